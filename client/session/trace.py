"""Where the time of a step went, and how its route changed: for people who watch, never needed to go on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Answered(NamedTuple):
    """When a hop's answer came (seconds of the event loop), and how long it says that it queued and computed."""

    at: float
    queue_s: float
    compute_s: float


class HopName(NamedTuple):
    """A hop for people: its peer, the name that it gives itself, and its blocks."""

    peer: str
    name: str | None
    start: int
    end: int


class HopTime(NamedTuple):
    """The seconds of a step in one hop; ``network_s`` is what neither its queue nor its computing explain."""

    hop: HopName
    queue_s: float
    compute_s: float
    network_s: float


class RouteEvent(NamedTuple):
    """Something happened to a route.

    ``kind``: ``route``, the session was opened over ``hops``; ``failed``, ``hops`` has the one that did, and ``reason``
    says how; ``left``, the same of one that works, but slower than another way; ``replaced``, ``hops`` took over the
    blocks of the one that failed or was left last.
    """

    kind: str
    hops: tuple[HopName, ...]
    reason: str = ""


def waited(began: float, answers: Iterable[Answered]) -> list[float]:
    """The seconds for which a step waited for each hop, from when the answers of all hops before it were there. At
    least what the hop says that it took."""
    seconds = []
    for answer in answers:
        seconds.append(max(answer.at - began, answer.queue_s + answer.compute_s))
        began = max(began, answer.at)
    return seconds


def split_time(began: float, steps: Iterable[tuple[HopName, Sequence[Answered]]]) -> tuple[HopTime, ...]:
    """A step's time by hops, each with the answers to the step's parts, in order.

    A hop has the time from the answer of the hop before it to its own, as they arrive at the client; so what it takes
    to pass on from one to the next counts for the latter. If that is less than the hop says that it took, the answer
    before was late, and the difference was not that hop's. Where hops work on several parts at the same time, the sum
    of what they tell may be more than the time that passed, and then nothing is left for the network.
    """
    times: list[HopTime] = []
    for hop, parts in steps:
        if not parts:
            continue
        queue, compute = sum(part.queue_s for part in parts), sum(part.compute_s for part in parts)
        times.append(HopTime(hop, queue, compute, parts[-1].at - began - queue - compute))
        began = parts[-1].at
    late = 0.0
    for index in reversed(range(len(times))):
        left = times[index].network_s + late
        times[index], late = times[index]._replace(network_s=max(0.0, left)), min(0.0, left)
    return tuple(times)
