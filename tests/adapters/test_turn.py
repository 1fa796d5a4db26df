import pytest
import torch

from householder import householder_product
from householder.adapters.turn import turn_by_products
from householder.testing import assert_as_accurate


def reflections(k, x):
    """Apply one reflection after the other, in the dtype given."""
    for v in k.unbind(-2):
        x = x - 2 * (x @ v).unsqueeze(-1) * v / v.square().sum().clamp_min(1e-3)
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "N", "equal"),
    [((30,), 8, False), ((2, 40), 16, False), ((50,), 4, True), ((20,), 1, False), ((), 6, False)],
)
def test_products_turn_as_the_op_does(shape, N, equal, dtype):
    torch.manual_seed(0)
    k, x, dy = torch.randn(N, 48), torch.randn(*shape, 48), torch.randn(*shape, 48)
    if equal:  # the pairs that adapters start with, of which the product is the identity
        k = k[: N // 2].repeat_interleave(2, dim=0)
    if N == 6:
        k[2] = 0  # the identity
    results = []
    for turn, to in (
        (turn_by_products, dtype),
        (reflections, dtype),
        (lambda k, x: householder_product(x, k), torch.float64),
    ):
        leaves = [t.to(dtype).to(to).requires_grad_() for t in (k, x)]
        y = turn(*leaves)
        assert y.shape == x.shape
        assert y.dtype == to
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype).to(to))])
    for name, actual, plain, expected in zip(("y", "dk", "dx"), *results, strict=True):
        # Where equal pairs cancel the gradient is what is left of large numbers.
        assert_as_accurate(actual, plain, expected, name=name)


def test_products_are_not_rounded_again_by_autocast():
    torch.manual_seed(0)
    k, x = torch.randn(8, 48), torch.randn(20, 48).bfloat16()
    plain = turn_by_products(k.bfloat16(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(turn_by_products(k.bfloat16(), x), plain)
