"""The triangles of float32 reflectors, in float64.

Where reflectors are nearly parallel, errors of the triangle and of its products with K add up (see
`wy.triangle_dtype`). It is the small part of the work. Three launches, as in `prepare.py`: K Kᵀ in
parts over D; their sum and the inverse of its triangle; the products with K. Products are sums of
outer products on the ordinary arithmetic units, one column and one row after the other, both from
the cache: Triton 3.6 multiplies float64 tiles wrongly on tensor cores (found on an H200), and
graphics cards without them are served too.
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
    strictly_lower,
    sum_parts,
    tile_at,
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
def wide_cross_kernel(
    kt, out, N, D,
    BLOCKS: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the sum over some columns of one lower tile of K Kᵀ, from Kᵀ [G, D, N]."""
    tiles: tl.constexpr = R // SIDE * (R // SIDE + 1) // 2
    i_tile = tl.program_id(0) % tiles
    i_block = (tl.program_id(0) // tiles).to(tl.int64)
    i_split = tl.program_id(1)
    # Tiles are numbered by rows: (0, 0), (1, 0), (1, 1), (2, 0) … (3, 3).
    i_row = (i_tile >= 1).to(tl.int32) + (i_tile >= 3).to(tl.int32) + (i_tile >= 6).to(tl.int32)
    i_column = i_tile - i_row * (i_row + 1) // 2
    first = (i_block % BLOCKS) * R
    o_t = tl.arange(0, SIDE)
    o_i = first + i_row * SIDE + o_t
    o_j = first + i_column * SIDE + o_t
    kt += i_block // BLOCKS * D * N
    total = tl.zeros((SIDE, SIDE), dtype=tl.float64)
    for start in range(i_split * COLUMNS, tl.minimum(D, (i_split + 1) * COLUMNS), AHEAD):
        for i in tl.static_range(AHEAD):
            b_i = load_row(kt, start + i, o_i, D, N, N)
            b_j = load_row(kt, start + i, o_j, D, N, N)
            total += b_i[:, None] * b_j[None, :]
    p_out = out + (i_block * tl.num_programs(1) + i_split) * R * R
    tl.store(p_out + tile_at(i_row, i_column, R, SIDE), total)


@triton.jit
def substitute(m, R: tl.constexpr):
    """Invert I + m for a strictly lower triangular tile `m [R, R]` by substitution."""
    o_r = tl.arange(0, R)
    x = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0) + tl.zeros_like(m)
    for j in range(R - 1):
        # Eliminate column j: rows below it lose their multiple of row j, which is final by now.
        column = tl.sum(tl.where(o_r[None, :] == j, m, 0.0), axis=1)
        row = tl.sum(tl.where(o_r[:, None] == j, x, 0.0), axis=0)
        x -= column[:, None] * row[None, :]
    return x


@triton.jit
def add_outer(total, columns, rows, begin, end, stride: tl.constexpr):
    """Add to a tile the product of columns and rows `begin …` of two squares in memory.

    `columns` and `rows` are the places of column 0 and of row 0.
    """
    for start in range(begin, end, AHEAD):
        for i in tl.static_range(AHEAD):
            b_c = tl.load(columns + start + i)
            b_r = tl.load(rows + (start + i) * stride)
            total += b_c[:, None] * b_r[None, :]
    return total


@triton.jit
def wide_triangle_kernel(
    parts, beta, exact_gram, exact, exact_beta, inverse, gram, coefficient, N, beta_g,
    BLOCKS: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Write K Kᵀ, β and (I + L)⁻¹ of a block in float64, and rounded for the gradient."""
    tiles: tl.constexpr = R // SIDE
    i_block = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, SIDE)
    parts += i_block * SPLITS * R * R
    exact_gram += i_block * R * R
    exact += i_block * R * R
    inverse += i_block * R * R
    gram += i_block * R * R
    for i in range(tiles):
        for j in range(tiles):
            at = tile_at(i, j, R, SIDE)
            b_gram = tl.zeros((SIDE, SIDE), dtype=tl.float64)
            if j <= i:
                b_gram += sum_parts(parts + at, SPLITS, R)
            else:  # larger tiles, too, are to find zeros above the diagonal
                tl.store(exact + at, b_gram)
                tl.store(inverse + at, b_gram.to(tl.float32))
            tl.store(exact_gram + at, b_gram)
            tl.store(gram + at, b_gram.to(tl.float32))
    tl.debug_barrier()
    for i in range(tiles):
        at = tile_at(i, i, R, SIDE)
        b_gram = tl.load(exact_gram + at)
        o_n = (i_block % BLOCKS) * R + i * SIDE + o_t
        if GIVEN:
            p_beta = beta + i_block // BLOCKS * beta_g + o_n
            b_beta = tl.load(p_beta, mask=o_n < N, other=0.0).to(tl.float64)
        else:
            squares = on_diagonal(b_gram, SIDE)
            # A zero reflector is the identity.
            b_beta = tl.where(squares > 0.0, 2.0 / tl.where(squares > 0.0, squares, 1.0), 0.0)
        tl.store(exact_beta + i_block * R + i * SIDE + o_t, b_beta)
        tl.store(coefficient + i_block * R + i * SIDE + o_t, b_beta.to(tl.float32))
        b_inverse = substitute(strictly_lower(b_beta[:, None] * b_gram, SIDE), SIDE)
        tl.store(exact + at, b_inverse)
        tl.store(inverse + at, b_inverse.to(tl.float32))
    for i in range(1, tiles):
        rows = (i * SIDE + o_t) * R
        for j in range(i):
            # What the threads of this program have stored, they read, and then write again.
            tl.debug_barrier()
            columns = j * SIDE + o_t
            at = tile_at(i, j, R, SIDE)
            total = tl.zeros((SIDE, SIDE), dtype=tl.float64)
            total = add_outer(total, exact_gram + rows, exact + columns, j * SIDE, i * SIDE, R)
            total *= tl.load(exact_beta + i_block * R + i * SIDE + o_t)[:, None]
            tl.debug_barrier()
            tl.store(exact + at, total)
            tl.debug_barrier()
            product = tl.zeros((SIDE, SIDE), dtype=tl.float64)
            own, below = exact + rows + i * SIDE, exact + i * SIDE * R + columns
            product = add_outer(product, own, below, 0, SIDE, R)
            tl.debug_barrier()
            tl.store(exact + at, -product)
            tl.store(inverse + at, -product.to(tl.float32))


@triton.jit
def wide_expand_kernel(
    k, exact, exact_beta, left, right, N, D, k_g, k_n,
    BLOCKS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write one tile of rows and columns of Tᵀ K and of T K."""
    tiles: tl.constexpr = R // TILE
    i_block = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles
    i_g = i_block // BLOCKS
    first = (i_block % BLOCKS) * R
    o_t = i * TILE + tl.arange(0, TILE)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    k += i_g * k_g
    exact += i_block * R * R
    exact_beta += i_block * R
    total = tl.zeros((TILE, BD), dtype=tl.float64)
    for start in range(i * TILE, R, AHEAD):
        for m in tl.static_range(AHEAD):
            n = start + m
            b_k = load_row(k, first + n, o_d, N, D, k_n)
            total += tl.load(exact + n * R + o_t)[:, None] * b_k[None, :]
    total *= tl.load(exact_beta + o_t)[:, None]
    store_rows(left + i_g * N * D, first + o_t, o_d, N, D, D, total)
    total = tl.zeros((TILE, BD), dtype=tl.float64)
    for start in range(0, (i + 1) * TILE, AHEAD):
        for m in tl.static_range(AHEAD):
            n = start + m
            b_k = load_row(k, first + n, o_d, N, D, k_n)
            b_k *= tl.load(exact_beta + n)
            total += tl.load(exact + o_t * R + n)[:, None] * b_k[None, :]
    store_rows(right + i_g * N * D, first + o_t, o_d, N, D, D, total)


def wide_triangles(k: Tensor, beta: Tensor | None) -> tuple[Tensor, ...]:
    """Return Tᵀ K, T K, (I + L)⁻¹, K Kᵀ and β, in float32, as `prepare` does."""
    G, N, D = k.shape
    R, blocks = config.block_size(N), config.num_blocks(N)
    tile, columns = config.tile_size(R), config.wide_columns(D)
    splits = cdiv(D, columns)
    parts = torch.empty(G, blocks, splits, R, R, dtype=torch.float64, device=k.device)
    side, sizes = SIDE.value, {"N": N, "D": D, "BLOCKS": blocks, "R": R}
    small = {"num_warps": 4, "num_stages": 1}
    # So that a column is read at once: reading it across rows takes the cache five times as long.
    kt = k.mT.contiguous()
    lower = R // side * (R // side + 1) // 2
    launch(
        wide_cross_kernel, (G * blocks * lower, splits), kt, parts,
        **sizes, COLUMNS=columns, **small,
    )  # fmt: skip
    # Two at a time would be taken apart again, which costs the host more than another.
    exact_gram, exact = (parts.new_empty(G, blocks, R, R) for _ in range(2))
    exact_beta = torch.empty(G, blocks, R, dtype=torch.float64, device=k.device)
    inverse, gram = (k.new_empty(G, blocks, R, R) for _ in range(2))
    used = torch.empty(G, blocks, R, dtype=torch.float32, device=k.device)
    launch(
        wide_triangle_kernel, (G * blocks,),
        parts, beta, exact_gram, exact, exact_beta, inverse, gram, used,
        N=N, beta_g=0 if beta is None else beta.stride(0),
        BLOCKS=blocks, R=R, SPLITS=splits, GIVEN=beta is not None, **small,
    )  # fmt: skip
    left, right = k.new_empty(G, N, D), k.new_empty(G, N, D)
    launch(
        wide_expand_kernel, (G * blocks * (R // tile), cdiv(D, 64)),
        k, exact, exact_beta, left, right,
        k_g=k.stride(0), k_n=k.stride(1), **sizes, TILE=tile, BD=64, **small,
    )  # fmt: skip
    return left, right, inverse, gram, used
