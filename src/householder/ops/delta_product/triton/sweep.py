"""`delta_product` backward as one kernel: a sweep over each sequence and head from its end.

Where K and V fit in one tile, one program carries all of dS and finds every gradient of a chunk as
it passes (formulas in `backward.py`), so that neither dS nor D is ever written or read again. The
tiles of the next chunk are loaded while this one is worked on.

The products are arranged so that no result needs to be transposed for the next: dS, dU and D are
held as `[V, …]`, what comes from S as `[K, …]`, and of the pairs only Pᵀ and dAᵀ are formed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import cast_operand, dot, dot_add
from householder.ops.delta_product.triton.chunks import (
    BETA,
    FROM_START,
    TO_END,
    TOKEN_FROM_START,
    load_tile,
    load_tile_t,
    locate_sequence,
    pair_decay,
    row_offsets,
    store_tile,
    store_tile_t,
)


@triton.jit
def prefetch(pointer, offsets, D: tl.constexpr, BLOCK: tl.constexpr):
    """Bring rows of 16-bit numbers at `offsets` into the second-level cache."""
    LINE: tl.constexpr = 64
    lines = tl.minimum(tl.arange(0, (BLOCK + LINE - 1) // LINE) * LINE, D - 1)
    addresses = (pointer + offsets[:, None] + lines[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], tl.int32, False, 1
    )


@triton.jit
def sweep_kernel(
    do, q, k, table, ut, states, u, dfinal, dinitial, dq, dk, dv, dbeta, dg,
    cu_seqlens, first_chunk, scale, T, do_b, do_h, q_b, q_h, k_b, k_h,
    HV: tl.constexpr, do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, k_n: tl.constexpr, UT_STRIDE: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    AHEAD: tl.constexpr = 0, EARLY: tl.constexpr = False, PREFETCH: tl.constexpr = False,
):  # fmt: skip
    """Carry dS of one sequence and value head to its start; write the gradients of all chunks."""
    i_sh = tl.program_id(0).to(tl.int64)
    i_s = i_sh // HV
    i_h = i_sh % HV
    batch, first, length, chunk = locate_sequence(i_s, T, cu_seqlens, first_chunk, C, PACKED)
    batch = tl.cast(batch, tl.int64)
    first = tl.cast(first, tl.int64)
    chunk = tl.cast(chunk, tl.int64)

    o_r = tl.arange(0, R)
    o_c = tl.arange(0, BC)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    token = o_r // N
    everywhere = o_r >= 0
    m_v = o_v < V
    above = o_r[:, None] < o_r[None, :]
    seen = token[:, None] <= o_c[None, :]
    # A query's gates are those of its token's rows; past the chunk's end there is no query.
    query = tl.minimum(o_c, C - 1) * N
    p_q = q + batch * q_b + first * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + first * k_t + (i_h // GROUP) * k_h
    p_do = do + batch * do_b + first * do_t + i_h * do_h
    first_row = batch * T + first  # of tensors that are contiguous
    p_dq = dq + (first_row * HV + i_h) * K
    p_dk = dk + (first_row * N * HV + i_h) * K
    p_dv = dv + (first_row * N * HV + i_h) * V
    p_dbeta = dbeta + first_row * N * HV + i_h
    o_krows = row_offsets(R, N, k_t, k_n)

    b_ds = tl.zeros((BV, BK), tl.float32)
    if dfinal is not None:
        b_ds += load_tile_t(dfinal + i_sh * K * V, o_k * V, o_k < K, 0, V, BV).to(tl.float32)
        b_ds *= 1.0 / scale

    num_chunks = tl.cdiv(length, C)
    if AHEAD:
        i = tl.maximum(num_chunks - 1, 0)
        start = tl.cast(i * C, tl.int64)
        n = tl.minimum(length - i * C, C)
        i_ch = (chunk + i) * HV + i_h
        if AHEAD & 1:
            next_k = load_tile(p_k + start * k_t, o_krows, o_r < n * N, 0, K, BK)
        if AHEAD & 8:
            next_q = load_tile(p_q + start * q_t, o_c * q_t, o_c < n, 0, K, BK)
        if AHEAD & 2:
            next_do = load_tile(p_do + start * do_t, o_c * do_t, o_c < n, 0, V, BV)
        if AHEAD & 4:
            next_u = load_tile(u + i_ch * R * V, o_r * V, o_r < n * R, 0, V, BV)
    for step in tl.range(num_chunks, disable_licm=True):
        i = num_chunks - 1 - step
        start = tl.cast(i * C, tl.int64)
        n = tl.minimum(length - i * C, C)
        m_r = o_r < n * N
        m_c = o_c < n
        i_ch = (chunk + i) * HV + i_h
        p_table = table + i_ch * (6 * R if GATED else R)
        b_beta = tl.load(p_table + BETA * R + o_r)

        if AHEAD & 1:
            b_k = next_k
        else:
            b_k = load_tile(p_k + start * k_t, o_krows, m_r, 0, K, BK)
        if AHEAD & 8:
            b_q = next_q
        else:
            b_q = load_tile(p_q + start * q_t, o_c * q_t, m_c, 0, K, BK)
        if AHEAD & 2:
            b_do = next_do
        else:
            b_do = load_tile(p_do + start * do_t, o_c * do_t, m_c, 0, V, BV)
        if AHEAD & 4:
            b_u = next_u
        else:
            b_u = load_tile(u + i_ch * R * V, o_r * V, everywhere, 0, V, BV)
        b_t = load_tile(ut + i_ch * UT_STRIDE, o_r * R, everywhere, 0, R, R)
        if EARLY:
            b_s = load_tile(states + i_ch * K * V, o_v * K, m_v, 0, K, BK)
        if PREFETCH:
            before = tl.maximum(i - 1, 0)
            some = (i > 0).to(tl.int32)
            start_b = tl.cast(before * C, tl.int64)
            i_b = (chunk + before) * HV + i_h
            prefetch(p_k + start_b * k_t, o_krows * some, K, BK)
            prefetch(u + i_b * R * V, o_r * V, V, BV)
            prefetch(p_q + start_b * q_t, o_c * q_t * some, K, BK)
            prefetch(p_do + start_b * do_t, o_c * do_t * some, V, BV)
            prefetch(ut + i_b * UT_STRIDE, o_r * R, R, R)
            prefetch(states + i_b * K * V, tl.minimum(o_v, V - 1) * K, K, BK)
        b_k = cast_operand(b_k, PRECISION)
        b_do = cast_operand(b_do, PRECISION)
        b_q = cast_operand(b_q, PRECISION)

        # What rows write into the next chunk's state; of dK, all that needs dS'.
        b_dsh = cast_operand(b_ds, PRECISION)
        b_dk = dot(tl.trans(b_dsh), tl.trans(b_u), PRECISION)
        if GATED:
            to_end = tl.load(p_table + TO_END * R + o_r)
            b_dk *= to_end[None, :]
            b_written = tl.sum(b_dk * tl.trans(b_k).to(tl.float32), axis=0)

        # The chain from dS' to dS.
        b_a = dot(b_k, tl.trans(b_q), PRECISION)
        if GATED:
            b_a *= pair_decay(p_table, query[None, :], o_r[:, None], seen, R)
        b_a = cast_operand(tl.where(seen, b_a, 0.0), PRECISION)
        b_du = dot(b_dsh, tl.trans(b_k), PRECISION)
        b_qe = b_q
        if GATED:
            from_start = tl.load(p_table + FROM_START * R + o_r)
            token_from_start = tl.load(p_table + TOKEN_FROM_START * R + o_c)
            kept = tl.load(p_table + FROM_START * R + R - 1)
            b_du *= to_end[None, :]
            b_ds *= kept
            b_qe = cast_operand(b_q.to(tl.float32) * token_from_start[:, None], PRECISION)
        b_du = dot_add(tl.trans(b_do), tl.trans(b_a), b_du, PRECISION)
        b_d = dot(cast_operand(b_du, PRECISION), b_t, PRECISION) * (-b_beta)[None, :]
        b_dh = cast_operand(b_d, PRECISION)
        b_ds = dot_add(tl.trans(b_do), b_qe, b_ds, PRECISION)
        if GATED:
            b_d *= from_start[None, :]
        b_ds = dot_add(cast_operand(b_d, PRECISION), b_k, b_ds, PRECISION)

        if AHEAD:
            i = tl.maximum(i - 1, 0)
            start_next = tl.cast(i * C, tl.int64)
            n_next = tl.minimum(length - i * C, C)
            i_next = (chunk + i) * HV + i_h
            if AHEAD & 1:
                next_k = load_tile(p_k + start_next * k_t, o_krows, o_r < n_next * N, 0, K, BK)
            if AHEAD & 8:
                next_q = load_tile(p_q + start_next * q_t, o_c * q_t, o_c < n_next, 0, K, BK)
            if AHEAD & 2:
                next_do = load_tile(p_do + start_next * do_t, o_c * do_t, o_c < n_next, 0, V, BV)
            if AHEAD & 4:
                next_u = load_tile(u + i_next * R * V, o_r * V, everywhere, 0, V, BV)
        if not EARLY:
            b_s = load_tile(states + i_ch * K * V, o_v * K, m_v, 0, K, BK)

        # Values.
        p_row = start * N * HV
        b_dv = tl.trans(b_dh).to(tl.float32) * -scale
        store_tile(p_dv + p_row * V, o_r * HV * V, m_r, 0, b_dv, V, BV)

        # Pairs of rows, and of rows with queries.
        b_m = dot(b_u, b_dh, PRECISION)
        b_at = dot(b_u, tl.trans(b_do), PRECISION)
        # U_r = β_r (the residual that row r writes), of which β's gradient is the product with D.
        b_dbeta = tl.sum(tl.where(o_r[:, None] == o_r[None, :], b_m, 0.0), axis=1)
        b_dbeta = b_dbeta * (-scale) / (b_beta * b_beta)
        tl.store(p_dbeta + p_row + o_r * HV, b_dbeta.to(dbeta.dtype.element_ty), mask=m_r)
        if GATED:
            b_m *= pair_decay(p_table, o_r[None, :], o_r[:, None], above, R)
            attention = b_a.to(tl.float32) * b_at
            b_at *= pair_decay(p_table, query[None, :], o_r[:, None], seen, R)
        b_m = tl.where(above, b_m, 0.0)
        b_at = cast_operand(tl.where(seen, b_at, 0.0), PRECISION)
        b_mh = cast_operand(b_m, PRECISION)
        if GATED:
            # What rows give to the reads and outputs at or after each token, from before it.
            crossing = dot(b_k, tl.trans(b_k), PRECISION) * b_m
            here_on = tl.where(token[:, None] >= o_c[None, :], 1.0, 0.0)
            crossing = dot(
                cast_operand(crossing, PRECISION), cast_operand(here_on, PRECISION), PRECISION
            )
            here_on = tl.where(o_c[:, None] >= o_c[None, :], 1.0, 0.0)
            crossing = dot_add(
                cast_operand(attention, PRECISION), cast_operand(here_on, PRECISION),
                crossing, PRECISION,
            )  # fmt: skip
            b_dg = tl.sum(tl.where(token[:, None] < o_c[None, :], crossing, 0.0), axis=0)
            b_kept = tl.sum(b_s.to(tl.float32) * b_dsh.to(tl.float32), axis=1)
            b_dg += kept * tl.sum(b_kept, axis=0)

        # Queries.
        b_dq = dot(tl.trans(b_s), tl.trans(b_do), PRECISION)
        if GATED:
            b_dq *= token_from_start[None, :]
            b_asked = tl.sum(b_dq * tl.trans(b_q).to(tl.float32), axis=0)
            at_or_after = o_c[None, :] >= o_c[:, None]
            b_dg += tl.sum(tl.where(at_or_after, b_asked[None, :], 0.0), axis=1)
        b_dq = dot_add(tl.trans(b_k), b_at, b_dq, PRECISION) * scale
        store_tile_t(p_dq + start * HV * K, o_c * HV * K, m_c, 0, b_dq, K, BK)

        # Keys: what rows read, and what they write for queries and later rows.
        if GATED:
            b_rd = dot(tl.trans(b_s), b_dh, PRECISION) * from_start[None, :]
            b_read = tl.sum(b_rd * tl.trans(b_k).to(tl.float32), axis=0)
            at_or_after = token[None, :] >= o_c[:, None]
            b_dg += tl.sum(tl.where(at_or_after, b_read[None, :], b_written[None, :]), axis=1)
            p_dg = dg + (first_row + start) * HV + i_h
            tl.store(p_dg + o_c * HV, (b_dg * scale).to(dg.dtype.element_ty), mask=m_c)
            b_dk += b_rd
        else:
            b_dk = dot_add(tl.trans(b_s), b_dh, b_dk, PRECISION)
        b_dk = dot_add(tl.trans(b_k), b_mh, b_dk, PRECISION)
        b_dk = dot_add(tl.trans(b_k), tl.trans(b_mh), b_dk, PRECISION)
        b_dk = dot_add(tl.trans(b_q), tl.trans(b_at), b_dk, PRECISION)
        store_tile_t(p_dk + p_row * K, o_r * HV * K, m_r, 0, b_dk * scale, K, BK)

    if dinitial is not None:
        store_tile_t(dinitial + i_sh * K * V, o_k * V, o_k < K, 0, b_ds * scale, V, BV)
