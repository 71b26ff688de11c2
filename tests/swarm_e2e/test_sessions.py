"""Many sessions at once, threads, streams, and a KV cache that is too small for all of them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TextIteratorStreamer

from swarm.client import SwarmModelForCausalLM
from swarm.errors import BadRequestError, UsageError
from swarm.model.source import resolve
from tests.models import tiny_model
from tests.swarm_e2e.nodes import Swarm, run_command, run_swarm

QUIET: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(scope="module")
def swarm(path: Path) -> Iterator[Swarm]:
    with run_swarm(path, ("0:3", "3:6"), "--cache-tokens", "1024") as swarm:
        yield swarm


def prompt(number: int) -> torch.Tensor:
    return torch.randint(10, 250, (1, 3 + 5 * number), generator=torch.Generator().manual_seed(number))


def test_sixteen_sessions_of_different_lengths_together_give_each_the_same_as_alone(
    model: Any, whole: PreTrainedModel
) -> None:
    numbers = range(16)
    expected = [whole.generate(prompt(number), max_new_tokens=16 + number, **QUIET) for number in numbers]
    barrier = threading.Barrier(len(numbers))

    def run(number: int) -> torch.Tensor:
        barrier.wait()
        return model.generate(prompt(number), max_new_tokens=16 + number, **QUIET)

    with ThreadPoolExecutor(len(numbers)) as pool:
        results = list(pool.map(run, numbers))
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


def test_sessions_that_together_need_more_cache_than_there_is_all_finish(model: Any, whole: PreTrainedModel) -> None:
    prompts = [torch.randint(10, 250, (1, 300), generator=torch.Generator().manual_seed(90 + n)) for n in range(5)]
    expected = [whole.generate(ids, max_new_tokens=8, **QUIET) for ids in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        results = list(pool.map(lambda ids: model.generate(ids, max_new_tokens=8, **QUIET), prompts))
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


def test_a_prompt_longer_than_the_kv_budget_is_refused_by_name(model: Any) -> None:
    ids = torch.randint(10, 250, (1, 1500), generator=torch.Generator().manual_seed(1))
    with pytest.raises(BadRequestError, match="too long for this node: its limit is 1024"):
        model.generate(ids, max_new_tokens=4, **QUIET)
    view = model._connection._view
    assert all(view._bans.why(span.peer_id) is None for span in view._spans), "the nodes are healthy"
    assert model.generate(ids[:, :10], max_new_tokens=2, **QUIET).shape == (1, 12)


def test_streams(model: Any, whole: PreTrainedModel) -> None:
    expected = whole.generate(prompt(2), max_new_tokens=9, **QUIET)[0, prompt(2).shape[1] :].tolist()

    async def collect(limit: int) -> list[int]:
        tokens = []
        async for token in model.stream(prompt(2), max_new_tokens=9, **QUIET):
            tokens.append(token)
            if len(tokens) == limit:
                break
        return tokens

    async def several() -> list[list[int]]:
        return await asyncio.gather(collect(99), collect(4), collect(99))

    assert asyncio.run(several()) == [expected, expected[:4], expected]


def test_a_streamer_in_a_thread(model: Any, whole: PreTrainedModel) -> None:
    class Numbers:
        """Stands for a tokenizer: tokens as text."""

        def decode(self, ids: Any, **options: Any) -> str:
            return "".join(f"{int(token)}\n" for token in ids)

    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True)  # type: ignore[arg-type]
    thread = threading.Thread(
        target=model.generate, args=(prompt(1),), kwargs={"max_new_tokens": 6, "streamer": streamer, **QUIET}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = whole.generate(prompt(1), max_new_tokens=6, **QUIET)[0, prompt(1).shape[1] :].tolist()
    assert text.split() == [str(token) for token in expected]


def test_scores_and_assisted_generation(model: Any, whole: PreTrainedModel) -> None:
    options = {**QUIET, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    ours, theirs = model.generate(prompt(3), **options), whole.generate(prompt(3), **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), atol=1e-4, rtol=1e-4)
    assistant = AutoModelForCausalLM.from_pretrained(tiny_model("llama-gqa", layers=2, positions=2048))
    guided = model.generate(prompt(3), assistant_model=assistant, **{**QUIET, "max_new_tokens": 12})
    assert torch.equal(guided, whole.generate(prompt(3), **{**QUIET, "max_new_tokens": 12}))


def test_gradients_pass_through_the_swarm(model: Any, whole: PreTrainedModel) -> None:
    ids = prompt(2)
    grads = []
    for this in (model, whole):
        embeddings = whole.get_input_embeddings()(ids).detach().requires_grad_()
        loss = this(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
        loss.backward()
        grads.append(embeddings.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-3)


def test_several_models_in_one_process(model: Any, whole: PreTrainedModel) -> None:
    path = tiny_model("bloom", layers=2)
    other_whole = AutoModelForCausalLM.from_pretrained(path)
    with (
        run_swarm(path, ("0:2",)) as second,
        SwarmModelForCausalLM.from_pretrained(str(path), initial_peers=second.initial_peers) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        both = [pool.submit(this.generate, prompt(4), max_new_tokens=8, **QUIET) for this in (model, other)]
        for result, right in zip(both, (whole, other_whole), strict=True):
            assert torch.equal(result.result(), right.generate(prompt(4), max_new_tokens=8, **QUIET))


def test_a_model_of_another_shape_under_the_same_name(swarm: Swarm, path: Path) -> None:
    other = tiny_model("llama-gqa", hidden=32, positions=2048)
    prefix = resolve(str(path)).dht_prefix
    with pytest.raises(UsageError, match="another shape"):
        SwarmModelForCausalLM.from_pretrained(str(other), initial_peers=swarm.initial_peers, dht_prefix=prefix)


def test_nothing_is_left_behind(swarm: Swarm, path: Path) -> None:
    deadline = time.monotonic() + 90  # the records are refreshed every 20 s
    while True:
        said = run_command(["swarm-node", "status", str(path), "--json", "--initial-peers", swarm.initial_peers[0]])
        status = json.loads(said.stdout)
        assert status["holes"] == []
        assert sorted(node["blocks"] for node in status["nodes"]) == [[0, 3], [3, 6]]
        if all(node["sessions"] == 0 and node["cache_tokens_left"] == 1024 for node in status["nodes"]):
            return
        assert time.monotonic() < deadline, status
        time.sleep(0.5)
