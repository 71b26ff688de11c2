"""Only ``swarm/compat`` reaches into transformers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[3]
PRIVATE = {
    "_attn_implementation",
    "_get_dtype_plan",
    "_init_weights",
    "_non_persistent_buffers_set",
    "_prepare_cache_for_generation",
    "all_tied_weights_keys",
    "past_key_values",
    "cache_params",
    "layer_past",
    "original_inv_freq",
    "original_max_seq_len",
}
"""Names in transformers (and torch's modules) that only that package may use: attributes, keywords and functions."""
ALLOWED = {"swarm/model/families/bloom.py": {"layer_past"}, "swarm/model/families/falcon.py": {"layer_past"}}
"""Those two families compute attention themselves, and their adapters take the place of just that module."""


def files() -> list[Path]:
    return [
        file
        for room in ("swarm", "node", "client")
        for file in (ROOT / room).rglob("*.py")
        if "compat" not in file.parts
    ]


def used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword | ast.arg) and node.arg:
            yield node.arg
        elif isinstance(node, ast.FunctionDef):
            yield node.name


def test_others_import_only_names_at_the_top_of_transformers() -> None:
    public = set(dir(transformers))
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not [alias for alias in node.names if alias.name.startswith("transformers.")], file
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                assert node.module == "transformers", f"{file} imports from {node.module}"
                private = [alias.name for alias in node.names if alias.name not in public]
                assert not private, f"{file} imports {private}, which are not public"


def test_others_use_no_private_names() -> None:
    assert len(files()) > 100
    for file in files():
        name = file.relative_to(ROOT).as_posix()
        wrong = PRIVATE.intersection(used(ast.parse(file.read_text()))) - ALLOWED.get(name, set())
        assert not wrong, f"{name} uses {sorted(wrong)}: put it behind swarm/compat"
