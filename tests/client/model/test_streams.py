"""Tokens as they come, in threads and in an event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from tests.client.model.conftest import OPTIONS, Pair, small_draft, tokens


def test_streamer_in_a_thread(pair: Pair) -> None:
    class Numbers:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(f"{number} " for number in ids)

    streamer: Any = TextIteratorStreamer(Numbers(), skip_prompt=True)  # type: ignore[arg-type]
    ids = tokens(1, 5)
    thread = threading.Thread(target=pair.mine.generate, args=(ids,), kwargs=OPTIONS | {"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert [int(part) for part in text.split()] == pair.whole.generate(ids, **OPTIONS)[0, 5:].tolist()


def test_stream(pair: Pair) -> None:
    async def collect(ids: Tensor, **options: Any) -> list[Any]:
        return [token async for token in pair.mine.stream(ids, **(OPTIONS | options))]

    ids = tokens(1, 5)
    expected = pair.whole.generate(ids, **OPTIONS)[0, 5:].tolist()
    assert asyncio.run(collect(ids)) == expected
    assert asyncio.run(collect(ids, assistant_model=small_draft())) == expected
    ids = tokens(2, 5)
    made = asyncio.run(collect(ids))
    assert torch.stack(made, dim=1).tolist() == pair.whole.generate(ids, **OPTIONS)[:, 5:].tolist()
    with pytest.raises(ValueError, match="streamer"):
        asyncio.run(collect(ids, num_beams=2))
    assert pair.all_closed()


def test_streams_at_once_in_their_sessions(pair: Pair) -> None:
    async def one(seed: int) -> list[Any]:
        with pair.mine.session(max_length=30) as session:
            made = [token async for token in pair.mine.stream(tokens(1, 6, seed), **OPTIONS)]
            assert session.position == 12
            return made

    async def all_of_them() -> list[list[Any]]:
        return await asyncio.gather(*(one(seed) for seed in range(4)))

    expected = [pair.whole.generate(tokens(1, 6, seed), **OPTIONS)[0, 6:].tolist() for seed in range(4)]
    assert asyncio.run(all_of_them()) == expected


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_leaving_a_stream_stops_it(pair: Pair, how: str) -> None:
    options = OPTIONS | {"max_new_tokens": 500}

    async def leave() -> None:
        stream = pair.mine.stream(tokens(1, 5), **options)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 3:
                break
        await stream.aclose()  # type: ignore[attr-defined]

    async def cancel() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in pair.mine.stream(tokens(1, 5), **options):
                started.set()

        reader = asyncio.create_task(read())
        await started.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    asyncio.run(leave() if how == "break" else cancel())
    assert pair.all_closed()
    assert len(pair.connection.steps()[0]) < 400


def test_error_in_a_stream(pair: Pair) -> None:
    async def read() -> None:
        async for _ in pair.mine.stream(tokens(1, 5), **OPTIONS):
            pair.connection.failure = "the swarm is gone"

    try:
        with pytest.raises(AssertionError, match="the swarm is gone"):
            asyncio.run(read())
    finally:
        pair.connection.failure = None
    assert pair.all_closed()
