"""What a stranger may have others do when it asks to be connected."""

from __future__ import annotations

import pytest

from swarm.network.nat.punch import Allowance, is_allowed, read_place


def test_an_allowance_is_for_each_name_and_comes_back() -> None:
    allowance = Allowance(2, 60.0)
    assert [allowance.take("a", now) for now in (0.0, 1.0, 2.0)] == [True, True, False]
    assert allowance.take("b", 2.0)
    assert allowance.take("a", 60.5)
    assert not allowance.take("a", 60.6)


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("/ip4/10.0.0.7/tcp/4001", ("10.0.0.7", 4001)),
        ("/ip4/10.0.0.7/tcp/4001/p2p/Qm", ("10.0.0.7", 4001)),
        ("/ip4/127.0.0.1/tcp/22", None),
        ("/ip4/224.0.0.1/tcp/22", None),
        ("/ip4/0.0.0.0/tcp/22", None),
        ("/ip4/999.0.0.1/tcp/22", None),
        ("/ip4/10.0.0.7/tcp/99999", None),
        ("/ip4/10.0.0.7/tcp/0", None),
        ("/ip6/::1/tcp/22", None),
        ("/dns4/example.org/tcp/22", None),
        ("", None),
    ],
)
def test_where_others_can_be(address: str, place: tuple[str, int] | None) -> None:
    assert read_place(address) == place


def test_a_relay_from_outside_cannot_point_into_a_private_network() -> None:
    assert is_allowed(("8.8.8.8", 4001), ("9.9.9.9", 4001))
    assert is_allowed(("10.0.0.7", 4001), ("10.0.0.1", 4001))
    assert not is_allowed(("10.0.0.7", 4001), ("9.9.9.9", 4001))
