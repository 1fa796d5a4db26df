"""`OrthogonalLinear` and `StiefelLinear` against the dense formula, and their own promises."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from householder.nn import OrthogonalLinear, StiefelLinear
from householder.testing import orthogonality_error

SIZES = [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("N", [None, 1, 2, 12])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_is_linear_with_its_weight(n: int, m: int, N: int | None, dtype: torch.dtype) -> None:
    layer = StiefelLinear(n, m, N, dtype=dtype)
    x = torch.randn(2, 3, n, dtype=dtype)
    assert layer.weight.shape == (m, n)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert orthogonality_error(layer.weight) < 1e-14
    plain = StiefelLinear(n, m, N, bias=False, dtype=dtype)
    torch.testing.assert_close(plain(x), F.linear(x, plain.weight))


@pytest.mark.parametrize("N", [None, 2])
@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 9), (9, 4)])
def test_keeps_lengths(n: int, m: int, N: int | None) -> None:
    layer = StiefelLinear(n, m, N, bias=False, dtype=torch.float64)
    x = torch.randn(7, n, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    if m >= n:
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    if m <= n:
        torch.testing.assert_close(dx.norm(dim=-1), dy.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_set_weight_and_from_linear(n: int, m: int, dtype: torch.dtype) -> None:
    linear = nn.Linear(n, m, dtype=dtype)
    layer = StiefelLinear.from_linear(linear)
    assert layer.bias is not None
    assert torch.equal(layer.bias, linear.bias)
    wide = m < n
    Q, R = torch.linalg.qr(linear.weight.detach().mH if wide else linear.weight.detach())
    Q = Q * R.diagonal().sgn()
    Q = Q.mH if wide else Q
    torch.testing.assert_close(layer.weight.detach(), Q, rtol=0, atol=1e-5)
    layer.set_weight(-Q)
    torch.testing.assert_close(layer.weight.detach(), -Q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("N", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("determinant", [1, -1])
@pytest.mark.parametrize("D", [1, 4, 7])
def test_determinant_is_chosen_and_kept(D: int, determinant: int, N: int | None) -> None:
    layer = OrthogonalLinear(D, N, determinant=determinant, dtype=torch.float64)
    for _ in range(3):
        assert layer.determinant() == determinant
        assert abs(float(torch.linalg.det(layer.weight).detach()) - determinant) < 1e-12
        layer.reset_parameters()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(5):
        layer(torch.randn(4, D, dtype=torch.float64)).pow(3).sum().backward()
        optimizer.step()
    assert layer.determinant() == determinant
    assert abs(float(torch.linalg.det(layer.weight).detach()) - determinant) < 1e-12


def test_set_weight_changes_the_determinant() -> None:
    layer = OrthogonalLinear(5, determinant=1)
    mirror = torch.eye(5)
    mirror[2, 2] = -1
    layer.set_weight(mirror)
    assert layer.determinant() == -1
    torch.testing.assert_close(layer.weight, mirror)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("N", [None, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_inverse(N: int | None, bias: bool, dtype: torch.dtype) -> None:
    layer = OrthogonalLinear(8, N, bias, dtype=dtype)
    x = torch.randn(3, 8, dtype=dtype)
    torch.testing.assert_close(layer.inverse(layer(x)), x)
    torch.testing.assert_close(layer(layer.inverse(x)), x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("N", [None, 1])
def test_gradients_vmap_and_compile(N: int | None) -> None:
    layer = StiefelLinear(4, 3, N, dtype=torch.float64)
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


@pytest.mark.parametrize("N", [None, 3])
def test_a_row_does_not_depend_on_how_many_there_are(N: int | None) -> None:
    """The way it is computed depends on the layer's sizes alone."""
    layer = OrthogonalLinear(16, N)
    x = torch.randn(1000, 16)
    torch.testing.assert_close(layer(x)[:2], layer(x[:2]), rtol=1e-5, atol=1e-6)
    assert (layer.frame._applies_reflectors()) == (N == 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N", [None, 4])
def test_half_precision(N: int | None, dtype: torch.dtype) -> None:
    layer = StiefelLinear(32, 48, N, dtype=dtype)
    x = torch.randn(5, 32).to(dtype)
    y = layer(x)
    assert y.dtype == layer.weight.dtype == dtype
    exact = copy.deepcopy(layer).double()(x.double())
    error = (y - exact).abs().max() / exact.abs().max()
    assert error < 2 * torch.finfo(dtype).eps
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_copies_pickles_and_state_dicts() -> None:
    layer = OrthogonalLinear(6, determinant=-1)
    other = OrthogonalLinear(6, determinant=1)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved):
        assert torch.equal(same(x), layer(x))
        assert same.determinant() == -1


def test_training_in_a_network_keeps_it_orthogonal() -> None:
    model = nn.Sequential(StiefelLinear(4, 16), nn.Tanh(), OrthogonalLinear(16), nn.Tanh())
    model.append(StiefelLinear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(64, 4)
    target = 0.5 * torch.stack([x[:, 0] * x[:, 1], x[:, 2]], dim=-1).tanh()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for layer in (model[0], model[2], model[4]):
        assert orthogonality_error(layer.weight) < 2e-6


def test_is_made_on_the_meta_device() -> None:
    layer = OrthogonalLinear(6, determinant=-1, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.determinant() == -1
    assert orthogonality_error(layer.weight) < 1e-6


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^StiefelLinear: `in_features` must be at least 1"):
        StiefelLinear(0, 3)
    with pytest.raises(ValueError, match=r"^OrthogonalLinear: `features` must be at least 1"):
        OrthogonalLinear(0)
    with pytest.raises(ValueError, match=r"^OrthogonalLinear: `determinant` must be 1, -1"):
        OrthogonalLinear(3, determinant=0)
    with pytest.raises(ValueError, match=r"^OrthogonalLinear: .* a unitary Q has no sign"):
        OrthogonalLinear(3, determinant=1, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"use StiefelLinear.from_linear"):
        OrthogonalLinear.from_linear(nn.Linear(3, 4))
    with pytest.raises(NotImplementedError, match=r"for real weights only, got torch.complex64"):
        OrthogonalLinear(3, dtype=torch.complex64).determinant()
    with pytest.raises(ValueError, match=r"set_frame: `weight` must be \[5, 3\], got shape"):
        StiefelLinear(3, 5).set_weight(torch.zeros(3, 5))
