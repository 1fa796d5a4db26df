"""`SVDLinear`: what is read off its factors against decompositions of its dense weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from householder.nn import SVDLinear


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("N", [None, 1, 5])
@pytest.mark.parametrize(("n", "m", "rank"), [(6, 6, None), (12, 9, 2), (9, 12, 3), (1, 4, None)])
def test_is_linear_with_its_weight(
    n: int, m: int, rank: int | None, N: int | None, dtype: torch.dtype
) -> None:
    layer = SVDLinear(n, m, rank, N, dtype=dtype)
    with torch.no_grad():
        layer.s.normal_()
    x = torch.randn(2, 3, n, dtype=dtype)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    rank = min(n, m) if rank is None else rank
    assert torch.linalg.matrix_rank(layer.weight) == rank


@pytest.mark.parametrize("bounds", [None, (0.5, 1.5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_what_is_read_off_is_what_a_decomposition_finds(
    dtype: torch.dtype, bounds: tuple[float, float] | None
) -> None:
    layer = SVDLinear(7, 7, dtype=dtype, bounds=bounds)
    with torch.no_grad():
        layer.s.normal_()  # some of them negative
    W = layer.weight
    found = layer.singular_values.sort(descending=True).values
    torch.testing.assert_close(found, torch.linalg.svdvals(W))
    torch.testing.assert_close(layer.spectral_norm(), torch.linalg.matrix_norm(W, ord=2))
    torch.testing.assert_close(layer.frobenius_norm(), torch.linalg.matrix_norm(W))
    torch.testing.assert_close(layer.logabsdet(), torch.linalg.slogdet(W).logabsdet)
    x = torch.randn(3, 7, dtype=dtype)
    torch.testing.assert_close(layer.inverse(layer(x)), x)
    torch.testing.assert_close(layer(layer.inverse(x)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize(("n", "m"), [(8, 8), (5, 9), (9, 5)])
def test_full_rank_keeps_a_linear_layer(n: int, m: int, dtype: torch.dtype) -> None:
    linear = nn.Linear(n, m, dtype=dtype)
    layer = SVDLinear.from_linear(linear)
    x = torch.randn(4, n, dtype=dtype)
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), linear(x), rtol=tolerance, atol=tolerance)


def test_low_rank_with_bounds_is_the_nearest_such_matrix() -> None:
    linear = nn.Linear(20, 12, bias=False, dtype=torch.float64)
    lowest, highest = 0.3, 0.6
    layer = SVDLinear.from_linear(linear, rank=5, bounds=(lowest, highest))
    assert layer.bias is None
    U, s, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    margin = 0.01 * (highest - lowest)
    clamped = s[:5].clamp(lowest + margin, highest - margin)
    assert (s[:5] > highest).any()
    torch.testing.assert_close(layer.weight.detach(), (U[:, :5] * clamped) @ Vh[:5])
    # No random one of the same kind is nearer.
    distance = torch.linalg.matrix_norm(layer.weight - linear.weight)
    for _ in range(20):
        other = SVDLinear(20, 12, 5, bounds=(lowest, highest), dtype=torch.float64)
        assert torch.linalg.matrix_norm(other.weight - linear.weight) > distance
    # Values at and beyond the bounds still learn.
    layer.weight.square().sum().backward()
    assert (layer.s.grad.abs() > 1e-3 * layer.s.grad.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_few_reflectors_get_the_best_singular_values(dtype: torch.dtype) -> None:
    linear = nn.Linear(12, 8, bias=False, dtype=dtype)
    layer = SVDLinear.from_linear(linear, num_householder=3)
    (layer.weight - linear.weight.detach()).abs().square().sum().backward()
    assert layer.s.grad.abs().max() < 1e-13
    assert layer.left.reflectors.grad.abs().max() > 1e-3


@pytest.mark.parametrize("sign", [1, -1])
def test_bounds_hold_wherever_the_parameters_go(sign: int) -> None:
    layer = SVDLinear(10, 10, bounds=(0.5, 2.0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    for _ in range(20):
        optimizer.zero_grad()
        (sign * layer.weight.square().sum()).backward()
        optimizer.step()
    singular = torch.linalg.svdvals(layer.weight)
    assert singular.min() >= 0.5 * (1 - 1e-5)
    assert singular.max() <= 2.0 * (1 + 1e-5)
    # It did go where the gradient pointed.
    assert singular.max() < 0.51 if sign > 0 else singular.min() > 1.99


def test_decay_of_s_is_decay_of_the_weight() -> None:
    """One SGD step on ‖W‖²/2 through s alone shrinks W as weight decay on W itself would."""
    layer = SVDLinear(6, 4, bias=False, dtype=torch.float64)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD([layer.s], lr=0.1, weight_decay=0.5)
    layer.s.grad = torch.zeros_like(layer.s)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), (1 - 0.1 * 0.5) * before)


@pytest.mark.parametrize(
    ("bounds", "start"),
    [(None, 1.0), ((0.0, 2.0), 1.0), ((0.0, 0.5), 0.495), ((2.0, 3.0), 2.01)],
)
def test_starts_at_one_or_near_it(bounds: tuple[float, float] | None, start: float) -> None:
    layer = SVDLinear(5, 4, bounds=bounds, dtype=torch.float64)
    expected = torch.full((4,), start, dtype=torch.float64)
    torch.testing.assert_close(layer.singular_values.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("rank", "N"), [(3, None), (1, 1)])
def test_gradients_vmap_and_compile(rank: int, N: int | None) -> None:
    layer = SVDLinear(4, 3, rank, N, bounds=(0.1, 2.0), dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(5, 4, dtype=torch.float64)

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    leaves = tuple(layer.parameters())
    torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    stacked = [torch.stack([p.detach(), torch.randn_like(p)]) for p in leaves]
    each = torch.stack([run(*values) for values in zip(*stacked, strict=True)])
    torch.testing.assert_close(torch.func.vmap(run)(*stacked), each)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [None, 4])
def test_half_precision(rank: int | None, dtype: torch.dtype) -> None:
    layer = SVDLinear.from_linear(nn.Linear(32, 48, dtype=dtype), rank)
    x = torch.randn(5, 32).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = copy.deepcopy(layer).double()(x.double())
    assert (y - exact).abs().max() / exact.abs().max() < 6 * torch.finfo(dtype).eps
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_thin_factors_take_no_dense_memory() -> None:
    """The weight of 300,000 × 300,000 would take 360 gigabytes."""
    layer = SVDLinear(300_000, 300_000, rank=2, bounds=(0.0, 1.0))
    y = layer(torch.randn(2, 300_000))
    y.square().sum().backward()
    assert sum(x.numel() for x in layer.state_dict().values()) < 6 * 300_000
    assert layer.spectral_norm() <= 1


def test_copies_pickles_and_state_dicts() -> None:
    layer = SVDLinear(6, 5, 3, bounds=(0.0, 1.0))
    other = SVDLinear(6, 5, 3, bounds=(0.0, 1.0))
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same.weight, layer.weight)


def test_is_made_on_the_meta_device() -> None:
    layer = SVDLinear(6, 5, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight), torch.ones(5))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^SVDLinear: `rank` must be at most .* = 3, got 4"):
        SVDLinear(3, 5, 4)
    with pytest.raises(ValueError, match=r"^SVDLinear: `bounds` must be \(lowest, highest\)"):
        SVDLinear(3, 5, bounds=(2.0, 1.0))
    with pytest.raises(TypeError, match=r"^SVDLinear: `bounds` must be a pair .* got 1\.0"):
        SVDLinear(3, 3, bounds=1.0)  # type: ignore[arg-type]
    for layer in (SVDLinear(3, 5), SVDLinear(4, 4, 3)):
        with pytest.raises(ValueError, match=r"^SVDLinear.inverse: needs a square W of full rank"):
            layer.inverse(torch.zeros(1, layer.out_features))
        with pytest.raises(ValueError, match=r"^SVDLinear.logabsdet: needs a square W"):
            layer.logabsdet()
    layer = SVDLinear(3, 3)
    with torch.no_grad():
        layer.s[1] = 0
    with pytest.raises(ValueError, match=r"other than 0, got 1 of them"):
        layer.inverse(torch.zeros(3))
    assert layer.logabsdet() == -torch.inf
    with pytest.raises(ValueError, match=r"^SVDLinear.set_weight: `weight` must be \[3, 3\]"):
        layer.set_weight(torch.zeros(3, 2))
