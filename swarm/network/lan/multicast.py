"""Multicast DNS: hears which nodes there are, and announces one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address

from zeroconf import DNSQuestionType, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from ...errors import ConnectError
from .record import LanRecord, usable_address

logger = logging.getLogger(__name__)
logging.getLogger("zeroconf").setLevel(logging.ERROR)  # it warns of each malformed packet of a stranger
SERVICE = "_swarm-llm._tcp.local."
_MAX_HEARD = 256
_ASK_MS = 2000.0


class Multicast:
    """Listens on the networks of ``hosts``, addresses of this machine, from :meth:`open` to :meth:`close`."""

    def __init__(self, zeroconf: AsyncZeroconf, on_change: Callable[[], None]) -> None:
        self._zeroconf, self._on_change = zeroconf, on_change
        self._heard: dict[str, LanRecord | None] = {}  # by the name of the service; None: it is being asked
        self._asking: set[asyncio.Task[None]] = set()
        self._announced: AsyncServiceInfo | None = None
        self._browser = self._browse()

    @classmethod
    async def open(cls, hosts: Sequence[str], on_change: Callable[[], None]) -> Multicast:
        """``on_change`` is called whenever :attr:`records` has changed.

        Raises:
            ConnectError: this machine has no such network, or another program keeps the port to itself.
        """
        if not hosts:
            raise ConnectError("this machine is in no network: connect it, or give a node's address, --initial-peers")
        try:
            zeroconf = AsyncZeroconf(interfaces=[*hosts])
            await zeroconf.zeroconf.async_wait_for_start()
        except Exception as error:  # OSError, or zeroconf's own
            raise ConnectError(
                f"can't listen for multicast DNS on UDP port 5353 ({error}): another program may keep the port to "
                "itself; give a node's address with --initial-peers instead"
            ) from error
        return cls(zeroconf, on_change)

    @property
    def records(self) -> list[LanRecord]:
        """Of the nodes that are heard."""
        return [record for record in self._heard.values() if record is not None]

    async def ask_again(self) -> None:
        """Asks who is there."""
        await self._browser.async_cancel()
        self._browser = self._browse()

    def _browse(self) -> AsyncServiceBrowser:
        # answers to everybody: one sent to this machine alone reaches any one of the programs that listen here
        return AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE, handlers=[self._on_service], question_type=DNSQuestionType.QM
        )

    async def announce(self, record: LanRecord) -> None:
        """Announces this node, or what has changed about it."""
        usable = [found for address in record.addresses if (found := usable_address(address)) is not None]
        hosts = [str(ip) for ip, _ in usable if isinstance(ip, IPv4Address)]
        info = AsyncServiceInfo(
            SERVICE,
            f"{record.peer_id}.{SERVICE}",
            port=usable[0][1],
            properties=record.to_txt(),
            server=f"{record.peer_id}.local.",
            parsed_addresses=hosts or [str(usable[0][0])],
        )
        if self._announced is None:
            # nobody else has the name, which is the PeerID
            await self._zeroconf.async_register_service(info, cooperating_responders=True)
        else:
            await self._zeroconf.async_update_service(info)
        self._announced = info

    async def close(self) -> None:
        """Says goodbye, if it was announced, and stops listening."""
        for task in self._asking:
            task.cancel()
        with contextlib.suppress(Exception):
            await self._browser.async_cancel()
        with contextlib.suppress(Exception):
            await self._zeroconf.async_close()

    def _on_service(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            if self._heard.pop(name, None) is not None:
                self._on_change()
        elif name in self._heard or len(self._heard) < _MAX_HEARD:
            self._heard.setdefault(name, None)
            task = asyncio.ensure_future(self._ask(zeroconf, name))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask(self, zeroconf: Zeroconf, name: str) -> None:
        try:
            info = AsyncServiceInfo(SERVICE, name)
            if not await info.async_request(zeroconf, _ASK_MS, question_type=DNSQuestionType.QM):
                raise ValueError("no answer")
            record = LanRecord.from_txt(info.properties)
        except Exception as error:  # zeroconf's own, of what strangers send, are of many kinds
            logger.debug("%s can't be read: %s", name, error)
            self._heard.pop(name, None)
            return
        if self._heard.get(name) != record:
            self._heard[name] = record
            self._on_change()
