#!/usr/bin/env python3
"""Write docs/models.md from the table that the tests of families run over.

python scripts/make_models_doc.py          # after a change of swarm/model/family_check/table.py
python scripts/make_models_doc.py --check  # exit code 1 if the page is not what the table says
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT))

from swarm.model.families import REFUSED, family_of  # noqa: E402
from swarm.model.families.base import Family  # noqa: E402
from swarm.model.family_check.table import CASES  # noqa: E402
from tests.families.over_nodes import OVER_NODES  # noqa: E402
from tests.families.test_multimodal import OPTIONS as MULTIMODAL  # noqa: E402
from tests.families.test_refused import REFUSED as TRIED  # noqa: E402

HEAD = """\
# Models

<!-- Made by scripts/make_models_doc.py from swarm/model/family_check/table.py: change that, not this. -->

Every row is tested with a tiny model of the true architecture and random weights, against transformers on the whole
model: logits of whole sequences (`forward`), greedy text and beam search over three uneven spans with prompts prefilled
in pieces, and sessions of different lengths in one batch. Rows with "nodes" are also tested over real processes.
*Adapter* says which file of `swarm/families/` knows the family; the others need none. Types that aren't listed may well
work: a node tries a block without weights first, and refuses by name what it can't serve.

| family | `model_type` | beyond a plain Llama | adapter | tested |
| --- | --- | --- | --- | --- |
"""

TAIL = """
Of checkpoints with images ({multimodal}) the text part is served.

## What differs
* transformers before 5.21 leaves the caps of Gemma 2 out of its usual attention; here they are computed with any
  version, as in transformers with `attn_implementation="eager"`.
* Layers with a state (gated DeltaNet, Mamba 2) keep one for each row, of a fixed size, beside the KV cache. It can't be
  cut back: a client that goes back in a session plays the session in again, and transformers itself refuses assisted
  generation with these models. A node keeps the states of at most 64 rows.
* Blocks that use the keys and values of others, and those others, are one piece: a node serves all of them or none. In
  Gemma 3n, as transformers has it, that is the second half of the model.
* What a block of Gemma 3n or 4 is given of a token beside hidden states goes along from node to node. With the sizes
  that are transformers' defaults, all together is 8 times the hidden size in Gemma 3n and 4 times in Gemma 4.
* Rotary frequencies that hang on a sequence's length (`longrope`, `dynamic`) are computed row by row, from the row's
  tokens so far. transformers looks at the whole prompt: a prompt longer than the original length of the model that is
  prefilled in pieces can give other text.

## Quantized checkpoints
A node says at its start what it makes of one; kernels are tried on a small matrix first. On a CPU:

* In memory as small as they are, with a kernel, and exact: 4 bits of GPTQ (act-order too), AWQ ("gemm") and
  compressed-tensors (`pack-quantized`) in groups of a multiple of 32 inputs, or with a scale a row; 8 bits of
  bitsandbytes, compressed-tensors and symmetric GPTQ with a scale a row.
* The same, with scales rounded to bfloat16, as the package bitsandbytes does: its NF4 and FP4, on processors with
  AVX-512 BF16 and for nodes in bfloat16.
* Exact, without a kernel: FP8, MXFP4 (gpt-oss), and compressed-tensors' `nvfp4`, `mxfp4`, `mxfp8` and 8-bit groups.
  They are dequantized block by block when loaded; or each time they are used, which takes the least memory and is
  slow, if the blocks asked for don't fit otherwise, or with `--quantization packed`.
* Dequantized block by block when loaded: GPTQ and compressed-tensors with other numbers of bits or scales, GGUF, layers
  that transformers splits or joins when it loads them, and everything with `--quantization none`.

Exact: the weights are to the last bit those that dequantizing gives, rounded once to the node's dtype.

## Refused
{refused}
* Models that bring their own code.

How a family is added: [adding-a-model.md](adding-a-model.md).
"""


def page() -> str:
    """The whole page."""
    rows = []
    for case in CASES:
        adapter = type(family_of(case.model_type))
        file = "" if adapter is Family else f"`{adapter.__module__.rpartition('.')[2]}.py`"
        tested = "nodes" if case.label in OVER_NODES else "engines"
        rows.append(f"| {case.family} | `{case.model_type}` | {case.quirks} | {file} | {tested} |")
    reasons = {name: reason for name, (_, reason) in TRIED.items()} | REFUSED
    refused = "\n".join(f"* `{name}`: {reason}." for name, reason in sorted(reasons.items()))
    names = ", ".join(f"`{name}`" for name in MULTIMODAL)
    return HEAD + "\n".join(rows) + "\n" + TAIL.format(refused=refused, multimodal=names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit(f"{PAGE.name} is out of date: run scripts/make_models_doc.py")


if __name__ == "__main__":
    main()
