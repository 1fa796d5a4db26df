"""Tile sizes and launch parameters of the backward kernels: a table, as `config.py` is."""

from __future__ import annotations

from typing import NamedTuple

from householder.ops.path_attention.triton.config import Launch, key_block


class Tiles(NamedTuple):
    """Tiles and launch parameters of one kernel of the rectangles."""

    rows: int  # queries
    columns: int  # keys
    inner: int  # how much of K passes a product at a time, at most
    launch: Launch


class Blocks(NamedTuple):
    """Tiles and launch parameters of a kernel that works on products or chunks."""

    first: int
    second: int
    launch: Launch


class ChunkBlocks(NamedTuple):
    """How much of K and V the kernels of the chunks take at a time, and their parameters."""

    inner_k: int  # of K in the kernels that sum over it
    inner_v: int
    columns_k: int  # of K in the kernel that writes its columns
    columns_v: int
    pairs: Launch
    columns: Launch


def gradient_precision(precision: str) -> str:
    """Return the precision of products of gradients.

    float16 has not the range of what is summed; TF32 has, and float16's digits.
    """
    return "tf32" if precision == "fp16" else precision


# Where the operands are bfloat16 and where not, for K and V of up to 64, up to 128, and more.
QUERY_TILES: dict[bool, tuple[Tiles, ...]] = {
    True: (
        Tiles(64, 64, 64, Launch(4, 3)),
        Tiles(128, 64, 128, Launch(8, 3)),
        Tiles(64, 32, 64, Launch(4, 2)),
    ),
    False: (
        Tiles(64, 32, 32, Launch(4, 1)),
        Tiles(64, 64, 32, Launch(8, 1)),
        Tiles(32, 32, 32, Launch(4, 1)),
    ),
}
KEY_TILES: dict[bool, tuple[Tiles, ...]] = {
    True: (
        Tiles(64, 64, 64, Launch(4, 3)),
        Tiles(64, 128, 128, Launch(8, 3)),
        Tiles(32, 64, 64, Launch(8, 2)),
    ),
    False: (
        Tiles(32, 64, 32, Launch(4, 1)),
        # 23.7 ms against 37.4 with tiles of 32 queries and 64 keys (float32, 4×4096×16×128).
        Tiles(64, 32, 32, Launch(8, 1)),
        Tiles(32, 32, 32, Launch(4, 1)),
    ),
}


def query_tiles(K: int, V: int, precision: str) -> Tiles:
    """Tiles of the kernel of the queries; at most 128 rows."""
    return _choose(QUERY_TILES, K, V, precision)


def key_tiles(K: int, V: int, precision: str) -> Tiles:
    """Tiles of the kernel of the keys; at most 128 columns."""
    return _choose(KEY_TILES, K, V, precision)


def _choose(table: dict[bool, tuple[Tiles, ...]], K: int, V: int, precision: str) -> Tiles:
    widest = key_block(max(K, V), precision)
    tiles = table[precision == "bf16"][(widest > 64) + (widest > 128)]
    return tiles._replace(inner=min(tiles.inner, key_block(K, precision)))


def hopper_key_tiles(K: int, V: int) -> tuple[int, int]:
    """Queries of a tile, and tiles in flight, in the form of the kernel of the keys for Hopper."""
    return (128, 3) if max(K, V) <= 64 else (64, 4)


def product_blocks(K: int, precision: str) -> Blocks:
    """Rows of dF that one program makes, and how much of K it sums over at a time."""
    if precision == "bf16" and key_block(K, precision) == 128:
        return Blocks(128, 64, Launch(8, 1))
    return leaf_blocks(K, precision)


def leaf_blocks(K: int, precision: str) -> Blocks:
    """Those of the kernel that ends in W dF and W dFᵀ."""
    block = key_block(K, precision)
    if precision == "tf32x3":
        return Blocks(32, 32, Launch(8, 1))
    return Blocks(min(block, 64), min(block, 64), Launch(4 if block <= 128 else 8, 1))


def chunk_blocks(K: int, V: int, precision: str) -> ChunkBlocks:
    """Tiles of the kernels of the chunks."""
    one_tile = K <= 32
    K, V = key_block(K, precision), key_block(V, precision)
    if precision != "bf16":
        launch = Launch(8, 1)
        # float32 reflectors beside float16 keys are multiplied in float16, and of that a sum over
        # one tile of 32 columns may come out wrong (see `key_block`).
        inner_k = 64 if precision == "fp16" and one_tile else min(K, 32)
        return ChunkBlocks(inner_k, min(V, 32), min(K, 32), min(V, 32), launch, launch)
    # Where all loads come first, the programs wait for memory once. The columns' kernel fits three
    # programs on a multiprocessor: 0.32 ms instead of 0.37 on an H200, B·T·H = 262,144, K = 128.
    return ChunkBlocks(
        min(K, 128), min(V, 128), min(K, 64), min(V, 64), Launch(4, 1), Launch(4, 1, 168)
    )
