"""LoRA adapters on real nodes: the same tokens, logits and gradients as PEFT on the whole model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from swarm.client import SwarmModelForCausalLM
from swarm.errors import UsageError
from tests.adapters import make_adapter, whole_with
from tests.models import tiny_model
from tests.swarm_e2e.nodes import Swarm, run_swarm, run_to_end

QUIET: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
WHICH: tuple[str | None, ...] = ("ada", "bob", None)


def prompts(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 250, (rows, columns), generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """Two nodes with two adapters each, a client, and PEFT's whole model."""

    swarm: Swarm
    whole: PeftModel
    model: Any
    adapters: dict[str, Path]

    @contextmanager
    def expecting(self, adapter: str | None) -> Iterator[Any]:
        """The whole model, with the adapter or without any."""
        if adapter is not None:
            self.whole.set_adapter(adapter)
        with self.whole.disable_adapter() if adapter is None else nullcontext():
            yield self.whole

    def client(self, **settings: Any) -> Any:
        peers = self.swarm.initial_peers
        return SwarmModelForCausalLM.from_pretrained(self.swarm.model, initial_peers=peers, **settings)


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    path = tiny_model("llama-gqa", positions=2048)
    adapters = {
        "ada": make_adapter(
            path, "ada", r=4, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"v_proj": 2}
        ),
        "bob": make_adapter(path, "bob", seed=1, r=8, lora_alpha=12, use_rslora=True, target_modules="all-linear"),
    }
    options = [part for adapter in adapters.values() for part in ("--adapters", str(adapter))]
    with run_swarm(path, ("0:3", "3:6"), *options) as swarm:
        whole = whole_with(path, adapters)
        peers = swarm.initial_peers
        with SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=peers) as model:
            yield Case(swarm, whole, model, adapters)


@pytest.mark.parametrize("adapter", WHICH)
def test_logits_and_gradients(case: Case, adapter: str | None) -> None:
    ids, labels = prompts(2, 9), prompts(2, 9, seed=1)
    case.model.active_adapter = adapter
    found = case.model.get_input_embeddings()(ids).detach().requires_grad_()
    expected = found.detach().clone().requires_grad_()
    logits = case.model(inputs_embeds=found).logits
    case.model.active_adapter = "another one, too late for what has begun"
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    with case.expecting(adapter) as whole:
        wanted = whole(inputs_embeds=expected).logits
        torch.nn.functional.cross_entropy(wanted.flatten(0, 1), labels.flatten()).backward()
    torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-3)


def test_all_at_once(case: Case) -> None:
    """Sessions with different adapters and none generate at the same time."""
    ids = {adapter: prompts(2, 7 + index, seed=index) for index, adapter in enumerate(WHICH)}
    expected = {}
    for adapter in WHICH:
        with case.expecting(adapter) as whole:
            expected[adapter] = whole.generate(input_ids=ids[adapter], max_new_tokens=12, **QUIET)
    assert len({row.tolist().__repr__() for row in expected.values()}) == len(WHICH)
    found: dict[str | None, torch.Tensor] = {}
    opened = []
    for adapter in WHICH:  # a session keeps the adapter that it was made with
        case.model.active_adapter = adapter
        opened.append((adapter, case.model.session(max_length=64)))
    case.model.active_adapter = None

    def generate(adapter: str | None, session: Any) -> None:
        found[adapter] = case.model.generate(ids[adapter], session=session, max_new_tokens=12, **QUIET)
        session.close()

    threads = [threading.Thread(target=generate, args=each) for each in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for adapter in WHICH:
        assert torch.equal(found[adapter], expected[adapter]), adapter


def test_prefixes_are_not_shared(case: Case) -> None:
    """The same prompt with one adapter after the other: nothing of another one's cache is found."""
    ids = prompts(1, 80, seed=3)
    with case.client(prefix_salt="everybody's") as model:
        for adapter in (*WHICH, *WHICH):
            model.active_adapter = adapter
            with case.expecting(adapter) as whole:
                expected = whole.generate(input_ids=ids, max_new_tokens=4, **QUIET)
            with model.session(max_length=128) as session:
                assert torch.equal(model.generate(ids, session=session, max_new_tokens=4, **QUIET), expected)
                reused = [hop.reused for hop in session.cache.route]
            assert reused == ([0, 0] if adapter not in getattr(model, "seen", ()) else [64, 64])
            model.seen = (*getattr(model, "seen", ()), adapter)


def test_failover_keeps_the_adapter(case: Case) -> None:
    """Another node takes over that has the adapter; the one that hasn't is never asked."""
    ids = prompts(1, 8, seed=4)
    bare = case.swarm.add("0:6")
    options = ("--adapters", f"ada={case.adapters['ada']}")
    spare = case.swarm.add("3:6", *options)
    with case.expecting("ada") as whole:
        expected = whole.generate(input_ids=ids, max_new_tokens=20, **QUIET)
    with case.client(active_adapter="ada") as model, model.session(max_length=64) as session:
        begun = model.generate(ids, session=session, max_new_tokens=8, **QUIET)
        route = [str(hop.peer_id) for hop in session.cache.route]
        assert bare.peer_id not in route
        last = case.swarm.node_of(route[-1])
        last.kill()
        assert torch.equal(model.generate(begun, session=session, max_new_tokens=12, **QUIET), expected)
        route = [str(hop.peer_id) for hop in session.cache.route]
        assert bare.peer_id not in route
        assert last.peer_id not in route
    bare.terminate()
    spare.terminate()
    for node in (bare, spare):
        node.wait_gone(15)
    case.swarm.add("3:6", *(part for path in case.adapters.values() for part in ("--adapters", str(path))))


def test_another_adapter_of_the_same_name(case: Case) -> None:
    where = ["serve", case.swarm.model, "--blocks", "0:3", "--host", "127.0.0.1", "--log-format", "json"]
    adapters = ["--adapters", f"ada={case.adapters['bob']}", "--initial-peers", case.swarm.initial_peers[0]]
    code, events, _ = run_to_end([*where, *adapters], case.adapters["ada"].parent)
    assert code == 2
    assert "another adapter as 'ada'" in events[-1]["message"]


def test_unknown_adapter(case: Case) -> None:
    with case.client(active_adapter="eve") as model, pytest.raises(UsageError, match=r"'eve'.*there is 'ada', 'bob'"):
        model.generate(prompts(1, 4), max_new_tokens=2, **QUIET)
