"""How many blocks fit into a node's memory, with what quantization and KV cache. Pure functions of plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarm.errors import UsageError

MEMORY_SHARE = 0.85
"""How much of the free memory a node plans to use: the rest is for activations and everything else on the machine."""

ASKED_SHARE = 0.95
"""The same where the user has said which blocks, or how many."""

_SESSION_TOKENS = 4096  # of a session that the default KV cache reckons with, if the model has as many positions
_SESSIONS, _MOST_SESSIONS = 4, 32
_FEWEST_TOKENS = 2048  # with less than this a default KV cache serves nobody
_PAGE = 16


@dataclass(frozen=True)
class Sizes:
    """What a model's blocks need.

    Attributes:
        num_blocks: of the whole model.
        block_bytes: weights of one block by quantization; there is always ``"none"``. For a quantized checkpoint also
            ``"packed"``, all weights as they are there; and ``"kernels"``, only those for which there is a kernel.
        token_bytes: one token in the KV cache of one block.
        positions: that the model has; ``None``: no limit is known.
        fastest: how a quantized checkpoint is computed with fastest.
    """

    num_blocks: int
    block_bytes: Mapping[str, int]
    token_bytes: int
    positions: int | None = None
    fastest: str = "none"


@dataclass(frozen=True)
class Wish:
    """What the user has decided; ``None`` leaves it to the node.

    Attributes:
        blocks: how many.
        quantization: one of ``Sizes.block_bytes``; ``"checkpoint"``: packed, but what is slow to compute with only if
            the blocks asked for don't fit without it; or ``"auto"``: the same for a quantized checkpoint, for others
            none if all blocks asked for fit, else nf4.
        cache_tokens: size of the KV cache.
        early: blocks are served while others are still loaded, so the KV cache is there meanwhile.
    """

    blocks: int | None = None
    quantization: str = "checkpoint"
    cache_tokens: int | None = None
    early: bool = False


@dataclass(frozen=True)
class Plan:
    """What fits. ``bytes_each`` is what a block takes with its KV cache; ``reason`` says why in words, with a hint if
    another quantization would serve more."""

    num_blocks: int
    quantization: str
    cache_tokens: int
    bytes_each: int
    reason: str


def plan_memory(free_bytes: int, sizes: Sizes, wish: Wish) -> Plan:
    """As many blocks as fit with a KV cache of a sensible size, or the blocks that are asked for.

    The plan's weights and KV cache, and its weights with the unquantized block that is there while it is quantized, fit
    into the node's share of ``free_bytes``; all three together if blocks are served early. More memory never means
    fewer blocks, nor less KV cache for as many.

    Raises:
        UsageError: not even one block fits, or not those that are asked for. The message says what would.
    """
    if wish.blocks is not None and not 1 <= wish.blocks <= sizes.num_blocks:
        raise UsageError(f"--num-blocks {wish.blocks}: the model has {sizes.num_blocks} blocks")
    budget = int(free_bytes * (MEMORY_SHARE if wish.blocks is None else ASKED_SHARE))
    quantization = _choose(budget, sizes, wish)
    count = wish.blocks or _most_blocks(budget, sizes, wish, quantization)
    tokens = _cache_tokens(budget, sizes, wish, quantization, count) if count else None
    if tokens is None:
        raise UsageError(_refusal(free_bytes, budget, sizes, wish, quantization))
    reason = _reason(free_bytes, budget, sizes, wish, quantization, count, tokens)
    return Plan(count, quantization, tokens, sizes.block_bytes[quantization] + tokens * sizes.token_bytes, reason)


def _choose(budget: int, sizes: Sizes, wish: Wish) -> str:
    """One of ``sizes.block_bytes``: the fastest with which the blocks asked for fit, else the smallest."""
    count = wish.blocks or 1
    if wish.quantization == "checkpoint" or (wish.quantization == "auto" and "packed" in sizes.block_bytes):
        order = (sizes.fastest, "packed")
    elif wish.quantization == "auto":
        order, count = ("none", "nf4"), wish.blocks or sizes.num_blocks
    else:
        return wish.quantization
    known = [name for name in order if name in sizes.block_bytes]
    return next((name for name in known if _cache_tokens(budget, sizes, wish, name, count) is not None), known[-1])


def _most_blocks(budget: int, sizes: Sizes, wish: Wish, quantization: str) -> int:
    """How many blocks fit with the KV cache asked for, or with that of a few sessions; one block may have less."""
    tokens = wish.cache_tokens or _usual_tokens(sizes)
    block = sizes.block_bytes[quantization]
    loading = _loading(sizes, quantization)
    with_cache = budget - loading if wish.early else budget
    count = min(with_cache // (block + tokens * sizes.token_bytes), (budget - loading) // block)
    if count < 1:
        return 1 if _cache_tokens(budget, sizes, wish, quantization, 1) is not None else 0
    return min(count, sizes.num_blocks)


def _cache_tokens(budget: int, sizes: Sizes, wish: Wish, quantization: str, count: int) -> int | None:
    """The size of the KV cache beside ``count`` blocks; ``None``: they don't fit."""
    rest = budget - count * sizes.block_bytes[quantization]
    if rest < (loading := _loading(sizes, quantization)):
        return None
    fitting = (rest - loading if wish.early else rest) // (count * sizes.token_bytes)
    if wish.cache_tokens is not None:
        return wish.cache_tokens if wish.cache_tokens <= fitting else None
    usual = _usual_tokens(sizes)
    if fitting < min(_FEWEST_TOKENS, usual):
        return None
    tokens = fitting if fitting < usual else usual + (fitting - usual) // 2
    return min(tokens, usual * _MOST_SESSIONS // _SESSIONS) // _PAGE * _PAGE


def _usual_tokens(sizes: Sizes) -> int:
    session = min(sizes.positions or _SESSION_TOKENS, _SESSION_TOKENS)
    return max(_PAGE, _SESSIONS * session // _PAGE * _PAGE)


def _loading(sizes: Sizes, quantization: str) -> int:
    """What is needed while loading beyond the weights: a block that is not quantized yet; parts of packed ones."""
    if quantization in ("packed", "kernels"):
        return sizes.block_bytes[quantization]
    return 0 if quantization == "none" else sizes.block_bytes["none"]


def _reason(free_bytes: int, budget: int, sizes: Sizes, wish: Wish, quantization: str, count: int, tokens: int) -> str:
    block, cache = sizes.block_bytes[quantization], count * tokens * sizes.token_bytes
    weights = {"none": "", "packed": " packed", "kernels": " packed in part"}.get(quantization, f" in {quantization}")
    reason = (
        f"{count} × {_size(block)}{weights} and {_size(cache)} for {tokens} tokens of KV cache, "
        f"of {_size(free_bytes)} free"
    )
    if wish.blocks is None and count < sizes.num_blocks and quantization in ("none", "kernels"):
        more = {name: _most_blocks(budget, sizes, wish, name) for name in sizes.block_bytes}
        best = max(more, key=lambda name: more[name])
        if more[best] > count:
            reason += f"; --quantization {best} would fit {more[best]}"
    return reason


def _refusal(free_bytes: int, budget: int, sizes: Sizes, wish: Wish, quantization: str) -> str:
    count = wish.blocks or 1
    tokens = wish.cache_tokens or min(_FEWEST_TOKENS, _usual_tokens(sizes))
    block = sizes.block_bytes[quantization]
    cache, loading = count * tokens * sizes.token_bytes, _loading(sizes, quantization)
    needed = count * block + (cache + loading if wish.early else max(cache, loading))
    ways: list[str] = []
    fewer = _most_blocks(budget, sizes, wish, quantization)
    if 0 < fewer < count:
        ways.append(f"serve {fewer} (--num-blocks {fewer}, or as many with --blocks)")
    for name, size in sizes.block_bytes.items():
        if size < block and _cache_tokens(budget, sizes, wish, name, count) is not None:
            ways.append(f"--quantization {name}")
            break
    if wish.cache_tokens is not None:
        room = budget - count * block
        fitting = max(0, room - loading if wish.early else room) // (count * sizes.token_bytes) // _PAGE * _PAGE
        if fitting >= _PAGE and room >= loading:
            ways.append(f"--cache-tokens {fitting}")
    what = "one block needs" if count == 1 else f"{count} blocks need"
    return (
        f"{what} {_size(needed)} with {tokens} tokens of KV cache, and of {_size(free_bytes)} free memory "
        f"{_size(budget)} can be used: {'; or '.join(ways) if ways else 'free some memory, or take a larger machine'}"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def widest_mean(sizes: Sequence[int], count: int) -> int:
    """Of ``count`` neighbours among ``sizes``, the mean, rounded up, where they need most."""
    sums = (sum(sizes[start : start + count]) for start in range(len(sizes) - count + 1))
    return -(-max(sums) // count)


def usable_together(free_bytes: Sequence[int], block_bytes: int) -> int:
    """Of what is free on several devices, how much whole blocks can use: less than one stays empty on each but one."""
    return max(0, sum(free_bytes) - (len(free_bytes) - 1) * block_bytes)


def share_blocks(count: int, free_bytes: Sequence[int], bytes_each: int) -> list[int]:
    """How many of ``count`` blocks, of ``bytes_each`` with their KV cache, each device gets, so that what stays free is
    as even as it can be. If they fit at all, they fit like this."""
    left, shares = list(free_bytes), [0] * len(free_bytes)
    for _ in range(count):
        most = max(range(len(left)), key=left.__getitem__)
        shares[most] += 1
        left[most] -= bytes_each
    return shares
