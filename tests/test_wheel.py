"""A wheel in an environment of its own, away from the checkout: what people install."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
DATA = ("swarm/data", "client/gateway/pages")
LOOK = """
import json, swarm, swarm.client, swarm.node
print(json.dumps([module.__file__ for module in (swarm, swarm.client, swarm.node)]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy, as setuptools leaves things behind, and finds what was left behind before."""
    folder = tmp_path_factory.mktemp("wheel")
    leftovers = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, folder / "checkout", ignore=leftovers)
    # with the setuptools that is here, which needs no internet
    run([*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, folder / "checkout"])
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel; what it depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run([*PIP, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel])
    (site,) = folder.glob("lib/python*/site-packages")
    # Such lines don't make Python look for the .pth files of these folders, so this checkout isn't found by its own
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    return folder / "bin"


def run(command: list[str | Path], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_data_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in DATA:
        inside = folder if folder.startswith("swarm/") else f"swarm/{folder}"
        files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert files
        assert names >= {f"{inside}/{path}" for path in files}
    assert "swarm/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "client/", "node/", "scripts/"))]


def test_what_it_demands_is_what_it_is_tested_with(installed: Path) -> None:
    everything = "swarm-llm[gateway,gguf,quantization]"
    run([*PIP, "--python", installed / "python", "install", "--quiet", "--dry-run", "--no-index", everything])


def test_the_way_that_people_go(installed: Path, tmp_path: Path) -> None:
    where = json.loads(run([installed / "python", "-c", LOOK], cwd=tmp_path))
    assert all(Path(path).is_relative_to(installed.parent) for path in where), where
    said = run([sys.executable, ROOT / "scripts" / "try_install.py", installed], cwd=tmp_path)
    assert said.startswith("It works")
