"""Weights and activations on a GPU: each layer against itself in float64, and beside torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

from householder.nn import (
    GroupSort,
    HouseholderActivation,
    MaxMin,
    OrthogonalLinear,
    OrthonormalFrame,
    StiefelLinear,
    SVDLinear,
    parametrizations,
)
from householder.testing import CORRELATIONS, correlated_reflectors, orthogonality_error

DEVICE = "cuda"
# What the formulas' sums and products come to; float16 and bfloat16 round reflectors and results.
LIMITS = {
    torch.float32: 1e-5, torch.float64: 1e-13, torch.complex64: 1e-5,
    torch.bfloat16: 1.5e-2, torch.float16: 2e-3,
}  # fmt: skip

pytestmark = pytest.mark.gpu


def linear(n: int, m: int) -> nn.Module:
    return nn.Linear(m, n, bias=False)


# The module and the width of its inputs.
LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "orthogonal": (lambda: parametrizations.orthogonal(linear(96, 96)), 96),
    "orthogonal, tall": (lambda: parametrizations.orthogonal(linear(300, 40)), 40),
    "orthogonal, wide": (lambda: parametrizations.orthogonal(linear(40, 300)), 300),
    "orthogonal, few": (
        lambda: parametrizations.orthogonal(linear(200, 200), num_householder=6), 200,
    ),
    "svd": (lambda: parametrizations.svd(linear(96, 64), rank=8, bounds=(0.5, 2.0)), 64),
    "OrthogonalLinear": (lambda: OrthogonalLinear(200), 200),
    "OrthogonalLinear, few": (lambda: OrthogonalLinear(256, 8), 256),
    "StiefelLinear": (lambda: StiefelLinear(64, 256), 64),
    "StiefelLinear, wide, few": (lambda: StiefelLinear(256, 64, 5), 256),
    "SVDLinear": (lambda: SVDLinear(96, 96, bounds=(0.5, 2.0)), 96),
    "SVDLinear, low rank": (lambda: SVDLinear(256, 128, rank=8), 256),
    "MaxMin": (MaxMin, 96),
    "GroupSort": (lambda: GroupSort(4), 96),
    "HouseholderActivation": (lambda: HouseholderActivation(96, 4), 96),
}  # fmt: skip


def make(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Make a layer on the CPU, where the same numbers are drawn everywhere, and bring it over."""
    create, width = LAYERS[name]
    torch.manual_seed(0)
    layer = create()
    x = torch.randn(70, width)
    return layer.to(DEVICE, dtype), x.to(DEVICE, dtype)


def run(
    layer: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x) if call is None else call(x)
    weights = torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=torch.float64)
    dy = (weights * torch.ones(len(y), 1, device=y.device)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def assert_near(actual: list[Tensor], expected: list[Tensor], limit: float) -> None:
    # Gradients of all parameters are measured together: some vanish but for rounding.
    scale = max(float(e.abs().max()) for e in expected)
    for a, e in zip(actual, expected, strict=True):
        wide = torch.complex128 if e.is_complex() else torch.float64
        assert float((a.to(wide) - e.to(wide)).abs().max()) <= limit * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_agree_with_float64(name: str, dtype: torch.dtype) -> None:
    layer, x = make(name, dtype)
    actual = run(layer, x)
    assert actual[0].dtype == dtype
    assert actual[0].device.type == DEVICE
    expected = run(copy.deepcopy(layer).double(), x.double())
    assert_near(actual, expected, LIMITS[dtype])


def test_complex_values_and_gradients_agree_with_complex128() -> None:
    torch.manual_seed(0)
    layer, exact = (
        OrthogonalLinear(48, dtype=dtype, device=DEVICE)
        for dtype in (torch.complex64, torch.complex128)
    )
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(70, 48, dtype=torch.complex64, device=DEVICE)
    assert_near(run(layer, x), run(exact, x.to(torch.complex128)), LIMITS[torch.complex64])
    assert orthogonality_error(layer.weight) <= 4 * torch.finfo(torch.float32).eps * 48**0.5


@pytest.mark.parametrize("kind", CORRELATIONS)
@pytest.mark.parametrize(("D", "M"), [(64, 64), (300, 100), (300, 300)])
def test_frames_are_orthonormal(D: int, M: int, kind: str) -> None:
    frame = OrthonormalFrame(D, M, device=DEVICE)
    with torch.no_grad():
        frame.reflectors.copy_(correlated_reflectors(kind, M, D))
    assert orthogonality_error(frame()) <= 4 * torch.finfo(torch.float32).eps * D**0.5


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the compiler's own
@pytest.mark.parametrize(
    "name",
    ["orthogonal", "orthogonal, few", "StiefelLinear, wide, few", "SVDLinear, low rank",
     "HouseholderActivation", "GroupSort"],
)  # fmt: skip
def test_compiled_whole(name: str) -> None:
    layer, x = make(name, torch.float32)
    compiled = torch.compile(layer, fullgraph=True)
    assert_near(run(layer, x, compiled), run(layer, x), LIMITS[torch.float32])


@pytest.mark.parametrize("shape", [(40, 40), (300, 40)])
def test_agrees_with_torchs_parametrization(shape: tuple[int, int]) -> None:
    theirs = torch_parametrizations.orthogonal(
        linear(*shape), orthogonal_map="householder", use_trivialization=False
    ).to(DEVICE)
    ours = parametrizations.orthogonal(linear(*shape)).to(DEVICE)
    ours.weight = theirs.weight.detach()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-5)
    assert orthogonality_error(ours.weight) <= 4 * torch.finfo(torch.float32).eps * shape[0] ** 0.5


def test_a_step_of_training_waits_for_nothing(
    nothing_waits: Callable[[], AbstractContextManager[None]],
) -> None:
    """No value is read by the host: what it reads it would wait for."""
    layers = [
        parametrizations.orthogonal(linear(64, 64)),
        HouseholderActivation(64),
        OrthogonalLinear(64),
        MaxMin(),
        SVDLinear(64, 32, rank=4),
        GroupSort(2),
    ]
    model = nn.Sequential(*layers).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    x = torch.randn(8, 64, device=DEVICE)
    model(x).square().sum().backward()  # compiles the kernels
    with nothing_waits():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
