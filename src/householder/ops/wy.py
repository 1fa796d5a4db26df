"""The triangular algebra of compact WY products, shared by the ops.

With reflectors as rows of `K` and reflector 0 applied first,

    H_{N-1} … H_0 = I − Kᵀ T K,    T = (I + tril(diag(β) K Kᵀ, −1))⁻¹ diag(β).

The triangle is always solved exactly. The form with 1/β is never used (it fails at β = 0), and
neither is a truncated series (it loses orthogonality for correlated reflectors).
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype to compute in: the tensors' promoted one, and at least float32.

    Inner products and triangular solves of bfloat16 and float16 data run in float32.

    Examples:
        >>> compute_dtype(torch.ones(1, dtype=torch.bfloat16))
        torch.float32
    """
    dtype = torch.float32
    for x in tensors:
        if x is not None:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of a product applied to vectors; `beta` comes last.

    It is the promoted dtype of the others. A wider `beta` adds precision and not width; only a
    complex one makes the result complex.

    Examples:
        >>> result_dtype(torch.ones(1, dtype=torch.bfloat16), torch.ones(1))
        torch.bfloat16
    """
    *others, beta = tensors
    dtype = others[0].dtype
    for x in others[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype.to_complex() if beta.is_complex() and not dtype.is_complex else dtype


def triangle_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which a triangle's entries and solutions are computed: twice as wide.

    Where reflectors are nearly parallel the entries of T neither decay nor cancel by themselves: an
    error of ε in each of R² inner products comes out as one of up to R ε in one direction of the
    product, where R reflections of a vector by themselves make √R ε. The triangle is the small part
    of the work. float64 has nothing wider; nor has a device without float64.

    Examples:
        >>> triangle_dtype(torch.float32, torch.device("cpu"))
        torch.float64
    """
    if device.type == "mps":
        return dtype
    return {torch.float32: torch.float64, torch.complex64: torch.complex128}.get(dtype, dtype)


# Triangles up to this size are solved by substitution, larger ones from two of half the size.
# Measured on two cores for batches of 64×64 float32: 16 → 13 µs a matrix, 64 (all LAPACK) 23 µs.
SUBSTITUTION_SIZE = 16


def inverse_unit_lower(m: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `(I + strict_lower(m))⁻¹`, exactly, for `m [b, R, R]`.

    The diagonal of `m` and what lies above it are ignored. Halves of the triangle are inverted as
    one batch and joined by `[[A, 0], [C, D]]⁻¹ = [[A⁻¹, 0], [−D⁻¹ C A⁻¹, D⁻¹]]`, which turns the
    work into matrix products; only blocks of up to `SUBSTITUTION_SIZE` rows are substituted row
    by row.

    Examples:
        >>> inverse_unit_lower(torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]))
        tensor([[[ 1.,  0.],
                 [-2.,  1.]]])
    """
    b, R, _ = m.shape
    if R <= SUBSTITUTION_SIZE:
        eye = torch.eye(R, dtype=m.dtype, device=m.device).expand_as(m)
        inverse = torch.linalg.solve_triangular(m, eye, upper=False, unitriangular=True)
        return inverse if out is None else out.copy_(inverse)
    if R % 2:
        m = torch.nn.functional.pad(m, (0, 1, 0, 1))
        inverse = inverse_unit_lower(m)[:, :R, :R]
        return inverse if out is None else out.copy_(inverse)
    h = R // 2
    halves = inverse_unit_lower(torch.cat([m[:, :h, :h], m[:, h:, h:]]))
    upper, lower = halves[:b], halves[b:]
    if out is None:
        out = m.new_empty(b, R, R)
    out[:, :h, :h] = upper
    out[:, :h, h:] = 0
    out[:, h:, h:] = lower
    out[:, h:, :h] = -(lower @ (m[:, h:, :h] @ upper))
    return out
