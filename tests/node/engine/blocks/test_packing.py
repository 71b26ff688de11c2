"""Packed linear layers compute what plain ones do, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from swarm.compute import packed_linear
from swarm.compute.packed_linear import PackedLinear
from swarm.node.engine.blocks.packing import pack_block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 17, 300])
@pytest.mark.parametrize("large", [False, True])
def test_packed_is_plain(
    dtype: torch.dtype, bias: bool, rows: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(packed_linear, "_LARGE", 16 << 10)
        monkeypatch.setattr(packed_linear, "_SLOW_BYTES", 16 << 10)
    torch.manual_seed(rows)
    plain = nn.Sequential(nn.Linear(96, 160, bias=bias), nn.SiLU(), nn.Linear(160, 90, bias=bias)).to(dtype)
    plain.requires_grad_(False)
    packed = copy.deepcopy(plain)
    pack_block(packed)
    if not isinstance(packed[0], PackedLinear):
        pytest.fail("this machine's torch does not pack: the node runs without it, but nothing is tested here")
    assert torch.equal(packed[2].weight, plain[2].weight)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    inputs = [torch.randn(1, rows, 96).to(dtype).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [plain(inputs[0]), packed(inputs[1])]
    torch.testing.assert_close(outputs[1], outputs[0], **tolerance)
    for output in outputs:
        output.backward(torch.ones_like(output))
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **tolerance)
    with torch.inference_mode():
        torch.testing.assert_close(packed(inputs[1].detach()), outputs[0].detach(), **tolerance)
