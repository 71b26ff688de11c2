"""Sealed calls: each is taken once, as it was said, by whom it is for."""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.network.lock.handshake import ID_BYTES, Secrets
from swarm.network.lock.sealed import Answering, Calling, NotSealedError, Seen


def secrets() -> Secrets:
    return Secrets(os.urandom(32), os.urandom(32), os.urandom(ID_BYTES))


def refuses(answering: Answering, message: bytes, kind: bytes = b"call") -> None:
    with pytest.raises(NotSealedError):
        answering.request(kind, message)


@given(st.lists(st.binary(max_size=64), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_each_request_is_taken_once_in_any_order(texts: list[bytes], chance: Random) -> None:
    calling, answering = (made := secrets(), Calling(made))[1], Answering(made)
    sent = [(text, *calling.request(b"call", text)) for text in texts]
    chance.shuffle(sent)
    for text, number, message in sent:
        assert text not in message or len(text) < 4
        assert answering.request(b"call", message) == (number, text)
        assert calling.answer(b"call", number, answering.answer(b"call", number, text[::-1])) == text[::-1]
    for _, _, message in sent:
        refuses(answering, message)


@given(st.binary(max_size=64), st.data())
def test_a_changed_message_is_refused(text: bytes, data: st.DataObject) -> None:
    made = secrets()
    _, message = Calling(made).request(b"call", text)
    at = data.draw(st.integers(0, len(message) - 1))
    changed = bytearray(message)
    changed[at] ^= data.draw(st.integers(1, 255))
    refuses(Answering(made), bytes(changed))
    refuses(Answering(made), message[:at])


def test_what_is_for_something_else_is_refused() -> None:
    made = secrets()
    calling, answering = Calling(made), Answering(made)
    number, message = calling.request(b"stream", b"name")
    refuses(answering, message)
    refuses(Answering(secrets()), message, b"stream")
    assert answering.request(b"stream", message)[1] == b"name"
    said = answering.answer(b"stream", number, b"yes")
    for kind, other, text in ((b"call", number, said), (b"stream", number + 1, said), (b"stream", number, message)):
        with pytest.raises(NotSealedError):
            calling.answer(kind, other, text)


@given(st.lists(st.integers(0, 10_000), max_size=200))
def test_numbers_are_new_once(numbers: list[int]) -> None:
    seen, used, highest = Seen(), set[int](), 0
    for number in numbers:
        new = seen.is_new(number)
        assert new == (number > max(0, highest - 4096) and number not in used)
        if new:
            seen.add(number)
            used.add(number)
            highest = max(highest, number)
