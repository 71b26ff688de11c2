"""Machines on local networks: each is a network namespace with cards at switches, and its own swarm commands.

Switches stand in a namespace of their own, so nothing of the machine's own network is touched. Needs root and ``ip``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.swarm_e2e.nodes import Node, Zygote, run_command

DOCKER = "172.17.0.1"


class LanProcess(Node):
    """A command on a host that goes on, and says what happens in JSON."""

    def __init__(self, host: LanHost, argv: Sequence[str], workdir: Path) -> None:
        number = len(list(workdir.glob("*.out")))
        self.stdout, self.stderr = workdir / f"{number}.out", workdir / f"{number}.err"
        self.stdout.touch()
        self.argv = list(argv)
        self.pid = Zygote.start(argv, self.stdout, self.stderr, netns=host.name)

    def said(self, name: str) -> list[dict[str, object]]:
        """Its events of this name."""
        return [event for event in self.events() if event["event"] == name]


class LanHost:
    """A machine. Each has docker's bridge, with the address that docker gives it everywhere."""

    def __init__(self, lans: Lans, number: int, networks: Sequence[int]) -> None:
        self.name, self._lans = f"{lans.name}-{number}", lans
        _ip("netns", "add", self.name)
        self.addresses = [f"10.77.{network}.{number}" for network in networks]
        for network, address in zip(networks, self.addresses, strict=True):
            port, card = f"p{network}-{number}", f"eth{network}"
            _ip("-n", lans.name, "link", "add", port, "type", "veth", "peer", "name", card, "netns", self.name)
            _ip("-n", self.name, "address", "add", f"{address}/24", "dev", card)
            _ip("-n", self.name, "link", "set", card, "up")
            _ip("-n", lans.name, "link", "set", port, "up")
            self.plug(network)
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "link", "add", "docker0", "type", "bridge")
        _ip("-n", self.name, "address", "add", f"{DOCKER}/16", "dev", "docker0")
        _ip("-n", self.name, "link", "set", "docker0", "up")

    def plug(self, network: int) -> None:
        """Connects its card to the switch."""
        _ip("-n", self._lans.name, "link", "set", self._port(network), "master", f"switch{network}")

    def unplug(self, network: int) -> None:
        """Takes its cable out of the switch; the machine doesn't notice."""
        _ip("-n", self._lans.name, "link", "set", self._port(network), "nomaster")

    def start(self, *argv: str) -> LanProcess:
        """Starts ``swarm`` or ``swarm-node``."""
        process = LanProcess(self, argv, self._lans.workdir)
        self._lans.processes.append(process)
        return process

    def serve(self, *options: str) -> LanProcess:
        """Starts ``swarm-node serve demo``, with nothing but these options."""
        return self.start("swarm-node", "serve", "demo", "--log-format", "json", *options)

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Runs ``swarm`` or ``swarm-node`` to its end."""
        return run_command(argv, netns=self.name)

    def _port(self, network: int) -> str:
        return f"p{network}-{self.name.rpartition('-')[2]}"


class Lans:
    """Switches and the machines at them; made by :func:`make_lans`."""

    def __init__(self, networks: int, workdir: Path) -> None:
        self.name, self.workdir = f"lan{os.getpid()}", workdir
        self.hosts: list[LanHost] = []
        self.processes: list[LanProcess] = []
        _ip("netns", "add", self.name)
        for number in range(networks):
            _ip("-n", self.name, "link", "add", f"switch{number}", "type", "bridge")
            _ip("-n", self.name, "link", "set", f"switch{number}", "up")

    def host(self, *networks: int) -> LanHost:
        """A machine with a card at each of these switches."""
        made = LanHost(self, len(self.hosts) + 1, networks)
        self.hosts.append(made)
        return made

    def close(self) -> None:
        """Ends everything."""
        try:
            for process in self.processes:
                process.terminate()
            for process in self.processes:
                process.wait_gone(60)
        finally:
            for name in (*(host.name for host in self.hosts), self.name):
                _ip("netns", "delete", name)


@contextlib.contextmanager
def make_lans(networks: int) -> Iterator[Lans]:
    """That many switches, which are not connected to each other."""
    with tempfile.TemporaryDirectory(prefix="swarm-lan-") as workdir:
        lans = Lans(networks, Path(workdir))
        try:
            yield lans
        finally:
            lans.close()


def why_no_lans() -> str | None:
    """Why there can be none here, if so."""
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    try:
        with make_lans(1) as lans:
            lans.host(0)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"network namespaces are not permitted: {getattr(error, 'stderr', '') or error}".strip()
    return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
