"""A node that is told to stop hands what sessions have in its cache over to the nodes that go on with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from swarm.client import SwarmModelForCausalLM
from tests.swarm_e2e.nodes import Node, Swarm, Zygote, run_swarm
from tests.swarm_e2e.test_failover import IDS, at_token, generate, peers_of

LONG = torch.randint(10, 250, (1, 700), generator=torch.Generator().manual_seed(5))
PADDED = torch.cat([torch.zeros(1, 4, dtype=torch.int64), IDS[:, 4:]], dim=1)
ROWS = torch.cat([IDS, PADDED])
MASK = torch.ones_like(ROWS).masked_fill(ROWS == 0, 0)
WAYS: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "greedy": (LONG, {"do_sample": False}),
    "beams": (IDS, {"do_sample": False, "num_beams": 3}),
    "rows with left padding": (ROWS, {"do_sample": False, "attention_mask": MASK}),
}
AT = 8
"""The token at which the node is told to stop."""


@pytest.fixture(scope="module")
def started(path: Path) -> Iterator[Swarm]:
    """The second half is served twice."""
    with run_swarm(path, ("0:3", "3:6", "3:6"), metrics=True) as swarm:
        yield swarm


@pytest.fixture
def swarm(started: Swarm) -> Swarm:
    return started.revive()


def tokens(node: Node, phase: str) -> float:
    return node.figures[f'swarm_tokens_total{{phase="{phase}"}}']


def stop_in_generation(
    swarm: Swarm, path: Path, ids: torch.Tensor, options: dict[str, Any], **settings: Any
) -> tuple[torch.Tensor, Node, list[Node], dict[int, float]]:
    """Tells the second hop's node to stop in mid-generation. Returns the text, that node, those that took its place,
    and how many tokens each node had prefilled before."""
    with (
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=swarm.initial_peers, **settings) as model,
        model.session(max_length=1024) as session,
    ):
        left: list[Node] = []
        before: dict[int, float] = {}

        def stop() -> None:
            left.append(swarm.node_of(peers_of(session)[1]))
            before.update({node.pid: tokens(node, "prefill") for node in swarm.nodes if node.alive})
            left[0].terminate()

        result = generate(model, ids, stopping_criteria=[at_token(AT, stop)], session=session, **options)
        successors = [swarm.node_of(peer) for peer in peers_of(session)[1:]]
        assert left[0] not in successors
    return result, left[0], successors, before


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_computed_twice(swarm: Swarm, path: Path, whole: PreTrainedModel, way: str) -> None:
    ids, options = WAYS[way]
    expected = generate(whole, ids, **options)
    handed_over = {node.pid: tokens(node, "handed_over") for node in swarm.nodes}
    result, left, successors, before = stop_in_generation(swarm, path, ids, options)
    assert torch.equal(result, expected)
    assert Zygote.wait(left.pid) == 0
    assert left.events()[-1]["event"] == "stopped"
    for node in successors:
        assert tokens(node, "prefill") == before[node.pid]
        assert tokens(node, "handed_over") - handed_over[node.pid] >= ids.numel() - 4


def test_to_two_nodes_that_have_a_part_of_the_blocks_each(path: Path, whole: PreTrainedModel) -> None:
    expected = generate(whole, LONG, do_sample=False)
    with run_swarm(path, ("0:3", "3:6", "3:5", "5:6"), metrics=True) as swarm:
        result, left, successors, before = stop_in_generation(swarm, path, LONG, {"do_sample": False})
        assert torch.equal(result, expected)
        assert Zygote.wait(left.pid) == 0
        assert len(successors) == 2
        for node in successors:
            assert tokens(node, "prefill") == before[node.pid]
            assert tokens(node, "handed_over") >= LONG.numel()


def test_without_time_for_it_all_is_computed_again(swarm: Swarm, path: Path, whole: PreTrainedModel) -> None:
    expected = generate(whole, LONG, do_sample=False)
    result, left, successors, before = stop_in_generation(
        swarm, path, LONG, {"do_sample": False}, handover_timeout=1e-6
    )
    assert torch.equal(result, expected)
    assert Zygote.wait(left.pid) == 0
    assert all(tokens(node, "prefill") - before[node.pid] >= LONG.numel() for node in successors)
