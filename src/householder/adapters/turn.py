"""The product of a few trained reflections and what a layer reads or gives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from householder.ops import householder_product

# Up to so many features half-precision vectors on a GPU are turned by PyTorch's own products: the
# kernels are faster on the device and take the host four times as long. TO BE MEASURED.
MOST_FEATURES = 4095


def turn(k: Tensor, x: Tensor) -> Tensor:
    """Return Q x for the orthogonal product of the reflectors k, in the dtype of the layer's input.

    In half precision the reflectors are rounded too, as autocast rounds other weights. Q stays
    orthogonal to float32's rounding, and Q x changes by less than its own rounding: the change is
    along k alone.

    Args:
        k: reflectors `[N, D]`, reflector 0 acting first.
        x: `[..., D]`.
    """
    x = narrow(x)
    if x.dtype not in (torch.bfloat16, torch.float16):
        return householder_product(x, k).to(x.dtype)
    k = k.to(x.dtype)
    if x.is_cuda and x.shape[-1] <= MOST_FEATURES:
        return turn_by_products(k, x)
    return householder_product(x, k)


def turn_by_products(k: Tensor, x: Tensor) -> Tensor:
    """Return Q x as x − (x Kᵀ) W with W = Tᵀ K, which is made in float32.

    Written for the host, to which each step is a call: the fewer, the sooner a small layer is done.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = k.float()
        gram = wide @ wide.mT
        squares = gram.diagonal()
        # A zero reflector is the identity with any coefficient.
        beta = (2 / (squares + (squares == 0))).unsqueeze(-1)
        # W = diag(β) (I + L)⁻ᵀ K; the solver takes the unit diagonal of I + L for granted, and the
        # zeros above it.
        upper = (beta * gram).mT
        w = beta * torch.linalg.solve_triangular(upper, wide, upper=True, unitriangular=True)
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        y = torch.addmm(rows, F.linear(rows, k), w.to(x.dtype), alpha=-1)
    return y.view(x.shape)


def narrow(x: Tensor) -> Tensor:
    """Return x as autocast would round it in front of a layer."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
