"""Who is let in, by the bytes that come; no network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.network.lock.gate import LOCKED, SESSION_SECONDS, SHUT_OUT, WELCOME, WRONG_KEY, Gate
from swarm.network.lock.handshake import Meeting, caller_proofs, derive, key_of_answer, new_nonce
from swarm.network.lock.key import SwarmKey
from swarm.network.lock.sealed import Calling

ME, MEMBER, OTHER = b"me", b"member", b"other"
KEY, OLD = SwarmKey.new(), SwarmKey.new()


class Scene:
    def __init__(self, *keys: SwarmKey) -> None:
        self.now = 0.0
        self.shut_out: set[bytes] = set()
        self.gate = Gate(ME, keys or (KEY,), self.shut_out.__contains__, lambda: self.now)

    def challenge(self, caller: bytes = MEMBER) -> Meeting:
        nonce = new_nonce()
        answer = self.gate.hello(caller, WELCOME + nonce)
        assert answer[:1] == WELCOME
        return Meeting(caller, ME, nonce, answer[1:])

    def come_in(self, caller: bytes = MEMBER, key: SwarmKey = KEY) -> Calling:
        meeting = self.challenge(caller)
        answer = self.gate.prove(caller, caller_proofs([key], meeting))
        assert key_of_answer(answer[1:], [key], meeting) == key
        return Calling(derive(key, meeting))

    def takes(self, calling: Calling, caller: bytes = MEMBER) -> bool:
        return self.gate.find(caller, calling.request(b"call", b"")[1]) is not None


def test_a_member_comes_in_by_either_key_while_they_overlap() -> None:
    scene = Scene(KEY, OLD)
    for key in (KEY, OLD):
        assert scene.takes(scene.come_in(key=key))


def test_without_the_key_nobody_comes_in() -> None:
    scene = Scene()
    assert scene.gate.hello(OTHER, b"") == LOCKED
    meeting = scene.challenge(OTHER)
    assert scene.gate.prove(OTHER, caller_proofs([OLD], meeting)) == WRONG_KEY
    assert not scene.takes(Calling(derive(OLD, meeting)), OTHER)
    assert scene.gate.refused == {"no_key": 1, "wrong_key": 1, "shut_out": 0}


def test_a_challenge_is_good_for_one_try_and_half_a_minute() -> None:
    scene = Scene()
    meeting = scene.challenge()
    assert scene.gate.prove(MEMBER, b"wrong") == WRONG_KEY
    assert scene.gate.prove(MEMBER, caller_proofs([KEY], meeting)) == WRONG_KEY
    meeting = scene.challenge()
    scene.now += 31
    assert scene.gate.prove(MEMBER, caller_proofs([KEY], meeting)) == WRONG_KEY


def test_recorded_proofs_and_others_sessions_are_of_no_use() -> None:
    scene = Scene()
    meeting = scene.challenge()
    proofs = caller_proofs([KEY], meeting)
    assert scene.gate.prove(OTHER, proofs) == WRONG_KEY
    assert scene.gate.prove(MEMBER, proofs)[:1] == WELCOME
    assert scene.gate.prove(MEMBER, proofs) == WRONG_KEY
    scene.challenge()
    assert scene.gate.prove(MEMBER, proofs) == WRONG_KEY
    calling = Calling(derive(KEY, meeting))
    assert scene.takes(calling)
    assert not scene.takes(calling, OTHER)


def test_a_session_ends_after_an_hour_or_when_its_peer_is_shut_out() -> None:
    scene = Scene()
    calling = scene.come_in()
    scene.now += SESSION_SECONDS - 1
    assert scene.takes(calling)
    scene.now += 2
    assert not scene.takes(calling)
    calling = scene.come_in()
    scene.shut_out.add(MEMBER)
    assert not scene.takes(calling)
    assert scene.gate.hello(MEMBER, WELCOME + new_nonce()) == SHUT_OUT
    scene.shut_out.clear()
    assert scene.takes(calling)
    meeting = scene.challenge()
    scene.shut_out.add(MEMBER)
    assert scene.gate.prove(MEMBER, caller_proofs([KEY], meeting)) == SHUT_OUT
    assert scene.gate.refused["shut_out"] == 3


def test_a_peer_that_starts_again_comes_in_again_and_its_old_sessions_are_few() -> None:
    scene = Scene()
    calls = [scene.come_in() for _ in range(6)]
    assert [scene.takes(calling) for calling in calls] == [False, False, True, True, True, True]


def test_crowds_of_strangers_are_forgotten() -> None:
    scene = Scene()
    first = scene.challenge()
    for number in range(1024):
        scene.challenge(b"crowd %d" % number)
    assert scene.gate.prove(MEMBER, caller_proofs([KEY], first)) == WRONG_KEY
    assert len(scene.gate._challenges) == 1024


@pytest.mark.parametrize("asks", ["hello", "prove", "find"])
@given(message=st.binary(max_size=200))
def test_any_bytes_are_refused(asks: str, message: bytes) -> None:
    scene = Scene()
    scene.challenge(OTHER)
    scene.come_in(OTHER)
    answer = getattr(scene.gate, asks)(MEMBER, message)
    assert answer in (None, LOCKED, WRONG_KEY) or (asks == "hello" and len(message) == 33 == len(answer))
    assert not scene.gate.knows(MEMBER)
