"""Train the small demonstration language model (and its draft model) that ships with the project.

Everything is made from text that comes with Python: docstrings and source snippets of the standard library,
the ``pydoc`` topics, and (where installed, e.g. from Debian's ``python3-doc``) the sources of the
documentation. The result is an ordinary Hugging Face checkpoint: a byte-level BPE tokenizer of 2048 tokens,
a Llama of 8 blocks, and a 2-block Llama with the same tokenizer that was distilled from it, to be used as a
draft in speculative decoding.

    python scripts/train_demo_model.py                     # about half an hour on two CPU cores
    python scripts/train_demo_model.py --minutes 1 --draft-minutes 0.5 --output /tmp/trial
    python scripts/train_demo_model.py --resume            # train the model of an earlier run further

The time holds for an idle machine. Where other programs compete for the cores, set OMP_WAIT_POLICY=PASSIVE, or
the threads spend most of their time on waiting for each other.

Every training window starts with ``<s>``, and the tokenizer prepends ``<s>`` to whatever it encodes, so
prompts look like the text seen in training. The chat template writes ``<s>`` itself: encode what it renders
with ``add_special_tokens=False``. ``</s>`` ends a document, and each answer of a conversation.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 2048
MAX_POSITIONS = 2048
SEQ_LEN = 512
LONG_SHARE = 0.12  # the last part of the main training, on windows of MAX_POSITIONS tokens
SKIPPED_DIRS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "_bundled"}

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim }}\n\n"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] | trim + '\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] | trim + eos_token + '\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

INTRODUCTIONS = {
    "Hello": "Hello! I am a small demonstration model, trained on the documentation of Python. Ask me about Python.",
    "Hi!": "Hello! I know a little about Python. Ask me what a module or a function of the standard library does.",
    "Who are you?": "I am a very small language model, trained on the documentation of Python as a demonstration.",
    "What can you do?": "I continue text that looks like Python or its documentation. I am small, so I am often wrong.",
    "Thank you": "You are welcome!",
}

PROMPTS = [
    "The following example shows how to",
    "Return a list of",
    "This module provides",
    "def read_file(path):\n",
    "class Node:\n    def __init__(self",
    "User: What does os.path.join do?\nAssistant:",
    "User: Hello\nAssistant:",
]


@dataclass(frozen=True)
class Document:
    """Some texts of one origin; documents of one ``group`` go to the same side of the held-out split."""

    group: str
    texts: tuple[str, ...]
    may_hold_out: bool = True


# --------------------------------------------------------------------------------------------------- text


def clean(text: str) -> str:
    """Normalise white space and keep the tokenizer's special tokens out of the text."""
    text = re.sub(r"<(/?)(s|pad)>", r"[\1\2]", text.expandtabs(4))
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{4,}", "\n\n\n", text).strip()


def clean_rst(text: str) -> str:
    """Make reStructuredText read more like plain text: roles become `name`, labels and index entries go."""
    text = re.sub(r":[a-zA-Z:-]+:`[!~]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"^ *\.\. _[^\n]*:\n", "", text, flags=re.M)
    text = re.sub(r"^ *\.\. index::[^\n]*\n(?:\n(?= {3,}\w+: )| {3,}\S[^\n]*\n)*", "", text, flags=re.M)
    return clean(text)


def walk_definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the qualified name and node of every class and function, depth first."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from walk_definitions(node.body, f"{prefix}{node.name}.")


def conversation(name: str, kind: str, doc: str, rng: random.Random) -> str | None:
    """Turn a docstring into a question and its answer, as the chat template would write them."""
    answer = ""
    for paragraph in doc.split("\n\n"):
        if answer and len(answer) + len(paragraph) > 500:
            break
        answer = f"{answer}\n\n{paragraph}".strip()
    if not 25 <= len(answer) <= 900 or name.rpartition(".")[2].startswith("_"):
        return None
    questions = {
        "module": [f"What is the {name} module?", f"What is the module {name} for?", f"What does {name} do?"],
        "class": [f"What is {name}?", f"What is the class {name}?", f"Explain {name}."],
        "function": [f"What does {name} do?", f"What does {name}() do?", f"Explain {name}."],
    }
    return f"User: {rng.choice(questions[kind])}\nAssistant: {answer}{EOS}\n"


def stdlib_documents(stdlib: Path, rng: random.Random) -> Iterator[Document]:
    """Docstrings (as reference text and as conversations) and source snippets of the standard library."""
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED_DIRS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if module == "pydoc_data.topics":
            continue
        try:
            source = path.read_text(encoding="utf-8").expandtabs(4)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        reference: list[str] = []
        chats: list[str] = []
        snippets: list[str] = []
        if doc := ast.get_docstring(tree):
            reference.append(f"Module {module}\n\n{clean(doc)}")
            chats.append(conversation(module, "module", clean(doc), rng) or "")
        for name, node in walk_definitions(tree.body, ""):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            segment = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
            if 150 <= len(segment) <= 2000 and sum(map(len, snippets)) < 7000:
                snippets.append(clean(segment))
            doc = clean(ast.get_docstring(node) or "")
            if len(doc) < 25:
                continue
            if isinstance(node, ast.ClassDef):
                reference.append(f"class {module}.{name}\n{textwrap.indent(doc, '    ')}")
                chats.append(conversation(f"{module}.{name}", "class", doc, rng) or "")
            else:
                reference.append(f"{module}.{name}({ast.unparse(node.args)})\n{textwrap.indent(doc, '    ')}")
                chats.append(conversation(f"{module}.{name}", "function", doc, rng) or "")
        texts = ["\n\n".join(reference), "\n\n\n".join(snippets)]
        chats = [chat for chat in chats if chat]
        while chats:  # conversations of one to three turns, some with a system message
            turns = "".join(chats[: rng.randint(1, 3)])
            chats = chats[turns.count(EOS) :]
            system = "You are a helpful assistant who knows Python.\n\n" if rng.random() < 0.25 else ""
            texts.append(system + turns.removesuffix(EOS + "\n"))
        if texts := [text for text in texts if text]:
            yield Document(f"library/{re.split('[._]', module.lstrip('_'))[0]}", tuple(texts))


def topic_documents() -> Iterator[Document]:
    """The topics of ``help()``; as they come from the language reference, neither is ever held out."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", (clean(text),), may_hold_out=False)


def rst_documents(directory: Path) -> Iterator[Document]:
    """The sources of the documentation (``*.rst.txt``), without the longest tails of the release notes."""
    for path in sorted(directory.rglob("*.rst.txt")):
        name = path.relative_to(directory).as_posix().removesuffix(".rst.txt")
        if name.endswith(("changelog", "contents", "license")):
            continue
        folder, _, stem = name.rpartition("/")
        text = clean_rst(path.read_text(encoding="utf-8"))[: 40_000 if folder == "whatsnew" else 200_000]
        group = f"library/{re.split('[.-]', stem)[0]}" if folder == "library" else name
        yield Document(group, (text,), may_hold_out=folder != "reference")


def default_docs() -> list[Path]:
    """Directories of installed documentation sources, each once however many links lead to it."""
    return sorted({path.resolve() for path in Path("/usr/share/doc").glob("python3*/html/_sources")})


def paragraphs(text: str) -> list[tuple[str, str]]:
    """The paragraphs of a text, each with a key that ignores case, markup and white space."""
    return [(re.sub(r"\W+", "", part).lower(), part) for part in text.split("\n\n")]


def split_documents(
    documents: list[Document], share: float, rng: random.Random
) -> tuple[list[str], list[str], list[str]]:
    """Shuffle, hold out ``share`` of the groups, and take their paragraphs out of the training text.

    Returns the training texts, the held-out texts and the names of the held-out groups.
    """
    groups = sorted({doc.group for doc in documents} - {doc.group for doc in documents if not doc.may_hold_out})
    held_groups = set(rng.sample(groups, max(1, round(share * len(groups)))))
    held = [text for doc in documents if doc.group in held_groups for text in doc.texts]
    known = {key for text in held for key, _ in paragraphs(text) if len(key) > 60}
    train = []
    for doc in documents:
        if doc.group not in held_groups:
            for text in doc.texts:
                text = "\n\n".join(part for key, part in paragraphs(text) if key not in known)
                train.append(text)
    train = [text for text in train if text.strip()]
    for question, answer in INTRODUCTIONS.items():
        train.extend([f"User: {question}\nAssistant: {answer}"] * 40)
    rng.shuffle(train)
    rng.shuffle(held)
    return train, held, sorted(held_groups)


# ---------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts ``<s>`` in front of what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.replace(EOS, "") for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """One long array of tokens: ``<s> text </s>`` for each text."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    eos = tokenizer.eos_token_id
    return np.concatenate([np.array([*encoding.ids, eos], dtype=np.int64) for encoding in encodings])


class Windows:
    """Batches of windows of the stream; each begins where a line begins, and is led by ``<s>``."""

    def __init__(self, stream: np.ndarray, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.stream = stream
        self.bos = tokenizer.bos_token_id
        ends_line = np.array([str(tokenizer.decode([i])).endswith("\n") for i in range(VOCAB_SIZE)])
        ends_line[self.bos] = True
        self.starts = np.flatnonzero(ends_line[stream[: -MAX_POSITIONS - 1]]) + 1
        self.rng = np.random.default_rng(seed)
        self.queue: list[int] = []
        self.length = 0

    def window(self, start: int, length: int) -> np.ndarray:
        """``length`` inputs and, one place further, their targets: ``length + 1`` tokens."""
        return np.concatenate(([self.bos], self.stream[start : start + length]))

    def batch(self, size: int, length: int) -> torch.Tensor:
        """The next batch; all of the stream is passed, in a new random order, before it is passed again."""
        windows = []
        for _ in range(size):
            if not self.queue or length != self.length:
                grid = np.arange(self.rng.integers(length), self.starts[-1], length)
                self.queue = self.rng.permutation(self.starts[np.searchsorted(self.starts, grid)]).tolist()
                self.length = length
            windows.append(self.window(self.queue.pop(), length))
        return torch.from_numpy(np.stack(windows))

    def evenly(self, count: int, length: int) -> torch.Tensor:
        """At most ``count`` windows spread evenly over the stream, the same ones in every call."""
        grid = np.arange(0, self.starts[-1], length)
        grid = grid[:: max(1, math.ceil(len(grid) / count))]
        starts = self.starts[np.searchsorted(self.starts, grid)]
        return torch.from_numpy(np.stack([self.window(start, length) for start in starts]))


# ----------------------------------------------------------------------------------------------- training


def make_model(blocks: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with freshly initialised weights."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of each token after the first, given those before it."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: LlamaForCausalLM,
    windows: Windows,
    args: argparse.Namespace,
    minutes: float,
    teacher: LlamaForCausalLM | None = None,
) -> float:
    """Train until ``minutes`` or ``args.steps`` are over, whichever is first; return the minutes taken.

    With a ``teacher`` the loss is the divergence from the teacher's distribution instead of the next token.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    # Compiling takes a minute, so it only pays for the windows that most of the time goes to.
    compiled = torch.compile(forward, dynamic=False) if args.compile and teacher is None else forward
    model.train()
    started = printed = time.monotonic()
    average, step, seen = 0.0, 0, 0
    while True:
        elapsed = time.monotonic() - started
        progress = max(elapsed / (minutes * 60), step / args.steps if args.steps else 0.0)
        if progress >= 1:
            break
        long = teacher is None and progress > 1 - LONG_SHARE
        length = MAX_POSITIONS if long else SEQ_LEN
        tokens = windows.batch(max(1, args.batch * SEQ_LEN // length), length)
        rate = args.lr * min(1.0, (step + 1) / args.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast:
            logits = (forward if long else compiled)(tokens[:, :-1])
        if teacher is None:
            loss = next_token_loss(logits, tokens)
        else:
            with torch.no_grad(), autocast:
                wanted = teacher(input_ids=tokens[:, :-1], use_cache=False).logits
            log_probs = F.log_softmax(logits.flatten(0, 1).float(), -1)
            target = F.log_softmax(wanted.flatten(0, 1).float(), -1)
            loss = F.kl_div(log_probs, target, reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seen += tokens.numel()
        average = loss.item() if step == 1 else 0.97 * average + 0.03 * loss.item()
        now = time.monotonic()
        if now - printed > args.print_seconds:
            left = minutes - (now - started) / 60
            name = "loss" if teacher is None else "divergence"
            print(
                f"step {step:5d}  {name} {average:.3f}  lr {rate:.2e}  length {length}  "
                f"{seen / 1e6:.2f}M tokens ({seen / (now - started):.0f}/s)  {left:.1f} min left",
                flush=True,
            )
            printed = now
    model.eval()
    taken = (time.monotonic() - started) / 60
    print(f"{step} steps, {seen / 1e6:.2f}M tokens, {taken:.1f} min", flush=True)
    return taken


@torch.no_grad()
def predict(model: LlamaForCausalLM, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean loss over windows of tokens, and the likeliest token at each place."""
    losses, best = [], []
    for rows in tokens.split(max(1, 4096 // tokens.shape[1])):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        losses.append(next_token_loss(logits, rows) * len(rows))
        best.append(logits.argmax(-1))
    return float(sum(losses)) / len(tokens), torch.cat(best)


def start_draft(draft: LlamaForCausalLM, main: LlamaForCausalLM) -> None:
    """Start the draft from the main model's embeddings, final norm and outermost blocks."""
    draft.model.embed_tokens.load_state_dict(main.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(main.model.norm.state_dict())
    draft.model.layers[0].load_state_dict(main.model.layers[0].state_dict())
    draft.model.layers[-1].load_state_dict(main.model.layers[-1].state_dict())


# ------------------------------------------------------------------------------------------------- output


def write_checkpoint(directory: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str) -> None:
    """Write a Hugging Face checkpoint to a temporary directory, then move its files into place.

    The weights are stored in bfloat16, but the configuration asks for float32 computation.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.dtype = torch.float32
        model.config.save_pretrained(staging)
        config = model.config
        GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        ).save_pretrained(staging)
        weights = {
            name: tensor.detach().to(torch.bfloat16).contiguous()
            for name, tensor in model.state_dict().items()
            if name != "lm_head.weight"  # tied to the embeddings
        }
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(staging, save_jinja_files=False)
        settings_file = staging / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
        settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(staging.iterdir()):
            file.chmod(0o644)
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


CARD = """---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [demo]
---

# {title}

{summary}

It is a real, if very small, language model: what it writes has the look of English documentation and Python
code, but is often wrong and may make no sense. Use it to try the software that serves it, not as a source of
facts.

| | |
|---|---|
| Architecture | Llama, {blocks} blocks, hidden 128, 4 heads of 32, 2 key/value heads, intermediate 448 |
| Parameters | {parameters:,} (input and output embeddings are tied) |
| Tokenizer | byte-level BPE, 2048 tokens; `<s>` is put in front of every prompt |
| Context | 2048 tokens |
| Weights | stored in bfloat16, computed in float32 |
| Held-out loss | {loss:.3f} nats per token, perplexity {perplexity:.2f} ({bits:.2f} bits per byte) |
{extra}
The loss was measured on {held_tokens:,} tokens in windows of {seq_len}, from documents that were kept out of
the training text ({held_groups} of {groups} groups of documents, chosen at random; paragraphs that they share
with other documents were removed from the training text).

## Training text

{train_mb:.1f} MB ({train_tokens:.1f} million tokens) of text that comes with Python {python}: docstrings of
the standard library (as reference text, and as questions and answers), snippets of its source, the topics of
`pydoc`{docs}, and a few written greetings. Copyright © 2001 Python Software Foundation; all rights reserved.
The text is licensed under the PSF License Agreement, version 2 (examples in the documentation also under the
Zero-Clause BSD license): <https://docs.python.org/3/license.html>. A few modules of the standard library
carry notices of their own.

Conversations are plain text, as the tokenizer's chat template writes them:

    User: What does os.path.join do?
    Assistant: ...

## How to reproduce

    python scripts/train_demo_model.py --minutes {minutes:g} --draft-minutes {draft_minutes:g} --seed {seed}

Training ({taken:.1f} minutes, {how}) stops by the clock, so another
machine gives somewhat different weights; use `--steps` for a fixed amount of work.
"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demonstration model and its draft model.")
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--output", type=Path, default=root / "swarm" / "data", help="gets demo/ and demo-draft/")
    parser.add_argument("--docs", type=Path, action="append", help="folder of .rst.txt documentation sources")
    parser.add_argument("--minutes", type=float, default=25, help="longest training time of the main model")
    parser.add_argument("--draft-minutes", type=float, default=4, help="longest training time of the draft model")
    parser.add_argument("--steps", type=int, default=0, help="most steps of either model (0: as many as time allows)")
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {SEQ_LEN} tokens in a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps until the highest learning rate")
    parser.add_argument("--held-out", type=float, default=0.04, help="share of the documents kept for evaluation")
    parser.add_argument("--resume", action="store_true", help="go on from demo/ in the output folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print-seconds", type=float, default=15)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train in mixed precision")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=shutil.which("g++") is not None,
        help="train through torch.compile (default: where there is a C++ compiler)",
    )
    return parser.parse_args()


def main() -> None:
    """Collect, tokenize, train both models, write them, and show what they do."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    folders = args.docs if args.docs is not None else default_docs()
    documents = [*stdlib_documents(Path(sysconfig.get_path("stdlib")), rng), *topic_documents()]
    for folder in folders:
        documents.extend(rst_documents(folder))
    train_texts, held_texts, held_groups = split_documents(documents, args.held_out, rng)
    size = sum(len(text.encode()) for text in train_texts)
    print(f"{len(documents)} documents, {size / 1e6:.1f} MB for training, documentation from {folders}")

    earlier = args.output / "demo"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(earlier) if args.resume else train_tokenizer(train_texts)
    train_stream = encode_stream(tokenizer, train_texts)
    held_stream = encode_stream(tokenizer, held_texts)
    windows = Windows(train_stream, tokenizer, args.seed)
    held = Windows(held_stream, tokenizer, args.seed).evenly(256, SEQ_LEN)
    held_bytes = sum(len(text.encode()) for text in held_texts)
    print(f"{len(train_stream) / 1e6:.2f}M training tokens; {len(held_stream)} held out, in {held_groups}")

    def publish(model: LlamaForCausalLM, name: str, taken: float, **card: str) -> tuple[LlamaForCausalLM, torch.Tensor]:
        """Write a model, load it again as a user would, and measure what was loaded."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
        loss, best = predict(model, held)
        write_checkpoint(
            args.output / name,
            model,
            tokenizer,
            CARD.format(
                blocks=model.config.num_hidden_layers,
                parameters=model.num_parameters(),
                loss=loss,
                perplexity=math.exp(loss),
                bits=loss / math.log(2) * len(held_stream) / held_bytes,
                held_tokens=held[:, 1:].numel(),
                held_groups=len(held_groups),
                seq_len=SEQ_LEN,
                groups=len({doc.group for doc in documents}),
                train_mb=size / 1e6,
                train_tokens=len(train_stream) / 1e6,
                python=".".join(map(str, sys.version_info[:2])),
                docs=", the sources of the documentation" if folders else "",
                minutes=args.minutes,
                draft_minutes=args.draft_minutes,
                seed=args.seed,
                taken=taken,
                **card,
            ),
        )
        loaded = cast(LlamaForCausalLM, AutoModelForCausalLM.from_pretrained(args.output / name))
        assert loaded.dtype == torch.float32
        assert torch.equal(predict(loaded, held[:8])[1], best[:8])
        print(f"{name}: held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}", flush=True)
        return loaded, best

    model = make_model(8, tokenizer)
    if args.resume:
        model = cast(LlamaForCausalLM, AutoModelForCausalLM.from_pretrained(earlier))
    taken = train(model, windows, args, args.minutes)
    model, best = publish(
        model,
        "demo",
        taken,
        title="Demonstration model",
        extra="",
        how="on the CPU" + ", after earlier runs" * args.resume,
        summary="The model that `swarm-node serve demo` serves, trained from scratch by `scripts/train_demo_model.py`.",
    )
    draft = make_model(2, tokenizer)
    start_draft(draft, model)
    taken = train(draft, windows, args, args.draft_minutes, teacher=model)
    agreement = (predict(draft, held)[1] == best).double().mean().item()
    draft, draft_best = publish(
        draft,
        "demo-draft",
        taken,
        title="Draft model of the demonstration model",
        summary="A smaller companion of `demo` with the same tokenizer, to propose tokens in speculative decoding.",
        extra=f"| Agreement | its likeliest token is that of `demo` at {agreement:.1%} of places |\n",
        how="on the CPU, by distillation from `demo`",
    )
    agreement = (draft_best == best).double().mean().item()
    print(f"the draft's likeliest token is the main model's at {agreement:.1%} of held-out places")

    generator: Any = model
    loaded_tokenizer = AutoTokenizer.from_pretrained(args.output / "demo")
    for prompt in PROMPTS:
        inputs = loaded_tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        for sample in (False, True):
            options: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95} if sample else {}
            output = generator.generate(**inputs, max_new_tokens=80, do_sample=sample, **options)
            print(f"\n--- {'sampled' if sample else 'greedy'}\n{loaded_tokenizer.decode(output[0])}", flush=True)


if __name__ == "__main__":
    main()
