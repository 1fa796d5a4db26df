"""The carry of segments for Hopper's tensor cores (compute capability 9.0), in Gluon.

The same algorithm as in `carry.py`. All that a chunk needs is copied while the ones before are
computed, into a ring of places in shared memory, and so a chunk needs but one barrier.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from householder.ops._gluon import barrier, copy_tile, product_layout, row_layout
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
)
from householder.ops.delta_product.triton.hopper_tiles import (
    add,
    buffers,
    copy_triangle_and_table,
    pick,
    tile_rows,
)


@gluon.jit
def line_buffers(NUMBER: gl.constexpr, SIZE: gl.constexpr):
    """Allocate shared memory for coefficients."""
    return gl.allocate_shared_memory(
        gl.float32, [NUMBER, SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )


@gluon.jit
def locate(
    i_s, T, bounds, first_chunk, sequence, first_segment, C: gl.constexpr, PACKED: gl.constexpr,
    SEGMENT: gl.constexpr,
):  # fmt: skip
    """Return a segment's sequence, place in it, their number, batch row, tokens and first chunk."""
    tokens: gl.constexpr = SEGMENT * C
    if PACKED:
        i_seq = gl.load(sequence + i_s).to(gl.int64)
        first = gl.load(first_segment + i_seq)
        index = (i_s - first).to(gl.int32)
        count = gl.load(first_segment + i_seq + 1) - first
        batch = gl.to_tensor(0).to(gl.int64)
        start = gl.load(bounds + i_s)
        length = gl.load(bounds + i_s + 1) - start
        chunk = gl.load(first_chunk + i_s).to(gl.int64)
    else:
        count = (gl.to_tensor(T) + (tokens - 1)) // tokens
        i_seq = i_s // count
        index = (i_s % count).to(gl.int32)
        batch = i_seq
        start = index * tokens
        length = gl.minimum(T - start, tokens)
        chunk = i_seq * ((gl.to_tensor(T) + (C - 1)) // C) + index * SEGMENT
    return i_seq, index, count, batch, start.to(gl.int64), length, chunk


@gluon.jit
def chunk_bounds(
    table, growth, chunk, num_chunks, i_h, HV: gl.constexpr, R: gl.constexpr, BLOCK: gl.constexpr
):
    """Return the logarithms of the bounds on the maps through a segment's chunks, `[BLOCK]`."""
    o_i = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    m_i = o_i < num_chunks
    i_ch = (chunk + o_i) * HV + i_h
    p_last = table + i_ch * (6 * R) + R - 1
    log = gl.load(p_last + LOG_HIGH * R, mask=m_i, other=0.0)
    log += gl.load(p_last + LOG_LOW * R, mask=m_i, other=0.0)
    log += gl.load(growth + i_ch, mask=m_i, other=0.0)
    return o_i, gl.maximum(log, LEAST_PART)


@gluon.jit
def copy_tokens(
    i, stage, length, chunk, i_h, i_v, p_k, p_v, ut, table, s_k, s_t, s_v, s_g,
    HV: gl.constexpr, k_t: gl.constexpr, k_n: gl.constexpr, v_t: gl.constexpr, v_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Start to copy keys, values, T and coefficients of chunk `i`, nothing past the end."""
    warps: gl.constexpr = gl.num_warps()
    load_k: gl.constexpr = row_layout(BK, 8, warps)
    load_v: gl.constexpr = row_layout(BV, 8, warps)
    n = gl.minimum(length - i * C, C) * N
    start = i.to(gl.int64) * C
    i_ch = (chunk + i) * HV + i_h
    k_rows, o_krows = tile_rows(R, N, k_t, k_n, load_k)
    copy_tile(s_k.index(stage), p_k + start * k_t, k_rows, o_krows, n, 0, K, BK, load_k)
    v_rows, o_vrows = tile_rows(R, N, v_t, v_n, load_v)
    n_v = gl.where(i_v < V, n, 0)  # beside V are the map's columns
    copy_tile(s_v.index(stage), p_v + start * v_t, v_rows, o_vrows, n_v, i_v, V, BV, load_v)
    copy_triangle_and_table(stage, i_ch, n > 0, ut, table, s_t, s_g, s_g, N, C, R, R, GATED, False)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=SIZES)
def carry_kernel(
    k, v, table, ut, growth, initial, starts, maps, visible,
    bounds, first_chunk, sequence, first_segment, T, k_b, k_h, v_b, v_h,
    HV: gl.constexpr, k_t: gl.constexpr, k_n: gl.constexpr, v_t: gl.constexpr, v_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BC: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, PACKED: gl.constexpr,
    PRECISION: gl.constexpr, SEGMENT: gl.constexpr, BS: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Find Δ, kept with the next segment's start, and Φ of one segment and head."""
    warps: gl.constexpr = gl.num_warps()
    half: gl.constexpr = gl.bfloat16
    by_row: gl.constexpr = product_layout(BV, R, warps)
    by_key: gl.constexpr = product_layout(BV, BK, warps)
    from_state: gl.constexpr = gl.DotOperandLayout(0, by_row, 2)
    of_row: gl.constexpr = gl.SliceLayout(0, by_row)
    num_blocks: gl.constexpr = (V + K + BV - 1) // BV
    tokens: gl.constexpr = SEGMENT * C

    i_v = (gl.program_id(0) % num_blocks) * BV
    i_sh = (gl.program_id(0) // num_blocks).to(gl.int64)
    i_h = i_sh % HV
    i_seq, index, count, batch, start, length, chunk = locate(
        i_sh // HV, T, bounds, first_chunk, sequence, first_segment, C, PACKED, SEGMENT
    )
    if index + 1 >= count:
        return
    if (index == 0) & (i_v >= V):
        return
    num_chunks = (length + (C - 1)) // C

    begin = gl.to_tensor(0)
    if GATED:
        o_i, log = chunk_bounds(table, growth, chunk, num_chunks, i_h, HV, R, BS)
        from_here = gl.sum(log, axis=0) - (gl.associative_scan(log, 0, add) - log)
        last = gl.max(gl.where((o_i < num_chunks) & (from_here < NOTHING), o_i, -1), axis=0)
        seen = gl.where(last < 0, 1.0, 0.0)  # what lies before `begin`
        begin = gl.where((last >= 0) & (i_v >= V), num_chunks, gl.maximum(last, 0))

    p_k = k + batch * k_b + start * k_t + (i_h // GROUP) * k_h
    p_v = v + batch * v_b + start * v_t + i_h * v_h
    s_k = buffers(STAGES, R, BK)
    s_t = buffers(STAGES, R, R)
    s_v = buffers(STAGES, R, BV)
    s_g = line_buffers(STAGES, 8 * R if GATED else R)
    for i in gl.static_range(STAGES - 1):
        copy_tokens(
            begin + i, i, length, chunk, i_h, i_v, p_k, p_v, ut, table, s_k, s_t, s_v, s_g,
            HV, k_t, k_n, v_t, v_n, N, K, V, C, R, BK, BV, GATED,
        )  # fmt: skip

    # The state, transposed, beside the map.
    sv = i_v + gl.arange(0, BV, layout=gl.SliceLayout(1, by_key))
    sk = gl.arange(0, BK, layout=gl.SliceLayout(0, by_key))
    m_k = sk[None, :] < K
    o_state = sk[None, :] * V + sv[:, None]
    b_s = gl.where(sv[:, None] == V + sk[None, :], 1.0, 0.0)
    if initial is not None:
        m_state = (sv < gl.where(index == 0, V, 0))[:, None] & m_k
        p_initial = initial + (i_seq * HV + i_h) * K * V
        b_s += gl.load(p_initial + o_state, mask=m_state, other=0.0).to(gl.float32)
    if GATED:
        b_s *= seen

    for i in range(begin, num_chunks):
        stage = (i - begin) % STAGES
        b_k = s_k.index(stage)
        b_g = s_g.index(stage)
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()
        b_sa = gl.convert_layout(b_s.to(half), from_state)
        recalled = gl.zeros([BV, R], gl.float32, layout=by_row)
        recalled = warpgroup_mma(b_sa, b_k.permute([1, 0]), recalled, use_acc=False, is_async=True)
        copy_tokens(
            i + (STAGES - 1), (i - begin + (STAGES - 1)) % STAGES, length, chunk, i_h, i_v,
            p_k, p_v, ut, table, s_k, s_t, s_v, s_g,
            HV, k_t, k_n, v_t, v_n, N, K, V, C, R, BK, BV, GATED,
        )  # fmt: skip
        b_v = s_v.index(stage).permute([1, 0]).load(by_row)
        b_beta = pick(b_g, BETA, R, R, of_row)
        if GATED:
            from_start = pick(b_g, FROM_START, R, R, of_row)

        recalled = warpgroup_mma_wait(0, [recalled])
        if GATED:
            recalled *= from_start[None, :]
        b_y = ((b_v.to(gl.float32) - recalled) * b_beta[None, :]).to(half)
        b_u = gl.zeros([BV, R], gl.float32, layout=by_row)
        b_u = warpgroup_mma(
            gl.convert_layout(b_y, from_state), s_t.index(stage).permute([1, 0]), b_u,
            use_acc=False, is_async=True,
        )  # fmt: skip
        if GATED:
            # The chunk's last row has the decay of the whole chunk.
            b_s *= b_g.slice(FROM_START * R + R - 1, 1).load(gl.SliceLayout(0, by_key))[None, :]
            to_end = pick(b_g, TO_END, R, R, of_row)
        b_u = warpgroup_mma_wait(0, [b_u])
        if GATED:
            b_u *= to_end[None, :]
        b_s = warpgroup_mma(gl.convert_layout(b_u.to(half), from_state), b_k, b_s, is_async=True)
        b_s = warpgroup_mma_wait(0, [b_s])

    async_copy.wait_group(0)
    if i_v < V:
        m_state = (sv < V)[:, None] & m_k
        gl.store(starts + (i_sh + HV) * K * V + o_state, b_s, mask=m_state)
    if index > 0:
        slot = (batch * (T // tokens) + start // tokens) * HV + i_h
        m_map = ((sv >= V) & (sv < V + K))[:, None] & m_k
        gl.store(maps + slot * K * K + (sv - V)[:, None] * K + sk[None, :], b_s, mask=m_map)
        if GATED:
            gl.store(visible + slot, seen, mask=i_v == 0)


@gluon.jit
def copy_back(
    i, stage, length, chunk, i_h, i_v, p_do, p_q, p_k, ut, table, s_do, s_q, s_k, s_t, s_g, s_l,
    HV: gl.constexpr, do_t: gl.constexpr, q_t: gl.constexpr, k_t: gl.constexpr, k_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BC: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Start to copy dO, queries, keys, T and coefficients of chunk `i`, if there is one."""
    warps: gl.constexpr = gl.num_warps()
    load_k: gl.constexpr = row_layout(BK, 8, warps)
    load_v: gl.constexpr = row_layout(BV, 8, warps)
    n = gl.where(i >= 0, gl.minimum(length - i * C, C), 0)
    start = i.to(gl.int64) * C
    i_ch = (chunk + i) * HV + i_h
    k_rows, o_krows = tile_rows(R, N, k_t, k_n, load_k)
    copy_tile(s_k.index(stage), p_k + start * k_t, k_rows, o_krows, n * N, 0, K, BK, load_k)
    q_rows, o_qrows = tile_rows(BC, 1, q_t, 0, load_k)
    copy_tile(s_q.index(stage), p_q + start * q_t, q_rows, o_qrows, n, 0, K, BK, load_k)
    d_rows, o_drows = tile_rows(BC, 1, do_t, 0, load_v)
    copy_tile(s_do.index(stage), p_do + start * do_t, d_rows, o_drows, n, i_v, V, BV, load_v)
    copy_triangle_and_table(stage, i_ch, n > 0, ut, table, s_t, s_g, s_l, N, C, R, BC, GATED, GATED)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=SIZES)
def carry_back_kernel(
    do, q, k, table, ut, growth, dfinal, dends,
    bounds, first_chunk, sequence, first_segment, scale, T, do_b, do_h, q_b, q_h, k_b, k_h,
    HV: gl.constexpr, do_t: gl.constexpr, q_t: gl.constexpr, k_t: gl.constexpr, k_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BC: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, PACKED: gl.constexpr,
    PRECISION: gl.constexpr, SEGMENT: gl.constexpr, BS: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Find columns `[BV]` of one segment's and head's Δ', kept with the end before it.

    Everything is held without the factor `scale`, which the gradient has as a whole.
    """
    warps: gl.constexpr = gl.num_warps()
    half: gl.constexpr = gl.bfloat16
    by_row: gl.constexpr = product_layout(BV, R, warps)
    by_key: gl.constexpr = product_layout(BV, BK, warps)
    by_pair: gl.constexpr = product_layout(R, BC, warps)
    by_token: gl.constexpr = product_layout(BV, BC, warps)
    from_state: gl.constexpr = gl.DotOperandLayout(0, by_row, 2)
    of_row: gl.constexpr = gl.SliceLayout(0, by_row)
    num_v: gl.constexpr = (V + BV - 1) // BV

    i_v = (gl.program_id(0) % num_v) * BV
    i_sh = (gl.program_id(0) // num_v).to(gl.int64)
    i_h = i_sh % HV
    i_seq, index, count, batch, start, length, chunk = locate(
        i_sh // HV, T, bounds, first_chunk, sequence, first_segment, C, PACKED, SEGMENT
    )
    if (index == 0) | (index >= count):
        return
    num_chunks = (length + (C - 1)) // C

    end = num_chunks
    if GATED:
        o_i, log = chunk_bounds(table, growth, chunk, num_chunks, i_h, HV, R, BS)
        up_to_here = gl.associative_scan(log, 0, add)
        far: gl.constexpr = 2 * BS
        hidden = (o_i < num_chunks) & (up_to_here < NOTHING)
        end = gl.min(gl.where(hidden, o_i + 1, far), axis=0)
        seen = gl.where(end < far, 0.0, 1.0)  # what lies behind `end`
        end = gl.minimum(end, num_chunks)

    p_q = q + batch * q_b + start * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + start * k_t + (i_h // GROUP) * k_h
    p_do = do + batch * do_b + start * do_t + i_h * do_h
    s_k = buffers(STAGES, R, BK)
    s_q = buffers(STAGES, BC, BK)
    s_do = buffers(STAGES, BC, BV)
    s_t = buffers(STAGES, R, R)
    s_a = buffers(1, R, BC).index(0)
    s_g = line_buffers(STAGES, 8 * R if GATED else R)
    s_l = s_g
    if GATED:
        s_l = line_buffers(STAGES, 2 * BC)
    for i in gl.static_range(STAGES - 1):
        copy_back(
            end - 1 - i, i, length, chunk, i_h, i_v, p_do, p_q, p_k, ut, table,
            s_do, s_q, s_k, s_t, s_g, s_l,
            HV, do_t, q_t, k_t, k_n, N, K, V, C, R, BC, BK, BV, GATED,
        )  # fmt: skip

    sv = i_v + gl.arange(0, BV, layout=gl.SliceLayout(1, by_key))
    sk = gl.arange(0, BK, layout=gl.SliceLayout(0, by_key))
    o_state = sk[None, :] * V + sv[:, None]
    b_ds = gl.zeros([BV, BK], gl.float32, layout=by_key)
    if dfinal is not None:
        m_final = (sv < gl.where(index + 1 == count, V, 0))[:, None] & (sk < K)[None, :]
        p_final = dfinal + (i_seq * HV + i_h) * K * V
        b_ds += gl.load(p_final + o_state, mask=m_final, other=0.0).to(gl.float32) / scale
    if GATED:
        b_ds *= seen

    a_row = gl.arange(0, R, layout=gl.SliceLayout(1, by_pair))
    a_token = gl.arange(0, BC, layout=gl.SliceLayout(0, by_pair))
    allowed = (a_row // N)[:, None] <= a_token[None, :]

    for step in range(end):
        stage = step % STAGES
        b_k, b_q, b_g = s_k.index(stage), s_q.index(stage), s_g.index(stage)
        b_do = s_do.index(stage).permute([1, 0])
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()
        b_a = gl.zeros([R, BC], gl.float32, layout=by_pair)
        b_a = warpgroup_mma(b_k, b_q.permute([1, 0]), b_a, use_acc=False, is_async=True)
        b_du = gl.zeros([BV, R], gl.float32, layout=by_row)
        b_dsa = gl.convert_layout(b_ds.to(half), from_state)
        b_du = warpgroup_mma(b_dsa, b_k.permute([1, 0]), b_du, use_acc=False, is_async=True)
        if GATED:
            # Nothing of this chunk is in the state yet: all that is decays.
            b_ds *= b_g.slice(FROM_START * R + R - 1, 1).load(gl.SliceLayout(0, by_key))[None, :]
            b_doq = b_do.load(by_token).to(gl.float32)
            b_doq *= pick(b_g, TOKEN_FROM_START, R, BC, gl.SliceLayout(0, by_token))[None, :]
            b_doq = gl.convert_layout(b_doq.to(half), gl.DotOperandLayout(0, by_key, 2))
            b_ds = warpgroup_mma(b_doq, b_q, b_ds, is_async=True)
        else:
            b_ds = warpgroup_mma(b_do, b_q, b_ds, is_async=True)
        copy_back(
            end - step - STAGES, (step + (STAGES - 1)) % STAGES, length, chunk, i_h, i_v,
            p_do, p_q, p_k, ut, table, s_do, s_q, s_k, s_t, s_g, s_l,
            HV, do_t, q_t, k_t, k_n, N, K, V, C, R, BC, BK, BV, GATED,
        )  # fmt: skip

        b_a = warpgroup_mma_wait(2, [b_a])
        if GATED:
            query = s_l.index(stage)
            decay = query.slice(0, BC).load(gl.SliceLayout(0, by_pair))[None, :]
            decay -= pick(b_g, LOG_HIGH, R, R, gl.SliceLayout(1, by_pair))[:, None]
            rest = query.slice(BC, BC).load(gl.SliceLayout(0, by_pair))[None, :]
            rest -= pick(b_g, LOG_LOW, R, R, gl.SliceLayout(1, by_pair))[:, None]
            decay += rest
            b_a *= gl.exp(gl.where(allowed, decay, -float("inf")))
        b_a = gl.where(allowed, b_a, 0.0)
        s_a.store(b_a.to(half))
        fence_async_shared()
        barrier()
        b_du = warpgroup_mma_wait(1, [b_du])
        if GATED:
            b_du *= pick(b_g, TO_END, R, R, of_row)[None, :]
        b_du = warpgroup_mma(b_do, s_a.permute([1, 0]), b_du, is_async=True)
        b_du = warpgroup_mma_wait(0, [b_du])
        b_d = gl.zeros([BV, R], gl.float32, layout=by_row)
        b_d = warpgroup_mma(
            gl.convert_layout(b_du.to(half), from_state), s_t.index(stage), b_d, use_acc=False,
            is_async=True,
        )  # fmt: skip
        b_beta = pick(b_g, BETA, R, R, of_row)
        if GATED:
            b_beta *= pick(b_g, FROM_START, R, R, of_row)
        b_d, b_ds = warpgroup_mma_wait(0, [b_d, b_ds])
        b_d = (b_d * (-b_beta)[None, :]).to(half)
        b_ds = warpgroup_mma(gl.convert_layout(b_d, from_state), b_k, b_ds, is_async=True)
        b_ds = warpgroup_mma_wait(0, [b_ds])

    async_copy.wait_group(0)
    m_state = (sv < V)[:, None] & (sk < K)[None, :]
    gl.store(dends + (i_sh - HV) * K * V + o_state, b_ds * scale, mask=m_state)
