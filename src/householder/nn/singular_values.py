"""Singular values as parameters: free, or kept between two bounds by a sigmoid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from householder.ops.wy import compute_dtype

Bounds = tuple[float, float]

# Of the interval: how far inside its ends a value given at or beyond them starts. At the ends
# themselves the logit is infinite and the gradient zero.
MARGIN = 0.01


def check_bounds(where: str, bounds: Bounds | None) -> None:
    """Raise unless `bounds` is `None` or a pair 0 ≤ lowest < highest of finite numbers."""
    if bounds is None:
        return
    lowest, highest = bounds
    if not (0 <= lowest < highest and math.isfinite(highest)):
        raise ValueError(
            f"{where}: `bounds` must be (lowest, highest) with 0 <= lowest < highest, got "
            f"{bounds}; pass None for free singular values"
        )


def bound_singular_values(s: Tensor, bounds: Bounds | None) -> Tensor:
    """Return s itself, or lowest + (highest − lowest) · sigmoid(s)."""
    if bounds is None:
        return s
    lowest, highest = bounds
    return lowest + (highest - lowest) * torch.sigmoid(s)


def unbound_singular_values(s: Tensor, bounds: Bounds | None) -> Tensor:
    """Return what `bound_singular_values` takes to `s`, or to the nearest value well inside."""
    if bounds is None:
        return s
    lowest, highest = bounds
    return ((s - lowest) / (highest - lowest)).clamp(MARGIN, 1 - MARGIN).logit()


def nearest_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U `[n, r]`, s `[r]`, V `[m, r]` of the nearest matrix of rank r, computed in float32.

    Nearest in every unitarily invariant norm (Eckart, Young, 1936; Mirsky, 1960), and so it stays
    when the r singular values are then clamped to an interval.
    """
    U, s, Vh = torch.linalg.svd(weight.to(compute_dtype(weight)), full_matrices=False)
    return U[:, :rank], s[:rank], Vh[:rank].mH
