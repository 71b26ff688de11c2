"""Nothing of ours draws from the generators that a program seeds for itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRAWING = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
FILLING = {"uniform_", "normal_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_"}
OWN = {"SystemRandom", "Random", "default_rng", "Generator"}
INITIALIZED = {"Linear", "Embedding", "Conv1d", "Conv2d"}


def _drawing(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that draw from, or seed, a generator that isn't named."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, of = node.func.attr, ast.unparse(node.func.value)
        keywords = {keyword.arg for keyword in node.keywords}
        drawn = (of == "torch" and name in DRAWING) or name in FILLING
        elsewhere = "generator" in keywords
        global_module = of in ("random", "np.random", "numpy.random") and name not in OWN
        seeding = of in ("torch", "torch.random", "torch.cuda") and name in ("manual_seed", "seed", "set_rng_state")
        layer = of in ("nn", "torch.nn") and name in INITIALIZED and "meta" not in ast.unparse(node)
        if (drawn and not elsewhere) or global_module or seeding or layer:
            yield node


def _imports_draws(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(tree):
        from_random = isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random")
        if from_random and any(alias.name not in OWN for alias in node.names):
            yield node


def test_no_call_of_ours_draws() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for room in ("client", "node", "swarm")
        for path in sorted((ROOT / room).rglob("*.py"))
        for tree in [ast.parse(path.read_text())]
        for node in (*_drawing(tree), *_imports_draws(tree))
    ]
    assert found == []
