"""`delta_product` backward, second kernel: all gradients of a chunk, from S, dS', U and D.

The formulas are those of `backward.py`, which runs it after the walk.
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
    SIZES,
    TO_END,
    TOKEN_FROM_START,
    own_chunk,
    pair_decay,
    row_offsets,
)


@triton.jit
def with_writes(
    b_u, p_u, u_offsets, u_valid, x, p_x, x_offsets, x_valid, V: tl.constexpr,
    U_FIRST: tl.constexpr, PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Return U Xᵀ or X Uᵀ of rows as long as V; `b_u` and `x` are all of them if V is one block."""
    num_v: tl.constexpr = (V + BV - 1) // BV
    R: tl.constexpr = b_u.shape[0]
    product = tl.zeros((R, x.shape[0]) if U_FIRST else (x.shape[0], R), tl.float32)
    for i in range(num_v):
        if num_v > 1:
            x = cast_operand(load_tile(p_x, x_offsets, x_valid, i * BV, V, BV), PRECISION)
            b_u = load_tile(p_u, u_offsets, u_valid, i * BV, V, BV)
        if U_FIRST:
            product = dot_add(b_u, tl.trans(x), product, PRECISION)
        else:
            product = dot_add(x, tl.trans(b_u), product, PRECISION)
    return product


@triton.jit
def crossing_to_rows(
    p_k, offsets, valid, b_p, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return what row s gives to the read of row r, summed over r from each row on, s before it."""
    o_r = tl.arange(0, R)
    token = o_r // N
    kk = tl.zeros((R, R), tl.float32)
    for i_k in range((K + BK - 1) // BK):
        k_tile = cast_operand(load_tile(p_k, offsets, valid, i_k * BK, K, BK), PRECISION)
        kk = dot_add(k_tile, tl.trans(k_tile), kk, PRECISION)
    kk = cast_operand(kk * b_p, PRECISION)
    from_here_on = tl.where(o_r[:, None] <= o_r[None, :], 1.0, 0.0)
    kk = dot(cast_operand(from_here_on, PRECISION), kk, PRECISION)
    return tl.sum(tl.where(token[None, :] < token[:, None], kk, 0.0), axis=1)


@triton.jit
def crossing_to_queries(
    p_k, offsets, valid, p_q, q_offsets, q_valid, b_at, N: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the same for what it gives to outputs, by tokens."""
    o_c = tl.arange(0, BC)
    token = tl.arange(0, R) // N
    kq = tl.zeros((R, BC), tl.float32)
    for i_k in range((K + BK - 1) // BK):
        k_tile = cast_operand(load_tile(p_k, offsets, valid, i_k * BK, K, BK), PRECISION)
        q_tile = cast_operand(load_tile(p_q, q_offsets, q_valid, i_k * BK, K, BK), PRECISION)
        kq = dot_add(k_tile, tl.trans(q_tile), kq, PRECISION)
    kq = cast_operand(kq * b_at, PRECISION)
    from_here_on = tl.where(o_c[:, None] >= o_c[None, :], 1.0, 0.0)
    crossing = dot(kq, cast_operand(from_here_on, PRECISION), PRECISION)
    return tl.sum(tl.where(token[:, None] < o_c[None, :], crossing, 0.0), axis=0)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    do, q, k, table, states, dstates, u, dq, dk, dv, dbeta, dg,
    cu_seqlens, chunk_sequence, first_chunk, scale, T, do_b, do_h, q_b, q_h, k_b, k_h,
    HV: tl.constexpr, do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, k_n: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one chunk and value head; dq and dk have a head per value head."""
    num_k: tl.constexpr = (K + BK - 1) // BK
    num_v: tl.constexpr = (V + BV - 1) // BV
    i_chunk, i_h, batch, start, n = own_chunk(
        T, HV, cu_seqlens, chunk_sequence, first_chunk, C, PACKED
    )
    if n <= 0:
        return
    o_r = tl.arange(0, R)
    o_c = tl.arange(0, BC)
    token = o_r // N
    m_r = o_r < n * N
    m_c = o_c < n
    i_ch = i_chunk * HV + i_h
    first_row = batch * T + start  # of tensors that are contiguous

    p_q = q + batch * q_b + start * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + start * k_t + (i_h // GROUP) * k_h
    p_do = do + batch * do_b + start * do_t + i_h * do_h
    p_dq = dq + (first_row * HV + i_h) * K
    p_dk = dk + (first_row * N * HV + i_h) * K
    p_u = u + (first_row * N * HV + i_h) * V
    p_dv = dv + (first_row * N * HV + i_h) * V
    o_krows = row_offsets(R, N, k_t, k_n)
    o_vrows = o_r * HV * V
    # From 32-bit offsets of queries ptxas 12.8 (Triton 3.6's) makes the upper half of an address
    # out of a register that holds the lower half by then: in float16, 64 columns, with gates.
    o_qrows = o_c.to(tl.int64) * q_t
    p_table = table + i_ch * (6 * R if GATED else R)
    b_beta = tl.load(p_table + BETA * R + o_r)

    below = o_r[:, None] > o_r[None, :]
    above = o_r[:, None] < o_r[None, :]
    seen = token[:, None] <= o_c[None, :]
    # A query's gates are those of its token's rows; past the chunk's end there is no query.
    query = tl.minimum(o_c, C - 1) * N

    # Where all of V is one block, D, U and dO are loaded once and stay; dV replaces D at once.
    b_d = cast_operand(load_tile(p_dv, o_vrows, m_r, 0, V, BV), PRECISION)
    b_u = load_tile(p_u, o_vrows, m_r, 0, V, BV)
    b_do = cast_operand(load_tile(p_do, o_c * do_t, m_c, 0, V, BV), PRECISION)
    if num_v == 1:
        b_dv = b_d.to(tl.float32) * b_beta[:, None]
        store_tile(p_dv, o_vrows, m_r, 0, b_dv, V, BV)

    # The first tiles of what follows are on their way while the products of pairs are made. Each
    # of these is finished and packed before the next begins, to hold few registers.
    o_v = tl.arange(0, BV)
    b_s = load_tile(states + i_ch * K * V, o_v * K, o_v < V, 0, K, BK)
    b_k = load_tile(p_k, o_krows, m_r, 0, K, BK)
    b_p = with_writes(b_u, p_u, o_vrows, m_r, b_d, p_dv, o_vrows, m_r, V, False, PRECISION, BV)
    # U_r = β_r (the residual that row r writes), of which β's gradient is the product with D.
    b_dbeta = tl.sum(tl.where(o_r[:, None] == o_r[None, :], b_p, 0.0), axis=1) / b_beta
    p_dbeta = dbeta + first_row * N * HV + i_h
    tl.store(p_dbeta + o_r * HV, b_dbeta.to(dbeta.dtype.element_ty), mask=m_r)
    b_p *= -b_beta[:, None]
    if GATED:
        b_p *= pair_decay(p_table, o_r[:, None], o_r[None, :], below, R)
    b_p = tl.where(below, b_p, 0.0)
    b_dg = tl.zeros((BC,), tl.float32)
    if GATED:
        crossing = crossing_to_rows(p_k, o_krows, m_r, b_p, N, K, R, PRECISION, BK)
        b_dg += tl.sum(tl.where(o_c[:, None] * N == o_r[None, :], crossing[None, :], 0.0), axis=1)
    b_p = cast_operand(b_p, PRECISION)

    b_pt = with_writes(b_u, p_u, o_vrows, m_r, b_d, p_dv, o_vrows, m_r, V, True, PRECISION, BV)
    b_pt *= b_beta[None, :]
    if GATED:
        b_pt *= pair_decay(p_table, o_r[None, :], o_r[:, None], above, R)
    b_pt = cast_operand(tl.where(above, -b_pt, 0.0), PRECISION)

    b_at = with_writes(b_u, p_u, o_vrows, m_r, b_do, p_do, o_c * do_t, m_c, V, True, PRECISION, BV)
    if GATED:
        b_at *= scale * pair_decay(p_table, query[None, :], o_r[:, None], seen, R)
        b_dg += crossing_to_queries(
            p_k, o_krows, m_r, p_q, o_qrows, m_c, b_at, N, K, R, BC, PRECISION, BK
        )
    else:
        b_at *= scale
    b_at = cast_operand(tl.where(seen, b_at, 0.0), PRECISION)

    b_kept = tl.zeros((BV,), tl.float32)  # what S gives to the next chunk
    b_written = tl.zeros((R,), tl.float32)  # what rows give to it
    b_read = tl.zeros((R,), tl.float32)  # what S gives to rows
    b_asked = tl.zeros((BC,), tl.float32)  # what S gives to outputs
    for i_k in range(num_k):
        if num_k > 1:
            b_s = load_tile(states + i_ch * K * V, o_v * K, o_v < V, i_k * BK, K, BK)
            b_k = load_tile(p_k, o_krows, m_r, i_k * BK, K, BK)
        b_ds = load_tile(dstates + i_ch * K * V, o_v * K, o_v < V, i_k * BK, K, BK)
        b_q = cast_operand(load_tile(p_q, o_qrows, m_c, i_k * BK, K, BK), PRECISION)
        k_rows = b_k.to(tl.float32)
        b_kh = cast_operand(b_k, PRECISION)

        # Queries, and what the rows read: both from the state S.
        b_dk = tl.zeros((R, BK), tl.float32)
        b_dq = tl.zeros((BK, BC), tl.float32)
        for i in range(num_v):
            if num_v > 1:
                o_vi = i * BV + o_v
                b_d = cast_operand(load_tile(p_dv, o_vrows, m_r, i * BV, V, BV), PRECISION)
                b_do = cast_operand(load_tile(p_do, o_c * do_t, m_c, i * BV, V, BV), PRECISION)
                b_s = load_tile(states + i_ch * K * V, o_vi * K, o_vi < V, i_k * BK, K, BK)
                b_ds = load_tile(dstates + i_ch * K * V, o_vi * K, o_vi < V, i_k * BK, K, BK)
            if GATED:
                b_kept += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)
            b_dk = dot_add(b_d, b_s, b_dk, PRECISION)
            b_dq = dot_add(tl.trans(b_s), tl.trans(b_do), b_dq, PRECISION)
        b_dq *= scale
        b_dk *= -b_beta[:, None]
        if GATED:
            b_dk *= tl.load(p_table + FROM_START * R + o_r)[:, None]
            b_read += tl.sum(b_dk * k_rows, axis=1)
            b_dq *= tl.load(p_table + TOKEN_FROM_START * R + o_c)[None, :]
            q_columns = load_tile_t(p_q, o_qrows, m_c, i_k * BK, K, BK).to(tl.float32)
            b_asked += tl.sum(q_columns * b_dq, axis=0)
        b_dq = dot_add(tl.trans(b_kh), b_at, b_dq, PRECISION)
        store_tile_t(p_dq, o_c * HV * K, m_c, i_k * BK, b_dq, K, BK)

        # What the rows write: into the next chunk's state, into later rows, into outputs.
        write = b_dk
        if GATED:
            write = tl.zeros((R, BK), tl.float32)
        for i in range(num_v):
            if num_v > 1:
                o_vi = i * BV + o_v
                b_u = load_tile(p_u, o_vrows, m_r, i * BV, V, BV)
                b_ds = load_tile(dstates + i_ch * K * V, o_vi * K, o_vi < V, i_k * BK, K, BK)
            write = dot_add(b_u, b_ds, write, PRECISION)
        if GATED:
            write *= tl.load(p_table + TO_END * R + o_r)[:, None]
            b_written += tl.sum(write * k_rows, axis=1)
            write += b_dk
        b_dk = dot_add(b_p, b_kh, write, PRECISION)
        b_dk = dot_add(b_pt, b_kh, b_dk, PRECISION)
        b_dk = dot_add(b_at, b_q, b_dk, PRECISION)
        store_tile(p_dk, o_r * HV * K, m_r, i_k * BK, b_dk, K, BK)

    if GATED:
        at_or_after = token[None, :] >= o_c[:, None]
        b_dg += tl.sum(tl.where(at_or_after, b_read[None, :], b_written[None, :]), axis=1)
        at_or_after = o_c[None, :] >= o_c[:, None]
        b_dg += tl.sum(tl.where(at_or_after, b_asked[None, :], 0.0), axis=1)
        b_dg += tl.load(p_table + FROM_START * R + R - 1) * tl.sum(b_kept, axis=0)
        p_dg = dg + first_row * HV + i_h + o_c * HV
        tl.store(p_dg, b_dg.to(dg.dtype.element_ty), mask=m_c)
    if num_v > 1:
        # D has been read for the last time by every thread: what is there becomes dV.
        tl.debug_barrier()
        for i in range(num_v):
            d_rows = load_tile(p_dv, o_vrows, m_r, i * BV, V, BV).to(tl.float32)
            store_tile(p_dv, o_vrows, m_r, i * BV, d_rows * b_beta[:, None], V, BV)
