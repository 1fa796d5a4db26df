"""The definition of `swiglu`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) · up."""
    return F.silu(gate) * up
