"""generate() over a swarm is transformers' on the whole model, or says why it can't be: all that can be asked of it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, StoppingCriteriaList, set_seed
from transformers.utils import ModelOutput

from swarm.client import SwarmModelForCausalLM
from swarm.compat.keywords import GENERATE_KEYWORD, OLDEST_KEYWORD
from swarm.model.load_ends import load_ends
from swarm.model.source import resolve
from tests.client.in_process import InProcessConnection
from tests.client.model.generation_table import (
    EXACT,
    FIELDS,
    HANDLED_ELSEWHERE,
    NO_GENERATION,
    TABLE,
    Row,
    arguments,
)

IDS = torch.tensor([[0, 659, 628, 306, 431, 1264], [0, 431, 1264, 16, 431, 1264]])
QUIET: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 2}


@pytest.fixture(scope="module")
def connection() -> InProcessConnection:
    return InProcessConnection(resolve("demo").path)


@pytest.fixture(scope="module")
def model(connection: Any) -> Iterator[Any]:
    with SwarmModelForCausalLM.from_ends(load_ends(resolve("demo")), connection) as model:
        yield model


@pytest.fixture(scope="module")
def whole() -> Any:
    return AutoModelForCausalLM.from_pretrained(resolve("demo").path).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("demo").path)


def test_nothing_that_this_transformers_can_be_asked_for_is_missing() -> None:
    tried = {name for row in TABLE for name in row.names.split()}
    fields = {name for name in FIELDS if not name.startswith("_")}
    assert fields - tried - NO_GENERATION == set(), "new in GenerationConfig: try them in generation_table.py"
    assert arguments() - tried - HANDLED_ELSEWHERE == set(), "new in generate(): try them in generation_table.py"


def generate(model: Any, row: Row, options: dict[str, Any]) -> Any:
    set_seed(11)
    quiet = {} if "generation_config" in options else QUIET
    return model.generate(IDS[: row.rows], **{**quiet, **options})


def assert_same(mine: Any, theirs: Any) -> None:
    if not isinstance(theirs, ModelOutput):
        assert mine.tolist() == theirs.tolist()
        return
    assert mine.sequences.tolist() == theirs.sequences.tolist()
    assert set(mine) >= set(theirs) - {"past_key_values"}
    for name in {"scores", "logits"} & set(theirs):
        torch.testing.assert_close(torch.stack(mine[name]), torch.stack(theirs[name]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.names)
def test_row(model: Any, whole: Any, tokenizer: Any, connection: InProcessConnection, row: Row) -> None:
    if missing := set(row.options) & set(row.names.split()) - FIELDS - arguments():
        pytest.skip(f"this transformers has no {', '.join(missing)}")
    connection.sessions.clear()
    options = {**row.options, **row.make(whole, tokenizer)}
    if row.outcome != EXACT:
        with pytest.raises(ValueError, match=row.outcome):
            generate(model, row, options)
    else:
        theirs = generate(whole, row, {**row.options, **row.make(whole, tokenizer)})
        assert_same(generate(model, row, options), theirs)
        with model.session(max_length=40):  # which changes nothing, also where it knows all
            for _ in range(2):
                assert_same(generate(model, row, {**row.options, **row.make(whole, tokenizer)}), theirs)
    assert all(session.closed for session in connection.sessions)


# What goes wrong in the caller's own code


def fail_at(call: int, error: BaseException) -> Any:
    calls = 0

    def fail(ids: Tensor, scores: Any, **_: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return scores if isinstance(scores, Tensor) else torch.zeros(len(ids), dtype=torch.bool)

    return fail


@pytest.mark.parametrize("place", ["logits_processor", "stopping_criteria", "streamer"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_session_goes_on_after_an_error_of_the_callers(
    model: Any, whole: Any, place: str, options: dict[str, Any]
) -> None:
    ids = IDS[:1]

    class Streamer:
        check = staticmethod(fail_at(3, KeyboardInterrupt()))

        def put(self, value: Tensor) -> None:
            self.check(value, None)

        def end(self) -> None: ...

    failing: Any = {
        "logits_processor": LogitsProcessorList([fail_at(3, KeyError("mine"))]),
        "stopping_criteria": StoppingCriteriaList([fail_at(2, KeyError("mine"))]),  # type: ignore[list-item]
        "streamer": Streamer(),
    }[place]
    if place == "streamer" and "num_beams" in options:
        pytest.skip("transformers streams no beams")
    expected = whole.generate(ids, **QUIET, **options)
    with model.session(max_length=60) as session:
        with pytest.raises((KeyError, KeyboardInterrupt)):
            model.generate(ids, **{**QUIET, "max_new_tokens": 20}, **options, **{place: failing})
        assert session.position > 0
        assert model.generate(ids, **QUIET, **options).tolist() == expected.tolist()
        assert model.generate(IDS, **QUIET).tolist() == whole.generate(IDS, **QUIET).tolist()


def test_a_step_that_failed_is_as_if_it_had_not_been(model: Any, connection: InProcessConnection) -> None:
    with model.session(max_length=40) as session, torch.no_grad():
        first = model(IDS[:, :4], past_key_values=session.cache).logits
        connection.failure = "just now"
        try:
            with pytest.raises(AssertionError, match="just now"):
                model(IDS[:, 4:], past_key_values=session.cache)
        finally:
            connection.failure = None
        assert session.position == 4
        last = model(IDS[:, 4:], past_key_values=session.cache).logits
        torch.testing.assert_close(torch.cat([first, last], dim=1), model(IDS).logits, atol=1e-3, rtol=1e-3)


def test_ids_that_are_no_tokens_leave_a_session_as_it_was(model: Any, whole: Any) -> None:
    with model.session(max_length=40):
        with pytest.raises(IndexError):
            model.generate(torch.full((3, 4), 5000), **QUIET)
        assert model.generate(IDS, **QUIET).tolist() == whole.generate(IDS, **QUIET).tolist()


# generate() within generate()


def test_what_a_generate_calls_may_generate_too(model: Any, whole: Any) -> None:
    inner: list[list[int]] = []

    def look_ahead(ids: Tensor, scores: Tensor) -> Tensor:
        inner.append(model.generate(ids.flip(1), **{**QUIET, "max_new_tokens": 2})[0].tolist())
        return scores

    with model.session(max_length=40) as session:
        made = model.generate(IDS[:1], logits_processor=LogitsProcessorList([look_ahead]), **QUIET)  # type: ignore[list-item]
        assert made.tolist() == whole.generate(IDS[:1], **QUIET).tolist()
        assert session.position == made.shape[1] - 1
        expected = whole.generate(IDS[:1].flip(1), **{**QUIET, "max_new_tokens": 2})[0].tolist()
        assert inner[0] == expected

        def again(ids: Tensor, scores: Tensor) -> Tensor:
            model.generate(ids, session=session, **QUIET)
            return scores

        with pytest.raises(ValueError, match="at work in this session"):
            model.generate(IDS[:1], logits_processor=LogitsProcessorList([again]), **QUIET)  # type: ignore[list-item]


def test_continuous_batching_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="several threads"):
        model.generate_batch([[1, 2, 3]])
    with pytest.raises(ValueError, match="several threads"):
        model.init_continuous_batching()


# Room


def test_no_more_room_is_asked_for_than_is_needed(model: Any, connection: InProcessConnection) -> None:
    connection.sessions.clear()
    model.generate(IDS[:1], prompt_lookup_num_tokens=30, **QUIET)
    model.generate(IDS[:1], guidance_scale=1.5, **QUIET)
    assert [session.max_length for session in connection.sessions] == [12, 12, 7]


def test_columns_that_peft_puts_in_count(model: Any, whole: Any, connection: InProcessConnection) -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    got = []
    for each in (whole, model):
        torch.manual_seed(0)
        tuned: Any = get_peft_model(each, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
        connection.sessions.clear()
        options = QUIET | {"attention_mask": torch.ones_like(IDS)}
        got.append([tuned.generate(input_ids=IDS, **options, **more).tolist() for more in ({}, {"num_beams": 2})])
        if each is model:
            assert [session.max_length for session in connection.sessions] == [16, 16]
            with model.session(max_length=20):
                again = [tuned.generate(input_ids=IDS, **options).tolist() for _ in range(2)]
            assert again == got[-1][:1] * 2
            with model.session(max_length=14), pytest.raises(ValueError, match=r"16 positions.*room for 14"):
                tuned.generate(input_ids=IDS, **options)
    # PEFT 0.21 puts its columns in again at every step where transformers calls the cache by its new name
    if GENERATE_KEYWORD == OLDEST_KEYWORD:
        assert got[0] == got[1]
    assert got[1][0] == greedily(tuned, IDS, steps=7)


def greedily(model: Any, ids: torch.Tensor, *, steps: int) -> list[list[int]]:
    """Without a cache."""
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids.tolist()


def test_keys_and_values_of_ones_own_are_refused(model: Any) -> None:
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    tuned: Any = get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    with pytest.raises(AttributeError, match="prefix tuning"):
        tuned.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **QUIET)
    assert model.generate(IDS, **QUIET).shape == (2, 13)


# Others' random numbers


def states() -> tuple[Any, ...]:
    legacy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), str(legacy)


def test_greedy_draws_nothing(model: Any) -> None:
    before = states()
    model.generate(IDS, **QUIET)
    with model.session(max_length=40):
        model.generate(IDS, **QUIET)
    with torch.no_grad():
        model(IDS)
    assert states() == before


def test_threads_generate_in_their_own_sessions_beside(model: Any, whole: Any) -> None:
    options = QUIET | {"guidance_scale": 1.5}
    expected = [whole.generate(IDS[row : row + 1], **options).tolist() for row in range(2)]
    made: dict[int, Any] = {}

    def work(row: int) -> None:
        made[row] = model.generate(IDS[row : row + 1], **options).tolist()

    threads = [threading.Thread(target=work, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made[0], made[1]] == expected
