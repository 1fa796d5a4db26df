"""`PaTHAttention` on a GPU as a model runs it: bfloat16 queries beside float32 reflectors."""

import copy

import pytest
import torch

from householder.nn import PaTHAttention
from householder.testing import relative_error

pytestmark = pytest.mark.gpu


def differentiate(layer, x, dtype, cu_seqlens=None):
    """Return the output and all gradients of a layer, under autocast if `dtype` is one for it."""
    x = x.clone().requires_grad_()
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        y = layer(x, cu_seqlens=cu_seqlens)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    return {"y": y} | dict(
        zip(
            ("x", *(name for name, _ in layer.named_parameters())),
            torch.autograd.grad(y, [x, *layer.parameters()], dy),
            strict=True,
        )
    )


@pytest.mark.parametrize("use_forget_gate", [False, True])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(6, 6, 64), (4, 4, 128), (4, 2, 128)])
def test_gradients_under_autocast_are_those_of_the_chunked_form(
    heads, key_heads, head_dim, use_forget_gate
):
    pytest.importorskip("triton")
    torch.manual_seed(0)
    layer = PaTHAttention(
        384,
        num_heads=heads,
        num_key_heads=key_heads,
        head_dim=head_dim,
        use_forget_gate=use_forget_gate,
        device="cuda",
    )
    x = torch.randn(2, 2048, 384, device="cuda")
    plain = copy.deepcopy(layer).double()
    plain.impl = "chunk"
    expected = differentiate(plain, x.double(), None)
    chunked = copy.deepcopy(layer)
    chunked.impl = "chunk"
    rounded = differentiate(chunked, x, torch.bfloat16)
    layer.impl = "triton"
    actual = differentiate(layer, x, torch.bfloat16)
    for name, exact in expected.items():
        assert actual[name].isfinite().all(), name
        # The rest of the layer rounds as well: what it loses without the kernels, and some more.
        lost = relative_error(rounded[name], exact)
        assert relative_error(actual[name], exact) < 2 * lost + 1e-2, name


def test_a_whole_training_batch_has_finite_gradients():
    pytest.importorskip("triton")
    torch.manual_seed(0)
    layer = PaTHAttention(384, num_heads=6, device="cuda", impl="triton")
    x = torch.randn(8, 2048, 384, device="cuda")
    for name, gradient in differentiate(layer, x, torch.bfloat16).items():
        assert gradient.isfinite().all(), name
