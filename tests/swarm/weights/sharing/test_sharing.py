from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import BadRequestError, ModelError
from swarm.model.loading import SpanLoader, load_span
from swarm.model.source import resolve, resolve_store
from swarm.model.tensors import block_tensors
from swarm.node.engine import executor
from swarm.node.engine.blocks.packing import pack_block
from swarm.ranges import as_ranges
from swarm.weights.sharing.checkpoint import StoreCheckpoint
from swarm.weights.sharing.holders import Holder, possible_prefixes
from swarm.weights.sharing.manifest import Manifest, make_manifest
from swarm.weights.sharing.picker import PATIENCE_SECONDS, Picker, next_depth, rarest
from swarm.weights.sharing.protocol import (
    MAX_PIECES,
    PiecesRequest,
    dump_have,
    inflate,
    join_manifest,
    load_have,
    manifest_parts,
)
from swarm.weights.sharing.seeder import UploadLimit
from swarm.weights.sharing.store import WeightStore, find_root
from swarm.wire import rpc
from swarm.wire.dht_prefix import default_dht_prefix
from tests.models import tiny_model
from tests.swarm.weights.sharing.test_manifest import JSON
from tests.swarm.weights.test_dequantize import FORMATS, quantized

COUNT = 12
bits = st.lists(st.booleans(), min_size=COUNT, max_size=COUNT).map(lambda found: np.array(found, np.bool_))


def copies_of(picker_tells: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return sum((has | coming).astype(int) for has, coming in picker_tells.values()) + np.zeros(COUNT, int)


@settings(max_examples=100)
@given(
    bits,
    st.dictionaries(st.sampled_from("abcd"), st.tuples(bits, bits)),
    st.lists(st.integers(0, 2), min_size=COUNT, max_size=COUNT).map(np.array),
    st.data(),
)
def test_any_swarm_ends_with_all_that_honest_peers_have(
    wanted: np.ndarray, peers: dict[str, tuple[np.ndarray, np.ndarray]], order: np.ndarray, data: st.DataObject
) -> None:
    """Peers that answer in any order, leave, come back, lack what they said they had, or lie."""
    picker: Picker[str] = Picker(wanted, set(), seed=0, order=order)
    liars = data.draw(st.sets(st.sampled_from("abcd"), max_size=2), label="liars")
    told = {peer: (has.copy(), coming & ~has) for peer, (has, coming) in peers.items()}
    under_way, refused = dict[tuple[str, int], float](), set[str]()
    for peer, (has, coming) in told.items():
        picker.tell(peer, has, coming)
    now, troubles = 0.0, 6
    for _ in range(500):
        now += 1.0
        for peer in sorted(told):
            others = {piece for _, piece in under_way}
            free = picker.missing & told[peer][0]
            free[list(others)] = False
            piece = picker.next(peer, now)
            if piece is None:
                assert not free.any(), "a piece that nobody is asked for"
                continue
            assert peer not in refused
            assert picker.missing[piece]
            assert told[peer][0][piece], "asked of a peer that does not have it"
            if piece in others:
                assert others >= set(np.nonzero(picker.missing)[0]), "twice, though others have not been asked for"
                [since] = [at for (_, asked), at in under_way.items() if asked == piece]
                assert now - since >= PATIENCE_SECONDS
            else:
                assert order[piece] == order[free].min(), "not what is needed next"
                copies, equals = copies_of(told), free & (order == order[piece])
                assert copies[piece] == copies[equals].min(), "not the rarest"
            under_way[peer, piece] = now
        if not under_way:
            break
        peer, piece = data.draw(st.sampled_from(sorted(under_way)))
        trouble = troubles > 0 and data.draw(st.sampled_from(["", "", "leaves", "lacks", "late"]))
        if trouble == "late":
            now += PATIENCE_SECONDS
        if trouble:
            troubles -= 1
        if peer in liars:
            picker.refuse(peer)
            refused.add(peer)
        elif trouble == "leaves":
            picker.leave(peer)
            picker.tell(peer, *told[peer])  # and is back
        elif trouble == "lacks":
            picker.lacks(peer, piece)
            told[peer][0][piece] = False
        else:
            assert picker.arrived(peer, piece) == bool(wanted[piece])
            wanted[piece] = False
            under_way = {each: at for each, at in under_way.items() if each[1] != piece}
        if peer in liars or trouble == "leaves":
            under_way = {each: at for each, at in under_way.items() if each[0] != peer}
        elif trouble == "lacks":
            under_way.pop((peer, piece), None)
        if peer in liars:
            del told[peer]
            picker.tell(peer, *peers[peer])  # what it says is of no interest any more
    held = np.zeros(COUNT, np.bool_)
    for has, _ in told.values():
        held |= has
    assert not (picker.missing & held).any()
    assert not picker.asked


def test_the_rarest_are_taken_at_random() -> None:
    candidates = np.array([True, True, False, True, True])
    copies = np.array([2, 1, 0, 1, 3])
    random = np.random.default_rng(0)
    assert {rarest(candidates, copies, random) for _ in range(50)} == {1, 3}
    assert rarest(np.zeros(5, np.bool_), copies, random) is None


@given(st.integers(2, 16), st.lists(st.floats(0, 100)))
def test_a_slow_peer_is_asked_for_little_at_a_time(depth: int, waits: list[float]) -> None:
    for waited in waits:
        after = next_depth(depth, waited)
        assert 2 <= after <= 16
        assert after >= depth if waited < 0.2 else after <= depth
        depth = after
    for _ in range(20):
        depth = next_depth(depth, 1.0)
    assert depth == 2


@given(bits, bits)
def test_what_a_peer_has_goes_over_the_wire(has: np.ndarray, coming: np.ndarray) -> None:
    found = load_have(dump_have(has, coming), COUNT)
    assert (found[0] == has).all()
    assert (found[1] == coming).all()
    with pytest.raises(BadRequestError):
        load_have(dump_have(has, coming), COUNT + 8)


@given(st.binary(max_size=200), st.integers(0, 100))
def test_what_strangers_deflate(data: bytes, limit: int) -> None:
    with contextlib.suppress(BadRequestError):
        assert len(inflate(data, limit)) <= limit


def test_a_bomb_is_not_inflated() -> None:
    with pytest.raises(BadRequestError, match="larger"):
        inflate(zlib.compress(bytes(1 << 26)), 1 << 20)


ROOT = "ab" * 32


@given(JSON | st.dictionaries(st.sampled_from(["root", "file", "pieces", "blocks", "whole"]), JSON | st.just(ROOT)))
def test_requests_and_records_of_strangers(found: Any) -> None:
    try:
        request = PiecesRequest.from_message(rpc.Request(metadata=rpc.dump(found if isinstance(found, dict) else {})))
        assert request.root == ROOT
        assert len(request.pieces) <= MAX_PIECES
    except (BadRequestError, OverflowError):
        pass
    try:
        holder = Holder.from_value(found)
        assert holder.root == ROOT
        assert all(start < end for start, end in holder.blocks)
    except ValueError:
        pass


def test_requests_of_ours_are_understood() -> None:
    request = PiecesRequest(ROOT, 3, (0, 7))
    assert PiecesRequest.from_message(request.to_message()) == request
    with pytest.raises(BadRequestError):
        PiecesRequest.from_message(PiecesRequest(ROOT, 3, tuple(range(MAX_PIECES + 1))).to_message())
    with pytest.raises(BadRequestError):
        PiecesRequest.from_message(PiecesRequest("../..").to_message())


@given(st.sets(st.integers(0, 30)))
def test_ranges(blocks: set[int]) -> None:
    ranges = as_ranges(sorted(blocks))
    assert {block for start, end in ranges for block in range(start, end)} == blocks
    assert all(first[1] < second[0] for first, second in itertools.pairwise(ranges))


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B", "bigscience/bloom", "demo", "/some/where/x"])
@pytest.mark.parametrize("kind", ["llama", "bloom", "qwen2"])
def test_a_name_without_a_config_leads_to_the_same_prefix(model: str, kind: str) -> None:
    assert default_dht_prefix(model, kind) in possible_prefixes(model, None)
    assert possible_prefixes(model, "x") == ["x"]


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model("llama-gqa", sharded=True)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One file, of several pieces."""
    return Path(shutil.copytree(tiny_model("llama-gqa", hidden=256, layers=3), tmp_path / "single"))


def test_a_manifest_arrives_or_does_not(model: Path) -> None:
    manifest = make_manifest(model)
    data = b"".join(manifest_parts(manifest))
    assert join_manifest(data, manifest.root) == manifest
    with pytest.raises(ValueError, match="another root"):
        join_manifest(data, ROOT)
    with pytest.raises(BadRequestError):
        join_manifest(data[:-1], manifest.root)


def pieces_of(store: WeightStore, directory: Path) -> dict[int, bytes]:
    seeder = WeightStore(directory, store.manifest)
    assert seeder.is_whole
    found = {piece: seeder.read(piece) for piece in range(store.num_pieces)}
    assert None not in found.values()
    return found  # type: ignore[return-value]


def test_a_store_is_filled_in_any_order_and_goes_on_after_a_restart(single: Path, tmp_path: Path) -> None:
    manifest, to = make_manifest(single), tmp_path / "to"
    store = WeightStore.create(to, manifest)
    data = pieces_of(store, single)
    assert store.try_lock()
    order = np.random.default_rng(1).permutation(store.num_pieces).tolist()
    assert len(order) > 5
    for piece in order[: len(order) // 2]:
        assert not store.write(piece, data[piece] + b"x")
        assert not store.write(piece, data[(piece + 1) % len(data)])
        assert store.read(piece) is None
        assert store.write(piece, data[piece])
        assert store.read(piece) == data[piece]
    assert not WeightStore.create(to, manifest).try_lock(), "another process would not get in"
    store.finish()

    again = WeightStore.create(to, manifest)
    assert np.nonzero(again.has)[0].tolist() == sorted(order[: len(order) // 2])
    kept = WeightStore.open(to)
    assert kept is not None
    assert (kept.has == again.has).all()
    assert again.try_lock()
    for piece in order[len(order) // 2 :]:
        assert again.write(piece, data[piece])
    again.finish()
    assert again.is_whole
    for file in manifest.files:
        assert (to / file.name).read_bytes() == (single / file.name).read_bytes()
    assert make_manifest(to).root == manifest.root
    assert sorted(path.name for path in (to / ".swarm").iterdir() if "lock" not in path.name) == ["manifest.json"]
    assert again.size_of(again.has) == sum(file.size for file in manifest.files)


def test_a_store_keeps_out_of_other_directories(single: Path, tmp_path: Path) -> None:
    manifest = make_manifest(single)
    before = sorted(single.iterdir())
    with pytest.raises(ModelError, match="other files in it"):
        WeightStore.create(single, manifest)
    assert sorted(single.iterdir()) == before
    assert find_root(single) is None
    assert WeightStore.open(single) is None
    (tmp_path / "x" / ".swarm").mkdir(parents=True)
    (tmp_path / "x" / ".swarm" / "manifest.json").write_text(json.dumps({"root": ROOT, "files": 3}))
    assert WeightStore.open(tmp_path / "x") is None


def test_a_span_is_loaded_from_just_its_pieces(single: Path, tmp_path: Path) -> None:
    source = resolve(str(single))
    store = WeightStore.create(tmp_path / "to", make_manifest(single))
    data = pieces_of(store, single)
    blocks = [store.pieces_of(names) for names in block_tensors(source)]
    wanted = store.small_pieces() | blocks[1]
    assert not wanted.all()
    assert store.try_lock()
    for piece in np.nonzero(wanted)[0].tolist():
        store.write(piece, data[piece])
    store.finish()
    found = resolve_store("x", store, "x")
    assert (found.dtype, found.dht_prefix, found.num_blocks) == (source.dtype, "x", 3)
    assert block_tensors(found) == block_tensors(source)
    options: Any = {"dtype": torch.float32, "device": "cpu"}
    ours, theirs = load_span(found, 1, 2, **options), load_span(source, 1, 2, **options)
    expected = theirs.blocks.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.blocks.state_dict().items())
    with pytest.raises(ModelError, match="missing"):
        load_span(found, 2, 3, **options)
    with pytest.raises(ModelError, match="missing"):
        StoreCheckpoint(store).read("model.norm.weight")


def test_blocks_run_before_the_others_are_here(single: Path, tmp_path: Path) -> None:
    """In any order, and those that are loaded are not touched by those that follow."""
    source = resolve(str(single))
    store = WeightStore.create(tmp_path / "to", make_manifest(single))
    data, blocks = pieces_of(store, single), [store.pieces_of(names) for names in block_tensors(source)]
    options: Any = {"dtype": torch.float32, "device": "cpu", "finish": pack_block}
    whole = load_span(source, 0, 3, **options)
    hidden, expected = torch.randn(1, 5, source.hidden_size), {}
    for first, last in ((1, 2), (1, 3), (0, 3)):
        expected[first, last] = executor.forward(whole, hidden, first=first, last=last)
    assert store.try_lock()

    def take(wanted: np.ndarray) -> None:
        for piece in np.nonzero(wanted)[0].tolist():
            store.write(piece, data[piece])

    take(store.small_pieces())
    loader = SpanLoader(resolve_store("x", store, "x"), 0, 3, **options)
    with pytest.raises(ModelError, match="missing"):
        loader.load(1)
    for block, (first, last) in zip((1, 2, 0), expected, strict=True):
        take(blocks[block])
        loader.load(block)
        for begin, end in expected:
            if first <= begin and end <= last:
                output = executor.forward(loader.span, hidden, first=begin, last=end)
                assert torch.equal(output, expected[begin, end])
        part = loader.span.part(first, last)
        assert (part.start, part.end, len(part.blocks), len(part.devices)) == (first, last, last - first, last - first)
        assert torch.equal(executor.forward(part, hidden, first=first, last=last), expected[first, last])
    store.finish()


def test_a_quantized_span_is_loaded_from_just_its_pieces(tmp_path: Path) -> None:
    packed, _ = quantized(tmp_path, tiny_model("llama-gqa"), *FORMATS["fp8"])
    source = resolve(str(packed))
    store = WeightStore.create(tmp_path / "to", make_manifest(packed))
    data = pieces_of(store, packed)
    assert store.try_lock()
    for piece in np.nonzero(store.small_pieces() | store.pieces_of(block_tensors(source)[1]))[0].tolist():
        store.write(piece, data[piece])
    store.finish()
    found = resolve_store("x", store, "x")
    assert found.quantization is not None
    options: Any = {"dtype": torch.float32, "device": "cpu"}
    expected = load_span(source, 1, 2, **options).blocks.state_dict()
    ours = load_span(found, 1, 2, **options).blocks.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_a_manifest_whose_tensors_lie_elsewhere_is_noticed(single: Path, tmp_path: Path) -> None:
    """Its maker may have made it so that holes are read as weights."""
    found = make_manifest(single).to_json()
    tensor = found["tensors"][0]
    tensor["stop"] = tensor["start"]
    store = WeightStore(single, Manifest.from_json(found))
    with pytest.raises(ModelError, match="not what the manifest says"):
        StoreCheckpoint(store).read(tensor["name"])


def test_uploads_are_spread_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten pieces at 1 MB/s: the last may leave after 9 s, and who came first goes first."""
    slept: list[float] = []
    order: list[int] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        begin, clock = loop.time(), [0.0]
        monkeypatch.setattr(loop, "time", lambda: begin + clock[0])

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            clock[0] += seconds

        monkeypatch.setattr(asyncio, "sleep", sleep)
        limit = UploadLimit(1e6)

        async def send(number: int) -> None:
            await limit.wait(1_000_000)
            order.append(number)

        await asyncio.gather(*(send(number) for number in range(10)))
        await UploadLimit(0).wait(1 << 40)

    asyncio.run(run())
    assert order == list(range(10))
    assert sum(slept) == pytest.approx(9.0)
