"""Tensors to and from hivemind's protobuf messages, the format of Petals.

bfloat16 is sent as two bytes an element. hivemind's own default widens it to float32 before sending; its reader takes
both, and so does ours.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import AsyncIterator, Iterator

import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto import runtime_pb2

from ..errors import MalformedError

NONE = runtime_pb2.CompressionType.NONE
FLOAT16 = runtime_pb2.CompressionType.FLOAT16
COMPRESSIONS = (NONE, FLOAT16)  # the others lose too much for hidden states, so nobody is to ask for them

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NOTHING = {dtype: torch.empty(0, dtype=dtype) for dtype in _NAMES}
# Of a number's last byte, which has its sign and the upper bits of its exponent: what says that it may be infinite, no
# number, or so large (2 ** 65 in float32 and bfloat16) that a sum of such numbers could overflow
_LARGE = bytes(byte for byte in range(256) if byte & 0x7F >= 0x60)
_LARGE_BYTES = {
    torch.float32: _LARGE,
    torch.bfloat16: _LARGE,
    torch.float16: bytes(byte for byte in range(256) if byte & 0x7C == 0x7C),
}
_GLANCED_BYTES = 2**15
PART_BYTES = 2**21
"""Tensors sent over a streaming RPC are cut into parts of this many bytes."""

# what arrives is only read, then copied into a batch
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def encode(tensor: torch.Tensor, compression: int = NONE) -> runtime_pb2.Tensor:
    """``tensor`` (any shape, one of :data:`DTYPES`, on the CPU) as a message. Copies the data once."""
    if compression != NONE:
        tensor = tensor.detach()
        return serialize_torch_tensor(tensor.float() if tensor.dtype == torch.bfloat16 else tensor, compression)
    return runtime_pb2.Tensor(
        buffer=raw_bytes(tensor.contiguous()), size=tensor.shape, dtype=_NAMES[tensor.dtype], compression=NONE
    )


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A copy of the memory of a contiguous tensor. Not by way of numpy, which has no bfloat16: behind the layers of a
    step, whose weights have filled the processor's caches, each call into torch costs some twenty microseconds."""
    if not tensor.is_cpu:
        raise ValueError(f"a tensor on {tensor.device} can't be read here")
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def decode(message: runtime_pb2.Tensor, *, max_elements: int) -> torch.Tensor:
    """The tensor in ``message``, as a read-only view of its bytes where the format allows.

    Raises:
        MalformedError: a dtype, size or length that can't be, or more than ``max_elements`` elements.
    """
    dtype = DTYPES.get(message.dtype)
    if dtype is None:
        raise MalformedError(f"tensors of dtype {message.dtype[:40]!r} are not taken")
    shape = tuple(message.size)
    elements = math.prod(shape)
    # without its zeros, which would hide sizes of which torch can't make even an empty tensor
    if len(shape) > 4 or (elements or math.prod(size or 1 for size in shape)) > max_elements:
        raise MalformedError(f"a tensor of shape {shape[:8]} is too large: the limit is {max_elements} elements")
    if message.compression == FLOAT16:
        if len(message.buffer) != elements * 2 or dtype == torch.int64:
            raise MalformedError("the tensor's data does not have the length that its shape says")
        return deserialize_torch_tensor(message)
    if message.compression != NONE:
        raise MalformedError(f"compression {message.compression} is not taken")
    buffer = message.buffer
    if elements == 0:
        if buffer:
            raise MalformedError("an empty tensor has data")
        return torch.empty(shape, dtype=dtype) if len(shape) > 1 else _NOTHING[dtype]
    if dtype == torch.bfloat16 and len(buffer) == 4 * elements:
        return torch.frombuffer(buffer, dtype=torch.float32).view(shape).to(torch.bfloat16)
    if len(buffer) != elements * dtype.itemsize:
        raise MalformedError("the tensor's data does not have the length that its shape says")
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a floating tensor has neither infinities nor NaNs. One pass: either makes the sum infinite or NaN.

    Numbers so large that their sum overflows float32 count as infinite too; hidden states are far from that. Of a few
    numbers, as decode has them, mostly a glance at their exponents will do.
    """
    large = _LARGE_BYTES.get(tensor.dtype)
    if large is not None and tensor.nbytes <= _GLANCED_BYTES and tensor.is_cpu and tensor.is_contiguous():
        size = tensor.itemsize
        exponents = raw_bytes(tensor)[size - 1 :: size]
        if len(exponents.translate(None, large)) == len(exponents):
            return True
    return math.isfinite(tensor.sum(dtype=torch.float32).item())


def split(message: runtime_pb2.Tensor, part_bytes: int = PART_BYTES) -> Iterator[runtime_pb2.Tensor]:
    """Cuts an encoded tensor into parts; the first has everything but the rest of the data."""
    buffer = message.buffer
    yield runtime_pb2.Tensor(
        buffer=buffer[:part_bytes],
        size=message.size,
        dtype=message.dtype,
        compression=message.compression,
        chunks=max(1, -(-len(buffer) // part_bytes)),
    )
    for offset in range(part_bytes, len(buffer), part_bytes):
        yield runtime_pb2.Tensor(buffer=buffer[offset : offset + part_bytes])


async def join(parts: AsyncIterator[runtime_pb2.Tensor], *, max_bytes: int) -> list[runtime_pb2.Tensor]:
    """Puts the parts of a streaming RPC together again.

    Raises:
        MalformedError: more than ``max_bytes`` of data in all.
    """
    tensors: list[tuple[runtime_pb2.Tensor, list[bytes]]] = []
    total = 0
    async for part in parts:
        total += len(part.buffer) + 64  # so that empty parts don't come for free
        if total > max_bytes:
            raise MalformedError(f"the request is larger than {max_bytes} bytes")
        if part.dtype or not tensors:
            tensors.append((part, [part.buffer]))
        else:
            tensors[-1][1].append(part.buffer)
    for tensor, buffers in tensors:
        if len(buffers) > 1:
            tensor.buffer = b"".join(buffers)
    return [tensor for tensor, _ in tensors]
