"""What quantization costs in quality: a Markdown table.

    python scripts/quality.py           # about three minutes on two cores

Perplexity is of the built-in model, which is trained, on docstrings of installed packages (its training text is
Python's own standard library and documentation, and nothing of other packages). The larger models have random weights,
so they show how far the last hidden state is off, and how often the likeliest token is another one. Random weights are
hard on both: a trained model's likeliest token is seldom a near tie. Blocks are quantized by the code that nodes use.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from make_checkpoint import make_checkpoint, make_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.model.source import resolve
from swarm.node.engine.blocks.finish import finish_block
from swarm.node.engine.blocks.quantization import SCHEMES, find_scheme

PACKAGES = ("torch.nn.modules", "transformers.generation", "safetensors", "typer")
WINDOW = 512
LARGE = {"hidden": 1024, "layers": 8, "heads": 16, "kv_heads": 4, "vocab": 4000, "std": 0.03}


@dataclass(frozen=True)
class Quality:
    """Against the same model without quantization: ``error`` of the last hidden state, relative to its norm;
    ``agreement``, the share of places with the same likeliest token; ``loss`` in nats a token."""

    loss: float
    error: float
    agreement: float


def docstrings() -> Iterator[str]:
    """All docstrings of :data:`PACKAGES`."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for path in sorted(Path(folder).glob("*.py")):
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                        yield ast.get_docstring(node) or ""


@torch.inference_mode()
def run(path: Path, name: str, windows: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """The final hidden states of each window ``[T, H]``, and the loss."""
    model = load(path, name)
    states, losses = [], []
    for ids in windows.split(4):
        hidden = model.base_model(ids).last_hidden_state
        logits = model.lm_head(hidden).float()
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item())
        states.append(hidden)
    return states, sum(losses) / len(losses)


def load(path: Path, name: str) -> Any:
    """A whole model in bfloat16 whose blocks are as a node has them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval().requires_grad_(False)
    scheme = None if name == "none" else find_scheme(name, torch.device("cpu"), torch.bfloat16)
    for block in model.model.layers:
        finish_block(block, scheme)
    return model


def compare(path: Path, windows: torch.Tensor) -> dict[str, Quality]:
    """The quality of every scheme."""
    head = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).lm_head
    exact, loss = run(path, "none", windows)
    found = {"none": Quality(loss, 0.0, 1.0)}
    for name in SCHEMES:
        states, loss = run(path, name, windows)
        pairs = list(zip(states, exact, strict=True))
        with torch.inference_mode():
            same = [(head(mine).argmax(-1) == head(theirs).argmax(-1)).float().mean() for mine, theirs in pairs]
        off = sum((mine.float() - theirs.float()).square().sum() for mine, theirs in pairs)
        size = sum(theirs.float().square().sum() for theirs in exact)
        found[name] = Quality(loss, math.sqrt(off / size), float(sum(same)) / len(same))
    return found


def main(windows: Annotated[int, typer.Option(help="Windows of 512 tokens for the perplexity.")] = 64) -> None:
    """Print the table."""
    demo = resolve("demo").path
    text = "\n\n".join(doc for doc in docstrings() if len(doc) > 100)
    ids = AutoTokenizer.from_pretrained(demo)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    count = min(windows, len(ids) // WINDOW)
    spread = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    spread = spread[torch.linspace(0, len(spread) - 1, count).long()]
    with tempfile.TemporaryDirectory(prefix="swarm-quality-") as folder:
        rows = {f"demo, {spread.numel():,} tokens": compare(demo, spread)}
        for like, intermediate in (("llama-gqa", 2816), ("mixtral", 1408)):
            config = make_config(like, dtype="bfloat16", intermediate=intermediate, **LARGE)
            path = make_checkpoint(Path(folder) / like, config)
            random = torch.randint(10, 4000, (4, 128), generator=torch.Generator().manual_seed(0))
            rows[f"random {like}, hidden 1024, 8 blocks"] = compare(path, random)
    print("| model | quantization | perplexity | error of the last hidden state | same likeliest token |")
    print("| --- | --- | --- | --- | --- |")
    for model, found in rows.items():
        for name, quality in found.items():
            perplexity = f"{math.exp(quality.loss):.2f}" if model.startswith("demo") else ""
            print(f"| {model} | {name} | {perplexity} | {quality.error:.1%} | {quality.agreement:.1%} |")


if __name__ == "__main__":
    typer.run(main)
