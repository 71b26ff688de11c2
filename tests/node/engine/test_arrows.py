"""Inside the engine, imports go down only."""

from __future__ import annotations

from tests.test_rooms import MODULES, home_of, imports

ALLOWED = {
    "swarm.compute": {"swarm.compute", "swarm.errors"},
    "swarm.node.engine.cache": {"cache"},
    "swarm.node.engine.attention": {"cache", "attention"},
    "swarm.node.engine.blocks": {"cache", "attention", "blocks"},
}


def test_imports_go_down() -> None:
    for package, below in ALLOWED.items():
        room = "swarm." if package == "swarm.compute" else "swarm.node."
        allowed = tuple(name if "." in name else f"swarm.node.engine.{name}" for name in below)
        for name in (each for each in MODULES if each.startswith(f"{package}.")):
            homes = {home for _, found, _ in imports(name) if (home := home_of(found)) and home.startswith(room)}
            wrong = {home for home in homes if not home.startswith(allowed)}
            assert not wrong, f"{name} imports {wrong}"
