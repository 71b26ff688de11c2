"""Our client on Petals' servers, alone and in one chain with our nodes: the same text as transformers gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.proto import runtime_pb2
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from swarm.client import SwarmModelForCausalLM
from swarm.client.routing.route import Leg
from swarm.client.session.hop import Hop
from swarm.errors import MissingBlocksError, OutOfCacheError
from swarm.wire import rpc
from swarm.wire.codec import encode
from swarm.wire.dht_prefix import default_dht_prefix
from swarm.wire.records import span_uid
from swarm.wire.stream import MessageStream
from tests.petals.models import shared_model
from tests.petals.peers import Petals, Server, closing
from tests.swarm_e2e.nodes import Swarm, run_swarm

QUIET: dict[str, Any] = {"pad_token_id": 0}
FAMILIES = {"llama-gqa": "llama", "falcon-180b": "falcon", "bloom": "bloom"}


def prefix_of(path: Path) -> str:
    return default_dht_prefix(path.name, FAMILIES[path.name])


def prompts(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(10, 250, (rows, columns), generator=torch.Generator().manual_seed(rows * columns))


@dataclass
class Pair:
    """The model in the swarm, and whole."""

    swarm: Any
    whole: PreTrainedModel
    peers: list[str]

    def same(self, ids: torch.Tensor, **options: Any) -> None:
        """Both models generate the same."""
        results = []
        for model in (self.whole, self.swarm):
            set_seed(7)
            results.append(model.generate(ids, **{**QUIET, "do_sample": False, **options}))
        assert torch.equal(results[0], results[1])

    @property
    def route(self) -> list[str]:
        """The peers of the last text."""
        return [str(hop.peer_id) for hop in self.swarm.last_route]


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(shared_model("llama-gqa"))


@pytest.fixture(scope="module")
def pair(petals: Petals, whole: PreTrainedModel) -> Iterator[Pair]:
    path = shared_model("llama-gqa")
    first = petals.server(path, prefix_of(path), "0:3")
    last = petals.server(path, prefix_of(path), "3:6", [first.address])
    with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=[first.address], wait_timeout=2.0) as model:
        yield Pair(model, whole, [first.peer_id, last.peer_id])


@dataclass
class Mixed(Pair):
    """A chain of ours, Petals, ours."""

    nodes: Swarm
    server: Server


@pytest.fixture(scope="module", params=FAMILIES)
def mixed(request: pytest.FixtureRequest, petals: Petals) -> Iterator[Mixed]:
    path = shared_model(request.param)
    with run_swarm(path, ("0:2", "4:6")) as nodes:
        server = petals.server(path, prefix_of(path), "2:4", nodes.initial_peers)
        peers = [nodes.nodes[0].peer_id, server.peer_id, nodes.nodes[1].peer_id]
        with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=nodes.initial_peers) as model:
            yield Mixed(model, AutoModelForCausalLM.from_pretrained(path), peers, nodes, server)


def test_greedy(pair: Pair) -> None:
    pair.same(prompts(1, 9), max_new_tokens=16)
    assert pair.route == pair.peers


def test_batch(pair: Pair) -> None:
    pair.same(prompts(3, 7), max_new_tokens=10)


def test_seeded_sampling(pair: Pair) -> None:
    pair.same(prompts(2, 7), max_new_tokens=12, do_sample=True, temperature=0.9, top_p=0.95)


def test_beam_search(pair: Pair) -> None:
    pair.same(prompts(2, 8), max_new_tokens=12, num_beams=3)


def test_a_prompt_longer_than_a_chunk(pair: Pair) -> None:
    pair.same(prompts(1, 1100), max_new_tokens=3)


def test_logits_and_gradients(pair: Pair) -> None:
    ids = prompts(2, 600)
    results = []
    for model in (pair.whole, pair.swarm):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = model(inputs_embeds=embeddings).logits
        logits[..., :7].sum().backward()
        results.append((logits.detach(), embeddings.grad))
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, atol=2e-3, rtol=1e-3)


def test_left_padding_is_refused_with_the_reason(pair: Pair) -> None:
    ids, mask = prompts(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    with pytest.raises(MissingBlocksError, match="padding at their left"):
        pair.swarm.generate(ids, attention_mask=mask, max_new_tokens=2, **QUIET)


def test_columns_are_forgotten(pair: Pair) -> None:
    # Petals' servers can't; other text after a common beginning needs it
    ids, other = prompts(1, 12), prompts(1, 12)
    other[0, 8:] += 1
    expected = [pair.whole.generate(text, max_new_tokens=6, do_sample=False, **QUIET) for text in (ids, other)]
    with pair.swarm.session(max_length=32) as session:
        first = pair.swarm.generate(ids, session=session, max_new_tokens=6, do_sample=False, **QUIET)
        second = pair.swarm.generate(other, session=session, max_new_tokens=6, do_sample=False, **QUIET)
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])


def test_a_server_that_is_full_is_known_as_such(petals: Petals, whole: PreTrainedModel) -> None:
    path = shared_model("llama-gqa")
    server = petals.server(path, prefix_of(path), "0:6", (), "--attn_cache_tokens", "64")
    with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=[server.address], wait_timeout=1.0) as model:
        connection = model._connection
        (seen,) = connection._runtime.run(connection.overview("", None)).nodes
        assert seen.cache_tokens_left == 64
        session = model.session(max_length=48)  # not entered: what follows is to open one of its own
        model.generate(prompts(1, 4), session=session, max_new_tokens=2, **QUIET)
        with pytest.raises(OutOfCacheError):
            model.generate(prompts(1, 5), max_new_tokens=30, **QUIET)
        session.close()
        Pair(model, whole, []).same(prompts(1, 5), max_new_tokens=30)


def test_mixed_greedy(mixed: Mixed) -> None:
    mixed.same(prompts(1, 9), max_new_tokens=16)
    assert mixed.route == mixed.peers


def test_mixed_beam_search(mixed: Mixed) -> None:
    mixed.same(prompts(2, 8), max_new_tokens=10, num_beams=3)


def test_mixed_long_prompt(mixed: Mixed) -> None:
    mixed.same(prompts(1, 1100), max_new_tokens=4)


async def _leg(mixed: Mixed, start: int, end: int) -> Leg:
    (leg,) = await mixed.swarm._connection._view.route(start, end)
    return leg


async def _open(mixed: Mixed, start: int, end: int) -> Hop:
    view = mixed.swarm._connection._view
    return await Hop.open(
        view.peer.p2p,
        await _leg(mixed, start, end),
        view.prefix,
        rows=1,
        hidden_size=64,
        max_length=16,
        left_padding=(),
        max_bytes=2**20,
        timeout=10.0,
    )


def test_a_node_pushes_to_a_petals_server(mixed: Mixed) -> None:
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))

    async def run() -> torch.Tensor | None:
        ours, theirs = await _open(mixed, 0, 2), await _open(mixed, 2, 4)
        theirs.expect("step")
        await ours.send("step", 0, hidden, None, [theirs])
        output = await theirs.reply("step", 10.0)  # nobody else has sent it anything
        await ours.close()
        await theirs.close()
        return output

    output = mixed.swarm._connection._runtime.run(run())
    torch.testing.assert_close(output, mixed.swarm.blocks[0:4](hidden), atol=1e-4, rtol=1e-4)


def test_a_petals_server_pushes_to_a_node(mixed: Mixed) -> None:
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    view = mixed.swarm._connection._view

    async def run() -> torch.Tensor | None:
        ours, leg = await _open(mixed, 4, 6), await _leg(mixed, 2, 4)
        ours.expect("step")
        _, reader, writer = await view.peer.p2p.call_binary_stream_handler(leg.peer_id, rpc.handle_name(rpc.INFERENCE))
        stream = MessageStream(reader, writer, max_bytes=2**20)
        # it looks for the next servers in the message that opens a session, and nowhere else
        following = rpc.NextHop(ours.peer_id, ours.session_id, ours.start, ours.end)
        fields = {"session_id": "theirs", "max_length": 16, "step_id": "step", "next_servers": [following.to_tuple()]}
        tensors = [encode(hidden), encode(rpc.EMPTY), encode(rpc.EMPTY_INT64)]
        uid = span_uid(view.prefix, 2, 4)
        await stream.send(runtime_pb2.ExpertRequest(uid=uid, tensors=tensors, metadata=rpc.dump(fields)))
        output = await ours.reply("step", 10.0)
        stream.close()
        await ours.close()
        return output

    output = mixed.swarm._connection._runtime.run(run())
    torch.testing.assert_close(output, mixed.swarm.blocks[2:6](hidden), atol=1e-4, rtol=1e-4)


def test_petals_client_on_the_mixed_chain(mixed: Mixed, petals: Petals) -> None:
    path = Path(mixed.swarm.name_or_path)
    beams = {"max_new_tokens": 8, "num_beams": 3}
    with closing(petals.client(path, prefix_of(path), mixed.nodes.initial_peers)) as client:
        for ids, options in ((prompts(1, 9), {"max_new_tokens": 12}), (prompts(2, 6), beams)):
            expected = mixed.whole.generate(ids, do_sample=False, **options, **QUIET)
            result = client.ask("generate", ids=ids.tolist(), do_sample=False, **options, **QUIET)
            assert torch.equal(torch.tensor(result), expected)
        # From Petals' server on it gets nothing pushed: that looks for the next servers where its own client of 2.2.0
        # never names them, in the message that opens a session
        hidden = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(2))
        pushed = torch.tensor(client.ask("pushed", hidden=hidden.tolist(), columns=5))
    torch.testing.assert_close(pushed, mixed.swarm.blocks[0:4](hidden)[:, 5:], atol=1e-4, rtol=1e-4)
