"""Which sessions decode together: how many at a time, and how long to wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

_KEPT_S = 20.0  # machines get busier and idler
_MARGIN = 0.05
_MOST_GROUPS = 8
_SHARED_S = 30.0  # so long after it had to wait for others on its machine, a node counts as one of several
_NO_WAIT_S = 0.001


class BatchCosts:
    """How long batches of so many sessions take, as seen lately. Of sizes that weren't seen it is hopeful, so that they
    are tried."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # sessions: seconds, and when

    def add(self, now: float, sessions: int, seconds: float) -> None:
        """A batch took ``seconds``."""
        before, _ = self._seen.get(sessions, (seconds, now))
        self._seen[sessions] = (0.6 * before + 0.4 * seconds, now)
        self._seen = {size: known for size, known in self._seen.items() if now - known[1] < _KEPT_S}

    def seconds(self, sessions: int) -> float:
        """What a batch of so many sessions may take; 0 if nothing is known."""
        below = max((size for size in self._seen if size <= sessions), default=None)
        above = min((size for size in self._seen if size >= sessions), default=None)
        if above is None:
            return self._seen[below][0] if below is not None else 0.0
        if below is None:  # half of what a batch takes is for its sessions, half for any
            return self._seen[above][0] * (0.5 + 0.5 * sessions / above)
        if below == above:
            return self._seen[below][0]
        share = (sessions - below) / (above - below)
        return (1 - share) * self._seen[below][0] + share * self._seen[above][0]


def group_size(sessions: int, away_s: float, seconds: Callable[[int], float]) -> int:
    """How many of ``sessions`` should decode together, so that each gets its next token soonest.

    All at once read the weights once for all; but then the node has nothing to do while they are all at other nodes and
    their clients, which takes ``away_s``. In several groups that follow one another it works on, and so do the others.
    A group comes round in ``away_s`` and its own batch, but no sooner than all groups had theirs.

    Args:
        seconds: what a batch of so many sessions takes.
    """
    best, soonest = sessions, float("inf")
    for groups in range(1, min(sessions, _MOST_GROUPS) + 1):
        size = -(-sessions // groups)
        batch = seconds(size)
        round_s = max(groups * batch, batch + away_s)
        if round_s < (1 - _MARGIN) * soonest:
            best, soonest = size, round_s
    return best


class Gatherer:
    """Decides how many sessions decode together, and how long to wait for those that are due.

    Without waiting, sessions scatter into ever smaller groups that take turns: the first to come back is computed alone
    while the others, answered with it, are still on their way, and find the engine busy. A batch takes about as long
    for many rows as for one, and sessions that were computed together are answered together and come back together. So
    to wait until some moment costs those that are here, or come until then, their wait, once; and it saves all of them
    a batch, now and in the rounds to come. It is done where it saves more than it costs, up to the size that is best.

    Nodes that share a machine compute in turns: there a second group never finds a node idle, so one is best.
    """

    def __init__(self, *, worth: float = 0.5, reach: float = 1.75) -> None:
        self._worth = worth  # of a batch saved, to each session that is computed together, in batches
        self._reach = reach  # how far to look ahead and to wait at most, in batches
        self._costs = BatchCosts()
        self._batch_s = 0.0
        self._shared_until = float("-inf")

    def ran(self, now: float, seconds: float, sessions: int | None, *, waited_s: float = 0.0) -> None:
        """A batch with decode in it took ``seconds``; of so many ``sessions``, if there was nothing else in it. Before,
        it waited for other nodes of the machine."""
        if waited_s > _NO_WAIT_S:
            self._shared_until = now + _SHARED_S
        self._batch_s = seconds if not self._batch_s else 0.7 * self._batch_s + 0.3 * seconds
        if sessions is not None:
            self._costs.add(now, sessions, seconds)

    def usual(self, before: float | None, seconds: float) -> float:
        """How long a session is usually away, after it has been away for ``seconds``."""
        return seconds if before is None else 0.7 * before + 0.3 * seconds

    def size(self, now: float, away_s: Iterable[float]) -> int | None:
        """How many sessions to decode together, of all that do; each is usually away for so long. None: any number."""
        away = sorted(away_s) if now > self._shared_until else []
        return group_size(len(away), away[len(away) // 2], self._costs.seconds) if away else None

    def patience_s(
        self, now: float, waiting: int, waiting_since: float, due: Iterable[float], size: int | None = None
    ) -> float:
        """How long to wait now, with ``waiting`` sessions here (the first since ``waiting_since``), for those that are
        ``due`` at these times, up to ``size`` in all. 0: don't. Who is overdue may come any moment; late by half a
        batch, it may be gone."""
        batch, limit = self._batch_s, self._reach * self._batch_s
        soon = now + batch / 4
        near = sorted(moment if moment > now else soon for moment in due if now - batch / 2 < moment < now + limit)
        worth = self._worth if now > self._shared_until else 2 * self._worth
        best, until, total = 0.0, now, 0.0
        for count, moment in enumerate(near[: None if size is None else max(0, size - waiting)], start=1):
            total += moment
            costs = waiting * (moment - now) + count * moment - total
            gain = worth * batch * (waiting + count) - costs
            if gain > best:
                best, until = gain, moment
        if not best:
            return 0.0
        # a little longer than to the moment itself, since nobody is on time
        return max(0.0, min(until + batch / 8, waiting_since + limit) - now)
