"""Why a peer can't be reached, and whose clock is off, from what others say."""

from __future__ import annotations

import pytest
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2PDaemonError, P2PHandlerError
from hypothesis import given
from hypothesis import strategies as st

from swarm import errors
from swarm.network.clock import describe_skew, skew_told
from swarm.network.reach import call_failed, describe_dialing
from swarm.wire.error_text import to_wire

DIALED = """Connect failed. msg=failed to dial: failed to dial 12D3KooWFeaq: all dials failed
  * [/ip4/10.0.0.1/tcp/9] dial tcp4 0.0.0.0:4001->10.0.0.1:9: i/o timeout
  * [/ip4/127.0.0.1/tcp/9] dial tcp4 127.0.0.1:9: connect: connection refused
  * [/ip6/::1/tcp/9] dial backoff"""


def test_addresses_and_reasons_are_told() -> None:
    assert describe_dialing(DIALED) == (
        "unreachable at /ip4/10.0.0.1/tcp/9 (i/o timeout), /ip4/127.0.0.1/tcp/9 (connection refused), /ip6/::1/tcp/9"
    )
    assert describe_dialing("failed to find any peer in table") == "unreachable: no address of it is known"


@given(st.text(max_size=2000))
def test_whatever_the_daemon_says_it_is_one_short_line(text: str) -> None:
    said = describe_dialing(text)
    assert said.startswith("unreachable")
    assert "\n" not in said


def test_what_a_peer_answered_is_not_that_it_cant_be_reached() -> None:
    refused = call_failed(P2PHandlerError(to_wire(errors.BadRequestError("too long"))))
    assert (type(refused), str(refused)) == (errors.BadRequestError, "too long")
    assert type(call_failed(P2PDaemonError(DIALED))) is errors.PeerLostError


@pytest.mark.parametrize(("local", "said"), [("1010.00000", "10 s ahead of"), ("940.25000", "60 s behind")])
def test_hivemind_says_that_the_clock_is_off(local: str, said: str) -> None:
    error = ValidationError(f"local time must be within 3 seconds  of others(local: {local}, peer: 1000.00000)")
    skew = skew_told(error)
    assert skew is not None
    assert said in describe_skew(skew)
    assert skew_told(RuntimeError("none of the initial_peers responded to a ping")) is None
