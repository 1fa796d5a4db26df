"""Block sizes and launch parameters of the kernels: a table, nothing tunes at run time.

A choice depends on N, D and the precision alone, never on how many rows there are, so that what a
row gives does not depend on what else is in the batch. Chosen on an NVIDIA H200 (Triton 3.6).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from householder.ops._triton import power_of_two

# The most reflectors of one block, whose triangle one program inverts.
MAX_BLOCK = 128
# The side of the square tiles that the triangles of a block are kept in.
MAX_TILE = 64
# Columns that one program of the sums over D takes.
CROSS_COLUMNS = 256
# Rows from which on one program of the sums over rows is no longer enough, and the most programs.
OUTER_ROWS = 1024
MAX_OUTER_SPLITS = 8
# The most programs that share out one sum of the gradient of a frame.
MAX_FRAME_SPLITS = 4


class Launch(NamedTuple):
    """Tile sizes of one kernel, by the names it has for them, and its launch parameters."""

    tiles: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """All of it as keyword arguments of the kernel."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up; Triton's own is for kernels and takes longer than a small tensor."""
    return -(-a // b)


@functools.cache
def block_size(N: int) -> int:
    """Return R, the reflectors of a block: a power of two.

    At least 32, since Triton 3.6 compiles narrower float32 products wrongly on Hopper.
    """
    return power_of_two(N, least=32, most=MAX_BLOCK)


@functools.cache
def num_blocks(N: int) -> int:
    """Return how many blocks N reflectors are cut into."""
    return cdiv(N, block_size(N))


def tile_size(R: int) -> int:
    """Return the side of the tiles of a block's triangles."""
    return min(R, MAX_TILE)


def triangle_tile(R: int) -> int:
    """Return the side of the tiles that triangles are inverted in.

    Two tiles of 64 took longer one after the other (0.06 ms) than four of 32.
    """
    return min(R, 32)


@functools.cache
def lower_tiles(R: int) -> int:
    """Return how many tiles there are on and below the diagonal."""
    n = R // tile_size(R)
    return n * (n + 1) // 2


def cross_splits(D: int) -> int:
    """Return among how many programs the sum over D of one tile is shared out."""
    return cdiv(D, CROSS_COLUMNS)


def wide_columns(D: int) -> int:
    """Return how many columns one program of the float64 sums over D takes.

    They come in at most 32 parts, which one program of each tile adds up.
    """
    return max(64, cdiv(D, 256) * 8)


def outer_splits(M: int) -> int:
    """Return among how many programs a sum over M rows is shared out."""
    return max(1, min(MAX_OUTER_SPLITS, M // OUTER_ROWS))


def frame_splits(K: int) -> int:
    """Return among how many programs a sum over K is shared out, for gradients of a frame."""
    return max(1, min(MAX_FRAME_SPLITS, K // CROSS_COLUMNS))


def rows_kind(M: int) -> tuple[object, ...]:
    """Return what the choices of this file, and Triton's own, make of the number of rows."""
    sizes = tuple(size >= M for size in (1, MAX_BLOCK, 256, 1024))
    return M % 16 == 0, sizes, outer_splits(M), frame_splits(M)


@functools.cache
def inner_launch(R: int, precision: str) -> Launch:
    """Parameters of the products of rows with reflectors: rows, and columns at a time."""
    if precision == "bf16":
        return Launch({"BM": 32 if R <= 64 else 64, "BD": 256 if R <= 64 else 128}, 4, 4)
    return Launch({"BM": 64 if R <= 64 else 32, "BD": 64 if R <= 64 else 32}, 4, 3)


@functools.cache
def update_launch(R: int, precision: str) -> Launch:
    """Parameters of what is taken from the rows: rows and columns of a tile."""
    if precision == "bf16":
        return Launch({"BM": 32 if R <= 64 else 64, "BD": 128}, 4 if R <= 64 else 8, 1)
    return Launch({"BM": 64, "BD": 64}, 4, 1)


@functools.cache
def outer_launch(R: int, precision: str) -> Launch:
    """Parameters of the kernel that sums over rows: rows at a time, and columns."""
    if precision == "bf16":
        return Launch({"BM": 64, "BD": 128}, 4 if R <= 64 else 8, 3)
    return Launch({"BM": 32, "BD": 64}, 4 if R <= 64 else 8, 2)


@functools.cache
def product_launch(M: int, N: int, K: int) -> Launch:
    """Parameters of the product of any two matrices in float32: the tile of C, and K at a time.

    A short sum wants more rows a program (0.104 ms against 0.135 for 4096 × 128 × 4096), a long one
    more programs (0.105 against 0.161 for 4096 × 4096 × 128), and one into a narrow result more
    still.
    """
    if K <= 256:
        return Launch({"BM": 128, "BN": 64, "BK": 32}, 4, 3)
    if min(M, N) <= MAX_BLOCK and K <= 1024:
        return Launch({"BM": 32, "BN": 32, "BK": 64}, 4, 3)
    return Launch({"BM": 64, "BN": 64, "BK": 32}, 4, 3)


@functools.cache
def square_launch() -> Launch:
    """Parameters of the kernels of a block's triangles; columns of reflectors at a time."""
    return Launch({"BD": 64}, 4, 1)
