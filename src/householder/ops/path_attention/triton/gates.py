"""The gates of `path_attention` inside a chunk, and their sums in the tree of blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops.path_attention.triton.problem import (
    LEAST_GATE,
    SIZES,
    block_slot,
    has_right,
    locate_block,
    locate_tile,
    lowest_bit,
)


@triton.jit
def load_gates(g, stride, n):
    """Load the log gates of a chunk's n tokens, zero behind them."""
    o_c = tl.arange(0, 64)
    b_g = tl.load(g + o_c * stride, mask=o_c < n, other=0.0).to(tl.float32)
    return tl.maximum(b_g, LEAST_GATE)


@triton.jit
def decay_inside(b_g):
    """Return Σ g over j < s ≤ i in row i and column j of `[64, 64]`, and zero where j ≥ i.

    These are differences of running sums, of which none cancels: gates are split at multiples of
    2⁻⁶, whose sums have no rounding, and what is left is below 1 in all. Gates below −4096, for
    which there are not bits enough, are counted instead, and hide everything.
    """
    o_c = tl.arange(0, 64)
    hides = b_g < -4096.0
    shown = tl.where(hides, 0.0, b_g)
    high = tl.floor(shown * 64.0) / 64.0
    low = shown - high
    number = tl.where(hides, 1.0, 0.0)
    up_to = o_c[:, None] >= o_c[None, :]
    so_far = o_c[:, None] <= o_c[None, :]
    b_a = tl.sum(tl.where(up_to, high[None, :], 0.0), 1)[:, None]
    b_a -= tl.sum(tl.where(so_far, high[:, None], 0.0), 0)[None, :]
    b_low = tl.sum(tl.where(up_to, low[None, :], 0.0), 1)[:, None]
    b_low -= tl.sum(tl.where(so_far, low[:, None], 0.0), 0)[None, :]
    hidden = tl.sum(tl.where(up_to, number[None, :], 0.0), 1)[:, None]
    hidden -= tl.sum(tl.where(so_far, number[:, None], 0.0), 0)[None, :]
    b_a = tl.where(hidden > 0.0, LEAST_GATE, b_a + b_low)
    return tl.where(o_c[:, None] > o_c[None, :], b_a, 0.0)


@triton.jit(do_not_specialize=SIZES)
def join_gates_kernel(
    gate_sums, cu_seqlens, tile_sequence, first_tile, T, HQ, rows, level, PACKED: tl.constexpr
):
    """Add the gates of the halves of one full block of `level` ≥ 1 and one query head."""
    i = (tl.program_id(0) % HQ).to(tl.int64)
    chunk, length, tile = locate_block(
        tl.program_id(0) // HQ, T, cu_seqlens, tile_sequence, first_tile, level, PACKED
    )
    if (chunk + (1 << level)) * 64 < length:
        block = chunk >> level
        p_sums = gate_sums + i * (tl.cast(rows, tl.int64) // 32)
        left = tl.load(p_sums + block_slot(2 * tile, level - 1, 2 * block))
        right = tl.load(p_sums + block_slot(2 * tile, level - 1, 2 * block + 1))
        tl.store(p_sums + block_slot(2 * tile, level, block), left + right)


@triton.jit(do_not_specialize=SIZES)
def climb_gates_kernel(
    decay, gate_sums, cu_seqlens, tile_sequence, first_tile, T, HQ, rows, PACKED: tl.constexpr
):
    """Take the sums of gates of one chunk and query head up the tree."""
    i_chunk = tl.program_id(0) // HQ
    i = (tl.program_id(0) % HQ).to(tl.int64)
    _, _, length, tile = locate_tile(i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED)
    chunk = i_chunk - 2 * tile
    if (chunk // 2) * 128 >= length:
        return
    num_rows = tl.cast(rows, tl.int64)
    of_level = HQ * num_rows
    p_decay = decay + i * num_rows + i_chunk.to(tl.int64) * 64 + tl.arange(0, 64)
    p_sums = gate_sums + i * (num_rows // 32)
    if chunk > 0:
        level = lowest_bit(chunk)
        b_decay = tl.load(p_decay + level * of_level)
        rest = chunk & (chunk - 1)
        while rest > 0:
            b_decay += tl.load(p_sums + block_slot(2 * tile, level, (chunk >> level) - 1))
            level = lowest_bit(rest)
            rest = rest & (rest - 1)
            tl.store(p_decay + level * of_level, b_decay)
    rest = -1 - chunk
    level = lowest_bit(rest)
    num_chunks = tl.cdiv(length, 64)
    if has_right(chunk, level, num_chunks):
        b_decay = tl.load(p_decay + level * of_level)
        rest = rest & (rest - 1)
        above = lowest_bit(rest)
        while has_right(chunk, above, num_chunks):
            b_decay += tl.load(p_sums + block_slot(2 * tile, level, (chunk >> level) + 1))
            tl.store(p_decay + above * of_level, b_decay)
            level = above
            rest = rest & (rest - 1)
            above = lowest_bit(rest)
