"""`householder_product` as Triton kernels: forward and backward.

Up to `config.MAX_BLOCK` reflectors make one block, and rows go through it in one pass
(`apply.py`). More run block after block on products of matrices in float32 (`product.py`), half
inputs too, since each block's rounding would add up; and so do the first rows of the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from householder.ops._triton import addressable, dot_precision, on_its_device, operand_dtype
from householder.ops.householder_product.triton import config
from householder.ops.householder_product.triton.apply import apply_block, outer
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
    square = ((G, blocks, R, R), torch.float32)
    return (
        ((G, M, N), dtype), ((G, N, D), dtype), ((G, N, D), dtype),
        square, square, ((G, blocks, R), torch.float32),
    )  # fmt: skip


@on_its_device
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
        y `[G, M, D]` and what is saved, each as in `saved_shapes`, or empty.
    """
    k = addressable(k)
    if x is not None and is_fused(True, k.shape[1]):
        precision = dot_precision(k)
        triangles = prepare(k, beta, operand_dtype(precision), precision)
        w = triangles.right if transpose else triangles.left
        y, p = apply_block(addressable(x), k, w, precision, save)
    else:
        if transpose:
            k, beta = _reverse(k, beta)
        triangles = prepare(k, beta, torch.float32, "tf32x3")
        y, p = _apply_blocks(x, k, triangles.left, M)
    saved = (p, *triangles)
    return (y, *(saved if save else (t.new_empty(0) for t in saved)))


def _reverse(k: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return k.flip(1), None if beta is None else beta.flip(1)


def _blocks(N: int) -> list[slice]:
    R = config.block_size(N)
    return [slice(start, min(start + R, N)) for start in range(0, N, R)]


def _apply_blocks(x: Tensor | None, k: Tensor, w: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """Return Y and P = X_b Kᵀ of every block's own input X_b."""
    G, N, D = k.shape
    y = torch.empty(G, M, D, dtype=torch.float32, device=k.device)
    p = torch.empty(G, M, N, dtype=torch.float32, device=k.device)
    given = x
    for n in _blocks(N):
        if given is None:
            # Rows of the identity pick columns of K.
            p[:, :, n].copy_(k[:, n, :M].mT)
            product(k[:, n, :M].mT, w[:, n], y, minus=True, plus_identity=True)
        else:
            product(given, k[:, n].mT, p[:, :, n])
            product(p[:, :, n], w[:, n], y, minus=True, plus=given)
        given = y
    return y if k.dtype == torch.float32 else y.to(k.dtype), p


@on_its_device
def backward(
    dy: Tensor, k: Tensor, beta: Tensor | None, x: Tensor | None, transpose: bool, *saved: Tensor
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of x, the reflectors and β; None for what was not given."""
    k = addressable(k)
    p, triangles = saved[0], Triangles(*saved[1:])
    if x is not None and is_fused(True, k.shape[1]):
        precision = dot_precision(k)
        dy, x = addressable(dy), addressable(x)
        w = triangles.left if transpose else triangles.right
        dx, v = apply_block(dy, k, w, precision, save=True)
        a, b = outer(v, x, p, dy, precision)
        if transpose:
            a, b = b, a
        return dx, *reflector_gradients(a, b, k, triangles, beta)
    if transpose:
        k, beta = _reverse(k, beta)
    dx, a, b = _blocks_back(dy, x, k, triangles, p)
    dk, dbeta = reflector_gradients(a.unsqueeze(0), b.unsqueeze(0), k, triangles, beta)
    if transpose:
        dk, dbeta = _reverse(dk, dbeta)
    return dx, dk, dbeta


def _blocks_back(
    dy: Tensor, x: Tensor | None, k: Tensor, triangles: Triangles, p: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return dX, and Vᵀ X_b and Pᵀ dY of every block's own X_b and dY.

    A block's input X_b = X − Σ_{c<b} P_c W_c is not made again: Vᵀ X_b = Vᵀ X − Σ (Vᵀ P_c) W_c.
    """
    G, N, D = k.shape
    M = dy.shape[1]
    room = {"dtype": torch.float32, "device": k.device}
    v = torch.empty(G, M, N, **room)
    b = torch.empty(G, N, D, **room)
    blocks = _blocks(N)
    for n in reversed(blocks):
        product(dy, k[:, n].mT, v[:, :, n])
        product(p[:, :, n].mT, dy, b[:, n])
        if n.start or x is not None:
            dx = torch.empty(G, M, D, **room) if dy.dtype != torch.float32 or n is blocks[-1] else dy
            dy = product(v[:, :, n], triangles.right[:, n], dx, minus=True, plus=dy)
    if x is None:
        a = torch.zeros(G, N, D, **room) if M < D else torch.empty(G, N, D, **room)
        a[:, :, :M].copy_(v.mT)
    else:
        a = product(v.mT, x, torch.empty(G, N, D, **room))
    if len(blocks) > 1:
        R = config.block_size(N)
        s = product(v.mT, p, torch.empty(G, N, N, **room), lower=R)
        product(s, triangles.left, a, minus=True, plus=a, triangle=R)
    return None if x is None else dy.to(k.dtype), a, b
