"""In processes of their own: imports can't be taken back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

IMPORT = "from swarm.compat.late_imports import importing\nwith importing():\n    import {module}\nimport sys\n"
MODULES = ["swarm.node.hosting.server", "swarm.client.model.facade"]


def run(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_what_is_not_imported(module: str) -> None:
    assert run(IMPORT.format(module=module) + "print('scipy.special' in sys.modules)") == "False\n"


@pytest.mark.parametrize("module", MODULES)
def test_with_the_switch_all_is_imported_as_it_is(module: str) -> None:
    code = IMPORT.format(module=module) + "print('scipy.special' in sys.modules)"
    assert run(code, SWARM_LATE_IMPORTS="0") == "True\n"


def test_all_works_when_it_is_asked_for() -> None:
    code = """
import numpy, torch, hivemind
from hivemind.averaging.load_balancing import load_balance_peers
from transformers.loss.loss_for_object_detection import linear_sum_assignment
assert linear_sum_assignment(numpy.eye(2))[1].tolist() == [1, 0]
assert sum(load_balance_peers(100, [1.0, 2.0])) == 100
import scipy.optimize
assert scipy.optimize.linprog.__module__ == "scipy.optimize._linprog"
torch.compile(lambda x: x.sin(), backend="eager")(torch.ones(2))
"""
    run(IMPORT.format(module=MODULES[0]) + code)


def test_a_program_that_has_scipy_keeps_it() -> None:
    code = "import scipy.optimize as before\n" + IMPORT.format(module=MODULES[0])
    assert run(code + "print(sys.modules['scipy.optimize'] is before)") == "True\n"


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_node_serves(switch: str, tmp_path: Path) -> None:
    """With the switch off, too: then nothing is left of all this."""
    command = [Path(sys.executable).with_name("swarm-node"), "serve", "demo", "--blocks", "0:1", "--host", "127.0.0.1"]
    env = {**os.environ, "SWARM_LATE_IMPORTS": switch}
    with (
        (tmp_path / "stderr").open("w") as stderr,
        subprocess.Popen(
            [*command, "--log-format", "json"], stdout=subprocess.PIPE, stderr=stderr, text=True, env=env
        ) as node,
    ):
        assert node.stdout is not None
        events = []
        try:
            for line in node.stdout:
                events.append(json.loads(line)["event"])
                if events[-1] == "ready":
                    break
        finally:
            node.send_signal(signal.SIGINT)
            node.communicate(timeout=60)
    assert events[-1] == "ready", (tmp_path / "stderr").read_text()
    assert node.returncode == 0
