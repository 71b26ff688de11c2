"""Chunks along the hops of a route, without a network."""

from __future__ import annotations

import asyncio

import pytest
import torch

from swarm.client.routing.route import Leg
from swarm.client.routing.step_times import StepTimes
from swarm.client.session.pipeline import Chunk, Pipeline
from swarm.client.settings import ClientSettings
from swarm.errors import PeerLostError, RemoteError
from tests.client.routing.test_routing import span
from tests.client.session.fakes import FakeHop

INPUTS = torch.ones(1, 8, 1)


def make(*blocks: tuple[int, int]) -> list[FakeHop]:
    return [FakeHop(Leg(span(f"hop {start}", start, end), start, end)) for start, end in blocks]


def chunks(width: int) -> list[Chunk]:
    starts = range(0, INPUTS.shape[1], width)
    return [Chunk(at, INPUTS[:, at : at + width], None, len(starts) == 1, None) for at in starts]


def run(hops: list[FakeHop], parts: list[Chunk], *, alive: bool = True) -> torch.Tensor:
    """All parts through all hops, with the collecting of a session."""

    async def lives(hop: FakeHop) -> bool:
        hop.silent = hop.silent and not alive
        return alive

    async def through() -> torch.Tensor:
        pipeline: Pipeline[FakeHop] = Pipeline(ClientSettings(silence=0.05), lives, StepTimes())
        pipeline.hops = hops
        for hop in hops:
            hop.on_push_failed = lambda step_id, hop=hop: pipeline.push_failed(hop, step_id)  # type: ignore[misc]
        await pipeline.begin(parts)
        assert pipeline.columns == parts[0].hidden.shape[1]
        outputs = []
        for part in parts:
            hidden = part.hidden
            for index in range(len(hops)):
                await pipeline.send(index, part, hidden)
                hidden = await pipeline.wait(index, part, hidden)
            outputs.append(hidden)
        pipeline.end(parts)
        await pipeline.close()
        return torch.cat(outputs, dim=1)

    return asyncio.run(through())


EXPECTED = INPUTS.cumsum(dim=1).cumsum(dim=1).cumsum(dim=1)


@pytest.mark.parametrize("width", [8, 3])
def test_hops_pass_on_from_one_to_the_next(width: int) -> None:
    hops = make((0, 2), (2, 5), (5, 8))
    assert torch.equal(run(hops, chunks(width)), EXPECTED)
    assert all(len(hop.seen) == len(chunks(width)) for hop in hops)  # each step ran once
    assert {hop.ended for hop in hops} == {"closed"}


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("width", [8, 3])
def test_a_petals_server_gets_its_steps_from_here(which: int, width: int) -> None:
    hops = make((0, 2), (2, 5), (5, 8))
    hops[which].is_petals = True
    assert torch.equal(run(hops, chunks(width)), EXPECTED)


@pytest.mark.parametrize("width", [8, 3])
def test_what_could_not_be_pushed_is_sent_from_here(width: int) -> None:
    hops = make((0, 2), (2, 5), (5, 8))
    hops[0].loses_pushes = True
    assert torch.equal(run(hops, chunks(width)), EXPECTED)


def test_a_silent_hop_that_lives_is_sent_the_step_again() -> None:
    hops = make((0, 2), (2, 5), (5, 8))
    hops[1].silent = True
    assert torch.equal(run(hops, chunks(8)), EXPECTED)


def test_a_silent_hop_that_does_not_live_is_lost() -> None:
    hops = make((0, 2), (2, 5))
    hops[1].silent = True
    with pytest.raises(PeerLostError, match="does not answer"):
        run(hops, chunks(8), alive=False)


def test_an_answer_of_another_length_is_nonsense() -> None:
    hop = FakeHop(Leg(span("a", 0, 8), 0, 8), compute=lambda hidden, start, order: hidden[:, :1])
    with pytest.raises(RemoteError, match="answered for 1 tokens, not 8"):
        run([hop], chunks(8))
