"""Packed sequences in attention with rotary positions, on PyTorch's flash kernels."""

import pytest
import torch

from householder.nn import RotaryAttention
from householder.nn.attention_baselines import flash_takes
from householder.testing import assert_as_accurate

pytestmark = pytest.mark.gpu

LENGTHS = (70, 1, 0, 129, 200)


def run(layer, x, *, packed):
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    if packed:
        bounds = torch.tensor([0, *LENGTHS], device=x.device).cumsum(0).int()
        y = layer(x, cu_seqlens=bounds)
    else:
        y = torch.cat([layer(part) for part in x.split(LENGTHS, dim=1) if part.shape[1]], dim=1)
    y.float().pow(2).mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_packed_sequences_stay_apart(window, num_key_heads):
    torch.manual_seed(0)
    options = {"num_heads": 4, "num_key_heads": num_key_heads, "window": window}
    layer = RotaryAttention(256, **options).cuda().bfloat16()
    x = torch.randn(1, sum(LENGTHS), 256).cuda().bfloat16()
    assert flash_takes(layer.project(x)[0])
    wide = RotaryAttention(256, **options).cuda().double()
    wide.load_state_dict(layer.state_dict())
    exact = run(wide, x.double(), packed=False)
    for ours, plain, exact_ in zip(
        run(layer, x, packed=True), run(layer, x, packed=False), exact, strict=True
    ):
        assert_as_accurate(ours, plain, exact_)
