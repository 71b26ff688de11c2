"""Text that is shown piece by piece is the text that decoding all tokens gives, up to the first stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from swarm.client.gateway.text.text import Detokenizer, StopStrings
from swarm.model.source import resolve


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("demo").path)


@given(text=st.text(max_size=40))
def test_pieces_make_the_whole(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(0, 2047), max_size=30))
def test_any_tokens_and_characters_that_stay_unfinished(tokenizer: Any, ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push(token) for token in ids) + detokenizer.finish()
    assert shown == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_of_several_tokens_comes_when_it_is_whole(tokenizer: Any) -> None:
    ids = tokenizer("漢字", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    detokenizer = Detokenizer(tokenizer)
    assert [piece for piece in map(detokenizer.push, ids) if piece] == ["漢", "字"]


@given(
    st.lists(st.text("abc", max_size=4), max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_never_show(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    # it stops at the first push in which a stop string is complete, and shows what is before the first one
    end = next((n for n in range(len(pieces) + 1) if any(stop in "".join(pieces[:n]) for stop in stops)), None)
    strings, shown, stopped = StopStrings(stops), "", False
    for piece in pieces:
        result = strings.push(piece)
        shown += result.text
        assert whole.startswith(shown)
        if result.stopped:
            stopped = True
            break
    if end is None:
        assert not stopped
        assert shown + strings.finish() == whole
    else:
        text = "".join(pieces[:end])
        assert stopped
        assert shown == text[: min(text.index(stop) for stop in stops if stop in text)]


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    strings = StopStrings(["###END", "User:"])
    assert [strings.push(piece).text for piece in ("one #", "#", " two ", "Us", "ual ", "##", "#")] == [
        "one ", "", "## two ", "", "Usual ", "", ""
    ]  # fmt: skip
    assert strings.finish() == "###"
