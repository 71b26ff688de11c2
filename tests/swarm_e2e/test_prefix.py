"""Sessions that begin alike share what nodes have in their caches, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, set_seed

from swarm.client import SwarmModelForCausalLM
from tests.swarm_e2e.nodes import Swarm, run_swarm

QUIET: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.fixture(scope="module")
def swarm(path: Path) -> Iterator[Swarm]:
    with run_swarm(path, ("0:3", "3:6"), "--cache-tokens", "4096", metrics=True) as swarm:
        yield swarm


def client(swarm: Swarm, **settings: Any) -> Any:
    return SwarmModelForCausalLM.from_pretrained(swarm.model, initial_peers=swarm.initial_peers, **settings)


def reused(swarm: Swarm) -> list[int]:
    """How many tokens each node has taken from other sessions' caches so far."""
    return [int(node.figures['swarm_tokens_total{phase="reused"}']) for node in swarm.nodes]


def random_ids(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(10, 250, (rows, columns), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    set_seed(5)
    return model.generate(ids, **{**QUIET, **options})


@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_with_another_sessions_prefix(swarm: Swarm, whole: PreTrainedModel, way: str) -> None:
    shared = random_ids(1, 600, seed=1)  # more than one chunk
    with client(swarm) as model:
        generate(model, shared, do_sample=False)
        before = reused(swarm)
        for tail in (3, 40):
            ids = torch.cat([shared, random_ids(1, tail, seed=tail)], dim=1)
            assert torch.equal(generate(model, ids, **WAYS[way]), generate(whole, ids, **WAYS[way]))
        rows = WAYS[way].get("num_beams", 1)
        assert [b - a for a, b in zip(before, reused(swarm), strict=True)] == [2 * rows * 592] * 2


def test_a_batch_with_left_padding(swarm: Swarm, whole: PreTrainedModel) -> None:
    ids = torch.cat([random_ids(1, 100, seed=2).expand(3, -1), random_ids(3, 9, seed=3)], dim=1)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 21)):
        mask[row, :padding] = 0
        ids[row, padding : padding + 88] = ids[0, :88].clone()  # the same tokens in another column
    ids = ids.masked_fill(mask == 0, 0)
    with client(swarm) as model:
        generate(model, ids[:1], do_sample=False)
        before = reused(swarm)
        result = generate(model, ids, attention_mask=mask, do_sample=False)
        assert torch.equal(result, generate(whole, ids, attention_mask=mask, do_sample=False))
        assert all(b - a >= 3 * 59 for a, b in zip(before, reused(swarm), strict=True))


def test_logits_of_all_columns_are_computed_when_they_are_looked_at(swarm: Swarm, whole: PreTrainedModel) -> None:
    ids = random_ids(1, 64, seed=4)
    with client(swarm) as model, torch.no_grad():
        generate(model, ids, do_sample=False)
        with model.session(max_length=80) as session:
            logits = model(ids, past_key_values=session.cache).logits
        torch.testing.assert_close(logits, whole(ids).logits, atol=1e-4, rtol=1e-4)
        with model.session(max_length=80) as session:
            logits = model(ids, past_key_values=session.cache, logits_to_keep=5).logits
        torch.testing.assert_close(logits, whole(ids).logits[:, -5:], atol=1e-4, rtol=1e-4)


def test_the_answer_is_reused_with_the_next_question(swarm: Swarm, whole: PreTrainedModel) -> None:
    with client(swarm) as model:
        ids = generate(model, random_ids(1, 40, seed=6), max_new_tokens=60, do_sample=False)
        ids = torch.cat([ids, random_ids(1, 10, seed=7)], dim=1)
        before = reused(swarm)
        assert torch.equal(generate(model, ids, do_sample=False), generate(whole, ids, do_sample=False))
        assert [b - a for a, b in zip(before, reused(swarm), strict=True)] == [96, 96]  # 99 were computed


@pytest.mark.parametrize(
    ("one", "other", "shares"),
    [
        ({}, {}, False),
        ({"prefix_salt": "ours"}, {"prefix_salt": "ours"}, True),
        ({"prefix_salt": "ours"}, {"prefix_salt": "theirs"}, False),
        ({"prefix_reuse": "shared"}, {"prefix_reuse": "shared"}, True),
        ({"prefix_reuse": "shared"}, {}, False),
        ({"prefix_reuse": "off"}, {"prefix_reuse": "off"}, False),
    ],
)
def test_who_shares_with_whom(swarm: Swarm, one: dict[str, Any], other: dict[str, Any], shares: bool) -> None:
    ids = random_ids(1, 50, seed=int.from_bytes(str((one, other)).encode()) % 2**31)
    with client(swarm, **one) as model:
        first = generate(model, ids, do_sample=False)
    before = reused(swarm)
    with client(swarm, **other) as model:
        assert torch.equal(generate(model, ids, do_sample=False), first)
    assert [b - a for a, b in zip(before, reused(swarm), strict=True)] == [48 * shares] * 2


@pytest.fixture(scope="module")
def doubled(path: Path) -> Iterator[Swarm]:
    with run_swarm(path, ("0:3", "3:6", "0:3", "3:6")) as swarm:
        yield swarm


@pytest.mark.parametrize(("way", "index"), [("beams", 1), ("greedy", 0)])
def test_a_hop_dies_after_its_session_began_with_anothers_cache(
    doubled: Swarm, whole: PreTrainedModel, way: str, index: int
) -> None:
    ids = random_ids(1, 100, seed=8)
    expected = generate(whole, ids, max_new_tokens=24, **WAYS[way])
    nodes = doubled.revive().nodes
    peers = [node.wait_ready()["maddrs"][0] for node in nodes]
    with SwarmModelForCausalLM.from_pretrained(doubled.model, initial_peers=peers) as model:
        while True:  # until a session comes to where another one has been
            with model.session(max_length=160) as session:
                calls = 0

                def die(ids: torch.Tensor, scores: Any, session: Any = session, **kwargs: Any) -> torch.Tensor:
                    nonlocal calls
                    calls += 1
                    if calls == 10 and session.route[1].history.missing:
                        doubled.node_of(session.route[index].peer_id).kill()
                    return torch.zeros(ids.shape[0], dtype=torch.bool)

                result = generate(model, ids, max_new_tokens=24, stopping_criteria=[die], **WAYS[way])
                assert torch.equal(result, expected)
                if not all(node.alive for node in nodes):
                    break
