"""Activations whose Jacobian is orthogonal: against plain formulas, and against deel-torchlip."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from householder.nn import GroupSort, HouseholderActivation, MaxMin

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "MaxMin": MaxMin,
    "GroupSort, all": GroupSort,
    "GroupSort, groups of 3": lambda: GroupSort(3),
    "HouseholderActivation": lambda: HouseholderActivation(12, dtype=torch.float64),
    "HouseholderActivation, groups of 4": lambda: HouseholderActivation(12, 4, dtype=torch.float64),
}


def learnt(module: nn.Module) -> nn.Module:
    """Move the parameters away from where they start."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


@pytest.mark.parametrize("make", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("ties", ["none", "pairs", "all equal", "zeros"])
def test_all_singular_values_of_the_jacobian_are_one(
    make: Callable[[], nn.Module], ties: str
) -> None:
    act = learnt(make())
    x = torch.randn(12, dtype=torch.float64)
    if ties == "pairs":
        x = x[::2].repeat_interleave(2)
    elif ties != "none":
        x = torch.full_like(x, 0.0 if ties == "zeros" else 0.7)
    singular = torch.linalg.svdvals(torch.func.jacrev(act)(x))
    torch.testing.assert_close(singular, torch.ones_like(singular), rtol=0, atol=1e-14)


@pytest.mark.parametrize("make", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_lengths_and_distances(make: Callable[[], nn.Module]) -> None:
    """|σ(x)| = |x|, and no two points come to lie further apart."""
    act = learnt(make())
    x, y = torch.randn(2, 500, 12, dtype=torch.float64)
    torch.testing.assert_close(act(x).norm(dim=-1), x.norm(dim=-1))
    assert ((act(x) - act(y)).norm(dim=-1) <= (x - y).norm(dim=-1) + 1e-12).all()


@pytest.mark.parametrize("make", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("dim", [0, 1, 2, -3])
def test_any_dimension(make: Callable[[], nn.Module], dim: int) -> None:
    act = learnt(make())
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    expected = act(x)
    act.dim = dim
    moved = x.movedim(-1, dim)
    torch.testing.assert_close(act(moved), expected.movedim(-1, dim))
    assert act(moved.contiguous()).is_contiguous()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("make", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_gradients_vmap_and_compile(make: Callable[[], nn.Module]) -> None:
    act = learnt(make())
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    params = {name: p.detach() for name, p in act.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(act, dict(zip(params, values, strict=True)), x)

    leaves = tuple(p.requires_grad_() for p in params.values())
    torch.autograd.gradcheck(run, (x, *leaves), check_forward_ad=True)
    torch.testing.assert_close(torch.func.vmap(act)(x), act(x))
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), act(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_half_precision_rounds_once(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    act = learnt(make()).to(dtype)
    x = torch.randn(50, 12).to(dtype)
    y = act(x)
    assert y.dtype == dtype
    exact = copy.deepcopy(act).double()(x.double())
    assert ((y - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5).all()


def test_max_min_and_group_sort_are_sorts() -> None:
    x = torch.randn(5, 12)
    pairs = x.reshape(5, 6, 2).sort(dim=-1, descending=True).values.reshape(5, 12)
    assert torch.equal(MaxMin()(x), pairs)
    assert torch.equal(GroupSort(2)(x), pairs.reshape(5, 6, 2).flip(-1).reshape(5, 12))
    assert torch.equal(GroupSort()(x), x.sort(dim=-1).values)
    assert torch.equal(GroupSort(1)(x), x)


@pytest.mark.parametrize("act", [MaxMin(), GroupSort(2), GroupSort(), HouseholderActivation(4)])
def test_a_tie_stays_as_it_is(act: nn.Module) -> None:
    torch.testing.assert_close(torch.func.jacrev(act)(torch.zeros(4)), torch.eye(4))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_householder_is_a_reflection_of_one_half_space(size: int) -> None:
    act = learnt(HouseholderActivation(4 * size, size, dtype=torch.float64))
    x = torch.randn(100, 4, size, dtype=torch.float64)
    v = act.reflectors.detach()
    unit = v / v.norm(dim=-1, keepdim=True)
    mirrors = torch.eye(size, dtype=torch.float64) - 2 * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    reflected = (mirrors @ x.unsqueeze(-1)).squeeze(-1)
    expected = torch.where((x * v).sum(-1, keepdim=True) >= 0, x, reflected)
    torch.testing.assert_close(act(x.flatten(1)), expected.flatten(1))


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e30])
def test_only_the_direction_counts(length: float) -> None:
    act = HouseholderActivation(4)
    x = torch.randn(10, 4)
    with torch.no_grad():
        act.reflectors.mul_(length)
    y = act(x)
    torch.testing.assert_close(y, MaxMin()(x) if length else x, rtol=1e-5, atol=1e-6)
    y.square().sin().sum().backward()
    assert act.reflectors.grad.isfinite().all()


def test_copies_and_pickles() -> None:
    act = learnt(HouseholderActivation(6, 3, dim=1))
    x = torch.randn(2, 6, 4)
    other = HouseholderActivation(6, 3, dim=1)
    other.load_state_dict(act.state_dict())
    for same in (other, copy.deepcopy(act), pickle.loads(pickle.dumps(act))):
        assert torch.equal(same(x), act(x))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^MaxMin: groups of 2 must divide the channels, got 3"):
        MaxMin()(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"^GroupSort: groups of 4 must divide"):
        GroupSort(4)(torch.randn(2, 6))
    with pytest.raises(ValueError, match=r"^GroupSort: `group_size` must be at least 1"):
        GroupSort(0)
    with pytest.raises(ValueError, match=r"`group_size` must divide `channels`, got 4 and 6"):
        HouseholderActivation(6, 4)
    with pytest.raises(ValueError, match=r"`x` must have 6 channels in dimension -1"):
        HouseholderActivation(6)(torch.randn(2, 4))


class TestTorchlip:
    """deel-torchlip 1.0.5 as an oracle."""

    @pytest.fixture
    def torchlip(self) -> object:
        return pytest.importorskip("deel.torchlip")

    @pytest.mark.parametrize("size", [2, 3, None])
    def test_group_sort(self, torchlip: object, size: int | None) -> None:
        x = torch.randn(4, 6, 5, requires_grad=True)
        dy = torch.randn(4, 6, 5)
        ours, theirs = GroupSort(size, dim=1)(x), torchlip.GroupSort(size)(x)
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad(y, x, dy)[0] for y in (ours, theirs)]
        assert torch.equal(*gradients)

    def test_householder(self, torchlip: object) -> None:
        """Its pairs are channels c and c + C/2, its mirror the half angle, its side the other."""
        theirs = torchlip.HouseHolder(6).double()
        nn.init.uniform_(theirs.theta, -3, 3)
        half = theirs.theta.detach() / 2
        ours = HouseholderActivation(6, dim=1, dtype=torch.float64)
        with torch.no_grad():
            ours.reflectors.copy_(torch.stack([-half.sin(), half.cos()], dim=-1))
        x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
        neighbours = x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)
        found = ours(neighbours).unflatten(1, (3, 2)).transpose(1, 2).flatten(1, 2)
        torch.testing.assert_close(found, theirs(x))

    def test_where_torchlip_is_not_right(self, torchlip: object) -> None:
        """At a tie both outputs of its pairs take the gradient of one input: √2 and 0."""
        jacobian = torch.func.jacrev(lambda x: torchlip.functional.group_sort_2(x[None])[0])
        singular = torch.linalg.svdvals(jacobian(torch.zeros(2)))
        torch.testing.assert_close(singular, torch.tensor([math.sqrt(2), 0.0]))
