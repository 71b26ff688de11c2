"""Networks made of kernel namespaces: switches, hosts, and routers that masquerade. Needs root, ip and iptables.

Everything, the bridges too, stands in namespaces of its own: nothing of the machine's own network is touched, and a
namespace that goes takes its interfaces with it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOOLS = ("ip", "iptables")


@dataclass
class Lan:
    """A switch with hosts; ``network`` is the first three numbers of its addresses."""

    switch: str
    network: str
    gateway: str | None = None
    router: Host | None = None
    taken: int = 0


@dataclass
class Host:
    """A machine: its namespace, and its address in each of its networks."""

    namespace: str
    addresses: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Its address in its first network."""
        return self.addresses[0]


class Lab:
    """Makes networks and hosts; :meth:`close` ends what runs in them and takes them down."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._namespaces: list[str] = []

    def lan(self, network: str) -> Lan:
        """A switch, without a way out."""
        lan = Lan(self._namespace(), network)
        _ip("-n", lan.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", lan.switch, "link", "set", "br0", "up")
        return lan

    def host(self, *lans: Lan) -> Host:
        """A machine in each of these networks; its way out is the first one's router."""
        host = Host(self._namespace())
        for number, lan in enumerate(lans):
            lan.taken += 1
            port, card, address = f"p{lan.taken}", f"eth{number}", f"{lan.network}.{lan.taken}"
            # the card gets its name in the host's namespace only: the machine itself has some of these names
            _ip("-n", lan.switch, "link", "add", port, "type", "veth", "peer", "name", card, "netns", host.namespace)
            _ip("-n", lan.switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", card)
            _ip("-n", host.namespace, "link", "set", card, "up")
            host.addresses.append(address)
        if lans[0].gateway is not None:
            _ip("-n", host.namespace, "route", "add", "default", "via", lans[0].gateway)
        return host

    def nat(self, outside: Lan, network: str, *, symmetric: bool = False) -> Lan:
        """A network behind a router that masquerades, and lets nothing in that wasn't asked for, as a home has it.
        ``symmetric``: each connection gets a port of its own there, so that nobody can tell which the next one has."""
        inside = self.lan(network)
        router = self.host(outside, inside)
        inside.gateway, inside.router = router.addresses[1], router
        ports = ("-p", "tcp", "--random-fully") if symmetric else ()
        run = ("netns", "exec", router.namespace)
        _ip(*run, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        _ip(*run, "iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE", *ports)
        _ip(*run, "iptables", "-P", "FORWARD", "DROP")
        _ip(*run, "iptables", "-A", "FORWARD", "-i", "eth1", "-j", "ACCEPT")
        established = ("-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED")
        _ip(*run, "iptables", "-A", "FORWARD", *established, "-j", "ACCEPT")
        _ip(*run, "iptables", "-P", "INPUT", "DROP")
        _ip(*run, "iptables", "-A", "INPUT", *established, "-j", "ACCEPT")
        _ip(*run, "iptables", "-A", "INPUT", "-p", "icmp", "-j", "ACCEPT")
        return inside

    def count(self, at: Lan, others: Lan) -> None:
        """Begins to count what passes between two networks with routers."""
        for way in ("-d", "-s"):
            _ip("netns", "exec", _router(at).namespace, "iptables", "-I", "FORWARD", way, _router(others).address)

    def counted(self, at: Lan, others: Lan) -> int:
        """The bytes that have passed since."""
        listed = _ip("netns", "exec", _router(at).namespace, "iptables", "-nvxL", "FORWARD").splitlines()
        return sum(int(line.split()[1]) for line in listed if f" {_router(others).address} " in f"{line} ")

    def close(self) -> None:
        """Kills what still runs there and takes everything down."""
        for name in self._namespaces:
            for pid in _ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "delete", name)
        self._namespaces.clear()

    def _namespace(self) -> str:
        name = f"swarm{os.getpid()}-{next(self._numbers)}"
        _ip("netns", "add", name)
        self._namespaces.append(name)
        _ip("-n", name, "link", "set", "lo", "up")
        return name


@contextlib.contextmanager
def make_lab() -> Iterator[Lab]:
    """A lab that is taken down whatever happens."""
    lab = Lab()
    try:
        yield lab
    finally:
        lab.close()


def why_not() -> str | None:
    """Why no networks can be made here, if so."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    try:
        with make_lab() as lab:
            lab.nat(lab.lan("10.255.1"), "10.255.2")
    except (subprocess.CalledProcessError, OSError) as error:
        return f"network namespaces aren't permitted: {getattr(error, 'stderr', None) or error}".strip()
    return None


def _router(lan: Lan) -> Host:
    assert lan.router is not None
    return lan.router


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
