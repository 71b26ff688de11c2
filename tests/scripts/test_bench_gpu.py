"""The benchmark for GPUs, on a toy: what nobody runs for weeks must not rot."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from swarm.model.skeleton import build_skeleton
from swarm.node.engine.blocks.quantization import quantized_bytes

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_it_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench = importlib.import_module("bench_gpu")
    bench.main(device="cpu", tiny=True, scheme="int4")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:3] for line in lines if "tok/s" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [["1", "16"], ["1", "40"], ["4", "16"], ["4", "40"]]
    assert bench.largest_that_fits(80 << 30, "nf4") == "llama-2-70b"
    assert bench.largest_that_fits(80 << 30, "none") == "llama-2-13b"
    assert bench.largest_that_fits(141 << 30, "int4") == "falcon-180b"
    with pytest.raises(SystemExit, match="too little"):
        bench.largest_that_fits(1 << 30, "nf4")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="finds none"):
            bench.main()


def test_the_geometries_are_those_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench = importlib.import_module("bench_gpu")
    for name, shape in bench.MODELS.items():
        if name == "tiny":
            continue
        source = bench.source_of(name, torch.bfloat16)
        layers = build_skeleton(source, torch.bfloat16, attention="eager").layers
        weights = quantized_bytes(layers[0], None) / 2 * shape.layers / 1e9
        assert weights == pytest.approx(shape.billions, rel=0.01)
