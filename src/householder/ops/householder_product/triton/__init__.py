"""`householder_product` as Triton kernels: forward and backward.

Up to `config.MAX_BLOCK` reflectors make one block, and rows go through it in one pass
(`apply.py`). More run block after block on products of matrices in float32 (`product.py`), half
inputs too, since each block's rounding would add up; and so do the first rows of the identity.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from householder.ops._triton import (
    addressable,
    compiled_together,
    dot_precision,
    on_its_device,
    operand_dtype,
)
from householder.ops.householder_product.triton import config
from householder.ops.householder_product.triton.apply import inner, outer, update
from householder.ops.householder_product.triton.gradient import reflector_gradients
from householder.ops.householder_product.triton.prepare import Triangles, prepare
from householder.ops.householder_product.triton.product import product

__all__ = ["backward", "forward", "saved_shapes"]


def is_fused(rows: bool, N: int) -> bool:
    """Return whether one pass over given rows does."""
    return rows and config.num_blocks(N) == 1


def saved_shapes(
    x: Tensor | None, k: Tensor, M: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Return shapes and dtypes of what `forward` saves: P, and the triangles."""
    G, N, D = k.shape
    R, blocks = config.block_size(N), config.num_blocks(N)
    fused = is_fused(x is not None, N)
    dtype = operand_dtype(dot_precision(k)) if fused else torch.float32
    # Of a frame of one block, P is part of the reflectors.
    rows = 0 if x is None and blocks == 1 else M
    square = ((G, blocks, R, R), torch.float32)
    return (
        ((G, rows, N), dtype), ((G, N, D), dtype), ((G, N, D), dtype),
        square, square, ((G, blocks, R), torch.float32),
    )  # fmt: skip


def _kind(k: Tensor, beta: Tensor | None, x: Tensor | None, M: int, *others: bool) -> Hashable:
    """Return what a call's programs depend on."""
    dtypes = (k.dtype, None if beta is None else beta.dtype)
    return k.device, dtypes, k.shape[1:], x is None, config.rows_kind(M), others


def _backward_kind(
    dy: Tensor, k: Tensor, beta: Tensor | None, x: Tensor | None, transpose: bool, *_: Tensor
) -> Hashable:
    return _kind(k, beta, x, dy.shape[1], transpose)


@on_its_device
@compiled_together(_kind)
def forward(
    k: Tensor, beta: Tensor | None, x: Tensor | None, M: int, transpose: bool, save: bool
) -> tuple[Tensor, ...]:
    """Apply the product to rows `x [G, M, D]`, or to the first M rows of the identity.

    Args:
        k: reflectors `[G, N, D]`.
        beta: `[G, N]`, or None where they are orthogonal.
        x: rows of k's dtype, or None.
        M: how many rows.
        transpose: apply the transpose instead; not for rows of the identity.
        save: keep what `backward` needs.

    Returns:
        y `[G, M, D]` and, if asked for, what is saved, each as in `saved_shapes`.
    """
    k, beta = addressable(k), None if beta is None else addressable(beta)
    if x is not None and is_fused(True, k.shape[1]):
        precision = dot_precision(k)
        x = addressable(x)
        p, gram = inner(x, k, precision, with_gram=k.dtype != torch.float32)
        triangles = prepare(k, beta, operand_dtype(precision), gram)
        y = update(x, p, triangles.right if transpose else triangles.left, precision)
    else:
        if transpose:
            k, beta = _reverse(k, beta)
        triangles = prepare(k, beta, torch.float32)
        y, p = _apply_blocks(x, k, triangles.left, M)
    return (y, p, *triangles) if save else (y,)


def _reverse(k: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return k.flip(1), None if beta is None else beta.flip(1)


def _room(k: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=k.device)


def _blocks(N: int) -> list[slice]:
    R = config.block_size(N)
    return [slice(start, min(start + R, N)) for start in range(0, N, R)]


def _apply_blocks(x: Tensor | None, k: Tensor, w: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """Return Y and P = X_b Kᵀ of every block's own input X_b."""
    G, N, D = k.shape
    y = _room(k, G, M, D)
    blocks = _blocks(N)
    rows = 0 if x is None and len(blocks) == 1 else M
    p = _room(k, G, rows, N)
    given = x
    for n in blocks:
        if given is None:
            # Rows of the identity pick columns of K.
            if rows:
                p[:, :, n].copy_(k[:, n, :M].mT)
            product(k[:, n, :M].mT, w[:, n], y, minus=True, plus_identity=True)
        else:
            product(given, k[:, n].mT, p[:, :, n])
            product(p[:, :, n], w[:, n], y, minus=True, plus=given)
        given = y
    return y if k.dtype == torch.float32 else y.to(k.dtype), p


@on_its_device
@compiled_together(_backward_kind)
def backward(
    dy: Tensor, k: Tensor, beta: Tensor | None, x: Tensor | None, transpose: bool, *saved: Tensor
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of x, the reflectors and β; None for what was not given."""
    k = addressable(k)
    p, triangles = saved[0], Triangles(*saved[1:])
    if x is not None and is_fused(True, k.shape[1]):
        precision = dot_precision(k)
        dy, x = addressable(dy), addressable(x)
        v, _ = inner(dy, k, precision, with_gram=False)
        drows = update(dy, v, triangles.left if transpose else triangles.right, precision)
        a, b, parts = outer(v, x, p, dy, transpose, precision)
        if transpose:
            a, b = b, a
        return drows, *reflector_gradients(a, b, k, triangles, beta, parts)
    if transpose:
        k, beta = _reverse(k, beta)
    if x is None and config.num_blocks(k.shape[1]) == 1:
        return None, *reflector_gradients(*_frame_back(dy, k), k, triangles, beta)
    dx, a, b = _blocks_back(dy, x, k, triangles, p)
    dk, dbeta = reflector_gradients(a.unsqueeze(0), b.unsqueeze(0), k, triangles, beta)
    return dx, *(_reverse(dk, dbeta) if transpose else (dk, dbeta))


def _frame_back(dy: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return Vᵀ X and Pᵀ dY, in parts, of one block of reflectors and rows of the identity."""
    G, N, D = k.shape
    M = dy.shape[1]
    parts = config.frame_splits(D), G, N, D
    a = _room(k, *parts).zero_() if M < D else _room(k, *parts)
    product(k, dy.mT, a[..., :M])
    b = _room(k, config.frame_splits(M), G, N, D)
    return a, product(k[:, :, :M], dy, b)


def _blocks_back(
    dy: Tensor, x: Tensor | None, k: Tensor, triangles: Triangles, p: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return dX, and Vᵀ X_b and Pᵀ dY of every block's own X_b and dY.

    A block's input X_b = X − Σ_{c<b} P_c W_c is not made again: Vᵀ X_b = Vᵀ X − Σ (Vᵀ P_c) W_c.
    """
    G, N, D = k.shape
    M = dy.shape[1]
    v = _room(k, G, M, N)
    b = _room(k, G, N, D)
    blocks = _blocks(N)
    for n in reversed(blocks):
        product(dy, k[:, n].mT, v[:, :, n])
        product(p[:, :, n].mT, dy, b[:, n])
        if n.start or x is not None:
            dx = _room(k, G, M, D) if n is blocks[-1] else dy
            dy = product(v[:, :, n], triangles.right[:, n], dx, minus=True, plus=dy)
    if x is None:
        a = _room(k, G, N, D).zero_() if M < D else _room(k, G, N, D)
        a[:, :, :M].copy_(v.mT)
    else:
        a = product(v.mT, x, _room(k, G, N, D))
    if len(blocks) > 1:
        R = config.block_size(N)
        s = product(v.mT, p, _room(k, G, N, N), lower=R)
        product(s, triangles.left, a, minus=True, plus=a, triangle=R)
    return None if x is None else dy.to(k.dtype), a, b
