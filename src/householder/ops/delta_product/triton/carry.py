"""The carry of segments: what each segment of a long sequence makes of the state, all at once.

What is carried, and why little of it is work under gates, stands in `segments.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import (
    cast_operand,
    dot,
    dot_add,
    load_tile,
    load_tile_t,
    store_tile,
    store_tile_t,
)
from householder.ops.delta_product.triton.chunks import (
    BETA,
    FROM_START,
    LEAST_PART,
    LOG_HIGH,
    LOG_LOW,
    NOTHING,
    SIZES,
    TO_END,
    TOKEN_FROM_START,
    carried,
    locate_sequence,
    own_columns,
    pair_decay,
    row_offsets,
    writes,
)


@triton.jit
def locate_segment(
    i_s, T, sequence, first, C: tl.constexpr, PACKED: tl.constexpr, SEGMENT: tl.constexpr
):
    """Return a segment's sequence, its place in it, and how many segments that one has."""
    if PACKED:
        i = tl.load(sequence + i_s)
        begin = tl.load(first + i)
        return i, i_s - begin, tl.load(first + i + 1) - begin
    else:
        count = tl.cdiv(T, SEGMENT * C)
        return i_s // count, i_s % count, count


@triton.jit
def chunk_bounds(table, growth, chunk, num_chunks, i_h, HV, R: tl.constexpr, BLOCK: tl.constexpr):
    """Return the logarithms of the bounds on the maps through a segment's chunks, `[BLOCK]`."""
    o_i = tl.arange(0, BLOCK)
    m_i = o_i < num_chunks
    i_ch = (chunk + o_i) * HV + i_h
    p_last = table + i_ch * (6 * R) + R - 1
    log = tl.load(p_last + LOG_HIGH * R, mask=m_i, other=0.0)
    log += tl.load(p_last + LOG_LOW * R, mask=m_i, other=0.0)
    log += tl.load(growth + i_ch, mask=m_i, other=0.0)
    return tl.maximum(log, LEAST_PART)


@triton.jit(do_not_specialize=SIZES)
def carry_kernel(
    k, v, table, ut, growth, initial, starts, maps, visible,
    bounds, first_chunk, sequence, first_segment, T, k_b, k_h, v_b, v_h,
    HV: tl.constexpr, k_t: tl.constexpr, k_n: tl.constexpr, v_t: tl.constexpr, v_n: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, SEGMENT: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Find Δ, kept with the next segment's start, and Φ of one segment and head.

    A program has columns `[BV]` of both side by side, and has them transposed, as in the walk; Φᵀ
    is kept like that.
    """
    CARRIED: tl.constexpr = carried(PRECISION)
    i_v, i_sh, i_s, i_h = own_columns(HV, V + K, BV)
    i_seq, index, count = locate_segment(i_s, T, sequence, first_segment, C, PACKED, SEGMENT)
    if index + 1 >= count:
        return
    if (index == 0) & (i_v >= V):
        return
    batch, first, length, chunk = locate_sequence(i_s, T, bounds, first_chunk, C, PACKED, SEGMENT)
    num_chunks = tl.cdiv(length, C)

    begin = 0
    if GATED:
        log = chunk_bounds(table, growth, chunk, num_chunks, i_h, HV, R, BS)
        o_i = tl.arange(0, BS)
        from_here = tl.sum(log, axis=0) - (tl.cumsum(log, axis=0) - log)
        last = tl.max(tl.where((o_i < num_chunks) & (from_here < NOTHING), o_i, -1), axis=0)
        seen = tl.where(last < 0, 1.0, 0.0)  # what lies before `begin`
        begin = tl.where((last >= 0) & (i_v >= V), num_chunks, tl.maximum(last, 0))

    o_r = tl.arange(0, R)
    o_k = tl.arange(0, BK)
    o_v = i_v + tl.arange(0, BV)
    everywhere = o_r >= 0
    m_v = o_v < V
    p_k = k + batch * k_b + first * k_t + (i_h // GROUP) * k_h
    p_v = v + batch * v_b + first * v_t + i_h * v_h + o_v[:, None]
    o_krows = row_offsets(R, N, k_t, k_n)
    o_vrows = row_offsets(R, N, v_t, v_n)[None, :]
    o_state = o_k[None, :] * V + o_v[:, None]
    m_state = m_v[:, None] & (o_k[None, :] < K)

    b_s = tl.where(o_v[:, None] == V + o_k[None, :], 1.0, 0.0)
    if initial is not None:
        p_initial = initial + (tl.cast(i_seq, tl.int64) * HV + i_h) * K * V
        m_initial = m_v[:, None] & (o_k < tl.where(index == 0, K, 0))[None, :]
        b_s += tl.load(p_initial + o_state, mask=m_initial, other=0.0).to(tl.float32)
    if GATED:
        b_s *= seen

    for i in range(begin, num_chunks):
        start = tl.cast(i * C, tl.int64)
        m_r = o_r < tl.minimum(length - i * C, C) * N
        i_ch = (chunk + i) * HV + i_h
        b_k = cast_operand(load_tile(p_k + start * k_t, o_krows, m_r, 0, K, BK), PRECISION)
        m_tile = m_v[:, None] & m_r[None, :]
        b_v = tl.load(p_v + start * v_t + o_vrows, mask=m_tile, other=0.0).to(tl.float32)
        p_table = table + i_ch * (6 * R if GATED else R)
        b_beta = tl.load(p_table + BETA * R + o_r)
        b_ut = load_tile(ut + i_ch * (R * R), o_r * R, everywhere, 0, R, R)

        recalled = dot(cast_operand(b_s, PRECISION), tl.trans(b_k), CARRIED)
        if GATED:
            recalled *= tl.load(p_table + FROM_START * R + o_r)[None, :]
        b_u = writes(b_v - recalled, b_beta, b_ut, PRECISION)
        if GATED:
            b_u *= tl.load(p_table + TO_END * R + o_r)[None, :]
            b_s *= tl.load(p_table + FROM_START * R + R - 1)
        b_s = dot_add(cast_operand(b_u, PRECISION), b_k, b_s, CARRIED)

    if i_v < V:
        tl.store(starts + (i_sh + HV) * K * V + o_state, b_s, mask=m_state)
    if index > 0:
        slot = (batch * (T // (SEGMENT * C)) + first // (SEGMENT * C)) * HV + i_h
        m_map = (o_v >= V) & (o_v < V + K)
        store_tile(maps + slot * K * K, (o_v - V) * K, m_map, 0, b_s, K, BK)
        if GATED:
            tl.store(visible + slot, seen, mask=i_v == 0)


@triton.jit(do_not_specialize=SIZES)
def carry_back_kernel(
    do, q, k, table, ut, growth, dfinal, dends,
    bounds, first_chunk, sequence, first_segment, scale, T, do_b, do_h, q_b, q_h, k_b, k_h,
    HV: tl.constexpr, do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, k_n: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, SEGMENT: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Find columns `[BV]` of one segment's and head's Δ', kept with the end before it."""
    CARRIED: tl.constexpr = carried(PRECISION)
    i_v, i_sh, i_s, i_h = own_columns(HV, V, BV)
    i_seq, index, count = locate_segment(i_s, T, sequence, first_segment, C, PACKED, SEGMENT)
    if index == 0:
        return
    if index >= count:
        return
    batch, first, length, chunk = locate_sequence(i_s, T, bounds, first_chunk, C, PACKED, SEGMENT)
    num_chunks = tl.cdiv(length, C)

    end = num_chunks
    hidden = False  # what lies behind `end`
    if GATED:
        log = chunk_bounds(table, growth, chunk, num_chunks, i_h, HV, R, BS)
        o_i = tl.arange(0, BS)
        up_to_here = tl.cumsum(log, axis=0)
        end = tl.where((o_i < num_chunks) & (up_to_here < NOTHING), o_i + 1, 2 * BS)
        end = tl.min(end, axis=0)
        hidden = end < 2 * BS
        end = tl.minimum(end, num_chunks)

    o_r = tl.arange(0, R)
    o_c = tl.arange(0, BC)
    o_k = tl.arange(0, BK)
    everywhere = o_r >= 0
    p_q = q + batch * q_b + first * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + first * k_t + (i_h // GROUP) * k_h
    p_do = do + batch * do_b + first * do_t + i_h * do_h
    o_krows = row_offsets(R, N, k_t, k_n)
    token = o_r // N
    seen = token[None, :] <= o_c[:, None]
    query = tl.minimum(o_c, C - 1) * N

    b_ds = tl.zeros((BV, BK), tl.float32)
    if dfinal is not None:
        m_k = o_k < tl.where(index + 1 == count, K, 0)
        p_final = dfinal + (tl.cast(i_seq, tl.int64) * HV + i_h) * K * V
        b_ds += load_tile_t(p_final, o_k * V, m_k, i_v, V, BV).to(tl.float32)
    if GATED:
        b_ds = tl.where(hidden, 0.0, b_ds)

    for step in range(end):
        i = end - 1 - step
        start = tl.cast(i * C, tl.int64)
        n = tl.minimum(length - i * C, C)
        m_r = o_r < n * N
        m_c = o_c < n
        i_ch = (chunk + i) * HV + i_h
        p_table = table + i_ch * (6 * R if GATED else R)
        b_k = cast_operand(load_tile(p_k + start * k_t, o_krows, m_r, 0, K, BK), PRECISION)
        b_q = cast_operand(load_tile(p_q + start * q_t, o_c * q_t, m_c, 0, K, BK), PRECISION)
        b_do = load_tile_t(p_do + start * do_t, o_c * do_t, m_c, i_v, V, BV)
        b_ut = load_tile(ut + i_ch * (R * R), o_r * R, everywhere, 0, R, R)
        b_beta = tl.load(p_table + BETA * R + o_r)

        b_a = dot(b_q, tl.trans(b_k), PRECISION) * scale
        if GATED:
            b_a *= pair_decay(p_table, query[:, None], o_r[None, :], seen, R)
        b_a = cast_operand(tl.where(seen, b_a, 0.0), PRECISION)
        b_du = dot(cast_operand(b_ds, PRECISION), tl.trans(b_k), CARRIED)
        b_doq = b_do.to(tl.float32) * scale
        if GATED:
            b_du *= tl.load(p_table + TO_END * R + o_r)[None, :]
            b_doq *= tl.load(p_table + TOKEN_FROM_START * R + o_c)[None, :]
            b_ds *= tl.load(p_table + FROM_START * R + R - 1)
            b_beta *= tl.load(p_table + FROM_START * R + o_r)
        b_du = dot_add(cast_operand(b_do, PRECISION), b_a, b_du, PRECISION)
        b_d = dot(cast_operand(b_du, PRECISION), b_ut, CARRIED)
        b_ds = dot_add(cast_operand(b_doq, PRECISION), b_q, b_ds, PRECISION)
        b_ds = dot_add(cast_operand(b_d * (-b_beta)[None, :], PRECISION), b_k, b_ds, CARRIED)

    store_tile_t(dends + (i_sh - HV) * K * V, o_k * V, o_k < K, i_v, b_ds, V, BV)
