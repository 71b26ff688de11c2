"""A node's figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from swarm.errors import ConnectError
from swarm.network.nat.reachability import DIRECT, RELAY, UNKNOWN, UNREACHABLE
from swarm.network.peer import Peer

from ..engine.stats import EngineStats


class NodeCollector:
    """Reads the figures when Prometheus asks. Those of the engine begin anew when a node moves to other blocks."""

    def __init__(self, stats: Callable[[], EngineStats], peer: Peer) -> None:
        self._stats, self._peer = stats, peer

    def collect(self) -> Iterator[Metric]:
        """The metrics; called by the Prometheus client."""
        stats = self._stats()
        used = stats.cache_tokens - stats.cache_tokens_free
        yield GaugeMetricFamily("swarm_sessions", "Sessions that are open", stats.sessions)
        yield GaugeMetricFamily("swarm_cache_tokens_used", "Tokens in the KV cache", used)
        yield GaugeMetricFamily("swarm_cache_tokens_total", "Size of the KV cache in tokens", stats.cache_tokens)
        yield GaugeMetricFamily("swarm_cache_bytes", "Memory of the KV cache, used or not", stats.cache_bytes)
        yield GaugeMetricFamily("swarm_sessions_queued", "Sessions that wait for KV cache", stats.queued)
        yield GaugeMetricFamily("swarm_queue_depth", "Steps and requests that wait for the engine", stats.waiting)
        tokens = CounterMetricFamily(
            "swarm_tokens", "Tokens computed, or reused from another session's or node's cache", labels=["phase"]
        )
        tokens.add_metric(["prefill"], stats.prefill_tokens)
        tokens.add_metric(["decode"], stats.decode_tokens)
        tokens.add_metric(["reused"], stats.reused_tokens)
        tokens.add_metric(["handed_over"], stats.handed_over_tokens)
        yield tokens
        yield CounterMetricFamily("swarm_batches", "Turns of the engine", stats.batches)
        yield CounterMetricFamily("swarm_busy_seconds", "Seconds that the engine computed", stats.busy_s)
        times = GaugeMetricFamily("swarm_step_seconds", "Recent turns of the engine in seconds", labels=["quantile"])
        recent = sorted(stats.recent_step_s)
        for quantile in (0.5, 0.9, 0.99) if recent else ():
            times.add_metric([str(quantile)], recent[min(len(recent) - 1, int(quantile * len(recent)))])
        yield times
        yield GaugeMetricFamily("swarm_daemon_up", "Whether the network daemon runs (0 or 1)", self._peer.p2p.is_up)
        restarts = self._peer.restarts
        yield CounterMetricFamily("swarm_daemon_restarts", "Times that the network daemon was started again", restarts)
        if self._peer.lock is not None:
            refused = CounterMetricFamily("swarm_refused", "Peers that a locked swarm didn't let in", labels=["why"])
            for why, count in self._peer.lock.refused.items():
                refused.add_metric([why], count)
            yield refused
        now = self._peer.reach.now
        reached = GaugeMetricFamily("swarm_reached", "How others reach the node: 1 for what is so", labels=["how"])
        for how in (DIRECT, RELAY, UNREACHABLE, UNKNOWN):
            reached.add_metric([how], how == now.how)
        yield reached
        yield GaugeMetricFamily("swarm_relay_addresses", "Addresses of relays that let others through", len(now.relays))
        made = 0 if self._peer.p2p.puncher is None else self._peer.p2p.puncher.made
        yield CounterMetricFamily("swarm_hole_punched", "Direct connections made to or from peers behind NATs", made)


def serve_metrics(stats: Callable[[], EngineStats], peer: Peer, host: str, port: int) -> None:
    """Serves ``/metrics`` on ``port`` of the address ``host``, in a thread of its own.

    Raises:
        ConnectError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(NodeCollector(stats, peer))
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise ConnectError(
            f"can't serve metrics on {host} port {port} ({error.strerror}): choose another --metrics-port"
        ) from error
