"""Where tokens and blocks lie: what the kernels of `path_attention` share.

The kernels see tokens in tiles of `TILE_TOKENS`, two chunks each, numbered through over all
sequences; the last tile of a sequence is filled up with zeros. In what they keep in memory, row
`tile · TILE_TOKENS + r` belongs to token r of the tile. For a packed batch a tile's sequence comes
from small tables made on the device, so that nothing waits for the host.

In the tree, chunk c of a sequence belongs at level l to the block c >> l of 2^l chunks. The bit l
of c says which of two neighbours this is: the left one (0) or the right one (1). The products of
all blocks of a sequence lie in one array as the nodes of the tree do from left to right: block b of
level l at (2b + 1) 2^l − 1.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import addressable, aligned, dot_precision, has_wide_rows, is_hopper
from householder.ops.path_attention.inputs import Inputs
from householder.ops.path_attention.triton.config import (
    CHUNK_TOKENS,
    MOST_HOPPER_COLUMNS,
    TILE_TOKENS,
    key_block,
    num_levels,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Stronger gates, -inf among them, act the same, and their sums and differences stay finite.
LEAST_GATE = tl.constexpr(-1e30)
# Programs of 64 rows that run side by side on an H200, up to three a multiprocessor, as a power of
# two.
PLACES = tl.constexpr(512)
# Arguments of which one value is as good as another: kernels are not compiled again where they are
# 1, or become multiples of 16. Strides of rows of the batch are among them where a token has one
# number: T · H is such a multiple for some T, and words that grow would compile everything twice.
SIZES = (
    *("T", "window", "first_query", "num_tiles", "num_levels", "level", "rows_of_batch"),
    *("beta_b", "g_b", "lse_b", "dg_b"),
)


@triton.jit
def locate_tile(i_tile, T, cu_seqlens, tile_sequence, first_tile, PACKED: tl.constexpr):
    """Return, of a tile's sequence, the batch row, the first token there, tokens and first tile.

    Tiles past the last one of a packed batch lie behind the end of its last sequence.
    """
    if PACKED:
        i_s = tl.load(tile_sequence + i_tile)
        start = tl.load(cu_seqlens + i_s)
        return 0, start, tl.load(cu_seqlens + i_s + 1) - start, tl.load(first_tile + i_s)
    else:
        per_row = tl.cdiv(T, 128)
        row = i_tile // per_row
        return row, 0, T, row * per_row


@triton.jit
def locate_chunk(i_chunk, T, cu_seqlens, tile_sequence, first_tile, PACKED: tl.constexpr):
    """Return, of a chunk, the batch row, its first token there and its number in the sequence.

    And the number of tokens from there on, zero or less behind the sequence's end.
    """
    batch, first, length, tile = locate_tile(
        i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    chunk = i_chunk - 2 * tile
    start = tl.cast(first, tl.int64) + chunk * 64
    return tl.cast(batch, tl.int64), start, chunk, length - chunk * 64


@triton.jit
def locate_program(program, tiles, sequences, PLACES: tl.constexpr):
    """Return the sequence, one of a batch row and head, and the tile that a program works on.

    Tiles are counted from the costly end of a sequence, where most of the others are on the side
    that the program goes through. As many sequences take turns as have tiles for all PLACES where
    programs run. If one came after the other, the last one's costly tiles would begin when most
    places have nothing left to do; if more took turns, the cache would not hold them.
    """
    section = max(PLACES // tiles, 1)
    first = program // (tiles * section) * section
    size = min(section, sequences - first)
    rest = program - first * tiles
    return first + rest % size, rest // size


@triton.jit
def locate_block(i_block, T, cu_seqlens, tile_sequence, first_tile, level, PACKED: tl.constexpr):
    """Return the first chunk of a block of `level` ≥ 1, its sequence's tokens and first tile.

    Of a packed batch there is one program per tile, and no block for tiles that begin none.
    """
    if PACKED:
        _, _, length, tile = locate_tile(i_block, T, cu_seqlens, tile_sequence, first_tile, PACKED)
        chunk = 2 * (i_block - tile)
        length = tl.where((chunk & ((1 << level) - 1)) == 0, length, 0)
        return chunk, length, tile
    else:
        per_row = tl.cdiv(T, 64 << level)
        return (i_block % per_row) << level, T, (i_block // per_row) * tl.cdiv(T, 128)


@triton.jit
def lowest_bit(x):
    """Return the number of the lowest bit that is set in a 32-bit integer; negative if none is."""
    alone = (x & -x).to(tl.float32)
    return (alone.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def block_slot(first_chunk, level, block):
    """Return where the product of a block of a sequence lies."""
    return 2 * first_chunk + ((2 * block + 1) << level) - 1


@triton.jit
def has_right(chunk, level, num_chunks):
    """Return whether the block of `chunk` at `level`, a left one, has a right neighbour."""
    return (((chunk >> level) + 1) << level) < num_chunks


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Return the strides of `x [B, T, H, …]` by their names in the kernels.

    That of tokens is a constant of the kernel where x has a last dimension: offsets inside a tile
    then need no registers.
    """
    return {f"{name}_{letter}": x.stride(i) for i, letter in enumerate("bth")}


def has_near_heads(x: Tensor) -> bool:
    """Return whether offsets of heads of `x [B, T, H, D]` fit into 31 bits."""
    return x.shape[2] * x.stride(2) < 2**31


class Problem(NamedTuple):
    """The op's inputs as the kernels read them, and what follows from their shapes."""

    q: Tensor  # [B, T, HQ, K], zero before the first query
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    w: Tensor  # [B, T, H, K]
    beta: Tensor  # [B, T, H]
    g: Tensor | None  # [B, T, HQ]
    sinks: Tensor | None  # [HQ]
    scale: float
    window: int | None
    cu_seqlens: Tensor | None
    tile_sequence: Tensor | None  # [num_tiles]: the sequence of each tile
    first_tile: Tensor | None  # [S + 1]: the first tile of each sequence
    # Tokens before it ask nothing; None if all do. What is theirs alone may be left out.
    first_query: int | None
    num_tiles: int
    num_levels: int
    precision: str  # of products of q, k and v: "bf16", "fp16" or "tf32x3"

    @property
    def packing(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Tables of the packed batch; all None otherwise."""
        return self.cu_seqlens, self.tile_sequence, self.first_tile

    @property
    def operand(self) -> torch.dtype:
        """The dtype of queries and keys in memory, and of the operands of the attention."""
        names = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return names.get(self.precision, torch.float32)

    @property
    def product(self) -> torch.dtype:
        """The dtype of products of reflections, whose entries are of the size of 1."""
        return torch.float32 if self.precision == "tf32x3" else torch.float16

    @property
    def product_precision(self) -> str:
        """The precision of what products of reflections are made of: hundreds of them add up."""
        return "fp32" if self.precision == "tf32x3" else "fp16"

    @property
    def heads(self) -> int:
        """Query heads, HQ."""
        return self.q.shape[2]

    @property
    def rows(self) -> int:
        """Rows of what the kernels keep in memory."""
        return self.num_tiles * TILE_TOKENS

    @property
    def chunks(self) -> int:
        return self.rows // CHUNK_TOKENS

    @property
    def suits_hopper(self) -> bool:
        """Whether the forms for Hopper take the inputs: half dtypes, no gates, no window."""
        K, V = self.k.shape[-1], self.v.shape[-1]
        return (
            is_hopper(self.q.device)
            and self.precision != "tf32x3"
            and max(K, V) <= MOST_HOPPER_COLUMNS
            and self.g is None
            and self.window is None
            and all(map(has_wide_rows, (self.q, self.k, self.v, self.w)))
        )

    @property
    def suits_roles(self) -> bool:
        """Whether the kernels whose warps have roles take the inputs too.

        They copy whole squares of 64 columns, by 32-bit numbers of rows and columns. So many rows
        as these do not count fit into no memory: what a sequence gives is left to its own sizes.
        """
        most = max(2 * self.chunks * self.k.shape[-1], self.num_levels * self.rows)
        return (
            self.suits_hopper
            and self.num_levels > 0
            and {self.k.shape[-1], self.v.shape[-1]} <= {64, 128}
            and most * self.heads < 2**31
            and has_near_heads(self.v)
        )

    @property
    def suits_squares(self) -> bool:
        """Whether the forms for Hopper that copy all of a chunk into shared memory take the inputs.

        They multiply reflectors and keys as they are, or both in float16 if reflectors are float32.
        """
        one_dtype_or_wide = self.w.dtype in (self.k.dtype, torch.float32)
        return self.suits_hopper and self.heads == self.k.shape[2] and one_dtype_or_wide

    @property
    def fuses_chunks(self) -> bool:
        """Whether one kernel makes all gradients inside the chunks."""
        return self.suits_squares and self.precision == "bf16"

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that all kernels share."""
        K = self.k.shape[-1]
        return {
            "GROUP": self.q.shape[2] // self.k.shape[2],
            "K": K,
            "BK": key_block(K, self.precision),
            "GATED": self.g is not None,
            "PACKED": self.cu_seqlens is not None,
            "PRECISION": "tf32x3" if self.precision == "tf32x3" else "fp16",
        }

    @property
    def value_constants(self) -> dict[str, int]:
        V = self.v.shape[-1]
        return {"V": V, "BV": key_block(V, self.precision)}


def number_tiles(cu_seqlens: Tensor | None, T: int) -> tuple[Tensor | None, ...]:
    """Return the tables of a packed batch (see `Problem.packing`); all None otherwise."""
    if cu_seqlens is None:
        return None, None, None
    S = cu_seqlens.shape[0] - 1
    # Every sequence may end in one tile that is not full.
    num_tiles = T // TILE_TOKENS + S
    cu_seqlens = cu_seqlens.contiguous()
    first_tile = torch.zeros_like(cu_seqlens)
    tiles = (cu_seqlens.diff() + (TILE_TOKENS - 1)) // TILE_TOKENS
    torch.cumsum(tiles, 0, dtype=torch.int32, out=first_tile[1:])
    numbers = torch.arange(num_tiles, device=cu_seqlens.device, dtype=torch.int32)
    tile_sequence = torch.searchsorted(first_tile[1:], numbers, right=True, out_int32=True)
    return cu_seqlens, tile_sequence.clamp_(max=S - 1), first_tile


def put_behind(first_query: int, x: Tensor, fill: float = 0.0) -> Tensor:
    """Put `first_query` tokens of one number before those of `x [B, T, HQ, …]`."""
    if first_query == 0:
        return x
    last_dims = (0, 0) * (x.dim() - 2)
    return torch.nn.functional.pad(x, (*last_dims, first_query, 0), value=fill)


def take_behind(first_query: int, x: Tensor) -> Tensor:
    """Undo `put_behind`."""
    return x[:, first_query:].clone() if first_query else x


def arrange(x: Inputs) -> tuple[Any, ...]:
    """Return what `make_problem` gets: the inputs, queries for all tokens, tables of a packing."""
    cu_seqlens, tile_sequence, first_tile = number_tiles(x.cu_seqlens, x.k.shape[1])
    all_queries = put_behind(x.first_query, x.q)
    return all_queries, *x[1:9], cu_seqlens, tile_sequence, first_tile, x.first_query or None


def make_problem(*arranged: Any) -> Problem:
    """Bring what `arrange` returned to what the kernels can read, without computing anything."""
    *inputs, tile_sequence, first_tile, first_query = arranged
    x = Inputs(*inputs)
    B, T = x.q.shape[:2]
    num_tiles = B * -(-T // TILE_TOKENS) if tile_sequence is None else tile_sequence.shape[0]
    # float16 products in TF32, which `dot_precision` names, would double the time of attention.
    # Reflectors may be float32 beside half queries, keys and values, as the layer has them.
    precision = dot_precision(x.q, x.k, x.v)
    return Problem(
        q=addressable(x.q),
        k=addressable(x.k),
        v=addressable(x.v),
        w=addressable(x.w),
        # A value per token: their last dimension is heads, whatever its stride.
        beta=aligned(x.beta),
        g=None if x.g is None else aligned(x.g),
        sinks=None if x.sinks is None else x.sinks.contiguous(),
        scale=x.scale,
        window=x.window,
        cu_seqlens=x.cu_seqlens,
        tile_sequence=tile_sequence,
        first_tile=first_tile,
        first_query=first_query,
        num_tiles=num_tiles,
        num_levels=num_levels(T),
        precision="fp16" if precision == "tf32" else precision,
    )


def kind_of_call(*arranged: Any) -> Hashable:
    """Return what the programs of a call depend on, whatever its batch and, in a deep tree, T."""
    *inputs, _, _, first_query = arranged
    x = Inputs(*inputs)
    tensors = tuple((y.dtype, y.stride(1), y.shape[2:]) for y in x[:4])
    absent = tuple(y is None for y in (x.g, x.sinks, x.window, x.cu_seqlens, first_query))
    return x.q.device, tensors, absent, min(num_levels(x.q.shape[1]), 4)
