"""Looking for swarms on the local network, and for addresses of their nodes that answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from ..options import LanOptions
from .addresses import Interface, by_nearness, multicast_hosts, own_interfaces
from .choice import LOOK_SECONDS, LanSwarm, check_name, for_client, swarms_of
from .multicast import Multicast
from .record import LanRecord, usable_address

_LEAST_SECONDS = 0.7  # answers to everybody come after a random delay, and a Wi-Fi that sleeps adds to it
_PATIENCE_SECONDS = 5.0  # of a client, for which to find nobody is an error
_DIAL_SECONDS = 1.0
_MAX_DIALED = 8  # nodes


async def look(seconds: float = LOOK_SECONDS) -> list[LanSwarm]:
    """The swarms that are heard within ``seconds``.

    Raises:
        ConnectError: there is no network to listen on.
    """
    multicast = await Multicast.open(multicast_hosts(own_interfaces()), lambda: None)
    try:
        await asyncio.sleep(seconds)
        return swarms_of(multicast.records)
    finally:
        await multicast.close()


async def wait_for(
    multicast: Multicast, heard: Callable[[list[LanSwarm]], bool], seconds: float = LOOK_SECONDS
) -> list[LanSwarm]:
    """The swarms that are heard until ``heard`` is content with them, or for ``seconds``."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    while True:
        await asyncio.sleep(0.05)
        passed, swarms = loop.time() - begin, swarms_of(multicast.records)
        if passed > seconds or (passed > _LEAST_SECONDS and heard(swarms)):
            return swarms


async def find_peers(lan: LanOptions, models: Sequence[Collection[str]]) -> tuple[str, tuple[str, ...]]:
    """For clients of ``models``, each given by the names that it may have in the DHT: the name of their swarm on this
    network, and addresses of its nodes, ``/ip4/…/tcp/…/p2p/…``, that answer.

    Raises:
        ConnectError: there is no such swarm.
        UsageError: there are several.
    """
    check_name(lan.lan_name)
    interfaces = own_interfaces()
    multicast = await Multicast.open(multicast_hosts(interfaces), lambda: None)
    try:
        heard = partial(_is_there, name=lan.lan_name, models=models)
        swarms = await wait_for(multicast, heard, _PATIENCE_SECONDS)
    finally:
        await multicast.close()
    swarm = for_client(swarms, lan.lan_name, models)
    return swarm.name, await answering(swarm.nodes, interfaces)


async def answering(records: Iterable[LanRecord], interfaces: Sequence[Interface]) -> tuple[str, ...]:
    """Addresses of these nodes, of eight at most, that take connections from here; all addresses if none does, so that
    whoever uses them can say what is wrong with them."""
    asked = [*records][:_MAX_DIALED]
    found = await asyncio.gather(*(dial(record, interfaces) for record in asked))
    return tuple(maddr for maddrs in found for maddr in maddrs) or tuple(m for record in asked for m in record.maddrs)


async def dial(record: LanRecord, interfaces: Sequence[Interface]) -> list[str]:
    """Addresses of this node that take connections from here: the nearest ones, if any of them does."""
    for group in by_nearness(record.addresses, interfaces):
        answers = await asyncio.gather(*map(_answers, group))
        if any(answers):
            return [f"{address}/p2p/{record.peer_id}" for address, yes in zip(group, answers, strict=True) if yes]
    return []


async def _answers(address: str) -> bool:
    usable = usable_address(address)
    if usable is None:
        return False
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(str(usable[0]), usable[1]), _DIAL_SECONDS)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def _is_there(swarms: Sequence[LanSwarm], name: str | None, models: Sequence[Collection[str]]) -> bool:
    return any(swarm.name == name if name is not None else swarm.serves(models) for swarm in swarms)
