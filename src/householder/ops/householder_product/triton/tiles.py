"""Tiles of squares and of rows in memory, as the kernels of the triangles need them."""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import dot_add


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """Return `acc + a b` of tiles that went through `cast_operand`, for long loops.

    For float32 it is Triton's own product of TF32 parts. `dot_in_parts`, a loop over the parts,
    takes less time to compile and 1.7 times as long to run (4096³ in float32 on an H200).
    """
    if PRECISION == "tf32x3":
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return dot_add(a, b, acc, PRECISION)


@triton.jit
def tile_at(i, j, R: tl.constexpr, TILE: tl.constexpr):
    """Return the offsets of the tile (i, j) of a square of R."""
    o_t = tl.arange(0, TILE)
    return (i * TILE + o_t[:, None]) * R + j * TILE + o_t[None, :]


@triton.jit
def transposed_tile_at(i, j, R: tl.constexpr, TILE: tl.constexpr):
    """Return the offsets of the tile (i, j), each entry at its mirror image's place."""
    o_t = tl.arange(0, TILE)
    return (i * TILE + o_t[None, :]) * R + j * TILE + o_t[:, None]


@triton.jit
def sum_parts(p, SPLITS: tl.constexpr, R: tl.constexpr):
    """Return the sum of the parts that `cross_kernel` wrote of a tile, always in one order."""
    total = tl.zeros(p.shape, dtype=p.dtype.element_ty)
    # As many loads as registers allow are under way together.
    ahead: tl.constexpr = 8 if p.shape[0] <= 32 else 4
    for i in range(SPLITS // ahead):
        for j in tl.static_range(ahead):
            total += tl.load(p + (ahead * i + j) * R * R)
    for i in tl.static_range(SPLITS // ahead * ahead, SPLITS):
        total += tl.load(p + i * R * R)
    return total


@triton.jit
def on_diagonal(x, TILE: tl.constexpr):
    """Return the diagonal of a square tile."""
    o_t = tl.arange(0, TILE)
    return tl.sum(tl.where(o_t[:, None] == o_t[None, :], x, 0.0), axis=1)


@triton.jit
def strictly_lower(x, TILE: tl.constexpr):
    """Return a square tile with zeros on and above its diagonal."""
    o_t = tl.arange(0, TILE)
    return tl.where(o_t[:, None] > o_t[None, :], x, 0.0)


@triton.jit
def load_rows(p, rows, o_d, N, D, stride):
    """Load a tile of the rows and columns that exist, in float32; zero elsewhere."""
    mask = (rows < N)[:, None] & (o_d < D)[None, :]
    return tl.load(p + rows[:, None] * stride + o_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(p, rows, o_d, N, D, stride, x):
    """Store a tile of the rows and columns that exist."""
    mask = (rows < N)[:, None] & (o_d < D)[None, :]
    tl.store(p + rows[:, None] * stride + o_d[None, :], x.to(p.dtype.element_ty), mask=mask)
