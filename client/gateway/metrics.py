"""The gateway's figures for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .decode.admission import Admission

if TYPE_CHECKING:
    from swarm.network.peer import Peer

    from .api.call import Call

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """A registry of its own, so that several gateways fit into a process."""

    def __init__(self, admission: Admission) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "swarm_gateway_requests", "Requests that are done", ["endpoint", "status"], registry=registry
        )
        self._tokens = Counter("swarm_gateway_tokens", "Tokens", ["kind"], registry=registry)
        self._first = Histogram(
            "swarm_gateway_first_token_seconds", "From request to first token", buckets=_SECONDS, registry=registry
        )
        self._queued = Histogram(
            "swarm_gateway_queue_seconds", "Time in the queue", buckets=_SECONDS, registry=registry
        )
        self.batch_rows = Histogram(
            "swarm_gateway_batch_rows",
            "Sessions that a token is sampled for together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        running = Gauge("swarm_gateway_sessions", "Sessions under way", registry=registry)
        running.set_function(lambda: admission.running)
        waiting = Gauge("swarm_gateway_queue_depth", "Sessions that wait for their turn", registry=registry)
        waiting.set_function(lambda: admission.waiting)

    def watch(self, peer: Peer) -> None:
        """Tells of the gateway's network daemon, too."""
        up = Gauge("swarm_gateway_daemon_up", "Whether the network daemon runs (0 or 1)", registry=self._registry)
        up.set_function(lambda: peer.p2p.is_up)
        text = "Times that the network daemon was started again"
        restarts = Gauge("swarm_gateway_daemon_restarts", text, registry=self._registry)
        restarts.set_function(lambda: peer.restarts)

    def count(self, call: Call, status: int) -> None:
        """Notes a request that is done."""
        self._requests.labels(call.endpoint, str(status)).inc()
        self._tokens.labels("prompt").inc(call.prompt_tokens)
        self._tokens.labels("completion").inc(call.completion_tokens)
        if (first := call.first_seconds) is not None:
            self._first.observe(first)
            self._queued.observe(call.queue_seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
