"""What is in deploy/, by linters: no container engine or init system runs in tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def check(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile() -> None:
    check(BIN / "hadolint", DEPLOY / "Dockerfile")


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose(name: str) -> None:
    check(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / name)


@pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units(unit: Path, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    assert analyze is not None, "install systemd-analyze: on Debian and Ubuntu, apt install systemd"
    # it wants programs to be there
    text, programs = re.subn(
        r"(?<=^ExecStart=)/opt/swarm/bin/\S+", shutil.which("true") or "", unit.read_text(), flags=re.M
    )
    assert programs == 1
    copy = tmp_path / unit.name
    copy.write_text(text)
    check(analyze, "verify", "--man=no", copy)


def test_commands_and_settings_exist() -> None:
    """Units, compose and the example name only subcommands and variables that the commands know."""
    known = set()
    for command in (["swarm-node", "serve"], ["swarm-node", "bootstrap"], ["swarm", "gateway", "serve"]):
        code = f"import sys; sys.argv = {[*command, '--help']!r}; "
        module = "swarm.node.cli" if command[0] == "swarm-node" else "swarm.client.cli"
        done = subprocess.run(
            [sys.executable, "-c", f"{code}from {module} import main; main()"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
        )
        known |= set(re.findall(r"\b(?:SWARM|HF)_[A-Z_]+", done.stdout))
    files = [*UNITS, DEPLOY / "compose.yaml", DEPLOY / "env.example", DEPLOY / "Dockerfile"]
    used = set(re.findall(r"\b(?:SWARM|HF)_[A-Z_]+", "\n".join(file.read_text() for file in files)))
    assert used - {"HF_HOME"} <= known
