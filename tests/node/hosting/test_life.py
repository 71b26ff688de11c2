"""What is started is ended in order, whenever the word to stop comes."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from swarm.node.hosting.life import finish_unless, run_until


class Life:
    """Says what happens to it, and stops when it hears a certain word."""

    def __init__(self, stop_at: str, fails_at: str = "") -> None:
        self.said: list[str] = []
        self.stop, self._stop_at, self._fails_at = asyncio.Event(), stop_at, fails_at

    async def say(self, word: str) -> None:
        self.said.append(word)
        if word == self._stop_at:
            self.stop.set()
            await asyncio.sleep(60)
        if word == self._fails_at:
            raise ValueError(word)

    async def start(self, stack: AsyncExitStack) -> Life:
        stack.callback(self.said.append, "ended")
        await self.say("start")
        return self

    async def run(self) -> None:
        await run_until(self.stop, self.start, lambda life: life.say("leave"), lambda life: life.say("work"))


@pytest.mark.parametrize(
    ("stop_at", "fails_at", "said"),
    [
        ("start", "", ["start", "ended"]),
        ("work", "", ["start", "work", "leave", "ended"]),
        ("", "start", ["start", "ended"]),
        ("", "work", ["start", "work", "leave", "ended"]),
    ],
)
def test_in_order(stop_at: str, fails_at: str, said: list[str]) -> None:
    async def main() -> list[str]:
        life = Life(stop_at, fails_at)
        try:
            await life.run()
        except ValueError as error:
            assert str(error) == fails_at
        else:
            assert not fails_at
        return life.said

    assert asyncio.run(main()) == said


def test_work_that_is_done_is_no_reason_to_leave() -> None:
    async def main() -> None:
        life = Life("")
        running = asyncio.create_task(life.run())
        while "work" not in life.said:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert life.said == ["start", "work"]
        life.stop.set()
        await running
        assert life.said == ["start", "work", "leave", "ended"]

    asyncio.run(main())


def test_work_that_ends_by_itself() -> None:
    async def main() -> None:
        life = Life("stop")
        done = await finish_unless(life.stop, life.say("a word"))
        assert done is not None
        assert done.result() is None
        assert await finish_unless(life.stop, life.say("stop")) is None

    asyncio.run(main())
