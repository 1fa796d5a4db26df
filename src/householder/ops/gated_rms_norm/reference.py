"""The definition of `gated_rms_norm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y in x's dtype; arguments as in the public `gated_rms_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    return (normed * F.silu(gate.to(dtype))).to(x.dtype)
