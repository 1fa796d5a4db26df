"""The product of a few trained reflections and what a layer reads or gives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from householder.ops import householder_product

# Up to so many features and reflectors vectors on a GPU are turned by PyTorch's own products: the
# kernels are faster on the device and take the host four times as long. TO BE MEASURED.
MOST_FEATURES, MOST_REFLECTORS = 4095, 64

HALF = (torch.bfloat16, torch.float16)


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
    k = k.to(x.dtype) if x.dtype in HALF else k
    N, D = k.shape
    if x.is_cuda and k.dtype == x.dtype and D <= MOST_FEATURES and N <= MOST_REFLECTORS:
        return turn_by_products(k, x)
    return householder_product(x, k).to(x.dtype)


def turn_by_products(k: Tensor, x: Tensor) -> Tensor:
    """Return Q x as x − (x Kᵀ) W with W = Tᵀ K, which is made at twice the width.

    Written for the host, to which each step is a call: the fewer, the sooner a small layer is done.
    The products with x are of the precision that PyTorch multiplies the layer's weight with.
    """
    with torch.autocast(x.device.type, enabled=False):
        # Of rows that are no multiples of 16 bytes the tensor cores make nothing; a reflector of
        # zeros is the identity.
        if x.dtype in HALF and len(k) % 8:
            k = F.pad(k, (0, 0, 0, -len(k) % 8))
        wide = k.to(torch.float32 if k.dtype in HALF else torch.float64)
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
