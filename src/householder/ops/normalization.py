"""Unit vectors, as ops and layers make them."""

from __future__ import annotations

import torch
from torch import Tensor

from householder.ops.wy import compute_dtype


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the last dimension to unit length: x / √(Σ x² + eps).

    Computed in float32 at least. With `eps` under the root a zero vector stays zero, with a finite
    gradient, and a length never exceeds 1: a reflector made of such a key with beta in [0, 2]
    never expands the state.

    Args:
        x: `[..., D]`, any floating dtype.
        eps: added to the squared length.

    Returns:
        `[..., D]` in the dtype of `x`.

    Examples:
        >>> l2_normalize(torch.tensor([3.0, 4.0])).round(decimals=4)
        tensor([0.6000, 0.8000])
    """
    wide = x.to(compute_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
