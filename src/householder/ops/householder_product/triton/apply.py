"""Rows multiplied by one block of reflectors, and the sums over rows of the gradient.

With P = X Kᵀ and W = Tᵀ K (for the transpose T K), Y = X − P W: one kernel makes P, another Y. One
kernel for both would read X twice as well, and keeps fewer loads under way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._dispatch import contiguous_like
from householder.ops._triton import cast_operand, dot, dot_add, operand_dtype
from householder.ops.householder_product.triton import config


@triton.jit
def inner_kernel(
    x, k, p, M, N, D, x_g, x_m, k_g, k_n,
    R: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write rows of P = X Kᵀ."""
    num_m = tl.cdiv(M, BM)
    i_g = (tl.program_id(0) // num_m).to(tl.int64)
    o_m = ((tl.program_id(0) % num_m) * BM + tl.arange(0, BM)).to(tl.int64)
    o_r = tl.arange(0, R)
    m_m = (o_m < M)[:, None]
    m_r = (o_r < N)[None, :]
    p_x = x + i_g * x_g + o_m[:, None] * x_m
    p_k = k + i_g * k_g + o_r[None, :] * k_n
    total = tl.zeros((BM, R), dtype=tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        b_x = tl.load(p_x + o_d[None, :], mask=m_m & (o_d < D)[None, :], other=0.0)
        b_k = tl.load(p_k + o_d[:, None], mask=m_r & (o_d < D)[:, None], other=0.0)
        b_x, b_k = cast_operand(b_x, PRECISION), cast_operand(b_k, PRECISION)
        total = dot_add(b_x, b_k, total, PRECISION)
    p_p = p + (i_g * M + o_m[:, None]) * N + o_r[None, :]
    tl.store(p_p, cast_operand(total, PRECISION).to(p.dtype.element_ty), mask=m_m & m_r)


@triton.jit
def update_kernel(
    x, p, w, y, M, N, D, x_g, x_m,
    R: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write a tile of Y = X − P W."""
    num_m = tl.cdiv(M, BM)
    num_d = tl.cdiv(D, BD)
    # From the last rows to the first: those are still in the second-level cache.
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_g = (i // (num_m * num_d)).to(tl.int64)
    o_m = ((i // num_d % num_m) * BM + tl.arange(0, BM)).to(tl.int64)
    o_d = (i % num_d) * BD + tl.arange(0, BD)
    o_r = tl.arange(0, R)
    m_m = (o_m < M)[:, None]
    m_d = (o_d < D)[None, :]
    m_r = o_r < N
    b_x = tl.load(x + i_g * x_g + o_m[:, None] * x_m + o_d[None, :], mask=m_m & m_d, other=0.0)
    b_p = tl.load(
        p + (i_g * M + o_m[:, None]) * N + o_r[None, :], mask=m_m & m_r[None, :], other=0.0
    )
    b_w = tl.load(
        w + (i_g * N + o_r[:, None]) * D + o_d[None, :], mask=m_r[:, None] & m_d, other=0.0
    )
    b_p, b_w = cast_operand(b_p, PRECISION), cast_operand(b_w, PRECISION)
    b_y = b_x.to(tl.float32) - dot(b_p, b_w, PRECISION)
    p_y = y + (i_g * M + o_m[:, None]) * D + o_d[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m & m_d)


def apply_block(x: Tensor, k: Tensor, w: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Return `Y = X − P W` and `P = X Kᵀ`, for one block of reflectors."""
    G, M, D = x.shape
    N = k.shape[1]
    y = contiguous_like(x)
    p = x.new_empty(G, M, N, dtype=operand_dtype(precision))
    R = config.block_size(N)
    launch = config.inner_launch(R, precision)
    inner_kernel[(G * triton.cdiv(M, launch.tiles["BM"]),)](
        x, k, p, M, N, D, *x.stride()[:2], *k.stride()[:2],
        R=R, PRECISION=precision, **launch.options,
    )  # fmt: skip
    launch = config.update_launch(R, precision)
    tiles = triton.cdiv(M, launch.tiles["BM"]) * triton.cdiv(D, launch.tiles["BD"])
    update_kernel[(G * tiles,)](
        x, p, w, y, M, N, D, *x.stride()[:2], R=R, PRECISION=precision, **launch.options
    )
    return y, p


@triton.jit
def outer_kernel(
    v, x, p, dy, out, M, N, D, x_g, x_m, dy_g, dy_m, G,
    R: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write columns of the sum over some rows of Vᵀ X, or of Pᵀ dY."""
    num_d = tl.cdiv(D, BD)
    i_which = tl.program_id(1) % 2
    i_split = tl.program_id(1) // 2
    i_g = (tl.program_id(0) // num_d).to(tl.int64)
    if i_which == 0:
        p_row = x + i_g * x_g
        stride = x_m
        p_r = v + i_g * M * N
    else:
        p_row = dy + i_g * dy_g
        stride = dy_m
        p_r = p + i_g * M * N
    o_d = (tl.program_id(0) % num_d) * BD + tl.arange(0, BD)
    o_r = tl.arange(0, R)
    m_d = o_d < D
    m_r = o_r < N
    rows = tl.cdiv(tl.cdiv(M, SPLITS), BM) * BM
    start = i_split * rows
    # Transposed, [BD, R]: the tensor cores want at least 64 rows, and there may be few reflectors.
    total = tl.zeros((BD, R), dtype=tl.float32)
    for m in range(start, tl.minimum(start + rows, M), BM):
        o_m = (m + tl.arange(0, BM)).to(tl.int64)
        m_m = o_m < M
        b_x = tl.load(
            p_row + o_m[:, None] * stride + o_d[None, :],
            mask=m_m[:, None] & m_d[None, :], other=0.0,
        )  # fmt: skip
        b_r = tl.load(
            p_r + o_m[:, None] * N + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0
        )
        b_x, b_r = cast_operand(b_x, PRECISION), cast_operand(b_r, PRECISION)
        total = dot_add(tl.trans(b_x), b_r, total, PRECISION)
    p_out = out + (((i_which * SPLITS + i_split) * G + i_g) * N + o_r[None, :]) * D + o_d[:, None]
    tl.store(p_out, total, mask=m_d[:, None] & m_r[None, :])


def outer(v: Tensor, x: Tensor, p: Tensor, dy: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Return `Vᵀ X` and `Pᵀ dY`, float32 `[sums, G, N, D]` in parts over the rows."""
    G, M, D = x.shape
    N = v.shape[2]
    R, splits = config.block_size(N), config.outer_splits(M)
    launch = config.outer_launch(R, precision)
    out = torch.empty(2, splits, G, N, D, dtype=torch.float32, device=x.device)
    outer_kernel[(G * triton.cdiv(D, launch.tiles["BD"]), 2 * splits)](
        v, x, p, dy, out, M, N, D, *x.stride()[:2], *dy.stride()[:2], G,
        R=R, SPLITS=splits, PRECISION=precision, **launch.options,
    )  # fmt: skip
    return out[0], out[1]
