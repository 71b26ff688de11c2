"""Prints the lower bound of each dependency in pyproject.toml as a constraint: the oldest versions that it promises.

Tools that only tests need are left out; constraints.txt has those.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROMISED = ("dependencies", "gguf", "quantization", "gateway")
"""Lists in pyproject.toml. It is read line by line, as Python 3.10 has no parser of TOML."""


def lower_bounds(text: str) -> list[str]:
    """``["torch==2.9", …]`` of those lists, in their order.

    Raises:
        ValueError: a dependency has no lower bound, so nobody can say what is promised.
    """
    found = []
    for name in PROMISED:
        wanted = re.search(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
        if wanted is None:
            raise ValueError(f"pyproject.toml has no list {name!r}")
        for requirement in re.findall(r'"([^"]+)"', wanted[1]):
            bound = re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", requirement)
            if bound is None:
                raise ValueError(f"{requirement!r} in pyproject.toml has no lower bound")
            found.append(f"{bound[1]}=={bound[2]}")
    return found


if __name__ == "__main__":
    print("\n".join(lower_bounds((ROOT / "pyproject.toml").read_text())))
