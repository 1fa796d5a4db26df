"""Unit length, unit sum and the gated RMSNorm, at ordinary and at extreme sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from householder.nn import GatedRMSNorm
from householder.nn.normalization import sum_normalize
from householder.ops.delta_product.activations import l2_normalize


def test_l2_length_never_exceeds_one() -> None:
    x = torch.randn(100, 16) * torch.logspace(-12, 12, 100)[:, None]
    lengths = l2_normalize(x).double().norm(dim=-1)
    assert lengths.max() <= 1 + 2e-7
    assert lengths[60:].min() > 1 - 2e-7


@pytest.mark.parametrize("normalize", [l2_normalize, sum_normalize])
def test_zero_vectors_stay_zero_with_finite_gradients(normalize) -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    y = normalize(x)
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("normalize", [l2_normalize, sum_normalize])
def test_half_precision_is_normalised_in_float32(normalize) -> None:
    """float16 would overflow at a sum of squares, or of entries, beyond 65504."""
    x = 1000 + 100 * torch.rand(3, 128, dtype=torch.float64)
    y = normalize(x.half())
    assert y.dtype == torch.float16
    exact = normalize(x.half().double())
    assert ((y.double() - exact).abs() <= 2**-11 * exact.abs()).all()


@pytest.mark.parametrize("normalize", [l2_normalize, sum_normalize])
def test_normalisation_gradients(normalize) -> None:
    x = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalize, x)


def test_gated_rms_norm_is_torch_rms_norm_times_silu() -> None:
    norm = GatedRMSNorm(6, eps=1e-3, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    expected = F.rms_norm(x, (6,), norm.weight, 1e-3) * F.silu(gate)
    torch.testing.assert_close(norm(x, gate), expected, rtol=1e-14, atol=1e-15)
    assert torch.autograd.gradcheck(norm, (x, gate))


def test_gated_rms_norm_rounds_half_precision_once() -> None:
    norm = GatedRMSNorm(64).bfloat16()
    x, gate = torch.randn(2, 50, 64).bfloat16()
    y = norm(x, gate)
    assert y.dtype == torch.bfloat16
    exact = norm.double()(x.double(), gate.double())
    assert ((y.double() - exact).abs() <= 1.01 * 2**-8 * exact.abs() + 1e-30).all()
