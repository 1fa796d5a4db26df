"""Which tile sizes and launch parameters the kernels run with: a table, nothing tunes at run time.

A choice depends on K, V and the precision alone, never on batch or length, so that what a sequence
gives does not depend on what else is in the batch. Chosen on an NVIDIA H200 (Triton 3.6).
"""

from __future__ import annotations

from typing import NamedTuple

from householder.ops._triton import power_of_two

# Tokens whose reflectors are multiplied by one triangle.
CHUNK_TOKENS = 64
# Tokens that are laid out together: sequences begin at multiples of it, so that the attention's
# tiles of this many queries never hold two sequences.
TILE_TOKENS = 128
# The most of K and of V that the form for Hopper holds.
MOST_HOPPER_COLUMNS = 128


class Launch(NamedTuple):
    """One kernel's launch parameters."""

    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """Return them as keyword arguments of a kernel."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


def num_levels(T: int) -> int:
    """Return the levels of the tree over a sequence of T tokens: log₂ of its chunks, rounded up."""
    return max(-(-T // CHUNK_TOKENS) - 1, 0).bit_length()


def key_block(K: int, precision: str) -> int:
    """Return the tile that holds all of K, or of V.

    With half-precision tiles of 16 or 32 columns Triton 3.6 compiles wrong products for Hopper
    (seen with K = 16 and with K = 32).
    """
    return power_of_two(K, least=32 if precision == "tf32x3" else 64)


def prepare_launch(precision: str) -> tuple[int, Launch]:
    """Tile, part of K, and parameters of the kernel of the triangles."""
    return 64, Launch(8 if precision == "tf32x3" else 4, 1)


def hopper_prepare_launch(K: int) -> Launch:
    """Parameters of the form of that kernel for Hopper."""
    return Launch(4, 1, 168 if K <= 64 else None)


def join_launch(K: int, precision: str) -> tuple[int, Launch]:
    """Tile, all of K or part of it, and parameters of the kernel that multiplies products."""
    block = key_block(K, precision)
    if precision == "tf32x3":
        # Each of two operands is there in three parts.
        return min(block, 64), Launch(8, 1)
    return (block, Launch(4 if block <= 64 else 8, 1)) if block <= 128 else (64, Launch(4, 2))


def climb_launch(K: int, precision: str) -> Launch:
    """Parameters of the kernel that takes queries and keys up the tree."""
    return Launch(4 if key_block(K, precision) <= 128 and precision != "tf32x3" else 8, 1)


def attend_launch(K: int, V: int, precision: str) -> tuple[int, Launch]:
    """Tile, keys, and parameters of the attention kernel."""
    widest = key_block(max(K, V), precision)
    if precision == "tf32x3":
        return (64 if widest == 128 else 32), Launch(4 if widest <= 64 else 8, 1)
    if widest <= 64:
        # Three programs on a multiprocessor: 0.40 ms against 0.46 (4×4096×16×64).
        return 64, Launch(4, 3, 168)
    return (64, Launch(4, 3)) if widest <= 128 else (32, Launch(4, 2))


def hopper_attend_stages(K: int, V: int) -> int:
    """Tiles of 128 keys and values in flight in the form of the attention for Hopper."""
    return 2 if max(K, V) > 64 else 3
