"""The triangles of float32 reflectors, in float64.

Where reflectors are nearly parallel, errors of the triangle and of its products with K add up (see
`wy.triangle_dtype`). It is the small part of the work. Four launches: K Kᵀ in parts over D; their
sum, with the inverses of the tiles on the diagonal; the tiles below them; the products with K.
Products are sums of outer products on the ordinary arithmetic units, one column and one row after
the other, both from the cache: Triton 3.6 multiplies float64 tiles wrongly on tensor cores (found
on an H200), and graphics cards without them are served too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops.householder_product.triton import config
from householder.ops.householder_product.triton.config import cdiv
from householder.ops.householder_product.triton.launch import launch
from householder.ops.householder_product.triton.tiles import (
    on_diagonal,
    store_rows,
    sum_parts,
    tile_at,
    transposed_tile_at,
)

# The side of the tiles that triangles are inverted in, and how many outer products are under way.
SIDE = tl.constexpr(32)
AHEAD = tl.constexpr(8)


@triton.jit
def load_row(k, n, o_d, N, D, stride):
    """Load columns of one row, zero where there is none."""
    rows = tl.zeros_like(o_d) + n
    return tl.load(k + rows * stride + o_d, mask=(rows < N) & (o_d < D), other=0.0).to(tl.float64)


@triton.jit
def zeros_in_runs(pointer, rows, columns):
    """Return float64 zeros `[rows, columns]` of which each thread holds runs of eight columns.

    Triton lays a tile out as it is loaded, and eight 16-bit numbers are one load of a thread; so
    this is a load, of nothing. Left to itself Triton gives each thread single columns of many rows,
    and an outer product is then a load for each of its entries.
    """
    places = pointer.to(tl.pointer_type(tl.float16)) + rows[:, None] * 128 + columns[None, :]
    return tl.load(places, mask=rows[:, None] + columns[None, :] < 0, other=0.0).to(tl.float64)


@triton.jit
def lower_tile(i):
    """Return row and column of a tile, numbered by rows: (0, 0), (1, 0), (1, 1) … (3, 3)."""
    row = (i >= 1).to(tl.int32) + (i >= 3).to(tl.int32) + (i >= 6).to(tl.int32)
    return row, i - row * (row + 1) // 2


@triton.jit
def wide_cross_kernel(
    kt, out, N, D,
    BLOCKS: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the sum over some columns of one lower tile of K Kᵀ, from Kᵀ [G, D, N]."""
    tiles: tl.constexpr = R // SIDE * (R // SIDE + 1) // 2
    i_row, i_column = lower_tile(tl.program_id(0) % tiles)
    i_block = (tl.program_id(0) // tiles).to(tl.int64)
    i_split = tl.program_id(1)
    first = (i_block % BLOCKS) * R
    o_t = tl.arange(0, SIDE)
    o_i = first + i_row * SIDE + o_t
    o_j = first + i_column * SIDE + o_t
    kt += i_block // BLOCKS * D * N
    total = zeros_in_runs(kt, o_t, o_t)
    for start in range(i_split * COLUMNS, tl.minimum(D, (i_split + 1) * COLUMNS), AHEAD):
        for i in tl.static_range(AHEAD):
            b_i = load_row(kt, start + i, o_i, D, N, N)
            b_j = load_row(kt, start + i, o_j, D, N, N)
            total += b_i[:, None] * b_j[None, :]
    p_out = out + (i_block * tl.num_programs(1) + i_split) * R * R
    tl.store(p_out + tile_at(i_row, i_column, R, SIDE), total)


@triton.jit
def substitute(gram_t, b_beta, R: tl.constexpr):
    """Return (I + L)⁻¹ of a tile for L = strict_lower(diag(β) G), from Gᵀ in memory.

    One warp does it, so that no step waits for another warp.
    """
    o_r = tl.arange(0, SIDE)
    x = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0).to(tl.float64)
    for j in range(SIDE - 1):
        # Eliminate column j: rows below it lose their multiple of row j, which is final by now.
        column = tl.where(o_r > j, b_beta * tl.load(gram_t + j * R + o_r), 0.0)
        # All bits but those of row j are zero: an exclusive or takes a third of an addition's time.
        own = tl.where(o_r[:, None] == j, x, 0.0).to(tl.int64, bitcast=True)
        row = tl.xor_sum(own, axis=0).to(tl.float64, bitcast=True)
        x -= column[:, None] * row[None, :]
    return x


@triton.jit
def wide_diagonal_kernel(
    parts, beta, gram_t, exact, exact_t, exact_beta, inverse, gram, coefficient, N, beta_g,
    BLOCKS: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Write one lower tile of K Kᵀ; of one on the diagonal β and (I + L)⁻¹ too; zeros opposite."""
    tiles: tl.constexpr = R // SIDE * (R // SIDE + 1) // 2
    i_block = (tl.program_id(0) // tiles).to(tl.int64)
    i, j = lower_tile(tl.program_id(0) % tiles)
    o_t = tl.arange(0, SIDE)
    square = i_block * R * R
    at = square + tile_at(i, j, R, SIDE)
    b_gram = sum_parts(parts + i_block * SPLITS * R * R + tile_at(i, j, R, SIDE), SPLITS, R)
    mirrored = square + transposed_tile_at(j, i, R, SIDE)
    tl.store(gram_t + mirrored, b_gram)
    tl.store(gram + at, b_gram.to(tl.float32))
    if i != j:
        # The larger tiles of the gradient are to find zeros above the diagonal.
        above = square + tile_at(j, i, R, SIDE)
        nothing = tl.zeros((SIDE, SIDE), dtype=tl.float32)
        tl.store(inverse + above, nothing)
        tl.store(gram + above, nothing)
        return
    o_n = (i_block % BLOCKS) * R + i * SIDE + o_t
    if GIVEN:
        p_beta = beta + i_block // BLOCKS * beta_g + o_n
        b_beta = tl.load(p_beta, mask=o_n < N, other=0.0).to(tl.float64)
    else:
        squares = on_diagonal(b_gram, SIDE)
        # A zero reflector is the identity.
        b_beta = tl.where(squares > 0.0, 2.0 / tl.where(squares > 0.0, squares, 1.0), 0.0)
    o_b = i_block * R + i * SIDE + o_t
    tl.store(exact_beta + o_b, b_beta)
    tl.store(coefficient + o_b, b_beta.to(tl.float32))
    # What the threads of this program have stored, they read.
    tl.debug_barrier()
    own = gram_t + square + i * SIDE * (R + 1)
    b_inverse = substitute(own, tl.load(exact_beta + o_b), R)
    tl.store(exact + at, b_inverse)
    tl.store(exact_t + mirrored, b_inverse)
    tl.store(inverse + at, b_inverse.to(tl.float32))


@triton.jit
def add_outer(total, columns, rows, begin, end, stride: tl.constexpr):
    """Add to a tile Aᵀ B of rows `begin …` of two squares in memory.

    `columns` and `rows` are where row 0 of A and of B begin.
    """
    for start in range(begin, end, AHEAD):
        for i in tl.static_range(AHEAD):
            b_c = tl.load(columns + (start + i) * stride)
            b_r = tl.load(rows + (start + i) * stride)
            total += b_c[:, None] * b_r[None, :]
    return total


@triton.jit
def wide_join_kernel(
    gram_t, exact, exact_t, exact_beta, inverse, R: tl.constexpr
):  # fmt: skip
    """Write the tiles of (I + L)⁻¹ below a diagonal one, whose columns need no others."""
    tiles: tl.constexpr = R // SIDE
    i_block = (tl.program_id(0) // (tiles - 1)).to(tl.int64)
    j = tl.program_id(0) % (tiles - 1)
    o_t = tl.arange(0, SIDE)
    gram_t += i_block * R * R
    exact += i_block * R * R
    exact_t += i_block * R * R
    inverse += i_block * R * R
    o_c = j * SIDE + o_t
    for i in range(j + 1, tiles):
        # What the threads of this program have stored, they read, and then write again.
        tl.debug_barrier()
        o_r = i * SIDE + o_t
        at = tile_at(i, j, R, SIDE)
        total = zeros_in_runs(exact, o_t, o_t)
        total = add_outer(total, gram_t + o_r, exact + o_c, j * SIDE, i * SIDE, R)
        total *= tl.load(exact_beta + i_block * R + o_r)[:, None]
        tl.store(exact + at, total)
        tl.debug_barrier()
        product = zeros_in_runs(exact, o_t, o_t)
        begin = i * SIDE
        product = add_outer(product, exact_t + o_r, exact + o_c, begin, begin + SIDE, R)
        tl.debug_barrier()
        tl.store(exact + at, -product)
        tl.store(exact_t + transposed_tile_at(j, i, R, SIDE), -product)
        tl.store(inverse + at, -product.to(tl.float32))


@triton.jit
def wide_expand_kernel(
    k, exact, exact_t, exact_beta, left, right, N, D, k_g, k_n,
    BLOCKS: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write one tile of rows and columns of Tᵀ K and of T K."""
    tiles: tl.constexpr = R // SIDE
    i_block = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles
    i_g = i_block // BLOCKS
    first = (i_block % BLOCKS) * R
    o_t = i * SIDE + tl.arange(0, SIDE)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    k += i_g * k_g
    exact += i_block * R * R
    exact_t += i_block * R * R
    exact_beta += i_block * R
    total = zeros_in_runs(exact, tl.arange(0, SIDE), tl.arange(0, BD))
    for start in range(i * SIDE, R, AHEAD):
        for m in tl.static_range(AHEAD):
            n = start + m
            b_k = load_row(k, first + n, o_d, N, D, k_n)
            total += tl.load(exact + n * R + o_t)[:, None] * b_k[None, :]
    total *= tl.load(exact_beta + o_t)[:, None]
    store_rows(left + i_g * N * D, first + o_t, o_d, N, D, D, total)
    total = zeros_in_runs(exact, tl.arange(0, SIDE), tl.arange(0, BD))
    for start in range(0, (i + 1) * SIDE, AHEAD):
        for m in tl.static_range(AHEAD):
            n = start + m
            b_k = load_row(k, first + n, o_d, N, D, k_n)
            b_t = tl.load(exact_t + n * R + o_t) * tl.load(exact_beta + n)
            total += b_t[:, None] * b_k[None, :]
    store_rows(right + i_g * N * D, first + o_t, o_d, N, D, D, total)


def wide_triangles(k: Tensor, beta: Tensor | None) -> tuple[Tensor, ...]:
    """Return Tᵀ K, T K, (I + L)⁻¹, K Kᵀ and β, in float32, as `prepare` does."""
    G, N, D = k.shape
    R, blocks = config.block_size(N), config.num_blocks(N)
    columns = config.wide_columns(D)
    splits = cdiv(D, columns)
    parts = torch.empty(G, blocks, splits, R, R, dtype=torch.float64, device=k.device)
    side, sizes = SIDE.value, {"N": N, "D": D, "BLOCKS": blocks, "R": R}
    small = {"num_warps": 4, "num_stages": 1}
    # So that a column is read at once, where reading it across rows takes the cache five times as
    # long, and so that nothing is converted again and again.
    kt = parts.new_empty(G, D, N).copy_(k.mT)
    lower = R // side * (R // side + 1) // 2
    launch(
        wide_cross_kernel, (G * blocks * lower, splits), kt, parts,
        **sizes, COLUMNS=columns, **small,
    )  # fmt: skip
    # Several at a time would be taken apart again, which costs the host more than another.
    # Both orientations are kept, so that every outer product reads rows.
    gram_t, exact, exact_t = (parts.new_empty(G, blocks, R, R) for _ in range(3))
    exact_beta = torch.empty(G, blocks, R, dtype=torch.float64, device=k.device)
    inverse, gram = (k.new_empty(G, blocks, R, R) for _ in range(2))
    used = torch.empty(G, blocks, R, dtype=torch.float32, device=k.device)
    launch(
        wide_diagonal_kernel, (G * blocks * lower,),
        parts, beta, gram_t, exact, exact_t, exact_beta, inverse, gram, used,
        N=N, beta_g=0 if beta is None else beta.stride(0),
        BLOCKS=blocks, R=R, SPLITS=splits, GIVEN=beta is not None, num_warps=1, num_stages=1,
    )  # fmt: skip
    if side < R:
        launch(
            wide_join_kernel, (G * blocks * (R // side - 1),),
            gram_t, exact, exact_t, exact_beta, inverse, R=R, **small,
        )  # fmt: skip
    left, right = k.new_empty(G, N, D), k.new_empty(G, N, D)
    launch(
        wide_expand_kernel, (G * blocks * (R // side), cdiv(D, 64)),
        k, exact, exact_t, exact_beta, left, right,
        k_g=k.stride(0), k_n=k.stride(1), **sizes, BD=64, **small,
    )  # fmt: skip
    return left, right, inverse, gram, used
