"""Strangers' messages: whatever comes, the node answers with an error, serves the others and keeps no memory for it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import pytest
import torch
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError
from hivemind.proto import runtime_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.errors import BadRequestError, PeerLostError, SwarmError
from swarm.wire import rpc
from swarm.wire.codec import decode, encode
from swarm.wire.records import span_uid
from swarm.wire.stream import MessageStream
from tests.node.rpc.scene import (
    EMPTY,
    EMPTY_INT64,
    HIDDEN,
    Request,
    Response,
    Scene,
    converse,
    step,
    still_well,
)

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "session_id", "max_length", "step_id", "next_servers", "pushed", "start", "left_padding", "args_structure",
    "active_adapter", "points", "alloc_timeout", "prefix_context", "page_names",
)  # fmt: skip


@st.composite
def metadata(draw: st.DrawFn) -> bytes:
    if draw(st.booleans()):
        return draw(st.binary(max_size=64))
    fields = draw(st.dictionaries(st.sampled_from(FIELDS), junk, max_size=4))
    return rpc.dump({"max_length": 64, **fields} if draw(st.booleans()) else fields)


@st.composite
def tensors(draw: st.DrawFn) -> runtime_pb2.Tensor:
    size = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, HIDDEN, 1000, 2**31]), max_size=5))
    return runtime_pb2.Tensor(
        buffer=draw(
            st.binary(max_size=64) | st.sampled_from([bytes(4 * HIDDEN), bytes(8 * HIDDEN), b"\xff" * 4 * HIDDEN])
        ),
        size=size,
        dtype=draw(st.sampled_from(["float32", "bfloat16", "int64", "float16", "", "object", "complex64", "🙂"])),
        compression=draw(st.integers(0, 5)),
        chunks=draw(st.integers(-5, 5)),
    )


@st.composite
def requests(draw: st.DrawFn) -> runtime_pb2.ExpertRequest:
    good = encode(torch.zeros(1, 1, HIDDEN))
    return Request(
        uid=draw(
            st.sampled_from([span_uid("m", 0, 2), "m.0", "m.1", "m.0 m.1 m.2", "m.1 m.0", "", "x.0", "m.-1"])
            | st.text()
        ),
        tensors=draw(st.lists(tensors() | st.just(good) | st.just(EMPTY) | st.just(EMPTY_INT64), max_size=4)),
        metadata=draw(metadata()),
    )


property_based = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@property_based
@given(strange=st.lists(requests(), min_size=1, max_size=3), after=st.booleans())
def test_any_message_in_a_session(scene: Scene, right: torch.Tensor, strange: list[Any], after: bool) -> None:
    opening = [step(torch.zeros(1, 1, HIDDEN), 0)] if after else []
    scene.run(converse(scene, opening + strange))
    still_well(scene, right)


@property_based
@given(raw=st.binary(max_size=200))
def test_any_bytes_in_a_stream(scene: Scene, right: torch.Tensor, raw: bytes) -> None:
    async def send() -> None:
        _, _, writer = await scene.stranger.call_binary_stream_handler(
            scene.node.peer_id, rpc.handle_name(rpc.INFERENCE)
        )
        writer.write(raw)
        await asyncio.sleep(0.01)
        writer.close()

    scene.run(send())
    still_well(scene, right)


@property_based
@given(strange=requests(), method=st.sampled_from([rpc.PUSH, rpc.FORWARD, rpc.BACKWARD]))
def test_any_unary_message(scene: Scene, right: torch.Tensor, strange: Any, method: str) -> None:
    async def call() -> None:
        with contextlib.suppress(P2PHandlerError):
            await scene.stranger.call_protobuf_handler(scene.node.peer_id, rpc.handle_name(method), strange, Response)

    scene.run(call())
    still_well(scene, right)


@property_based
@given(
    strange=st.lists(requests(), max_size=3),
    method=st.sampled_from([rpc.FORWARD_STREAM, rpc.BACKWARD_STREAM, rpc.PUSH_STREAM]),
)
def test_any_streamed_parts(scene: Scene, right: torch.Tensor, strange: list[Any], method: str) -> None:
    async def call() -> None:
        stream = await scene.open(method)
        try:
            for request in strange:
                await stream.send(request)
            await stream.send_end()
            if method != rpc.PUSH_STREAM:
                while await stream.receive(Response) is not None:
                    pass
        except SwarmError:
            pass
        finally:
            stream.close()

    scene.run(call())
    still_well(scene, right)


HID = torch.zeros(1, 1, HIDDEN)
WRONG: dict[str, tuple[list[Any], str]] = {
    "too long a session": ([step(HID, 0, max_length=129)], "its limit is 128"),
    "too many rows": ([step(torch.zeros(9, 1, HIDDEN), 0)], "the limit is 8"),
    "too many tokens": ([step(torch.zeros(8, 33, HIDDEN), 0)], "smaller steps|too large"),
    "another hidden size": ([step(torch.zeros(1, 1, HIDDEN - 1), 0)], r"\[rows, tokens, 64\]"),
    "not a number": ([step(HID + float("nan"), 0)], "not finite"),
    "infinite": ([step(HID + float("inf"), 0)], "not finite"),
    "whole numbers": ([step(HID.to(torch.int64), 0)], "floating"),
    "two dimensions": ([step(HID[0], 0)], "rows"),
    "out of order": ([step(HID, 0), step(HID, 5)], "out of order"),
    "beyond the length": ([step(HID, 0, max_length=1), step(HID, 1)], "was opened for 1"),
    "other rows in a later step": ([step(HID, 0), step(torch.zeros(2, 1, HIDDEN), 1)], "the session has 1 rows"),
    "blocks elsewhere": ([step(HID, 0, uid="m.1 m.2")], "not served here"),
    "another model": ([step(HID, 0, uid="n.0")], "no block of"),
    "names of half a length": ([step(HID, 0, page_names=[b"x" * 15])], "16-byte names"),
    "too many names": ([step(HID, 0, page_names=[b"x" * 16 * 4097])], "4096 at most"),
    "names that are no bytes": ([step(HID, 0, page_names=["x" * 16])], "16-byte names"),
    "names of other rows": ([step(HID, 0, prefix_context=b"c", page_names=[b"", b""])], "one item per row"),
    "a long context": ([step(HID, 0, prefix_context=b"c" * 65)], "at most 64 bytes"),
    "an adapter": ([step(HID, 0, active_adapter="a")], "adapter"),
    "no length": ([Request(uid="m.0", tensors=[encode(HID), EMPTY, EMPTY_INT64])], "needs max_length"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_answer_says(scene: Scene, right: torch.Tensor, name: str) -> None:
    requests, pattern = WRONG[name]
    *before, last = scene.run(converse(scene, requests))
    assert all(isinstance(answer, torch.Tensor) for answer in before)
    assert isinstance(last, BadRequestError)
    assert re.search(pattern, str(last)), str(last)
    still_well(scene, right)


def test_an_oversized_frame_is_refused_before_it_is_read(scene: Scene, right: torch.Tensor) -> None:
    async def send() -> SwarmError:
        _, reader, writer = await scene.stranger.call_binary_stream_handler(
            scene.node.peer_id, rpc.handle_name(rpc.INFERENCE)
        )
        writer.write(b"\x00" + (2**40).to_bytes(8, "big") + b"x" * 100_000)
        stream = MessageStream(reader, writer, max_bytes=2**20)
        with pytest.raises(SwarmError) as raised:
            await stream.receive(Response)
        stream.close()
        return raised.value

    assert "too large" in str(scene.run(send()))
    still_well(scene, right)


def test_a_session_that_others_can_not_push_to_by_guessing(scene: Scene, right: torch.Tensor) -> None:
    async def push() -> None:
        for session_id in ("", "guess", None):
            await scene.stranger.call_protobuf_handler(
                scene.node.peer_id, rpc.handle_name(rpc.PUSH), step(HID, 0, session_id=session_id), Response
            )

    scene.run(push())
    still_well(scene, right)


def test_a_step_that_comes_twice_is_run_once(scene: Scene) -> None:
    hidden = torch.linspace(-1, 1, 2 * HIDDEN).view(1, 2, HIDDEN)

    async def twice() -> list[torch.Tensor]:
        stream = await scene.open()
        first = step(hidden[:, :1], 0, step_id="a", session_id="s")
        second = step(hidden[:, 1:], 1, step_id="b", session_id="s")
        for request in (first, first, second):
            await stream.send(request)
        await stream.send(Request())
        answers: list[torch.Tensor] = []
        with contextlib.suppress(PeerLostError):  # the node closes the stream at the end of a session, as Petals does
            while (response := await stream.receive(Response)) is not None:
                answers.append(decode(response.tensors[0], max_elements=2**20))
        return answers

    alone = scene.run(converse(scene, [step(hidden[:, :1], 0), step(hidden[:, 1:], 1)]))
    answers = scene.run(twice())
    assert len(answers) == 2
    for answer, expected in zip(answers, alone, strict=True):
        assert isinstance(expected, torch.Tensor)
        assert torch.equal(answer, expected)
