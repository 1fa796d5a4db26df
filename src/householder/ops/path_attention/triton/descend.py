"""The gradients of the products of blocks of `path_attention`, down the tree.

With X the rows that pass a product and dX what they have as gradient behind it,

    dF_left  = Σ Q_rᵀ dQ_r + F_rightᵀ dF        dF_right = Σ dK_lᵀ K_l + dF F_leftᵀ

where the sums go over all rows of the other block of the pair. They need nothing from above, and so
one kernel makes those of all levels; another adds what comes from above, level by level. A chunk's
own product ends in W dF and W dFᵀ, which is all that the gradients inside the chunk need of it.

Nothing passes the first block of a sequence, nor its last: block b of level l has a gradient if
0 < b < (number of chunks − 1) >> l.
"""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import cast_operand, dot, dot_add, load_tile, store_tile
from householder.ops.path_attention.triton.problem import (
    LOG2_E,
    SIZES,
    block_slot,
    locate_tile,
    lowest_bit,
)


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    o, do, lse, sinks, lse_rows, delta_rows, dsinks_rows, cu_seqlens, tile_sequence, first_tile,
    T, num_tiles, HQ,
    o_b, o_t, o_h, do_b, do_t, do_h, lse_b, lse_t, lse_h,
    V: tl.constexpr, PACKED: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write δ = rowsum(dO ⊙ O) and lse, to the base 2, of one chunk and head.

    Rows behind the sequence's end get lse = ∞: they attend to nothing. A sink's logit has the
    gradient −δ times its part of the softmax, of each row.
    """
    i_chunk = tl.program_id(0) // HQ
    i_hq = (tl.program_id(0) % HQ).to(tl.int64)
    batch, first, length, tile = locate_tile(
        i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    token = i_chunk * 64 - tile * 128
    batch = tl.cast(batch, tl.int64)
    start = tl.cast(first, tl.int64) + token
    o_c = tl.arange(0, 64)
    m_c = token + o_c < length
    p_o = o + batch * o_b + start * o_t + i_hq * o_h
    p_do = do + batch * do_b + start * do_t + i_hq * do_h
    b_o = load_tile(p_o, o_c * o_t, m_c, 0, V, BV).to(tl.float32)
    b_do = load_tile(p_do, o_c * do_t, m_c, 0, V, BV).to(tl.float32)
    at = i_hq * (tl.cast(num_tiles, tl.int64) * 128) + i_chunk.to(tl.int64) * 64 + o_c
    b_delta = tl.sum(b_o * b_do, 1)
    tl.store(delta_rows + at, b_delta)
    b_lse = tl.load(lse + batch * lse_b + (start + o_c) * lse_t + i_hq * lse_h, mask=m_c, other=0.0)
    tl.store(lse_rows + at, tl.where(m_c, b_lse * LOG2_E, float("inf")))
    if sinks is not None:
        b_sink = tl.load(sinks + i_hq).to(tl.float32)
        tl.store(dsinks_rows + at, tl.where(m_c, -b_delta * tl.exp(b_sink - b_lse), 0.0))


@triton.jit
def pass_block(
    b_df, p_above, p_beside, start, LEFT: tl.constexpr, K: tl.constexpr, BP: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to rows `start …` of dF, `[BP, BK]`, what comes from the block above.

    `p_beside` is the product of the other block of the pair; LEFT says that dF is the left one's.
    """
    o_p = start + tl.arange(0, BP)
    o_k = tl.arange(0, BK)
    for inner in range(0, K, BR):
        o_r = inner + tl.arange(0, BR)
        if LEFT:
            b_f = tl.trans(load_tile(p_beside, o_r * K, o_r < K, start, K, BP))
            b_above = load_tile(p_above, o_r * K, o_r < K, 0, K, BK)
        else:
            b_f = load_tile(p_above, o_p * K, o_p < K, inner, K, BR)
            b_above = tl.trans(load_tile(p_beside, o_k * K, o_k < K, inner, K, BR))
        b_f, b_above = cast_operand(b_f, PRECISION), cast_operand(b_above, PRECISION)
        b_df = dot_add(b_f, b_above, b_df, PRECISION)
    return b_df


@triton.jit
def sum_rows(
    b_df, x, dx, first, num, start, SWAPPED: tl.constexpr, K: tl.constexpr, BP: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add rows `start …` of Xᵀ dX, `[BP, BK]`, or with SWAPPED of dXᵀ X, over `num` chunks."""
    o_c = tl.arange(0, 64)
    everywhere = o_c >= 0
    for i in range(num):
        at = (tl.cast(first + i, tl.int64) * 64) * K
        if SWAPPED:
            b_left = load_tile(dx + at, o_c * K, everywhere, start, K, BP)
            b_right = load_tile(x + at, o_c * K, everywhere, 0, K, BK)
        else:
            b_left = load_tile(x + at, o_c * K, everywhere, start, K, BP)
            b_right = load_tile(dx + at, o_c * K, everywhere, 0, K, BK)
        b_left = cast_operand(b_left, PRECISION)
        b_df = dot_add(tl.trans(b_left), cast_operand(b_right, PRECISION), b_df, PRECISION)
    return b_df


@triton.jit
def sum_block(
    q_levels, k_levels, dq_levels, dk_levels, i_h, sequence, num_chunks, level, block, H,
    num_rows, start, first_query, GROUP: tl.constexpr, K: tl.constexpr, BP: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return rows `start …` of a block's dF, `[BP, BK]`, without what comes from above."""
    b_df = tl.zeros((BP, BK), tl.float32)
    of_level = tl.cast(level, tl.int64)
    if block % 2 == 0:
        # A left block: the queries of the right one have passed it.
        first = (block + 1) << level
        num = tl.minimum(num_chunks - first, 1 << level)
        if first_query is not None:
            # Tiles that ask nothing have no gradients here.
            skipped = tl.maximum(first_query // 128 * 2 - first, 0)
            first += skipped
            num -= skipped
        for i in range(GROUP):
            of_head = ((of_level * H + i_h) * GROUP + i) * num_rows + sequence
            b_df = sum_rows(
                b_df, q_levels + of_head * K, dq_levels + of_head * K, first, num, start, False,
                K, BP, BK, PRECISION,
            )  # fmt: skip
    else:
        of_head = (of_level * H + i_h) * num_rows + sequence
        b_df = sum_rows(
            b_df, k_levels + of_head * K, dk_levels + of_head * K, (block - 1) << level,
            1 << level, start, True, K, BP, BK, PRECISION,
        )  # fmt: skip
    return b_df


@triton.jit(do_not_specialize=SIZES)
def sum_kernel(
    q_levels, k_levels, dq_levels, dk_levels, df, cu_seqlens, tile_sequence, first_tile,
    T, num_tiles, num_levels, H, rows_of_batch, first_query, GROUP: tl.constexpr, K: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write rows `[BP]` of the sums of one block of a level ≥ 1 and one key head."""
    num_p: tl.constexpr = (K + BP - 1) // BP
    start = (tl.program_id(0) % num_p) * BP
    i_h = ((tl.program_id(0) // num_p) % H).to(tl.int64)
    i = tl.program_id(0) // (num_p * H)
    if PACKED:
        # Programs go through the odd slots, those of blocks of all levels from 1 on.
        _, _, length, tile = locate_tile(i // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED)
        middle = i - 2 * tile + 1
        level = lowest_bit(middle) + 1
        block = middle >> level
    else:
        # Large blocks, the longest sums, come first.
        level = num_levels - 2
        at_level = rows_of_batch * (tl.cdiv(T, 64) >> level)
        while i >= at_level:
            i -= at_level
            level -= 1
            at_level = rows_of_batch * (tl.cdiv(T, 64) >> level)
        per_row = tl.cdiv(T, 64) >> level
        length = T
        tile = (i // per_row) * tl.cdiv(T, 128)
        block = i % per_row
    num_chunks = tl.cdiv(length, 64)
    if (block == 0) | (block >= (num_chunks - 1) >> level):
        return
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    b_df = sum_block(
        q_levels, k_levels, dq_levels, dk_levels, i_h, tl.cast(tile, tl.int64) * 128, num_chunks,
        level, block, H, num_rows, start, first_query, GROUP, K, BP, BK, PRECISION,
    )  # fmt: skip
    slot = (block_slot(2 * tile, level, block) // 2).to(tl.int64)
    o_p = start + tl.arange(0, BP)
    p_df = df + (i_h * (num_rows // 64) + slot) * (K * K)
    store_tile(p_df, o_p * K, o_p < K, 0, b_df, K, BK)


@triton.jit(do_not_specialize=SIZES)
def descend_kernel(
    f, df, cu_seqlens, tile_sequence, first_tile, T, num_tiles, level, H, K: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Add to rows `[BP]` of the dF of one block of `level` ≥ 1 what comes from the level above."""
    num_p: tl.constexpr = (K + BP - 1) // BP
    start = (tl.program_id(0) % num_p) * BP
    i_h = ((tl.program_id(0) // num_p) % H).to(tl.int64)
    i = tl.program_id(0) // (num_p * H)
    if PACKED:
        _, _, length, tile = locate_tile(i, T, cu_seqlens, tile_sequence, first_tile, PACKED)
        chunk = 2 * (i - tile)
        if chunk & ((1 << level) - 1) != 0:
            return
        block = chunk >> level
    else:
        per_row = tl.cdiv(T, 64) >> level
        length = T
        tile = (i // per_row) * tl.cdiv(T, 128)
        block = i % per_row
    last = (tl.cdiv(length, 64) - 1) >> level
    above = block // 2
    if (above == 0) | (above >= last // 2):
        return
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    p_df = df + i_h * (num_rows // 64) * (K * K)
    p_f = f + i_h * (num_rows // 32) * (K * K)
    slot = (block_slot(2 * tile, level, block) // 2).to(tl.int64)
    p_above = p_df + (block_slot(2 * tile, level + 1, above) // 2).to(tl.int64) * (K * K)
    p_beside = p_f + block_slot(2 * tile, level, block ^ 1).to(tl.int64) * (K * K)
    p_df += slot * (K * K)
    o_p = start + tl.arange(0, BP)
    b_df = load_tile(p_df, o_p * K, o_p < K, 0, K, BK).to(tl.float32)
    if block % 2 == 0:
        b_df = pass_block(b_df, p_above, p_beside, start, True, K, BP, BK, BR, PRECISION)
    else:
        b_df = pass_block(b_df, p_above, p_beside, start, False, K, BP, BK, BR, PRECISION)
    store_tile(p_df, o_p * K, o_p < K, 0, b_df, K, BK)


@triton.jit(do_not_specialize=SIZES)
def leaf_kernel(
    q_levels, k_levels, dq_levels, dk_levels, w, f, df, wdf, wdft, cu_seqlens, tile_sequence,
    first_tile, T, num_tiles, H, first_query, w_b, w_h, w_t: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BP: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Write W dF and W dFᵀ of one chunk and key head, for chunks whose product has a gradient."""
    i_chunk = tl.program_id(0) // H
    i_h = (tl.program_id(0) % H).to(tl.int64)
    batch, first, length, tile = locate_tile(
        i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    chunk = i_chunk - 2 * tile
    num_chunks = tl.cdiv(length, 64)
    if (chunk == 0) | (chunk >= num_chunks - 1):
        return
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    sequence = tl.cast(tile, tl.int64) * 128
    above = chunk // 2
    p_above = df + i_h * (num_rows // 64) * (K * K)
    p_above += (block_slot(2 * tile, 1, above) // 2).to(tl.int64) * (K * K)
    p_beside = f + i_h * (num_rows // 32) * (K * K)
    p_beside += block_slot(2 * tile, 0, chunk ^ 1).to(tl.int64) * (K * K)
    p_w = w + tl.cast(batch, tl.int64) * w_b + (tl.cast(first, tl.int64) + chunk * 64) * w_t
    p_w += i_h * w_h
    of_head = (i_h * num_rows + sequence + chunk * 64) * K
    o_c = tl.arange(0, 64)
    everywhere = o_c >= 0
    b_w = cast_operand(load_tile(p_w, o_c * w_t, everywhere, 0, K, BK), PRECISION)
    b_wdf = tl.zeros((64, BK), tl.float32)
    for start in range(0, K, BP):
        b_df = sum_block(
            q_levels, k_levels, dq_levels, dk_levels, i_h, sequence, num_chunks, 0, chunk, H,
            num_rows, start, first_query, GROUP, K, BP, BK, PRECISION,
        )  # fmt: skip
        if (above > 0) & (above < (num_chunks - 1) // 2):
            if chunk % 2 == 0:
                b_df = pass_block(b_df, p_above, p_beside, start, True, K, BP, BK, BR, PRECISION)
            else:
                b_df = pass_block(b_df, p_above, p_beside, start, False, K, BP, BK, BR, PRECISION)
        b_df = cast_operand(b_df, PRECISION)
        b_wdft = dot(b_w, tl.trans(b_df), PRECISION)
        store_tile(wdft + of_head, o_c * K, everywhere, start, b_wdft, K, BP)
        b_part = cast_operand(load_tile(p_w, o_c * w_t, everywhere, start, K, BP), PRECISION)
        b_wdf = dot_add(b_part, b_df, b_wdf, PRECISION)
    store_tile(wdf + of_head, o_c * K, everywhere, 0, b_wdf, K, BK)
