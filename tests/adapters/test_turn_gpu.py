"""Vectors turned by PyTorch's own products on a GPU."""

from __future__ import annotations

import pytest
import torch

from householder import householder_product
from householder.adapters import turn as turning
from householder.testing import relative_error

pytestmark = pytest.mark.gpu

LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 3e-6}


def leaves(N, D, dtype):
    generator = torch.Generator().manual_seed(0)
    k, x, dy = (torch.randn(n, D, generator=generator) for n in (N, 300, 300))
    if N > 3:
        k[3], k[2] = k[0], 0
    return [t.to("cuda", dtype).requires_grad_() for t in (k, x)], dy.to("cuda", dtype)


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("N", "D"), [(1, 40), (8, 768), (64, 1000)])
def test_values_and_gradients_agree_with_float64(N, D, dtype):
    (k, x), dy = leaves(N, D, dtype)
    y = turning.turn(k, x)
    actual = [y, *torch.autograd.grad(y, [k, x], dy)]
    wide = [t.detach().double().requires_grad_() for t in (k, x)]
    y = householder_product(wide[1], wide[0], impl="chunk")
    expected = [y, *torch.autograd.grad(y, wide, dy.double())]
    for name, a, e in zip(("y", "dk", "dx"), actual, expected, strict=True):
        assert relative_error(a, e) < LIMITS[dtype], name


def test_products_are_taken_up_to_the_stated_sizes(monkeypatch):
    calls = []
    products = turning.turn_by_products
    monkeypatch.setattr(turning, "turn_by_products", lambda *a: calls.append(1) or products(*a))
    for N, D, expected in (
        (8, turning.MOST_FEATURES, 1),
        (8, turning.MOST_FEATURES + 1, 0),
        (turning.MOST_REFLECTORS + 1, 64, 0),
    ):
        (k, x), _ = leaves(N, D, torch.bfloat16)
        turning.turn(k, x)
        assert len(calls) == expected
        calls.clear()


def test_a_step_waits_for_nothing_and_can_be_captured():
    (k, x), dy = leaves(8, 64, torch.bfloat16)

    def step():
        a, b = k.detach().requires_grad_(), x.detach().requires_grad_()
        return torch.autograd.grad(turning.turn(a, b), [a, b], dy)

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, e in zip(captured, expected, strict=True):
        assert torch.equal(a, e)
