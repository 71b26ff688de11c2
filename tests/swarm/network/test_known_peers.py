"""Whom a peer asks next, and what it keeps of those it has met."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from swarm.network.known_peers import (
    FORGET_SECONDS,
    MAX_CONTACTS,
    Asked,
    Contact,
    KnownPeers,
    freshest,
    same_swarm,
    whom_to_ask,
)

ONE = "12D3KooWRQKEFPWz3WsVbDF6BjtH2pe8WZ2k6dN8hjtmmu7NVyA4"
TWO = "12D3KooWA7ZYHEMbdEtfT5wsuF8PtRrtR7ZUYtxW6diAegPYnZd3"


def times_asked(seconds: int, *, present: tuple[str, ...]) -> int:
    """How often ``a`` is asked that never answers."""
    asked: dict[str, Asked] = {}
    count = 0
    for now in range(seconds):
        for peer_id in whom_to_ask(["a"], present, asked, now, most=8):
            asked[peer_id] = Asked(now, count)
            count += peer_id == "a"
    return count


def test_the_pause_grows_and_is_short_for_who_is_alone() -> None:
    assert 120 <= times_asked(600, present=()) <= 140, "every five seconds"
    assert 12 <= times_asked(600, present=("b",)) <= 18, "every minute"
    assert times_asked(600, present=("a",)) == 10, "also whether one is still there"


def test_those_asked_longest_ago_come_first_and_not_too_many() -> None:
    asked = {"a": Asked(500.0), "b": Asked(100.0), "c": Asked(999.5)}
    assert whom_to_ask("abcd", "", asked, 1000.0, most=8) == ["d", "b", "a"]
    assert whom_to_ask("abcd", "", asked, 1000.0, most=2) == ["d", "b"]


@given(st.lists(st.floats(0, 2 * FORGET_SECONDS), max_size=100))
def test_the_list_is_bounded_and_ages(seen: list[float]) -> None:
    now = 2 * FORGET_SECONDS
    kept = freshest([Contact(str(number), ("/ip4/1.2.3.4/tcp/5",), at) for number, at in enumerate(seen)], now)
    assert len(kept) <= MAX_CONTACTS
    assert all(contact.seen > now - FORGET_SECONDS for contact in kept)
    left_out = sorted(seen, reverse=True)[len(kept) :]
    assert all(at <= now - FORGET_SECONDS or len(kept) == MAX_CONTACTS for at in left_out)


def test_what_was_met_is_there_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "node.key.peers"
    initial = [f"/ip4/10.0.0.1/tcp/7/p2p/{ONE}"]
    known = KnownPeers(initial, file)
    known.met([Contact(TWO, ("/ip4/10.0.0.2/tcp/8",)), Contact(ONE, ())], now=1000.0)
    known.save()
    again = KnownPeers(initial, file)
    assert again.full_addresses() == [*initial, f"/ip4/10.0.0.2/tcp/8/p2p/{TWO}"]
    assert again.addresses(ONE) == ["/ip4/10.0.0.1/tcp/7"]


def test_a_file_is_of_one_swarm(tmp_path: Path) -> None:
    file = tmp_path / "node.key.peers"
    known = KnownPeers([f"/ip4/10.0.0.1/tcp/7/p2p/{ONE}"], file)
    known.met([Contact(TWO, ("/ip4/10.0.0.2/tcp/8",))], now=1000.0)
    known.save()
    assert KnownPeers([], file).peer_ids() == [], "it begins a swarm of its own now"
    assert KnownPeers([f"/ip4/10.0.0.2/tcp/8/p2p/{TWO}"], file).peer_ids() == [TWO], "one that was met"
    assert same_swarm((), (), ("b",)), "the first peer, started again"
    assert not same_swarm(("a",), ("b",), ("c",))


def test_a_damaged_file_or_a_full_disk_stops_nobody(tmp_path: Path) -> None:
    file = tmp_path / "node.key.peers"
    for text in ("", "[]", '{"initial": 5, "met": []}', '{"initial": [], "met": [{"peer_id": "x"}, 7]}'):
        file.write_text(text)
        assert KnownPeers([], file).peer_ids() == []
    file.unlink()
    file.mkdir()  # nothing can be written there
    known = KnownPeers([], file)
    known.met([Contact(TWO, ("/ip4/10.0.0.2/tcp/8",))], now=1000.0)
    known.save()
    assert [*tmp_path.iterdir()] == [file]
