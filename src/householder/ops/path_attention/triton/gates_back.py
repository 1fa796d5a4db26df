"""The gradients of the gates of `path_attention`.

A gate is crossed by the pairs of a query at or after its token and a key before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import cast_operand, dot, load_tile
from householder.ops.path_attention.triton.chunk_back import load_pairs
from householder.ops.path_attention.triton.problem import SIZES, locate_chunk


@triton.jit(do_not_specialize=["number"])
def totals_kernel(sums, totals, number, BLOCK: tl.constexpr):
    """Sum each chunk's 64 rows, in the same order however many chunks there are."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_sums = load_tile(sums, i * 64, i < number, 0, 64, 64)
    tl.store(totals + i, tl.sum(b_sums, 1), mask=i < number)


@triton.jit
def sum_range(totals, start, stop, BLOCK: tl.constexpr):
    """Return the sum of `totals[start … stop − 1]`, always in the same order."""
    o_b = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(start, stop, BLOCK):
        total += tl.load(totals + i + o_b, mask=i + o_b < stop, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=SIZES)
def gate_kernel(
    sums, totals, da_pairs, dg, cu_seqlens, tile_sequence, first_tile, T, num_tiles, num_levels,
    HQ, dg_b, dg_t, dg_h, PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dg of one chunk and query head.

    In the chunk, the gate of token s is crossed by the pairs with j < s ≤ i; in a rectangle, one of
    the right block by the rows from its token on, and one of the left block by the columns before
    it. `totals` are the chunks' sums of `sums`.
    """
    i_chunk = tl.program_id(0) // HQ
    i_hq = (tl.program_id(0) % HQ).to(tl.int64)
    batch, start, chunk, n = locate_chunk(i_chunk, T, cu_seqlens, tile_sequence, first_tile, PACKED)
    if n <= 0:
        return
    num_chunks = chunk + tl.cdiv(n, 64)
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    row = i_chunk.to(tl.int64) * 64
    o_c = tl.arange(0, 64)
    b_da = load_pairs(da_pairs + (i_hq * num_rows + row) * 64, PRECISION)
    before = cast_operand(tl.where(o_c[:, None] < o_c[None, :], 1.0, 0.0), PRECISION)
    later = o_c[:, None] >= o_c[None, :]
    b_dg = tl.sum(tl.where(later, dot(b_da, before, PRECISION), 0.0), 0)
    for level in range(num_levels):
        block = chunk >> level
        of_head = (tl.cast(level, tl.int64) * HQ + i_hq) * num_rows
        p_totals = totals + of_head // 64 + (i_chunk - chunk)
        if block % 2 == 1:
            b_sum = tl.load(sums + of_head + row + o_c)
            b_dg += tl.sum(tl.where(later, b_sum[:, None], 0.0), 0)
            stop = tl.minimum((block + 1) << level, num_chunks)
            b_dg += sum_range(p_totals, chunk + 1, stop, BLOCK)
        elif ((block + 1) << level) < num_chunks:
            b_sum = tl.load(sums + of_head + row + o_c)
            b_dg += tl.sum(tl.where(later, 0.0, b_sum[:, None]), 0)
            b_dg += sum_range(p_totals, block << level, chunk, BLOCK)
    p_dg = dg + batch * dg_b + start * dg_t + i_hq * dg_h
    tl.store(p_dg + o_c * dg_t, b_dg.to(dg.dtype.element_ty), mask=o_c < n)
