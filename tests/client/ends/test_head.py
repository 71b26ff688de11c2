"""The head gives each thread its own rows, whoever computed them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from swarm.client.ends.head import CombinedForward, PackedForward


def test_threads_get_their_own_rows_and_wait_together() -> None:
    weight, sizes = torch.randint(-3, 4, (8, 16)).float(), []  # whole numbers: sums are exact in any order

    def forward(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        time.sleep(0.002)  # so that others come meanwhile
        return x @ weight.T

    combined, start = CombinedForward(forward), threading.Barrier(12)

    def run(number: int) -> None:
        start.wait()
        for turn in range(20):
            x = torch.full((1, 1 + number % 3, 16), float(number * 100 + turn))
            torch.testing.assert_close(combined(x), x @ weight.T)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(run, range(12)))
    assert sum(sizes) == 20 * sum(1 + number % 3 for number in range(12))
    assert len(sizes) < 120, "they were computed together"


def test_an_error_reaches_those_whose_rows_it_is_and_no_more() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise RuntimeError("no")
        return x

    combined = CombinedForward(forward)
    with pytest.raises(RuntimeError, match="no"):
        combined(torch.full((1, 4), float("nan")))
    assert torch.equal(combined(torch.ones(1, 4)), torch.ones(1, 4))


def test_an_interrupt_is_for_the_thread_that_it_came_to() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not begun.is_set():
            begun.set()
            go_on.wait()
        elif bool((x == 0).any()):
            raise KeyboardInterrupt
        return x + 1

    combined = CombinedForward(forward)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(combined, torch.full((1, 4), 9.0))
        begun.wait()
        interrupted = pool.submit(combined, torch.zeros(1, 4))  # the next in turn, who computes for all that wait
        time.sleep(0.05)
        others = [pool.submit(combined, torch.full((1, 4), float(number))) for number in (1, 2, 3)]
        time.sleep(0.05)
        go_on.set()
        with pytest.raises(KeyboardInterrupt):
            interrupted.result()
        assert [int(each.result()[0, 0]) for each in (first, *others)] == [10, 2, 3, 4]
    assert int(combined(torch.ones(1, 4))[0, 0]) == 2


def test_gradients_and_long_inputs_go_straight_through() -> None:
    combined = CombinedForward(lambda x: 2 * x)
    x = torch.ones(1, 4, requires_grad=True)
    combined(x).sum().backward()
    assert torch.equal(x.grad, torch.full((1, 4), 2.0))
    assert combined(torch.ones(1, 500, 4)).shape == (1, 500, 4)
    assert combined(torch.ones(1, 0, 4)).shape == (1, 0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_follow_those_that_are_trained(dtype: torch.dtype) -> None:
    head = nn.Linear(32, 80, bias=False, dtype=dtype)
    packed, x = PackedForward(head), torch.randn(3, 32).to(dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    packed(x).float().sum().backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(packed(x), head(x), **tolerance)
        head.weight.add_(1)
        torch.testing.assert_close(packed(x), head(x), **tolerance)
    head.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    packed(leaf).float().sum().backward()
    assert leaf.grad is not None
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), head(x), **tolerance)
