"""`householder_product` in blocks of compact WY form, with its gradient in closed form.

Vectors lie in rows. For one block of reflectors K `[n, D]` and vectors X `[M, D]`,

    L = strict_lower(diag(β) K̄ Kᵀ)      P = X Kᴴ      U (I + L)ᵀ = P diag(β)      Y = X − U K

The triangle is solved exactly, against the M rows of P: neither `T` nor a D × D matrix is formed.
Its inner products, β where that follows from them, and the solution are twice as wide as the
vectors (`wy.triangle_dtype` says why), the products with X and K are not. Everything is written in
differentiable PyTorch without in-place updates, so that PyTorch can differentiate both functions
again, in reverse or forward mode, to any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from householder.ops._dispatch import without_autocast
from householder.ops.wy import compute_dtype, result_dtype, triangle_dtype

# The most and the fewest reflectors of one block. The triangle costs n·D a reflector and the
# products 4·M·D, so few vectors want small blocks; each block also costs some fixed time. More
# reflectors than dimensions make an ill-conditioned triangle.
MAX_BLOCK = 64
MIN_BLOCK = 16
# Inner products are sums of parts of so many dimensions: their rounding is what is left of the
# error of Q, and one long chain of additions makes up to 1.6 times as much of it.
PART = 64


class Block(NamedTuple):
    """Some reflectors, and what belongs to their triangle."""

    K: Tensor  # [G, n, D], in the dtype of the products
    b: Tensor  # β [G, n], as wide as the triangle
    gram: Tensor  # K̄ Kᵀ [G, n, n], as wide


@without_autocast
def forward(reflectors: Tensor, beta: Tensor | None, x: Tensor | None, rows: int) -> Tensor:
    """Return `H_{N−1} … H_0 x` for rows `x [G, M, D]`, reflectors `[G, N, D]`, beta `[G, N]`.

    Without x they are the first `rows` rows of the identity, without beta the reflectors are
    orthogonal.
    """
    X, blocks = _prepare(x, reflectors, beta, rows)
    for i, block in enumerate(blocks):
        X = _apply_block(X, block, is_identity=x is None and i == 0)[0]
    return X.to(_output_dtype(x, reflectors, beta))


@without_autocast
def backward(
    dy: Tensor, x: Tensor | None, reflectors: Tensor, beta: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of x (None without x), reflectors and beta (None without beta).

    A forward pass makes each block's X again (undoing the block instead would lose accuracy where
    it is nearly singular). Then, from the last block to the first,

        dU = −dY Kᴴ            dB conj(I + L) = dU            dP = dB diag(β̄)
        dX = dY + dP K         dL = −strict_lower(dBᵀ Ū)      E = diag(β̄) dL
        dK = dPᴴ X − Uᴴ dY + (Ē + Eᵀ) K        dβ = Σ_M dB ⊙ P̄ + Σ_cols dL ⊙ conj(K̄ Kᵀ)

    Without beta, β = 2 / ‖k‖² has a gradient of its own: −β² Re(dβ) k joins dK.
    """
    X, blocks = _prepare(x, reflectors, beta, dy.shape[1])
    steps = []
    for i, block in enumerate(blocks):
        Y, P, U = _apply_block(X, block, is_identity=x is None and i == 0)
        steps.append((X, block, P, U))
        X = Y

    dX = dy.to(X.dtype)
    dK_blocks, db_blocks = [], []
    for X, block, P, U in reversed(steps):
        K, b, gram = block
        unit = (b.unsqueeze(-1) * gram).conj()
        dU = -(dX @ K.mH).to(unit.dtype)
        dB = torch.linalg.solve_triangular(unit, dU, upper=False, left=False, unitriangular=True)
        # The rest is sums, which need no more than the vectors' own precision.
        b, gram, dB = (t.to(X.dtype) for t in (b, gram, dB))
        dP = dB * b.conj().unsqueeze(-2)
        dL = -(dB.mT @ U.conj()).tril(-1)
        E = b.conj().unsqueeze(-1) * dL
        dK = dP.mH @ X - U.mH @ dX + (E.conj() + E.mT) @ K
        db = (dB * P.conj()).sum(-2) + (dL * gram.conj()).sum(-1)
        if beta is None:
            db = db.real if db.is_complex() else db
            dK = dK - (db * b.abs().square()).unsqueeze(-1) * K
        dK_blocks.append(dK)
        db_blocks.append(db)
        dX = dX + dP @ K

    dK = torch.cat(dK_blocks[::-1], dim=-2)
    db = None if beta is None else _to_like(torch.cat(db_blocks[::-1], dim=-1), beta)
    dx = None if x is None else _to_like(dX, x)
    return dx, _to_like(dK, reflectors), db


@without_autocast
def tangent(
    reflectors: Tensor,
    beta: Tensor | None,
    x: Tensor | None,
    rows: int,
    dx: Tensor | None,
    dreflectors: Tensor,
    dbeta: Tensor | None,
) -> Tensor:
    """Return the derivative of `forward` along `(dx, dreflectors, dbeta)`, for forward mode.

    Each line of the block's algorithm is differentiated in turn.
    """
    X, blocks = _prepare(x, reflectors, beta, rows)
    dX = torch.zeros_like(X) if dx is None else dx.to(X.dtype)
    size = blocks[0].K.shape[1]
    dKs = dreflectors.to(X.dtype).split(size, dim=1)
    dbs = [None] * len(blocks) if dbeta is None else dbeta.split(size, dim=1)
    for block, dK, db in zip(blocks, dKs, dbs, strict=True):
        K, b, gram = block
        wide, dwide = K.to(gram.dtype), dK.to(gram.dtype)
        dgram = dwide.conj() @ wide.mT + wide.conj() @ dwide.mT
        if db is None:
            squares = dgram.diagonal(dim1=-2, dim2=-1)
            db = -b.square() / 2 * (squares.real if squares.is_complex() else squares)
        Y, P, U = _apply_block(X, block)
        dL = (db.unsqueeze(-1) * gram + b.unsqueeze(-1) * dgram).tril(-1)
        dP = (dX @ K.mH + X @ dK.mH).to(gram.dtype)
        right = dP * b.unsqueeze(-2) + P.to(gram.dtype) * db.unsqueeze(-2)
        dU = _solve_block(block, right - U.to(gram.dtype) @ dL.mT).to(X.dtype)
        X, dX = Y, dX - dU @ K - U @ dK
    return dX.to(_output_dtype(x, reflectors, beta))


def orthogonal_beta(squares: Tensor) -> Tensor:
    """Return β = 2 / ‖k‖², and 0 for a zero reflector, from `‖k‖²`, real or with a real part."""
    squares = squares.real if squares.is_complex() else squares
    zero = squares == 0
    return torch.where(zero, torch.zeros_like(squares), 2 / torch.where(zero, 1, squares))


def _output_dtype(x: Tensor | None, reflectors: Tensor, beta: Tensor | None) -> torch.dtype:
    if x is not None:
        return x.dtype
    return reflectors.dtype if beta is None else result_dtype(reflectors, beta)


def _prepare(
    x: Tensor | None, reflectors: Tensor, beta: Tensor | None, rows: int
) -> tuple[Tensor, list[Block]]:
    """Return the rows in the dtype to compute in, and the blocks of reflectors."""
    # A wider β is for the triangles, which are wide; only a complex one matters to the products.
    dtype = compute_dtype(x, reflectors)
    if beta is not None and beta.is_complex() and not dtype.is_complex:
        dtype = dtype.to_complex()
    G, _, D = reflectors.shape
    if x is None:
        X = torch.eye(rows, D, dtype=dtype, device=reflectors.device).expand(G, rows, D)
    else:
        X = x.to(dtype)
    size = min(MAX_BLOCK, max(MIN_BLOCK, min(2 * X.shape[1], D)))
    wide = triangle_dtype(dtype, reflectors.device)
    grams = [K.conj() @ K.mT for K in reflectors.to(wide).split(size, dim=1)]
    if beta is None:
        squares = torch.cat([gram.diagonal(dim1=-2, dim2=-1) for gram in grams], dim=-1)
        b = orthogonal_beta(squares)
    else:
        b = beta.to(wide)
    parts = reflectors.to(dtype).split(size, dim=1), b.split(size, dim=1), grams
    return X, [Block(*block) for block in zip(*parts, strict=True)]


def _apply_block(
    X: Tensor, block: Block, is_identity: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Y, and for the gradient P and U; rows of the identity pick columns of K."""
    K, b, gram = block
    P = K[..., : X.shape[1]].mH if is_identity else _inner(X, K)
    U = _solve_block(block, P.to(gram.dtype) * b.unsqueeze(-2)).to(X.dtype)
    return X - U @ K, P, U


def _inner(X: Tensor, K: Tensor) -> Tensor:
    """Return X Kᴴ, added up in parts unless the vectors are few: those wait for the calls."""
    M, D = X.shape[-2:]
    whole = D - D % PART
    if D < 2 * PART or M < PART:
        return X @ K.mH
    a, b = (t[..., :whole].unflatten(-1, (-1, PART)).transpose(-3, -2) for t in (X, K))
    P = (a @ b.mH).sum(-3)
    return P if whole == D else P + X[..., whole:] @ K[..., whole:].mH


def _solve_block(block: Block, right: Tensor) -> Tensor:
    """Solve U (I + L)ᵀ = right."""
    # The solver takes the unit diagonal of I + L and the zeros above it for granted.
    L = block.b.unsqueeze(-1) * block.gram
    return torch.linalg.solve_triangular(L.mT, right, upper=True, left=False, unitriangular=True)


def _to_like(d: Tensor, like: Tensor) -> Tensor:
    """Cast a gradient to its input's dtype; a real input takes the real part."""
    if d.is_complex() and not like.is_complex():
        d = d.real
    return d.to(like.dtype)
