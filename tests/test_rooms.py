"""Nodes and clients never import each other, and what both speak imports neither."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"swarm": ("swarm.node", "swarm.client"), "node": ("swarm.client",), "client": ("swarm.node",)}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_keep_to_themselves(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        wrong = [name for name in imported(file) if name.startswith(FORBIDDEN[room])]
        assert not wrong, f"{file} imports {wrong}"
