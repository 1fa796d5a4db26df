"""Which tile sizes and launch parameters the kernels run with: a table, nothing tunes at run time.

A choice depends on K, V and the precision alone, never on batch or length, so that what a sequence
gives does not depend on what else is in the batch. Chosen on an NVIDIA H200 (Triton 3.6).
"""

from __future__ import annotations

from typing import NamedTuple

from householder.ops._triton import power_of_two

# Reflector rows of one chunk.
CHUNK_ROWS = 64
# The most of K that the forms for Hopper carry in registers.
MOST_HOPPER_KEYS = 128

# Tokens of one segment of a long sequence, and the programs of one sequence's walk from which on
# there is no need to cut it.
SEGMENT_TOKENS = 4096
ENOUGH_PROGRAMS = 128
# Columns of V that one program of the chain of segments takes.
CHAIN_COLUMNS = 32


class Launch(NamedTuple):
    """One kernel's tile and launch parameters."""

    block: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """Launch parameters as keyword arguments of a kernel."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


def chunk_tokens(N: int) -> int:
    """Return C, the tokens of a chunk with N reflectors each."""
    return CHUNK_ROWS // N


def max_chunks(B: int, T: int, N: int, num_sequences: int | None) -> int:
    """Return how many chunks there may be, from shapes alone; `num_sequences` of a packed batch."""
    C = chunk_tokens(N)
    # Every packed sequence may end in one chunk that is not full.
    return B * -(-T // C) if num_sequences is None else T // C + num_sequences


def saved_shapes(
    B: int, T: int, N: int, HV: int, K: int, V: int, num_sequences: int | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of what `forward` saves: states, triangles, writes."""
    room = max_chunks(B, T, N, num_sequences) * HV
    return (room, V, K), (room, CHUNK_ROWS * CHUNK_ROWS), (B, T, N, HV, V)


def table_shape(
    B: int, T: int, N: int, HV: int, num_sequences: int | None, gated: bool
) -> tuple[int, ...]:
    """Return the shape of the table of coefficients."""
    return max_chunks(B, T, N, num_sequences), HV, 6 if gated else 1, CHUNK_ROWS


def segment_chunks(T: int, N: int, HV: int, V: int) -> int:
    """Return the chunks of a segment, or 0 if no sequence among T tokens is to be cut.

    Whether it is does not matter to a sequence of at most one segment.
    """
    # Rounded up: a sequence of exactly SEGMENT_TOKENS is one segment, whatever N is.
    chunks = -(-SEGMENT_TOKENS // chunk_tokens(N))
    if chunks * chunk_tokens(N) >= T or HV * -(-V // 64) >= ENOUGH_PROGRAMS:
        return 0
    return chunks


def segment_shapes(
    B: int, T: int, N: int, HV: int, K: int, V: int, num_sequences: int | None
) -> tuple[tuple[int, ...], tuple[int]]:
    """Return the shapes of what `forward` saves for segments: maps, and growth.

    A map is kept of all segments but each sequence's first and last. Growth is of chunks and,
    behind them, a flag of every map.
    """
    tokens = segment_chunks(T, N, HV, V) * chunk_tokens(N)
    if tokens == 0:
        return (0, K, K), (0,)
    maps = B * (T // tokens) * HV
    return (maps, K, K), (max_chunks(B, T, N, num_sequences) * HV + maps,)


def least_block(precision: str) -> int:
    """Return the least side of a tile.

    Triton 3.6 compiles 16-wide float32 products on Hopper that read past their shared memory
    (found by compute-sanitizer at K = V = 16, N = 7).
    """
    return 16 if precision == "bf16" else 32


def token_block(N: int, precision: str) -> int:
    """Return the tile that holds the tokens of a chunk."""
    return power_of_two(chunk_tokens(N), least=least_block(precision))


def key_block(K: int, precision: str) -> int:
    """Return the tile that holds all of K."""
    return power_of_two(K, least=least_block(precision))


def prepare_launch(K: int, precision: str) -> Launch:
    """Parameters of the kernel of the triangles; its tile is all of K."""
    block = key_block(K, precision)
    if precision == "bf16":
        # Three programs on a multiprocessor; with four of 128 registers the products wait for
        # spills: 0.121 ms against 0.160.
        return Launch(block, 4, 1, 168 if K <= 128 else None)
    return Launch(block, 4 if block == 32 else 8, 1)


def walk_launch(K: int, V: int, precision: str) -> Launch:
    """Parameters of the kernels that carry the state along a sequence; the tile is part of V."""
    if precision == "bf16":
        return Launch(power_of_two(V, most=64), 4 if K <= 128 else 8, 2)
    return Launch(32, 4 if K <= 32 else 8 if K <= 128 else 16, 1)


def hopper_prepare_launch(K: int, gated: bool) -> Launch:
    """Parameters of Hopper's kernel of the triangles; its tile is all of K."""
    # With gates a cap makes room for six programs on a multiprocessor instead of five.
    return Launch(power_of_two(K), 4, 1, 80 if gated else None)


def hopper_walk_launch(V: int) -> Launch:
    """Parameters of Hopper's forward walk; the tile is part of V, 16 columns a warp.

    One program for 128 columns: two of 64 write halves of rows, which costs more (0.49 ms against
    0.27 with what the backward needs).
    """
    return Launch(128, 8, 2) if V > 64 else Launch(64, 4, 2)


def carry_launch(K: int, V: int, precision: str) -> Launch:
    """Parameters of the kernel of the segments' maps; the tile is part of V and K together."""
    if precision == "bf16":
        return Launch(64, 4 if K <= 128 else 8, 2)
    return walk_launch(K, V, precision)


def hopper_carry_launch() -> Launch:
    """Parameters of the form of that kernel for Hopper; stages are places of its ring."""
    return Launch(64, 4, 2)


def hopper_carry_back_launch(V: int) -> Launch:
    """Parameters of the form for Hopper of the kernel that carries gradients; part of V."""
    return Launch(128, 8, 2) if V > 64 else Launch(64, 4, 2)


def chain_launch(K: int) -> Launch:
    """Parameters of the kernel that joins segments; the tile is part of K."""
    return Launch(power_of_two(K, least=32, most=128) if K <= 128 else 64, 8, 1)


def hopper_sweep_launch(K: int, V: int, precision: str) -> Launch | None:
    """Parameters of the backward kernel for Hopper, whose tile is all of K and of V."""
    block = power_of_two(max(K, V), least=64)
    if precision != "bf16" or block > 128:
        return None
    return Launch(block, block // 16, 1)


def gradient_launch(K: int, V: int, precision: str) -> Launch:
    """Parameters of the kernel of the per-chunk gradients; the tile is part of K.

    Triton 3.6 compiles wrong gradients of keys, on Hopper, for some tiles of 32 columns.
    """
    if precision == "bf16":
        return Launch(64, 4 if V <= 128 else 8, 1)
    # Of float32, 16 warps have a third less code each, and the first call compiles as much faster.
    return Launch(64, 16 if precision == "tf32x3" and min(K, V) > 32 else 8, 1)


def gradient_block_v(V: int, precision: str) -> int:
    """Return how much of V the kernel of the per-chunk gradients holds at once.

    With less than 64 columns of bfloat16, gates and tiles of at most 32 tokens, Triton 3.6 compiles
    wrong gradients of queries for Hopper.
    """
    if precision == "bf16":
        return power_of_two(V, least=64, most=128)
    return power_of_two(V, least=least_block(precision), most=64)


def step_launch(V: int, N: int) -> Launch:
    """Parameters of the one-token kernel; the tile is part of V."""
    return Launch(power_of_two(V, most=64 if N == 1 else 16), 4 if N == 1 else 1, 1)
