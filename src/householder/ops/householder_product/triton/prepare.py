"""The triangles of all blocks, and the reflectors multiplied by them.

Three launches, for all blocks at once: K Kᵀ in parts over D; their sum and the inverse of its
triangle; the products with K. For few reflectors the last two are one. The triangles of a block of
R reflectors are worked on in square tiles, which pass through memory: loops over tiles keep the
kernels short, where products of whole triangles would compile for minutes.

So it is for bfloat16 and float16 reflectors; those of float32 go to `wide.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import dot, dot_add, inverse_unit_lower
from householder.ops.householder_product.triton import config
from householder.ops.householder_product.triton.config import cdiv
from householder.ops.householder_product.triton.launch import launch
from householder.ops.householder_product.triton.tiles import (
    load_rows,
    on_diagonal,
    store_rows,
    strictly_lower,
    sum_parts,
    tile_at,
    transposed_tile_at,
)
from householder.ops.householder_product.triton.wide import wide_triangles


@triton.jit
def cross_kernel(
    a, k, out, N, D, a_s, a_g, a_n, k_g, k_n,
    BLOCKS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, SUMS: tl.constexpr,
    COLUMNS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the sum over some columns of one lower tile of A Kᵀ, A being the sum of SUMS parts."""
    tiles: tl.constexpr = R // TILE * (R // TILE + 1) // 2
    i_tile = tl.program_id(0) % tiles
    i_block = (tl.program_id(0) // tiles).to(tl.int64)
    i_split = tl.program_id(1)
    i_g = i_block // BLOCKS
    # Tiles are numbered by rows: (0, 0), (1, 0), (1, 1).
    i_row = (i_tile + 1) // 2
    i_column = i_tile // 2
    first = (i_block % BLOCKS) * R
    o_t = tl.arange(0, TILE)
    o_i = first + i_row * TILE + o_t
    o_j = first + i_column * TILE + o_t
    p_a = a + i_g * a_g + o_i[:, None] * a_n
    p_k = k + i_g * k_g + o_j[None, :] * k_n
    step = tl.cast(a_s, tl.int64)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, COLUMNS, BD):
        o_d = i_split * COLUMNS + start + tl.arange(0, BD)
        m_d = o_d < D
        m_a = (o_i < N)[:, None] & m_d[None, :]
        b_a = tl.load(p_a + o_d[None, :], mask=m_a, other=0.0)
        for i in tl.static_range(1, SUMS):
            b_a += tl.load(p_a + i * step + o_d[None, :], mask=m_a, other=0.0)
        b_k = tl.load(p_k + o_d[:, None], mask=(o_j < N)[None, :] & m_d[:, None], other=0.0)
        total = dot_add(b_a.to(tl.float32), b_k.to(tl.float32), total, "tf32x3")
    p_out = out + (i_block * tl.num_programs(1) + i_split) * R * R
    p_out += (i_row * TILE + o_t[:, None]) * R + i_column * TILE + o_t[None, :]
    tl.store(p_out, total)


@triton.jit
def solve_tile(
    parts, beta, i_g, o_n, N, beta_g, R: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Return a diagonal tile of K Kᵀ, the β of its reflectors `o_n` and (I + L)⁻¹ of it alone."""
    b_gram = sum_parts(parts, SPLITS, R)
    if GIVEN:
        b_beta = tl.load(beta + i_g * beta_g + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    else:
        squares = on_diagonal(b_gram, TILE)
        # A zero reflector is the identity.
        b_beta = tl.where(squares > 0.0, 2.0 / tl.where(squares > 0.0, squares, 1.0), 0.0)
    b_l = strictly_lower(b_beta[:, None] * b_gram, TILE)
    return b_gram, b_beta, inverse_unit_lower(b_l, TILE, "tf32x3")


@triton.jit
def narrow_kernel(
    parts, beta, k, inverse, gram, coefficient, left, right, N, D, beta_g, k_g, k_n,
    BLOCKS: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, GIVEN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Do what `triangle_kernel` and `expand_kernel` do, for blocks of one tile.

    Each program solves the triangle and writes some columns: less time than another launch.
    """
    i_block = tl.program_id(0).to(tl.int64)
    i_g = i_block // BLOCKS
    o_t = tl.arange(0, R)
    o_n = (i_block % BLOCKS) * R + o_t
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    at = tile_at(0, 0, R, R)
    b_gram, b_beta, b_inverse = solve_tile(
        parts + i_block * SPLITS * R * R + at, beta, i_g, o_n, N, beta_g, R, R, SPLITS, GIVEN
    )
    if tl.program_id(1) == 0:
        tl.store(gram + i_block * R * R + at, b_gram)
        tl.store(inverse + i_block * R * R + at, b_inverse)
        tl.store(coefficient + i_block * R + o_t, b_beta)
    b_k = load_rows(k + i_g * k_g, o_n, o_d, N, D, k_n)
    b_left = b_beta[:, None] * dot(tl.trans(b_inverse), b_k, "tf32x3")
    store_rows(left + i_g * N * D, o_n, o_d, N, D, D, b_left)
    b_right = dot(b_inverse, b_beta[:, None] * b_k, "tf32x3")
    store_rows(right + i_g * N * D, o_n, o_d, N, D, D, b_right)


@triton.jit
def triangle_kernel(
    parts, beta, inverse, gram, coefficient, N, beta_g,
    BLOCKS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Write K Kᵀ, β and (I + L)⁻¹ of a block, on and below the diagonal."""
    i_block = tl.program_id(0).to(tl.int64)
    i_g = i_block // BLOCKS
    o_t = tl.arange(0, TILE)
    parts += i_block * SPLITS * R * R
    gram += i_block * R * R
    inverse += i_block * R * R
    coefficient += i_block * R
    for i in range(R // TILE):
        at = tile_at(i, i, R, TILE)
        o_n = (i_block % BLOCKS) * R + i * TILE + o_t
        b_gram, b_beta, b_inverse = solve_tile(
            parts + at, beta, i_g, o_n, N, beta_g, R, TILE, SPLITS, GIVEN
        )
        tl.store(gram + at, b_gram)
        tl.store(coefficient + i * TILE + o_t, b_beta)
        tl.store(inverse + at, b_inverse)
        # Above the diagonal larger tiles, too, are to find zeros.
        for j in range(i + 1, R // TILE):
            tl.store(inverse + tile_at(i, j, R, TILE), tl.zeros((TILE, TILE), dtype=tl.float32))
            tl.store(gram + tile_at(i, j, R, TILE), tl.zeros((TILE, TILE), dtype=tl.float32))
    for i in range(1, R // TILE):
        # What the threads of this program have stored, they read.
        tl.debug_barrier()
        b_beta = tl.load(coefficient + i * TILE + o_t)
        diagonal = tl.load(inverse + tile_at(i, i, R, TILE))
        for j in range(i):
            total = tl.zeros((TILE, TILE), dtype=tl.float32)
            for m in range(j, i):
                at = tile_at(i, m, R, TILE)
                b_gram = sum_parts(parts + at, SPLITS, R)
                tl.store(gram + at, b_gram)
                above = tl.load(inverse + tile_at(m, j, R, TILE))
                total = dot_add(b_beta[:, None] * b_gram, above, total, "tf32x3")
            tl.store(inverse + tile_at(i, j, R, TILE), -dot(diagonal, total, "tf32x3"))


@triton.jit
def expand_kernel(
    k, inverse, beta, left, right, N, D, k_g, k_n,
    BLOCKS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write one tile of rows and columns of Tᵀ K and of T K."""
    tiles: tl.constexpr = R // TILE
    i_block = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles
    i_g = i_block // BLOCKS
    o_t = tl.arange(0, TILE)
    first = (i_block % BLOCKS) * R + o_t
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    k += i_g * k_g
    inverse += i_block * R * R
    beta += i_block * R + o_t
    total = tl.zeros((TILE, BD), dtype=tl.float32)
    for j in range(i, tiles):
        b_inverse = tl.load(inverse + transposed_tile_at(j, i, R, TILE))
        b_k = load_rows(k, first + j * TILE, o_d, N, D, k_n)
        total = dot_add(b_inverse, b_k, total, "tf32x3")
    total *= tl.load(beta + i * TILE)[:, None]
    store_rows(left + i_g * N * D, first + i * TILE, o_d, N, D, D, total)
    total = tl.zeros((TILE, BD), dtype=tl.float32)
    for j in range(i + 1):
        b_inverse = tl.load(inverse + tile_at(i, j, R, TILE))
        b_k = load_rows(k, first + j * TILE, o_d, N, D, k_n)
        total = dot_add(b_inverse, tl.load(beta + j * TILE)[:, None] * b_k, total, "tf32x3")
    store_rows(right + i_g * N * D, first + i * TILE, o_d, N, D, D, total)


class Triangles(NamedTuple):
    """What the products need of the reflectors, for G products of N reflectors in blocks."""

    left: Tensor  # Tᵀ K, [G, N, D]
    right: Tensor  # T K, [G, N, D]
    inverse: Tensor  # (I + L)⁻¹, float32 [G, blocks, R, R]
    gram: Tensor  # K Kᵀ on and below the diagonal blocks of 32, of the same shape
    beta: Tensor  # float32 [G, blocks, R]


def cross(a: Tensor, k: Tensor) -> Tensor:
    """Return A Kᵀ of every block, on and below the diagonal, for `a [sums, G, N, D]`.

    It comes in parts over D that are to be added up, `[G, blocks, parts, R, R]`.
    """
    G, N, D = k.shape
    R, blocks, splits = config.block_size(N), config.num_blocks(N), config.cross_splits(D)
    out = torch.empty(G, blocks, splits, R, R, dtype=torch.float32, device=k.device)
    a_s, a_g, a_n, _ = a.stride()
    launch(
        cross_kernel, (G * blocks * config.lower_tiles(R), splits), a, k, out, N=N, D=D,
        a_s=a_s, a_g=a_g, a_n=a_n, k_g=k.stride(0), k_n=k.stride(1),
        BLOCKS=blocks, R=R, TILE=config.tile_size(R), SUMS=a.shape[0],
        COLUMNS=config.CROSS_COLUMNS, BD=64, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def prepare(
    k: Tensor, beta: Tensor | None, dtype: torch.dtype, parts: Tensor | None = None
) -> Triangles:
    """Make the triangles of `k [G, N, D]`; `left` and `right` in `dtype`.

    Without `beta` every reflector is orthogonal. `parts` are those of `cross(k, k)`, if they are
    there already; triangles of float32 reflectors are float64 and have no use for them.
    """
    if k.dtype == torch.float32:
        return Triangles(*wide_triangles(k, beta))
    G, N, D = k.shape
    R, blocks = config.block_size(N), config.num_blocks(N)
    parts = cross(k.unsqueeze(0), k) if parts is None else parts
    # Two at a time would be taken apart again, which costs the host more than another.
    left, right = (k.new_empty(G, N, D, dtype=dtype) for _ in range(2))
    inverse, gram = (k.new_empty(G, blocks, R, R, dtype=torch.float32) for _ in range(2))
    used = torch.empty(G, blocks, R, dtype=torch.float32, device=k.device)
    beta_g = 0 if beta is None else beta.stride(0)
    sizes = {"BLOCKS": blocks, "R": R, "SPLITS": parts.shape[2], "GIVEN": beta is not None}
    tiling = config.square_launch()
    columns = cdiv(D, tiling.tiles["BD"])
    strides = {"k_g": k.stride(0), "k_n": k.stride(1)}
    tile = config.triangle_tile(R)
    if tile == R:
        launch(
            narrow_kernel, (G * blocks, columns),
            parts, beta, k, inverse, gram, used, left, right, N=N, D=D, beta_g=beta_g,
            **strides, **sizes, **tiling.options,
        )  # fmt: skip
        return Triangles(left, right, inverse, gram, used)
    launch(
        triangle_kernel, (G * blocks,), parts, beta, inverse, gram, used, N=N, beta_g=beta_g,
        **sizes, TILE=tile, num_warps=4, num_stages=1,
    )  # fmt: skip
    tile = config.tile_size(R)
    launch(
        expand_kernel, (G * blocks * (R // tile), columns),
        k, inverse, used, left, right, N=N, D=D, **strides,
        BLOCKS=blocks, R=R, TILE=tile, **tiling.options,
    )  # fmt: skip
    return Triangles(left, right, inverse, gram, used)
