"""What a program does around its model: interrupts it, forks, seeds generators, passes what transformers takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessorList, PreTrainedModel

from swarm.client import SwarmModelForCausalLM
from swarm.model.source import resolve
from tests.swarm_e2e.nodes import Swarm, run_swarm

QUIET: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 2}
IDS = torch.tensor([[0, 659, 628, 306, 431, 1264], [2, 2, 0, 1264, 16, 431]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with run_swarm("demo", ("0:4", "4:8")) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: Swarm) -> Iterator[Any]:
    with SwarmModelForCausalLM.from_pretrained("demo", initial_peers=swarm.initial_peers) as model:
        yield model


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(resolve("demo").path)


class CtrlC:
    """A logits processor that has the main thread interrupted some time after its ``call``-th call."""

    def __init__(self, call: int, seconds: float) -> None:
        self.left, self.seconds = call, seconds

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            main = threading.main_thread().ident
            assert main is not None
            threading.Timer(self.seconds, signal.pthread_kill, (main, signal.SIGINT)).start()
        return scores


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"guidance_scale": 1.5}], ids=str)
def test_a_session_goes_on_after_ctrl_c(model: Any, whole: Any, options: dict[str, Any]) -> None:
    given = {"attention_mask": MASK, **QUIET, **options}
    expected = whole.generate(IDS, max_new_tokens=8, **given).tolist()
    for turn in range(8):  # each time in another place
        with model.session(max_length=1000):
            ctrl_c: Any = LogitsProcessorList([CtrlC(1 + turn % 3, 0.0007 * turn)])  # type: ignore[list-item]
            with pytest.raises(KeyboardInterrupt):
                model.generate(IDS, max_new_tokens=900, logits_processor=ctrl_c, **given)
            assert model.generate(IDS, max_new_tokens=8, **given).tolist() == expected


def test_steps_by_hand_go_on_after_ctrl_c(model: Any, whole: Any) -> None:
    ids = torch.randint(3, 2000, (1, 900), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = whole(ids).logits
        for turn in range(4):
            with model.session(max_length=1000) as session:
                ctrl_c = CtrlC(1, 0.005 + 0.003 * turn)
                with pytest.raises(KeyboardInterrupt):
                    ctrl_c(ids, ids)
                    for at in range(0, 900, 3):
                        model(ids[:, at : at + 3], past_key_values=session.cache)
                rest = model(ids[:, session.position :], past_key_values=session.cache).logits
                torch.testing.assert_close(rest, expected[:, -rest.shape[1] :], atol=1e-3, rtol=1e-3)
                assert session.position == 900


def test_a_program_that_seeds_and_forks(swarm: Swarm) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.swarm_e2e.program", *swarm.initial_peers],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    refused = "UsageError: this process was forked from one that has used a swarm"
    used, called, own, session, closed = told.pop("child")
    assert [said[: len(refused)] for said in (used, called, own, *told.pop("after closing"))] == [refused] * 4
    assert [session, closed] == ["None", "None"]  # what ends it is no error, and does nothing to the parent's
    assert told == {
        "before the first model": ["LlamaForCausalLM"],
        "drawn by from_pretrained": False,
        "seeded as transformers": True,
        "drawn by use": False,
        "parent goes on": True,
    }


def test_arguments_as_transformers_takes_them(swarm: Swarm, whole: Any) -> None:
    path = Path(resolve("demo").path)
    with SwarmModelForCausalLM.from_pretrained(
        path, initial_peers=swarm.initial_peers[0], torch_dtype=torch.float32, device_map={"": "cpu"}
    ) as model:
        made = model.generate(IDS[:1], max_new_tokens=4, **QUIET)
        assert made.tolist() == whole.generate(IDS[:1], max_new_tokens=4, **QUIET).tolist()


def test_a_text_that_ends_with_the_models_last_position(model: Any, whole: Any) -> None:
    ids = torch.tensor([[0] + [659, 628, 306] * 677])  # 2032 of 2048
    expected = whole.generate(ids, max_new_tokens=16, **QUIET).tolist()
    assert model.generate(ids, max_new_tokens=16, prompt_lookup_num_tokens=10, **QUIET).tolist() == expected
