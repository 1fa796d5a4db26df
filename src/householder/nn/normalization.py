"""Activation and normalisation of keys and queries, normalisation of a mixer's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from householder.ops.gated_rms_norm import gated_rms_norm
from householder.ops.wy import compute_dtype


def sum_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the last dimension of non-negative numbers to sum one: x / max(Σ x, eps).

    Computed in float32 at least; a zero vector stays zero.

    Args:
        x: `[..., D]`, any floating dtype, >= 0.
        eps: what a smaller sum counts as.

    Returns:
        `[..., D]` in the dtype of `x`.

    Examples:
        >>> sum_normalize(torch.tensor([1.0, 3.0])).round(decimals=4)
        tensor([0.2500, 0.7500])
    """
    wide = x.to(compute_dtype(x))
    return (wide / wide.sum(-1, keepdim=True).clamp_min(eps)).to(x.dtype)


def _elu_plus_one(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _identity(x: Tensor) -> Tensor:
    return x


QK_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": _elu_plus_one,
    "identity": _identity,
}

# `delta_product` itself does "l2".
QK_NORMS = ("l2", "sum", "none")


class GatedRMSNorm(nn.Module):
    """Normalise by the root mean square, then gate: y = x / √(mean x² + eps) · weight · SiLU(gate).

    Computed in float32 at least.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
        device: of the parameter.
        dtype: of the parameter.

    Examples:
        >>> norm = GatedRMSNorm(4)
        >>> norm(torch.ones(2, 4), torch.zeros(2, 4)).abs().max().item()
        0.0

    References:
        Gated Delta Networks: Improving Mamba2 with Delta Rule (Yang, Kautz, Hatamizadeh, 2024),
        https://arxiv.org/abs/2412.06464
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the gated norm of `x [..., D]` under `gate [..., D]`, in the dtype of `x`."""
        return gated_rms_norm(x, gate, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """Return the options that `print` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
