"""An unmodified Petals client on our nodes: the same text and the same gradients as transformers on the whole model."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.wire.dht_prefix import default_dht_prefix
from tests.adapters import make_adapter, whole_with
from tests.petals.models import shared_model
from tests.petals.peers import Client, Petals, closing
from tests.swarm_e2e.nodes import Swarm, run_swarm

FAMILIES = {"llama-gqa": "llama", "falcon-180b": "falcon", "bloom": "bloom"}
QUIET: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@dataclass
class Case:
    """Our nodes, Petals clients of them, and the whole model."""

    swarm: Swarm
    petals: Petals
    name: str
    whole: Any
    client: Client

    def connect(self, **options: Any) -> AbstractContextManager[Client]:
        """Another client."""
        return connect(self.petals, self.swarm, self.name, **options)


def connect(petals: Petals, swarm: Swarm, name: str, **options: Any) -> AbstractContextManager[Client]:
    """A Petals client of these nodes."""
    path = shared_model(name)
    return closing(petals.client(path, default_dht_prefix(path.name, FAMILIES[name]), swarm.initial_peers, **options))


def generate(client: Client, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """The client's text."""
    return torch.tensor(client.ask("generate", ids=ids.tolist(), **QUIET, **options))


@functools.cache
def llama_adapter() -> Path:
    """A LoRA adapter of the Llama model."""
    return make_adapter(shared_model("llama-gqa"), "ada", r=4, target_modules=["q_proj", "v_proj", "down_proj"])


@contextmanager
def make_case(petals: Petals, name: str) -> Iterator[Case]:
    path = shared_model(name)
    options = ("--adapters", str(llama_adapter())) if name == "llama-gqa" else ()
    with run_swarm(path, ("0:3", "3:6"), *options) as swarm, connect(petals, swarm, name) as client:
        yield Case(swarm, petals, name, AutoModelForCausalLM.from_pretrained(path), client)


@pytest.fixture(scope="module")
def cases(petals: Petals) -> Iterator[Callable[[str], Case]]:
    """By the model's name, each made once."""
    with ExitStack() as stack:
        yield functools.cache(lambda name: stack.enter_context(make_case(petals, name)))


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture
def llama(cases: Callable[[str], Case]) -> Case:
    return cases("llama-gqa")


def prompts(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(10, 250, (rows, columns), generator=torch.Generator().manual_seed(rows * columns))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(layers: Any, whole: Any, hidden: torch.Tensor, deep: torch.Tensor | None = None) -> torch.Tensor:
    """``hidden`` through the Llama model's ``layers``, with prompts added before each, as Petals means them."""
    columns = hidden.shape[1]
    positions = torch.arange(columns)[None]
    mask = torch.full((columns, columns), float("-inf")).triu(1)[None, None]
    embeddings = whole.model.rotary_emb(hidden, positions)
    for index, layer in enumerate(layers):
        if deep is not None:
            added = torch.zeros_like(hidden)
            added[:, : deep.shape[1]] = deep[index]
            hidden = hidden + added
        hidden = layer(hidden, attention_mask=mask, position_embeddings=embeddings, position_ids=positions)
    return hidden


def test_greedy(case: Case) -> None:
    ids = prompts(1, 9)
    expected = case.whole.generate(ids, max_new_tokens=16, **QUIET)
    assert torch.equal(generate(case.client, ids, max_new_tokens=16), expected)


def test_active_adapter(llama: Case) -> None:
    whole = whole_with(shared_model("llama-gqa"), {"ada": llama_adapter()})
    ids, hidden, grad = prompts(1, 9), numbers(1, 9, 64).requires_grad_(), numbers(1, 9, 64, seed=1)
    base = whole.get_base_model()
    output = through(base.model.layers, base, hidden)
    output.backward(grad)
    with llama.connect(active_adapter="ada") as client:
        expected = whole.generate(input_ids=ids, max_new_tokens=16, **QUIET)
        assert torch.equal(generate(client, ids, max_new_tokens=16), expected)
        assert not torch.equal(generate(llama.client, ids, max_new_tokens=16), expected)
        order = {"hidden": hidden.tolist(), "grad": grad.tolist(), "first": 0, "last": 6}
        result = client.ask("forward_backward", **order)
    torch.testing.assert_close(torch.tensor(result["output"]), output.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(result["grad"]), hidden.grad, atol=1e-4, rtol=1e-4)


def test_batch(case: Case) -> None:
    ids = prompts(2, 7)
    expected = case.whole.generate(ids, max_new_tokens=12, **QUIET)
    assert torch.equal(generate(case.client, ids, max_new_tokens=12), expected)


def test_beam_search(case: Case) -> None:
    ids = prompts(2, 6)
    expected = case.whole.generate(ids, max_new_tokens=10, num_beams=3, **QUIET)
    assert torch.equal(generate(case.client, ids, max_new_tokens=10, num_beams=3), expected)


def test_a_session_stepped_by_hand(llama: Case) -> None:
    hidden = numbers(2, 12, 64)
    result = torch.tensor(llama.client.ask("session", hidden=hidden.tolist(), steps=[7, 1, 3, 1]))
    with torch.no_grad():
        torch.testing.assert_close(result, through(llama.whole.model.layers, llama.whole, hidden), atol=1e-4, rtol=1e-4)


def test_a_node_pushes_to_the_next(llama: Case) -> None:
    hidden = numbers(1, 9, 64)
    result = torch.tensor(llama.client.ask("pushed", hidden=hidden.tolist(), columns=5))
    with torch.no_grad():
        expected = through(llama.whole.model.layers, llama.whole, hidden)[:, 5:]
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("columns", "blocks"), [(11, (0, 6)), (5, (2, 5)), (1500, (0, 6))])
def test_forward_and_backward(llama: Case, columns: int, blocks: tuple[int, int]) -> None:
    # the longest goes by streams, in parts
    first, last = blocks
    hidden, grad = numbers(2, columns, 64), numbers(2, columns, 64, seed=1)
    order = {"hidden": hidden.tolist(), "grad": grad.tolist(), "first": first, "last": last}
    result = llama.client.ask("forward_backward", **order)
    hidden.requires_grad_(True)
    output = through(llama.whole.model.layers[first:last], llama.whole, hidden)
    output.backward(grad)
    torch.testing.assert_close(torch.tensor(result["output"]), output.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(result["grad"]), hidden.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_prompt_tuning(llama: Case, mode: str) -> None:
    length, layers, hidden_size = 4, 6, 64
    ids, labels = prompts(2, 8), prompts(2, 8).flip(1)
    shallow = numbers(length, hidden_size).requires_grad_(True)
    deep = numbers(length, layers * hidden_size, seed=1).requires_grad_(True) if mode == "deep_ptune" else None
    values = {"deep": deep.tolist()} if deep is not None else {}
    with llama.connect(tuning_mode=mode, pre_seq_len=length) as client:
        order = {"ids": ids.tolist(), "labels": labels.tolist(), "prompts": shallow.tolist(), **values}
        result = client.ask("tune", **order)

    embedded = torch.cat([shallow.expand(2, -1, -1), llama.whole.get_input_embeddings()(ids).detach()], dim=1)
    by_layer = deep.view(length, layers, hidden_size).transpose(0, 1) if deep is not None else None
    hidden = through(llama.whole.model.layers, llama.whole, embedded, by_layer)[:, length:]
    logits = llama.whole.lm_head(llama.whole.model.norm(hidden))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wanted = [shallow] if deep is None else [shallow, deep]
    gradients = torch.autograd.grad(loss, wanted)

    assert result["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, gradient in zip(("prompts", "deep"), gradients, strict=False):
        torch.testing.assert_close(torch.tensor(result[name]), gradient, atol=1e-4, rtol=1e-3)


def test_generating_with_deep_prompts(llama: Case) -> None:
    shallow, deep = numbers(3, 64), numbers(3, 6 * 64, seed=1)
    ids = prompts(2, 5)
    order = {"prompts": shallow.tolist(), "deep": deep.tolist()}
    with llama.connect(tuning_mode="deep_ptune", pre_seq_len=3) as client:
        client.ask("tune", ids=ids.tolist(), labels=ids.tolist(), **order)
        result = generate(client, ids, max_new_tokens=6)

    expected = ids
    with torch.no_grad():
        for _ in range(6):
            embedded = torch.cat([shallow.expand(2, -1, -1), llama.whole.get_input_embeddings()(expected)], dim=1)
            by_layer = deep.view(3, 6, 64).transpose(0, 1)
            hidden = through(llama.whole.model.layers, llama.whole, embedded, by_layer)
            logits = llama.whole.lm_head(llama.whole.model.norm(hidden[:, -1]))
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(result, expected)


def test_it_understands_how_much_cache_is_free(petals: Petals) -> None:
    """As in its own test_server_info; and it takes no node for full that isn't, nor the other way round."""
    with (
        run_swarm(shared_model("llama-gqa"), ("0:6",), "--cache-tokens", "1024") as swarm,
        connect(petals, swarm, "llama-gqa") as client,
    ):
        assert client.ask("room", tokens=[1, 1024, 1025]) == [[1, 1024]]
        before, one, both = client.ask("cache_available", sessions=[[2, 5, 100], [4, 5, 50]])
        assert before - one == 100 * 3
        assert one - both == 50 * 1
        deadline = time.monotonic() + 60
        while client.ask("cache_available", sessions=[]) != [before]:
            assert time.monotonic() < deadline, "the sessions are over, and their cache isn't free again"


def test_the_client_survives_nodes_that_are_killed(llama: Case) -> None:
    """A Petals client goes on with its next text, and in the middle of forward and backward.

    A text under way is lost with the node, whosever the nodes are: Petals 2.2 gives the server that takes over the
    history of the session with the step that failed already in it, and then finds it too long ("Broken input cache").
    """
    ids, hidden = prompts(1, 8), numbers(2, 5, 64)
    expected = llama.whole.generate(ids, max_new_tokens=12, **QUIET)
    # Nor does it ban a peer that can't be reached: it asks again until its next look at the swarm
    options = {"request_timeout": 5, "update_period": 1, "max_backoff": 0.5}
    with (
        run_swarm(shared_model("llama-gqa"), ("0:3", "3:6", "3:6", "0:3")) as swarm,
        connect(llama.petals, swarm, "llama-gqa", **options) as client,
    ):
        assert torch.equal(generate(client, ids, max_new_tokens=12), expected)

        def kill(hops: list[str]) -> None:
            swarm.node_of(hops[1]).kill()

        error = client.fail_when(kill, ids=ids.tolist(), pause_at=12, max_retries=8, max_new_tokens=12, **QUIET)
        assert "Broken input cache" in error
        assert torch.equal(generate(client, ids, max_new_tokens=12), expected)
        swarm.nodes[0].kill()
        order = {"hidden": hidden.tolist(), "grad": hidden.tolist(), "first": 0, "last": 6}
        result = client.ask("forward_backward", **order)
    hidden.requires_grad_(True)
    output = through(llama.whole.model.layers, llama.whole, hidden)
    output.backward(hidden.detach())
    torch.testing.assert_close(torch.tensor(result["output"]), output.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(result["grad"]), hidden.grad, atol=1e-4, rtol=1e-4)
