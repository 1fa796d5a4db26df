"""`householder_product` in blocks of compact WY form, with its gradient in closed form.

Vectors lie in rows. For one block of reflectors K `[n, D]` and vectors X `[M, D]`,

    L = strict_lower(diag(β) K̄ Kᵀ)      P = X Kᴴ      U (I + L)ᵀ = P diag(β)      Y = X − U K

The triangle is solved exactly, against the M rows of P: neither `T` nor a D × D matrix is formed.
Everything is written in differentiable PyTorch without in-place updates, so that PyTorch can
differentiate both functions again, in reverse or forward mode, to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from householder.ops._dispatch import without_autocast
from householder.ops.wy import compute_dtype, result_dtype

# The most and the fewest reflectors of one block. The triangle costs n·D a reflector and the
# products 4·M·D, so few vectors want small blocks; each block also costs some fixed time. More
# reflectors than dimensions make an ill-conditioned triangle.
MAX_BLOCK = 64
MIN_BLOCK = 16


@without_autocast
def forward(reflectors: Tensor, beta: Tensor, x: Tensor | None, rows: int) -> Tensor:
    """Return `H_{N−1} … H_0 x` for rows `x [G, M, D]`, reflectors `[G, N, D]`, beta `[G, N]`.

    Without x they are the first `rows` rows of the identity.
    """
    X, blocks = _prepare(x, reflectors, beta, rows)
    for i, (K, b) in enumerate(blocks):
        X = _apply_block(X, K, b, is_identity=x is None and i == 0)[0]
    return X.to(result_dtype(reflectors, beta) if x is None else x.dtype)


@without_autocast
def backward(
    dy: Tensor, x: Tensor | None, reflectors: Tensor, beta: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of x (None without x), reflectors and beta.

    A forward pass makes each block's X again (undoing the block instead would lose accuracy where
    it is nearly singular). Then, from the last block to the first,

        dU = −dY Kᴴ            dB conj(I + L) = dU            dP = dB diag(β̄)
        dX = dY + dP K         dL = −strict_lower(dBᵀ Ū)      E = diag(β̄) dL
        dK = dPᴴ X − Uᴴ dY + (Ē + Eᵀ) K        dβ = Σ_M dB ⊙ P̄ + Σ_cols dL ⊙ conj(K̄ Kᵀ)
    """
    X, blocks = _prepare(x, reflectors, beta, dy.shape[1])
    steps = []
    for i, (K, b) in enumerate(blocks):
        Y, gram, P, U = _apply_block(X, K, b, is_identity=x is None and i == 0)
        steps.append((X, K, b, gram, P, U))
        X = Y

    dX = dy.to(X.dtype)
    dK_blocks, db_blocks = [], []
    for X, K, b, gram, P, U in reversed(steps):
        unit = (b.unsqueeze(-1) * gram).conj()
        dU = -(dX @ K.mH)
        dB = torch.linalg.solve_triangular(unit, dU, upper=False, left=False, unitriangular=True)
        dP = dB * b.conj().unsqueeze(-2)
        dL = -(dB.mT @ U.conj()).tril(-1)
        E = b.conj().unsqueeze(-1) * dL
        dK_blocks.append(dP.mH @ X - U.mH @ dX + (E.conj() + E.mT) @ K)
        db_blocks.append((dB * P.conj()).sum(-2) + (dL * gram.conj()).sum(-1))
        dX = dX + dP @ K

    dK = torch.cat(dK_blocks[::-1], dim=-2)
    db = torch.cat(db_blocks[::-1], dim=-1)
    dx = None if x is None else _to_like(dX, x)
    return dx, _to_like(dK, reflectors), _to_like(db, beta)


@without_autocast
def tangent(
    reflectors: Tensor,
    beta: Tensor,
    x: Tensor | None,
    rows: int,
    dx: Tensor | None,
    dreflectors: Tensor,
    dbeta: Tensor,
) -> Tensor:
    """Return the derivative of `forward` along `(dx, dreflectors, dbeta)`, for forward mode.

    Each line of the block's algorithm is differentiated in turn.
    """
    X, blocks = _prepare(x, reflectors, beta, rows)
    dX, dblocks = _prepare(dx, dreflectors, dbeta, rows)
    dX = torch.zeros_like(X) if dx is None else dX.to(X.dtype)
    for (K, b), (dK, db) in zip(blocks, dblocks, strict=True):
        Y, gram, P, U = _apply_block(X, K, b)
        dgram = dK.conj() @ K.mT + K.conj() @ dK.mT
        dL = (db.unsqueeze(-1) * gram + b.unsqueeze(-1) * dgram).tril(-1)
        dP = dX @ K.mH + X @ dK.mH
        right = dP * b.unsqueeze(-2) + P * db.unsqueeze(-2) - U @ dL.mT
        dU = _solve_block(gram, b, right)
        X, dX = Y, dX - dU @ K - U @ dK
    return dX.to(result_dtype(reflectors, beta) if x is None else x.dtype)


def _prepare(
    x: Tensor | None, reflectors: Tensor, beta: Tensor, rows: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the rows and the blocks of reflectors in the dtype to compute in."""
    dtype = compute_dtype(x, reflectors, beta)
    G, _, D = reflectors.shape
    if x is None:
        X = torch.eye(rows, D, dtype=dtype, device=reflectors.device).expand(G, rows, D)
    else:
        X = x.to(dtype)
    size = min(MAX_BLOCK, max(MIN_BLOCK, min(2 * X.shape[1], D)))
    K, b = reflectors.to(dtype).split(size, dim=1), beta.to(dtype).split(size, dim=1)
    return X, list(zip(K, b, strict=True))


def _apply_block(
    X: Tensor, K: Tensor, b: Tensor, is_identity: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Y, and for the gradient K̄ Kᵀ, P and U; rows of the identity pick columns of K."""
    gram = K.conj() @ K.mT
    P = K[..., : X.shape[1]].mH if is_identity else X @ K.mH
    U = _solve_block(gram, b, P * b.unsqueeze(-2))
    return X - U @ K, gram, P, U


def _solve_block(gram: Tensor, b: Tensor, right: Tensor) -> Tensor:
    """Solve U (I + L)ᵀ = right."""
    # The solver takes the unit diagonal of I + L and the zeros above it for granted.
    L = b.unsqueeze(-1) * gram
    return torch.linalg.solve_triangular(L.mT, right, upper=True, left=False, unitriangular=True)


def _to_like(d: Tensor, like: Tensor) -> Tensor:
    """Cast a gradient to its input's dtype; a real input takes the real part."""
    if d.is_complex() and not like.is_complex():
        d = d.real
    return d.to(like.dtype)
