"""Singular values as parameters: free, or kept between two bounds by a sigmoid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Bounds = tuple[float, float]

# Of the interval: how far inside its ends a value given at or beyond them starts. At the ends
# themselves the logit is infinite and the gradient zero.
MARGIN = 0.01


def check_bounds(where: str, bounds: Bounds | None) -> None:
    """Raise unless `bounds` is `None` or a pair 0 ≤ lowest < highest of finite numbers."""
    if bounds is None:
        return
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(
            f"{where}: `bounds` must be a pair (lowest, highest), got {bounds!r}; "
            "pass None for free singular values"
        )
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


def singular_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U `[n, r]` and V `[m, r]` of the leading singular values of `[n, m]`.

    With its best singular values U diag(s) Vᴴ is the nearest matrix of rank r in every unitarily
    invariant norm (Eckart, Young, 1936; Mirsky, 1960), and so it stays when they are then clamped
    to an interval.
    """
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], Vh[:rank].mH


def best_singular_values(matrix: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Return the real s `[r]` nearest to the matrix as U diag(s) Vᴴ: Re diag(Uᴴ matrix V)."""
    s = (U.conj() * (matrix @ V)).sum(0)
    return s.real if s.is_complex() else s
