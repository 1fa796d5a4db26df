"""The gates' part of `delta_product` backward for Hopper: decays, and what the gradient is made of.

A log gate scales all that crosses its token, and its gradient is the sum of these parts of the
loss (see `backward.py`). The sweep finds them by rows of a chunk, or sums over the rows, apart for
each warp that has some; a small kernel puts them together.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from householder.ops._gluon import exp2
from householder.ops.delta_product.triton.chunks import (
    FROM_START,
    LOG_HIGH,
    LOG_LOW,
    SIZES,
    TO_END,
    own_chunk,
)
from householder.ops.delta_product.triton.hopper_tiles import LOG2_E, pick

# What the gates' gradient of a chunk is made of, in places of R numbers, each in parts: what rows
# write to the chunk's end, what they take from its start, what goes from rows before a token to
# rows and queries from it on, what queries take from the start, and what S keeps.
WRITTEN = gl.constexpr(0)
TAKEN = gl.constexpr(2)
CROSSING = gl.constexpr(4)
ASKED = gl.constexpr(6)
KEPT = gl.constexpr(10)
# What a chunk has: these, 8 parts of what S keeps, and a multiple of 16.
PARTS_SIZE = 10 * 64 + 16


@gluon.jit
def pair_decay(
    rows, later, LINE: gl.constexpr, BC: gl.constexpr, R: gl.constexpr, LAYOUT: gl.constexpr
):
    """Return Γ from rows to later queries, or rows; anything where the query is not later.

    In `later`, sums of log gates begin at LINE, and behind them what is left of each.
    """
    log = pick(later, LINE, BC, BC, gl.SliceLayout(0, LAYOUT))[None, :]
    log -= pick(rows, LOG_HIGH, R, R, gl.SliceLayout(1, LAYOUT))[:, None]
    # The first difference is exact, the second one small: both are taken before they are joined.
    rest = (pick(later, LINE + 1, BC, BC, gl.SliceLayout(0, LAYOUT)) * LOG2_E)[None, :]
    rest -= (pick(rows, LOG_LOW, R, R, gl.SliceLayout(1, LAYOUT)) * LOG2_E)[:, None]
    return exp2(log * LOG2_E + rest)


@gluon.jit
def sum_rows(x, PARTS: gl.constexpr):
    """Return the sums of a product's rows, `[rows, PARTS]`: those of different warps apart."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    return gl.sum(x.reshape([ROWS, PARTS, COLUMNS // PARTS]), axis=2)


@gluon.jit
def store_row_sums(pointer, x, z, PARTS: gl.constexpr):
    """Store such sums."""
    sums = sum_rows(x, PARTS)
    ROWS: gl.constexpr = x.shape[0]
    o_p = gl.arange(0, PARTS, layout=gl.SliceLayout(0, sums.type.layout))
    o_r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, sums.type.layout)) + z
    gl.store(pointer + o_p[None, :] * ROWS + o_r[:, None], sums)


@gluon.jit
def store_column_sums(pointer, x, PARTS: gl.constexpr):
    """Store the sums of a product's columns, in PARTS that are those of different warps."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    sums = gl.sum(x.reshape([PARTS, ROWS // PARTS, COLUMNS]), axis=1)
    layout: gl.constexpr = sums.type.layout
    o_p = gl.arange(0, PARTS, layout=gl.SliceLayout(1, layout))
    o_c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    gl.store(pointer + o_p[:, None] * COLUMNS + o_c[None, :], sums)


@gluon.constexpr_function
def rows_of_warps(rows, columns, row_last):
    """Return how warps hold 16 rows and 64 or all columns, as factors of small products.

    Those of 16 rows come first, with `row_last`, or of 8, which are given transposed.
    """
    registers = [[0, 1], [8, 0], [0, 8]] if row_last else [[0, 1], [0, 8], [8, 0]]
    registers += [[0, 16 << i] for i in range((columns[0] // 16).bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    warps = [[16 << i, 0] for i in range((rows // 16).bit_length() - 1)]
    warps += [[0, columns[0]]] * (columns[1] // columns[0] - 1)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, columns[1]])


@gluon.jit
def by_warps(x, PARTS: gl.constexpr):
    """Take a tile apart into those of 16 rows and a part of the columns that warps hold."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1] // PARTS
    x = x.reshape([ROWS // 16, 16, PARTS, COLUMNS]).permute((2, 0, 1, 3))
    return x.reshape([PARTS * ROWS // 16, 16, COLUMNS])


@gluon.jit
def row_products(a, b, PARTS: gl.constexpr):
    """Return the inner products of the rows of two tiles, `[PARTS · rows]`, in PARTS of columns.

    They are the diagonals of small products: cheaper than to unpack the tiles. `b` is in shared
    memory; `a` is so too, or it is a product with 16 rows a warp and a part of the columns.
    """
    ROWS: gl.constexpr = b.shape[0]
    COLUMNS: gl.constexpr = b.shape[1]
    WARPS: gl.constexpr = PARTS * ROWS // 16
    small: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, small, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, small, 2)
    b = by_warps(b.load(rows_of_warps(ROWS, (COLUMNS // PARTS, COLUMNS), False)), PARTS)
    b = gl.convert_layout(b.permute((0, 2, 1)), right)
    a = gl.convert_layout(by_warps(a, PARTS), left)
    x = mma_v2(a, b, gl.zeros([WARPS, 16, 16], gl.float32, layout=small))
    by_row: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, small))
    by_column: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, small))
    row = gl.arange(0, 16, layout=by_row)[None, :][:, :, None]
    column = gl.arange(0, 16, layout=by_column)[None, :][:, None, :]
    return gl.sum(gl.where(row == column, x, 0.0), axis=2)


@gluon.jit
def inner_product(a, b):
    """Return the inner product of two tiles in shared memory, in parts of 16 rows."""
    a = a.load(rows_of_warps(a.shape[0], (a.shape[1], a.shape[1]), True))
    return gl.sum(row_products(a, b, 1), axis=1)


@gluon.jit
def store_row_products(pointer, a, b, z, PARTS: gl.constexpr):
    """Store the inner products of rows."""
    x = row_products(a.to(gl.bfloat16), b, PARTS)
    o_w = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))
    o_r = gl.arange(0, 16, layout=gl.SliceLayout(0, x.type.layout)) + z
    gl.store(pointer + o_w[:, None] * 16 + o_r[None, :], x)


@triton.jit(do_not_specialize=SIZES)
def gate_kernel(
    parts, table, dg, cu_seqlens, chunk_sequence, first_chunk, parts_step, scale, T, HV,
    N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, PACKED: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Put the parts of the gates' gradient together for one chunk and value head."""
    i_chunk, i_h, batch, start, n = own_chunk(
        T, HV, cu_seqlens, chunk_sequence, first_chunk, C, PACKED
    )
    if n <= 0:
        return
    p = parts + (i_chunk * HV + i_h) * parts_step
    p_table = table + (i_chunk * HV + i_h) * (6 * R)
    # A token's gate is crossed by what rows before its first one write, and by what it and rows
    # behind it take: sums of both are read at that row.
    o_r = tl.arange(0, R)
    first = o_r % N == 0
    earlier = tl.zeros((R,), tl.float32)
    later = tl.zeros((R,), tl.float32)
    b_dg = tl.zeros((R,), tl.float32)
    for i in tl.static_range(GROUPS):
        earlier += tl.load(p + (WRITTEN + i) * R + o_r - 1, mask=o_r > 0, other=0.0)
        later += tl.load(p + (TAKEN + i) * R + o_r)
        b_dg += tl.load(p + (CROSSING + i) * R + o_r)
    earlier *= tl.load(p_table + TO_END * R + o_r - 1, mask=o_r > 0, other=0.0)
    later *= tl.load(p_table + FROM_START * R + o_r)
    for i in tl.static_range(GROUPS if N == 1 else 4 * GROUPS):
        later += tl.load(p + ASKED * R + i * BC + o_r // N, mask=first, other=0.0)
    b_dg += tl.cumsum(earlier, axis=0) + tl.cumsum(later, axis=0, reverse=True)
    b_dg += tl.sum(tl.load(p + KEPT * R + tl.arange(0, 4 * GROUPS)), axis=0)
    p_dg = dg + (batch * T + start + o_r // N) * HV + i_h
    tl.store(p_dg, (b_dg * scale).to(dg.dtype.element_ty), mask=first & (o_r < n * N))
