"""Records, metadata, tensors and errors on the wire: in the forms of Petals, and safe from what strangers send."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils import MSGPackSerializer
from hypothesis import example, given
from hypothesis import strategies as st

from swarm import errors
from swarm.wire import rpc
from swarm.wire.codec import DTYPES, FLOAT16, all_finite, decode, encode, join, split
from swarm.wire.error_text import from_wire, to_wire
from swarm.wire.records import Offer, ServerInfo, ServerState, parse_span_uid, span_uid

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 0, 8), (0,), (3, 5)])
def test_tensors_are_those_of_hivemind_both_ways(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    for message in (encode(tensor), serialize_torch_tensor(tensor)):  # hivemind widens bfloat16
        copy = runtime_pb2.Tensor.FromString(message.SerializeToString())
        for read in (decode(copy, max_elements=100), deserialize_torch_tensor(copy)):
            assert read.dtype == dtype
            assert torch.equal(read, tensor)


def test_bfloat16_is_two_bytes_an_element() -> None:
    assert len(encode(torch.zeros(1, 3, 8, dtype=torch.bfloat16)).buffer) == 48


def test_compressed_tensors() -> None:
    tensor = torch.linspace(-1, 1, 64).view(1, 2, 32)
    torch.testing.assert_close(decode(encode(tensor, FLOAT16), max_elements=64), tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [1, 7, 40_000])  # many are looked at in another way than few
def test_numbers_that_are_not_finite_are_found(dtype: torch.dtype, elements: int) -> None:
    for value in (0.0, -1.5, 1e4, -6e4, 1e19):
        tensor = torch.full((1, 1, elements), min(value, torch.finfo(dtype).max), dtype=dtype)
        assert all_finite(tensor)
        for bad in (float("inf"), float("-inf"), float("nan"), -float("nan")):
            tensor[0, 0, elements // 2] = bad
            assert not all_finite(tensor)
            assert not all_finite(tensor.transpose(0, 2))
    assert not all_finite(torch.full((1, 1, 4), 3e38, dtype=torch.bfloat16))  # the sum overflows


@example(b"", [0, 65, 66372617, 2137900203], "float32", 0)  # of which torch can't make even an empty tensor
@given(st.binary(max_size=40), st.lists(st.integers(0, 2**32 - 1), max_size=6), st.text(max_size=9), st.integers(0, 5))
def test_a_tensor_from_a_stranger_is_right_or_refused(buffer: bytes, size: list[int], dtype: str, how: int) -> None:
    message = runtime_pb2.Tensor(buffer=buffer, size=size, dtype=dtype or "float32", compression=how)
    try:
        tensor = decode(message, max_elements=16)
    except errors.BadRequestError:
        return
    assert list(tensor.shape) == size
    assert tensor.numel() <= 16


@given(st.integers(1, 200), st.integers(1, 64))
def test_parts_of_a_tensor_come_together_again(elements: int, part_bytes: int) -> None:
    messages = [encode(torch.arange(elements, dtype=torch.int64)), encode(torch.ones(2, 2))]

    async def parts() -> AsyncIterator[runtime_pb2.Tensor]:
        for message in messages:
            for part in split(message, part_bytes):
                yield part

    together = asyncio.run(join(parts(), max_bytes=10**6))
    assert [decode(message, max_elements=10**4).tolist() for message in together] == [
        list(range(elements)),
        [[1.0, 1.0], [1.0, 1.0]],
    ]
    with pytest.raises(errors.BadRequestError, match="larger than"):
        asyncio.run(join(parts(), max_bytes=8 * elements))


def test_records_go_round_and_petals_records_are_read() -> None:
    info = ServerInfo(
        ServerState.ONLINE,
        3.5,
        start_block=1,
        end_block=4,
        inference_rps=10.0,
        adapters=("a",),
        next_pings={"Qm": 0.1},
        cache_tokens_left=7,
        offer=Offer(fingerprint="f", push_stream=True, sessions=2, adapters={"ada": "1f"}),
    )
    assert ServerInfo.from_tuple(MSGPackSerializer.loads(MSGPackSerializer.dumps(info.to_tuple()))) == info
    petals = (2, 10.0, {"start_block": 0, "end_block": 4, "version": "2.2.0", "torch_dtype": "float32", "unknown": 1})
    read = ServerInfo.from_tuple(petals)
    assert (read.offer, read.start_block, read.torch_dtype) == (None, 0, "float32")


def test_free_cache_is_announced_in_petals_unit() -> None:
    """Keys and values are counted one by one, in each block."""
    ours = ServerInfo(ServerState.ONLINE, 1.0, start_block=2, end_block=5, cache_tokens_left=100, offer=Offer())
    state, throughput, extra = ours.to_tuple()
    assert extra["cache_tokens_left"] == 100 * 2 * 3
    assert [ours.cache_tokens_for(blocks) for blocks in (1, 2, 3)] == [100] * 3
    del extra["swarm"]
    theirs = ServerInfo.from_tuple((state, throughput, extra))
    assert [theirs.cache_tokens_for(blocks) for blocks in (1, 2, 3)] == [300, 150, 100]
    for end in (None, 2, 1):  # of how many blocks is not known
        assert ServerInfo.from_tuple((state, throughput, {**extra, "end_block": end})).cache_tokens_for(1) is None


@given(
    junk
    | st.tuples(junk, junk, junk)
    | st.tuples(
        st.just(2),
        st.just(1.0),
        st.dictionaries(
            st.sampled_from(
                [
                    *("start_block", "end_block", "next_pings", "adapters", "swarm", "version", "inference_rps"),
                    *("using_relay", "cache_tokens_left"),
                ]
            ),
            junk,
        ),
    )
)
def test_a_record_from_a_stranger_is_right_or_refused(source: Any) -> None:
    try:
        info = ServerInfo.from_tuple(source)
    except ValueError:
        return
    assert ServerInfo.from_tuple(info.to_tuple()) == info


@given(st.dictionaries(st.sampled_from(sorted(rpc.Metadata.__dataclass_fields__)), junk))
def test_metadata_from_a_stranger_is_right_or_refused(fields: dict[str, Any]) -> None:
    try:
        metadata = rpc.parse(rpc.load(rpc.dump(fields)))
    except (errors.BadRequestError, OverflowError):  # the latter: no msgpack can hold it
        return
    assert metadata.max_length is None or metadata.max_length >= 0


def test_hops_in_metadata() -> None:
    peer = PeerID(b"\x12\x20" + bytes(32))
    for form in (list, tuple):
        hops = form([form(rpc.NextHop(peer, "s", 3, 7).to_tuple())])
        assert rpc.parse({"next_servers": hops}).next_servers == (rpc.NextHop(peer, "s", 3, 7),)
    right = (peer.to_base58(), "s", 3, 7)
    wrong = [(5, "s", 3, 7), ([], "s", 3, 7), (right[0], None, 3, 7), (right[0], "s", 7, 3), (right[0], "s", -1, 3)]
    for hop in (*wrong, (right[0], "s", 0, 2**40), right[:3], (*right, 1), (right[0], "s", 3, 7.0), "hop", None):
        with pytest.raises(errors.BadRequestError, match="next_servers"):
            rpc.parse({"next_servers": [right, hop]})


@given(st.binary(max_size=200))
def test_bytes_as_metadata(raw: bytes) -> None:
    with contextlib.suppress(errors.BadRequestError):
        assert isinstance(rpc.load(raw), dict)


def test_arguments_as_petals_packs_them() -> None:
    one, two = torch.ones(1), torch.zeros(2)
    marked = ((b"__T1", b"__T0", b"__T1"), {})
    arranged = rpc.arrange([one, two], marked, count=3)
    assert [tensor.numel() for tensor in arranged] == [2, 1, 2]
    for wrong in (((b"__T7",), {}), ((b"x",), {}), 5, ((b"__T0", 3), {}), (b"__T0",)):
        with pytest.raises(errors.BadRequestError):
            rpc.arrange([one, two], wrong, count=1)


def test_uids() -> None:
    assert parse_span_uid(span_uid("a.b", 3, 6), "a.b") == (3, 6)
    for wrong in ("", "m.1", "m.0 m.2", "m.1 m.0", "n.0", "m.x", "m.-1", "m.0  m.1", "m.²"):
        with pytest.raises(ValueError, match=r"block"):
            parse_span_uid(wrong, "m" if wrong != "m.1" else "n")


def test_errors_keep_their_class_over_the_wire() -> None:
    for error in (errors.BadRequestError("a b"), errors.OutOfCacheError("full"), errors.LeavingError("bye")):
        again = from_wire(to_wire(error))
        assert (type(again), str(again)) == (type(error), str(error))
        again = from_wire(repr(RuntimeError(to_wire(error))))  # as hivemind's unary calls wrap it
        assert (type(again), str(again)) == (type(error), str(error))
    assert type(from_wire("something else")) is errors.RemoteError


@given(st.text())
def test_any_text_is_an_error(text: str) -> None:
    assert isinstance(from_wire(text), errors.SwarmError)
