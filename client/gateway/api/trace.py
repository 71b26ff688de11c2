"""What a stream tells of its way through the swarm, if it is asked to (``swarm_trace``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...session.trace import HopTime, RouteEvent
from ..decode.generation import Sampled
from ..served_model import ServedModel


def trace_json(model: ServedModel, trace: Sequence[Sampled | RouteEvent]) -> dict[str, Any]:
    """The field ``swarm`` of a chunk: ``tokens`` with their times in milliseconds, and ``events`` of the route."""
    return {
        "tokens": [_token(model, each) for each in trace if isinstance(each, Sampled)],
        "events": [
            {"kind": each.kind, "hops": [hop._asdict() for hop in each.hops], "reason": each.reason}
            for each in trace
            if isinstance(each, RouteEvent)
        ],
    }


def _token(model: ServedModel, sampled: Sampled) -> dict[str, Any]:
    return {
        "text": model.token_text(sampled.token),
        "gateway_ms": _ms(sampled.gateway_s),
        "hops": [_hop(time) for time in sampled.times],
    }


def _hop(time: HopTime) -> dict[str, Any]:
    return {
        **time.hop._asdict(),
        "queue_ms": _ms(time.queue_s),
        "compute_ms": _ms(time.compute_s),
        "network_ms": _ms(time.network_s),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
