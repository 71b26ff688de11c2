"""The proofs, for any peers, keys and challenges: only the same key, pair, challenges and role fit."""

from __future__ import annotations

from dataclasses import fields, replace

from hypothesis import assume, given
from hypothesis import strategies as st

from swarm.network.lock.handshake import (
    Meeting,
    answerer_proof,
    caller_proofs,
    derive,
    find_key,
    key_of_answer,
)
from swarm.network.lock.key import MAX_KEYS, SwarmKey

NONCES = st.binary(min_size=32, max_size=32)
PEERS = st.binary(min_size=1, max_size=48)
MEETINGS = st.builds(Meeting, PEERS, PEERS, NONCES, NONCES)
KEYS = st.lists(st.builds(SwarmKey, NONCES), min_size=1, max_size=MAX_KEYS, unique=True)


@given(MEETINGS, KEYS, KEYS)
def test_the_two_agree_if_they_have_a_key_in_common(
    meeting: Meeting, ours: list[SwarmKey], theirs: list[SwarmKey]
) -> None:
    key = find_key(caller_proofs(ours, meeting), theirs, meeting)
    common = set(ours) & set(theirs)
    assert key in common if common else key is None
    if key is not None:
        assert key_of_answer(answerer_proof(key, meeting), ours, meeting) == key
        assert derive(key, meeting) == derive(key, replace(meeting))


@given(MEETINGS, KEYS, MEETINGS)
def test_a_proof_is_for_one_meeting(meeting: Meeting, keys: list[SwarmKey], other: Meeting) -> None:
    for name in (field.name for field in fields(Meeting)):
        mixed = replace(meeting, **{name: getattr(other, name)})
        if mixed != meeting:
            assert find_key(caller_proofs(keys, mixed), keys, meeting) is None
            assert key_of_answer(answerer_proof(keys[0], mixed), keys, meeting) is None
            assert derive(keys[0], mixed) != derive(keys[0], meeting)


@given(MEETINGS, KEYS)
def test_a_proof_is_for_one_role(meeting: Meeting, keys: list[SwarmKey]) -> None:
    turned = Meeting(meeting.answerer, meeting.caller, meeting.answerer_nonce, meeting.caller_nonce)
    for each in (meeting, turned):
        assert find_key(answerer_proof(keys[0], each), keys, meeting) is None
        assert key_of_answer(caller_proofs(keys[:1], each), keys, meeting) is None


@given(MEETINGS, KEYS, st.binary(max_size=32 * (MAX_KEYS + 1)))
def test_nothing_else_is_a_proof(meeting: Meeting, keys: list[SwarmKey], said: bytes) -> None:
    assume(said not in [caller_proofs([key], meeting) for key in keys])
    assert find_key(said, keys, meeting) is None
    assert key_of_answer(said, keys, meeting) is None


@given(MEETINGS)
def test_where_one_peer_id_ends_and_the_next_begins_is_proved_too(meeting: Meeting) -> None:
    assume(len(meeting.answerer) > 1)
    moved = replace(meeting, caller=meeting.caller + meeting.answerer[:1], answerer=meeting.answerer[1:])
    key = SwarmKey.new()
    assert caller_proofs([key], moved) != caller_proofs([key], meeting)
    assert derive(key, moved) != derive(key, meeting)
