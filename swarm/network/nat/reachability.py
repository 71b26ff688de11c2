"""How this peer is reached: found out by asking others, not claimed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hivemind.proto import dht_pb2
from hivemind.utils.auth import AuthRole, AuthRPCWrapper

from ...wire.peer_id import peer_id_of, read_peer_id
from ..daemon_calls import direct_connections
from ..lan.addresses import is_loopback
from .circuits import reserve
from .dial_back import Answer, ask

if TYPE_CHECKING:
    from hivemind.dht import DHTNode
    from hivemind.p2p import P2P

logger = logging.getLogger(__name__)
DIRECT, RELAY, UNREACHABLE, UNKNOWN = "direct", "relay", "unreachable", "unknown"
MAX_RELAYS = 3
_RELAY_ADDRESSES = 2  # that are told of each
_ASKED = 4  # peers at a time
_ASK_SECONDS = 12.0
_RESERVE_SECONDS = 5.0
_ALONE_SECONDS = 2.0  # between two looks whether somebody has come
_HOLD_SECONDS = 5.0  # between two reservations: a relay that was away has forgotten them
_CHECK_SECONDS = 300.0  # between two questions


@dataclass(frozen=True)
class Reached:
    """How others reach a peer.

    Attributes:
        how: ``direct``; ``relay``; ``unreachable``; ``unknown``, as nobody could be asked.
        relays: the addresses of those that let others through.
    """

    how: str = UNKNOWN
    relays: tuple[str, ...] = ()

    def describe(self) -> str:
        """For people: what it is, and what to do about it."""
        if self.how == DIRECT:
            return "Others reach this machine directly"
        if self.how == RELAY:
            names = {relay.rpartition("/p2p/")[2] for relay in self.relays}
            through = ", ".join(f"…{name[-8:]}" for name in sorted(names))
            return (
                f"Others can't connect to this machine, and reach it through a relay ({through}): to be faster, "
                "forward the --port and name the address from outside with --public-ip"
            )
        if self.how == UNREACHABLE:
            return (
                "Nobody can connect to this machine, and no peer that can be reached relays for it, so no blocks are "
                "announced: open the --port in the firewall, or forward it and give --public-ip, or run swarm-node "
                "bootstrap on a machine that can be reached"
            )
        return "Nobody is there yet who could tell whether this machine can be reached: it asks when somebody comes"


def decide(answers: Mapping[str, Answer], *, relayed: bool) -> bool | None:
    """Whether a peer is reached directly by all who tried; None: nobody could tell. ``relayed``: it isn't to be."""
    tried = [answer.reached for answer in answers.values() if answer.reached is not None]
    if relayed:
        return False if answers else None
    return all(tried) if tried else None


def choose_relays(answers: Mapping[str, Answer], held: Sequence[str]) -> list[str]:
    """The PeerIDs of those that relay, in the order in which to ask them: those that do it already come first."""
    willing = [name for name, answer in answers.items() if answer.relays]
    return sorted(willing, key=lambda name: name not in held)


class Reachability:
    """Keeps :attr:`now` true from :meth:`start` to :meth:`stop`, and gets places at relays where that is needed.

    Args:
        addresses: where this peer listens.
        relayed: it is to be reached through relays, whatever others say.
        alone: only processes of this machine can reach it, so nobody is asked.

    Attributes:
        now: how the peer is reached.
        on_change: called with :attr:`now` whenever it has changed.
    """

    def __init__(
        self,
        p2p: P2P,
        dht: DHTNode,
        addresses: Sequence[str],
        initial_peers: Sequence[str],
        *,
        relayed: bool,
        alone: bool,
    ) -> None:
        self._p2p, self._dht, self._relayed, self._alone = p2p, dht, relayed, alone
        self._addresses = [address for address in addresses if not is_loopback(address)]
        self._initial = [*map(peer_id_of, initial_peers)]
        self._known: dict[str, Answer] = {}  # what peers have said that answered
        self.now = Reached(DIRECT) if alone else Reached()
        self.on_change: list[Callable[[Reached], None]] = []
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to ask. Others may ask this peer now, too."""
        protocol = self._dht.protocol
        if self._alone:
            self._settled.set()
        else:
            if protocol.client_mode:
                await protocol.add_p2p_handlers(self._p2p, AuthRPCWrapper(protocol, AuthRole.SERVICER, None))
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def settled(self) -> Reached:
        """How the peer is reached, once somebody was asked or nobody was there to be asked."""
        await self._settled.wait()
        return self.now

    def relays(self) -> set[str]:
        """The names of those at which this peer has a place."""
        return {relay.rpartition("/p2p/")[2] for relay in self.now.relays}

    def about(self) -> tuple[bool, Sequence[str]]:
        """What others may know: whether this peer can relay for them, and where it listens."""
        return self.now.how in (DIRECT, UNKNOWN), self._addresses

    async def _run(self) -> None:
        while True:
            try:
                pause = await self._look()
            except Exception as error:
                logger.warning("could not find out how this machine is reached, will try again: %s", error)
                pause = _ALONE_SECONDS
            self._settled.set()
            await asyncio.sleep(pause)

    async def _look(self) -> float:
        """Asks, and acts on it; the seconds until the next look."""
        answers = await self._ask()
        direct = decide(answers, relayed=self._relayed)
        if direct is None and self.now.how in (DIRECT, UNKNOWN):
            await self._take_part()
            return _CHECK_SECONDS if self.now.how == DIRECT else _ALONE_SECONDS
        self._known.update(answers)
        if direct:
            await self._take_part()
            self._set(Reached(DIRECT))
            return _CHECK_SECONDS
        loop = asyncio.get_running_loop()
        until = loop.time() + _CHECK_SECONDS
        while loop.time() < until:
            relays = await self._hold()
            self._set(Reached(RELAY, relays) if relays else Reached(UNREACHABLE))
            self._settled.set()
            if not relays:
                break  # others may have come
            await asyncio.sleep(_HOLD_SECONDS)
        return 0.0 if self.now.how == RELAY else _ALONE_SECONDS

    async def _ask(self) -> dict[str, Answer]:
        """What peers say; whoever couldn't reach this one is asked again, since a full machine is slow."""
        peers = dict.fromkeys([*self._initial, *self._dht.protocol.routing_table.peer_id_to_uid])
        peers.pop(self._p2p.peer_id, None)
        chosen = [*peers][:_ASKED]
        listens = [str(address) for address in await self._p2p.get_visible_maddrs(latest=True)]
        self._addresses = [each for each in listens if not is_loopback(each) and "/p2p-circuit" not in each]
        for again in range(2):
            replies = await asyncio.gather(*(ask(self._p2p, each, self._addresses, _ASK_SECONDS) for each in chosen))
            found = {each.to_base58(): reply for each, reply in zip(chosen, replies, strict=True) if reply is not None}
            if again or self._relayed or all(reply.reached is not False for reply in found.values()):
                break
        return found

    async def _hold(self) -> tuple[str, ...]:
        """Gets places at relays, or keeps them; the relays' addresses."""
        held = [relay.rpartition("/p2p/")[2] for relay in self.now.relays]
        seen = await self._seen_addresses()
        ample: list[str] = []
        narrow: list[str] = []
        for name in choose_relays(self._known, held):
            if len(ample) == MAX_RELAYS:
                break
            terms = await reserve(self._p2p, read_peer_id(name), _RESERVE_SECONDS)
            if terms is None:
                self._known.pop(name, None)  # it is asked again when others are
            else:
                (ample if terms.ample else narrow).append(name)
        return tuple(place for name in ample or narrow[:MAX_RELAYS] for place in self._places(name, seen))

    def _places(self, relay: str, seen: Mapping[str, Sequence[str]]) -> list[str]:
        told = [address.partition("/p2p/")[0] for address in self._known[relay].addresses]
        where = dict.fromkeys([*seen.get(relay, ()), *told])
        return [f"{address}/p2p/{relay}" for address in [*where][:_RELAY_ADDRESSES]]

    async def _seen_addresses(self) -> dict[str, list[str]]:
        """Where the peers are to which there is a connection."""
        return {
            name.to_base58(): [address for address in addresses if not is_loopback(address)]
            for name, addresses in (await direct_connections(self._p2p)).items()
        }

    async def _take_part(self) -> None:
        """From now on this peer keeps others' records too, which is of no use before it can be reached. There is no way
        back: hivemind fails if a peer is in others' tables and doesn't take part."""
        protocol = self._dht.protocol
        if protocol.client_mode:
            protocol.client_mode = False
            protocol.node_info = dht_pb2.NodeInfo(node_id=self._dht.node_id.to_bytes())
            await asyncio.gather(*map(protocol.call_ping, [*protocol.routing_table.peer_id_to_uid]))

    def _set(self, now: Reached) -> None:
        if now == self.now:
            return
        self.now = now
        for tell in self.on_change:
            tell(now)
