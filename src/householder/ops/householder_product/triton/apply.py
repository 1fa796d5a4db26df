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
from householder.ops._triton import cast_operand, dot, operand_dtype
from householder.ops.householder_product.triton import config
from householder.ops.householder_product.triton.config import cdiv
from householder.ops.householder_product.triton.launch import launch
from householder.ops.householder_product.triton.tiles import multiply_add


@triton.jit
def inner_kernel(
    x, k, p, gram, M, N, D, x_g, x_m, k_g, k_n,
    R: tl.constexpr, GRAM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write rows of P = X Kᵀ; the last programs, if asked for, those of K Kᵀ."""
    num_m = tl.cdiv(M, BM)
    per_product = num_m
    if GRAM:
        per_product += tl.cdiv(R, BM)
    i_g = (tl.program_id(0) // per_product).to(tl.int64)
    i_m = tl.program_id(0) % per_product
    if i_m < num_m:
        o_m = (i_m * BM + tl.arange(0, BM)).to(tl.int64)
        m_m = (o_m < M)[:, None]
        p_x = x + i_g * x_g + o_m[:, None] * x_m
    else:
        o_m = ((i_m - num_m) * BM + tl.arange(0, BM)).to(tl.int64)
        m_m = (o_m < N)[:, None]
        p_x = k + i_g * k_g + o_m[:, None] * k_n
    o_r = tl.arange(0, R)
    m_r = (o_r < N)[None, :]
    p_k = k + i_g * k_g + o_r[None, :] * k_n
    total = tl.zeros((BM, R), dtype=tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        b_x = tl.load(p_x + o_d[None, :], mask=m_m & (o_d < D)[None, :], other=0.0)
        b_k = tl.load(p_k + o_d[:, None], mask=m_r & (o_d < D)[:, None], other=0.0)
        b_x, b_k = cast_operand(b_x, PRECISION), cast_operand(b_k, PRECISION)
        total = multiply_add(b_x, b_k, total, PRECISION)
    if GRAM:  # noqa: SIM102 (one is known at compile time)
        if i_m >= num_m:
            p_gram = gram + (i_g * R + o_m[:, None]) * R + o_r[None, :]
            tl.store(p_gram, total, mask=(o_m < R)[:, None] & (o_r < R)[None, :])
            return
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
    # From the last rows to the first: what was read last is the likeliest to be in the cache.
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


def inner(x: Tensor, k: Tensor, precision: str, with_gram: bool) -> tuple[Tensor, Tensor | None]:
    """Return `P = X Kᵀ` of one block of reflectors and, if asked for, K Kᵀ as `cross` does."""
    G, M, D = x.shape
    N = k.shape[1]
    R = config.block_size(N)
    p = x.new_empty(G, M, N, dtype=operand_dtype(precision))
    gram = x.new_empty(G, 1, 1, R, R, dtype=torch.float32) if with_gram else None
    tiling = config.inner_launch(R, precision)
    rows = tiling.tiles["BM"]
    programs = cdiv(M, rows) + (cdiv(R, rows) if with_gram else 0)
    launch(
        inner_kernel, (G * programs,), x, k, p, gram, M=M, N=N, D=D,
        x_g=x.stride(0), x_m=x.stride(1), k_g=k.stride(0), k_n=k.stride(1),
        R=R, GRAM=with_gram, PRECISION=precision, **tiling.options,
    )  # fmt: skip
    return p, gram


def update(x: Tensor, p: Tensor, w: Tensor, precision: str) -> Tensor:
    """Return `Y = X − P W`."""
    G, M, D = x.shape
    N = p.shape[2]
    y = contiguous_like(x)
    R = config.block_size(N)
    tiling = config.update_launch(R, precision)
    tiles = cdiv(M, tiling.tiles["BM"]) * cdiv(D, tiling.tiles["BD"])
    launch(
        update_kernel, (G * tiles,), x, p, w, y, M=M, N=N, D=D, x_g=x.stride(0), x_m=x.stride(1),
        R=R, PRECISION=precision, **tiling.options,
    )  # fmt: skip
    return y


@triton.jit
def sum_outer(
    rows, stride, o_d, width, r, i_split, M, N,
    R: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Return the sum over a share of the rows of the outer products of columns `o_d` and r.

    It is [BD, R]: the tensor cores want at least 64 rows, and there may be few reflectors.
    """
    o_r = tl.arange(0, R)
    m_d = o_d < width
    m_r = o_r < N
    share = tl.cdiv(tl.cdiv(M, SPLITS), BM) * BM
    start = i_split * share
    total = tl.zeros((BD, R), dtype=tl.float32)
    for m in range(start, tl.minimum(start + share, M), BM):
        o_m = (m + tl.arange(0, BM)).to(tl.int64)
        m_m = (o_m < M)[:, None]
        b_x = tl.load(
            rows + o_m[:, None] * stride + o_d[None, :], mask=m_m & m_d[None, :], other=0.0
        )
        b_r = tl.load(r + o_m[:, None] * N + o_r[None, :], mask=m_m & m_r[None, :], other=0.0)
        b_x, b_r = cast_operand(b_x, PRECISION), cast_operand(b_r, PRECISION)
        total = multiply_add(tl.trans(b_x), b_r, total, PRECISION)
    return total


@triton.jit
def outer_kernel(
    v, x, p, dy, out, parts, M, N, D, x_g, x_m, dy_g, dy_m, G,
    R: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, TRANSPOSE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write columns of the sum over some rows of Vᵀ X, of Pᵀ dY or of Vᵀ P.

    For the transpose of the product the last is transposed.
    """
    num_d = tl.cdiv(D, BD)
    per_product = 2 * num_d
    if PARTS:
        per_product += (R + BD - 1) // BD
    i_g = (tl.program_id(0) // per_product).to(tl.int64)
    i = tl.program_id(0) % per_product
    i_split = tl.program_id(1)
    o_r = tl.arange(0, R)
    p_v = v + i_g * M * N
    p_p = p + i_g * M * N
    if PARTS:  # noqa: SIM102 (one is known at compile time)
        if i >= 2 * num_d:
            o_d = (i - 2 * num_d) * BD + tl.arange(0, BD)
            total = sum_outer(p_p, N, o_d, N, p_v, i_split, M, N, R, SPLITS, PRECISION, BM, BD)
            p_parts = parts + (i_g * SPLITS + i_split) * R * R
            if TRANSPOSE:
                p_parts += o_d[:, None] * R + o_r[None, :]
            else:
                p_parts += o_r[None, :] * R + o_d[:, None]
            tl.store(p_parts, total, mask=(o_d < R)[:, None] & (o_r < R)[None, :])
            return
    if i < num_d:
        rows = x + i_g * x_g
        stride = x_m
        r = p_v
    else:
        rows = dy + i_g * dy_g
        stride = dy_m
        r = p_p
    o_d = (i % num_d) * BD + tl.arange(0, BD)
    total = sum_outer(rows, stride, o_d, D, r, i_split, M, N, R, SPLITS, PRECISION, BM, BD)
    part = ((i // num_d) * SPLITS + i_split) * G + i_g
    p_out = out + (part * N + o_r[None, :]) * D + o_d[:, None]
    tl.store(p_out, total, mask=(o_d < D)[:, None] & (o_r < N)[None, :])


def outer(
    v: Tensor, x: Tensor, p: Tensor, dy: Tensor, transpose: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return `Vᵀ X` and `Pᵀ dY`, float32 `[sums, G, N, D]`, and `Vᵀ P`, in parts over the rows.

    The last is as `cross` returns it; of the transpose of a product it is `Pᵀ V`. There is none
    where P is kept in another dtype than X, in which the kernel could not read it.
    """
    G, M, D = x.shape
    N = v.shape[2]
    R, splits = config.block_size(N), config.outer_splits(M)
    tiling = config.outer_launch(R, precision)
    out = torch.empty(2, splits, G, N, D, dtype=torch.float32, device=x.device)
    parts = None
    if p.dtype == x.dtype:
        parts = torch.empty(G, 1, splits, R, R, dtype=torch.float32, device=x.device)
    columns = tiling.tiles["BD"]
    programs = 2 * cdiv(D, columns) + (0 if parts is None else cdiv(R, columns))
    launch(
        outer_kernel, (G * programs, splits), v, x, p, dy, out, parts, M=M, N=N, D=D,
        x_g=x.stride(0), x_m=x.stride(1), dy_g=dy.stride(0), dy_m=dy.stride(1), G=G,
        R=R, SPLITS=splits, PARTS=parts is not None, TRANSPOSE=transpose,
        PRECISION=precision, **tiling.options,
    )  # fmt: skip
    return out[0], out[1], parts
