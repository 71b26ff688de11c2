"""The caller's mistakes are the caller's, large batches are divided, and what can't be had says why."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from swarm.client import SwarmModelForCausalLM
from swarm.errors import InputError, MissingBlocksError, SessionInUseError
from tests.models import tiny_model
from tests.swarm_e2e.nodes import Swarm, run_command, run_swarm

QUIET: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def path() -> Path:
    return tiny_model("llama-gqa", layers=2, positions=2048)


@pytest.fixture(scope="module")
def swarm(path: Path) -> Iterator[Swarm]:
    with run_swarm(path, ("0:1", "1:2"), "--cache-tokens", "8192") as swarm:
        yield swarm


@pytest.fixture(autouse=True)
def _nobody_is_banned(model: Any) -> Iterator[None]:
    yield
    view = model._connection._view
    assert all(view._bans.why(span.peer_id) is None for span in view._spans), "the nodes are healthy"


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(10, 250, (rows, columns), generator=torch.Generator().manual_seed(rows))


def test_a_forward_and_a_backward_of_more_tokens_than_a_message_takes(model: Any, whole: PreTrainedModel) -> None:
    ids = tokens(9, 1000)
    results = []
    for this in (model, whole):
        embeddings = whole.get_input_embeddings()(ids).detach().requires_grad_()
        logits = this(inputs_embeds=embeddings, use_cache=False).logits
        logits[..., :7].sum().backward()
        results.append((logits.detach(), embeddings.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_a_forward_of_more_rows_than_a_message_takes(model: Any, whole: PreTrainedModel) -> None:
    ids = tokens(300, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("rows", "way"),
    [
        (300, {"do_sample": False}),
        (300, {"do_sample": True}),
        (100, {"do_sample": False, "num_beams": 3}),
        (100, {"do_sample": True, "num_return_sequences": 3}),
    ],
)
def test_generate_with_more_rows_than_a_session_takes(
    model: Any, whole: PreTrainedModel, rows: int, way: dict[str, Any]
) -> None:
    ids, mask = tokens(rows, 5), torch.ones(rows, 5, dtype=torch.int64)
    mask[-1, :2] = 0
    results = []
    for this in (model, whole):
        set_seed(5)
        results.append(this.generate(ids, attention_mask=mask, **QUIET, **way))
    assert torch.equal(*results)


def test_a_session_of_many_rows_goes_back_and_on(model: Any, whole: PreTrainedModel) -> None:
    ids = tokens(300, 6)
    with model.session(max_length=16) as session:
        model.generate(ids, do_sample=False, **QUIET)
        other = torch.cat([ids[:, :4], ids[:, :3]], dim=1)
        assert torch.equal(
            model.generate(other, do_sample=False, **QUIET), whole.generate(other, do_sample=False, **QUIET)
        )
        assert len(session.route) == 2


def test_a_row_that_no_message_takes_is_refused_here(model: Any) -> None:
    with pytest.raises(InputError, match="a row of 9000 tokens is longer than the 8192"):
        model.blocks(torch.zeros(1, 9000, 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_the_callers_and_at_once(model: Any, whole: PreTrainedModel, value: float) -> None:
    good = model.get_input_embeddings()(tokens(1, 4)).detach()
    bad = good.clone()
    bad[0, 1] = value
    for wrong in (
        lambda: model(inputs_embeds=bad),
        lambda: model.generate(inputs_embeds=bad, **QUIET),
        lambda: model.blocks(bad.requires_grad_()),
        lambda: model.blocks(good.requires_grad_()).backward(bad.detach()),
    ):
        with pytest.raises(ValueError, match="not finite"):
            wrong()
    with model.session(max_length=16) as session:  # also in the middle of a session, which can be used on
        first = session.step(good[:, :2])
        with pytest.raises(ValueError, match="not finite"):
            session.step(bad.detach()[:, 1:2])
        torch.testing.assert_close(torch.cat([first, session.step(good[:, 2:])], dim=1), model.blocks(good))
    assert torch.equal(model.generate(tokens(1, 4), **QUIET), whole.generate(tokens(1, 4), **QUIET))


def test_a_session_is_for_one_thread_at_a_time(model: Any) -> None:
    session = model._connection.session(max_length=1024)
    hidden = torch.zeros(1, 1, 64)
    session.step(hidden)
    met: list[BaseException] = []
    together = threading.Barrier(2)

    def use() -> None:
        together.wait()
        try:
            for _ in range(200):
                session.step(hidden)
        except SessionInUseError as error:
            met.append(error)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(met) == 1, "the other one goes on"
    session.step(hidden)
    session.close()


def test_a_node_that_nobody_can_reach_is_named_with_its_address(path: Path) -> None:
    address = "/ip4/127.0.0.1/tcp/9"
    with run_swarm(path, ("0:1",)) as swarm:
        lost = swarm.add("1:2", "--announce", address)
        with (
            SwarmModelForCausalLM.from_pretrained(
                str(path), initial_peers=swarm.initial_peers, wait_timeout=1.0
            ) as model,
            pytest.raises(MissingBlocksError, match=rf"{lost.peer_id[-8:]} \(1:2\) .* unreachable at {address}"),
        ):
            model.generate(tokens(1, 3), **QUIET)
        for program in ("swarm", "swarm-node"):
            status = [program, "status", str(path), "--initial-peers", swarm.initial_peers[0]]
            text = run_command([*status, "--once"]).stdout
            assert "Every block is served" not in text
            assert "Nobody that can be reached serves blocks 1:2" in text
            assert f"unreachable at {address}" in " ".join(text.split())
        seen = json.loads(run_command([*status, "--json"]).stdout)
        assert seen["holes"] == [[1, 2]]
        assert [node["state"] for node in seen["nodes"]] == ["online", "lost"]


def test_a_clock_that_is_hours_off_is_named_as_the_cause(swarm: Swarm) -> None:
    code = f"""
import asyncio, time
right = time.time
time.time = lambda: right() + 7200
from swarm.network.peer import Peer, PeerOptions
asyncio.run(Peer.start(PeerOptions(initial_peers={swarm.initial_peers!r}, client=True)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ConnectError: can't join: the clock of this machine is 7200 s ahead of the swarm's" in done.stderr
