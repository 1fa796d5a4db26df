"""The carry of segments for Hopper's tensor cores (compute capability 9.0), in Gluon.

The same algorithm as `segments.carry_kernel`. All tiles of a chunk are copied while the one before
is computed, into the other of two places each, and so a chunk needs but one barrier.
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

# Renamed after Triton 3.6.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.constexpr_function
def row_layout(columns, vector, warps):
    """Return how `warps` warps load rows of `columns` elements, `vector` of them a thread."""
    across = min(32, columns // vector)
    return gl.BlockedLayout([1, vector], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def product_layout(rows, columns, warps):
    """Return the layout of a product, 16 rows a warp; warps to spare share its columns."""
    down = min(warps, rows // 16)
    across = warps // down
    return gl.NVMMADistributedLayout([3, 0], [down, across], [16, columns // across, 16])


@gluon.jit
def tile_rows(R: gl.constexpr, N: gl.constexpr, stride_t, stride_n, layout: gl.constexpr):
    """Return the numbers of a tile's rows and their offsets."""
    o_r = gl.arange(0, R, layout=gl.SliceLayout(1, layout))
    if N == 1:
        return o_r, o_r * stride_t
    else:
        return o_r, (o_r // N) * stride_t + (o_r % N) * stride_n


@gluon.jit
def copy_tile(
    to, pointer, rows, offsets, n, start, D: gl.constexpr, BLOCK: gl.constexpr,
    layout: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Start to copy columns `start …` of the first `n` rows into shared memory; others get zero."""
    o_d = start + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    mask = (rows < n)[:, None]
    if MASKED:
        mask = mask & (o_d < D)[None, :]
    async_load(to, pointer + offsets[:, None] + o_d[None, :], mask=mask)


@gluon.jit
def pick(table, row: gl.constexpr, R: gl.constexpr, layout: gl.constexpr):
    """Load one row of a chunk's table of coefficients."""
    return gl.load(table + row * R + gl.arange(0, R, layout=layout))


@gluon.jit
def add(a, b):
    """Return the sum, for a scan."""
    return a + b


@gluon.jit
def carry_kernel(
    k, v, table, ut, growth, initial, starts, maps, visible,
    bounds, first_chunk, sequence, first_segment, T, k_b, k_h, v_b, v_h,
    HV: gl.constexpr, k_t: gl.constexpr, k_n: gl.constexpr, v_t: gl.constexpr, v_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BC: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, PACKED: gl.constexpr,
    PRECISION: gl.constexpr, SEGMENT: gl.constexpr, BS: gl.constexpr, UT: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr,
):  # fmt: skip
    """Find Δ, kept with the next segment's start, and Φ of one segment and head."""
    BETA: gl.constexpr = 0
    LOG_HIGH: gl.constexpr = 1
    LOG_LOW: gl.constexpr = 2
    FROM_START: gl.constexpr = 3
    TO_END: gl.constexpr = 4
    warps: gl.constexpr = gl.num_warps()
    width: gl.constexpr = 6 * R if GATED else R
    half: gl.constexpr = gl.bfloat16
    by_row: gl.constexpr = product_layout(BV, R, warps)
    by_key: gl.constexpr = product_layout(BV, BK, warps)
    from_state: gl.constexpr = gl.DotOperandLayout(0, by_row, 2)
    load_k: gl.constexpr = row_layout(BK, 8, warps)
    load_r: gl.constexpr = row_layout(R, 8, warps)
    load_v: gl.constexpr = row_layout(BV, 8, warps)
    of_row: gl.constexpr = gl.SliceLayout(0, by_row)
    num_blocks: gl.constexpr = (V + K + BV - 1) // BV
    tokens: gl.constexpr = SEGMENT * C

    i_v = (gl.program_id(0) % num_blocks) * BV
    i_sh = (gl.program_id(0) // num_blocks).to(gl.int64)
    i_s = i_sh // HV
    i_h = i_sh % HV
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
        count = (gl.to_tensor(T) + tokens - 1) // tokens
        i_seq = i_s // count
        index = (i_s % count).to(gl.int32)
        batch = i_seq
        start = index * tokens
        length = gl.minimum(T - start, tokens)
        chunk = i_seq * ((gl.to_tensor(T) + C - 1) // C) + index * SEGMENT
    if index + 1 >= count:
        return
    if (index == 0) & (i_v >= V):
        return
    first_token = start.to(gl.int64)
    num_chunks = (length + C - 1) // C

    begin = gl.to_tensor(0)
    if GATED:
        vector: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
        o_i = gl.arange(0, BS, layout=vector)
        m_i = o_i < num_chunks
        i_ch = (chunk + o_i) * HV + i_h
        p_last = table + i_ch * width + R - 1
        log = gl.load(p_last + LOG_HIGH * R, mask=m_i, other=0.0)
        log += gl.load(p_last + LOG_LOW * R, mask=m_i, other=0.0)
        log += gl.load(growth + i_ch, mask=m_i, other=0.0)
        log = gl.maximum(log, -256.0)
        from_here = gl.sum(log, axis=0) - (gl.associative_scan(log, 0, add) - log)
        last = gl.max(gl.where(m_i & (from_here < -104.0), o_i, -1), axis=0)
        seen = gl.where(last < 0, 1.0, 0.0)  # what lies before `begin`
        begin = gl.where((last >= 0) & (i_v >= V), num_chunks, gl.maximum(last, 0))

    p_k = k + batch * k_b + first_token * k_t + (i_h // GROUP) * k_h
    p_v = v + batch * v_b + first_token * v_t + i_h * v_h

    s_k = gl.allocate_shared_memory(
        half, [2, R, BK], gl.NVMMASharedLayout.get_default_for([R, BK], half)
    )
    s_t = gl.allocate_shared_memory(
        half, [2, R, R], gl.NVMMASharedLayout.get_default_for([R, R], half)
    )
    s_v = gl.allocate_shared_memory(
        half, [2, R, BV], gl.NVMMASharedLayout.get_default_for([R, BV], half)
    )
    k_rows, o_krows = tile_rows(R, N, k_t, k_n, load_k)
    v_rows, o_vrows = tile_rows(R, N, v_t, v_n, load_v)
    t_rows, o_trows = tile_rows(R, 1, R, 0, load_r)

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

    n = gl.minimum(length - begin * C, C) * N
    at = begin.to(gl.int64) * C
    i_ch = (chunk + begin) * HV + i_h
    copy_tile(s_k.index(0), p_k + at * k_t, k_rows, o_krows, n, 0, K, BK, load_k, K % BK != 0)
    copy_tile(
        s_t.index(0), ut + i_ch * UT, t_rows, o_trows, gl.where(n > 0, R, 0), 0, R, R, load_r, False
    )
    copy_tile(s_v.index(0), p_v + at * v_t, v_rows, o_vrows, n, i_v, V, BV, load_v, True)
    async_copy.commit_group()
    p_table = table + i_ch * width
    o_row = gl.arange(0, R, layout=of_row)
    b_beta = gl.load(p_table + BETA * R + o_row, mask=o_row < n, other=0.0)

    for i in range(begin, num_chunks):
        place = (i - begin) % 2
        after = (i * C + C).to(gl.int64)
        n_after = gl.minimum(length - (i + 1) * C, C) * N  # none or fewer past the last chunk
        i_ch = (chunk + i) * HV + i_h
        p_table = table + i_ch * width
        b_k = s_k.index(place)

        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        b_sa = gl.convert_layout(b_s.to(half), from_state)
        recalled = gl.zeros([BV, R], gl.float32, layout=by_row)
        recalled = warpgroup_mma(b_sa, b_k.permute([1, 0]), recalled, use_acc=False, is_async=True)

        copy_tile(
            s_k.index(1 - place), p_k + after * k_t, k_rows, o_krows, n_after, 0, K, BK, load_k,
            K % BK != 0,
        )  # fmt: skip
        left = gl.where(n_after > 0, R, 0)
        copy_tile(
            s_t.index(1 - place), ut + (i_ch + HV) * UT, t_rows, o_trows, left, 0, R, R, load_r,
            False,
        )  # fmt: skip
        copy_tile(
            s_v.index(1 - place), p_v + after * v_t, v_rows, o_vrows, n_after, i_v, V, BV, load_v,
            True,
        )  # fmt: skip
        async_copy.commit_group()
        beta_after = gl.load(
            p_table + HV * width + BETA * R + o_row, mask=o_row < n_after, other=0.0
        )
        b_v = s_v.index(place).permute([1, 0]).load(by_row).to(gl.float32)

        recalled = warpgroup_mma_wait(0, [recalled])
        if GATED:
            recalled *= pick(p_table, FROM_START, R, of_row)[None, :]
        b_y = ((b_v - recalled) * b_beta[None, :]).to(half)
        b_u = gl.zeros([BV, R], gl.float32, layout=by_row)
        b_u = warpgroup_mma(
            gl.convert_layout(b_y, from_state), s_t.index(place).permute([1, 0]), b_u,
            use_acc=False, is_async=True,
        )  # fmt: skip
        if GATED:
            b_s *= gl.load(p_table + FROM_START * R + R - 1)
            to_end = pick(p_table, TO_END, R, of_row)[None, :]
        b_u = warpgroup_mma_wait(0, [b_u])
        if GATED:
            b_u *= to_end
        b_s = warpgroup_mma(gl.convert_layout(b_u.to(half), from_state), b_k, b_s, is_async=True)
        b_s = warpgroup_mma_wait(0, [b_s])
        b_beta = beta_after

    async_copy.wait_group(0)
    if i_v < V:
        m_state = (sv < V)[:, None] & m_k
        gl.store(starts + (i_sh + HV) * K * V + o_state, b_s, mask=m_state)
    if index > 0:
        slot = (batch * (T // tokens) + first_token // tokens) * HV + i_h
        m_map = ((sv >= V) & (sv < V + K))[:, None] & m_k
        gl.store(maps + slot * K * K + (sv - V)[:, None] * K + sk[None, :], b_s, mask=m_map)
        if GATED:
            gl.store(visible + slot, seen, mask=i_v == 0)


@gluon.jit
def carry_back_kernel(
    do, q, k, table, ut, growth, dfinal, dends,
    bounds, first_chunk, sequence, first_segment, scale, T, do_b, do_h, q_b, q_h, k_b, k_h,
    HV: gl.constexpr, do_t: gl.constexpr, q_t: gl.constexpr, k_t: gl.constexpr, k_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BC: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, PACKED: gl.constexpr,
    PRECISION: gl.constexpr, SEGMENT: gl.constexpr, BS: gl.constexpr, UT: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr,
):  # fmt: skip
    """Find columns `[BV]` of one segment's and head's Δ', kept with the end before it.

    Everything is held without the factor `scale`, which the gradient has as a whole.
    """
    BETA: gl.constexpr = 0
    LOG_HIGH: gl.constexpr = 1
    LOG_LOW: gl.constexpr = 2
    FROM_START: gl.constexpr = 3
    TO_END: gl.constexpr = 4
    TOKEN_FROM_START: gl.constexpr = 5
    warps: gl.constexpr = gl.num_warps()
    width: gl.constexpr = 6 * R if GATED else R
    half: gl.constexpr = gl.bfloat16
    by_row: gl.constexpr = product_layout(BV, R, warps)
    by_key: gl.constexpr = product_layout(BV, BK, warps)
    by_pair: gl.constexpr = product_layout(R, BC, warps)
    by_token: gl.constexpr = product_layout(BV, BC, warps)
    from_state: gl.constexpr = gl.DotOperandLayout(0, by_row, 2)
    load_k: gl.constexpr = row_layout(BK, 8, warps)
    load_r: gl.constexpr = row_layout(R, 8, warps)
    load_v: gl.constexpr = row_layout(BV, 8, warps)
    of_row: gl.constexpr = gl.SliceLayout(0, by_row)
    num_v: gl.constexpr = (V + BV - 1) // BV
    tokens: gl.constexpr = SEGMENT * C

    i_v = (gl.program_id(0) % num_v) * BV
    i_sh = (gl.program_id(0) // num_v).to(gl.int64)
    i_s = i_sh // HV
    i_h = i_sh % HV
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
        count = (gl.to_tensor(T) + tokens - 1) // tokens
        i_seq = i_s // count
        index = (i_s % count).to(gl.int32)
        batch = i_seq
        start = index * tokens
        length = gl.minimum(T - start, tokens)
        chunk = i_seq * ((gl.to_tensor(T) + C - 1) // C) + index * SEGMENT
    if (index == 0) | (index >= count):
        return
    first_token = start.to(gl.int64)
    num_chunks = (length + C - 1) // C

    end = num_chunks
    if GATED:
        vector: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
        o_i = gl.arange(0, BS, layout=vector)
        m_i = o_i < num_chunks
        i_ch = (chunk + o_i) * HV + i_h
        p_last = table + i_ch * width + R - 1
        log = gl.load(p_last + LOG_HIGH * R, mask=m_i, other=0.0)
        log += gl.load(p_last + LOG_LOW * R, mask=m_i, other=0.0)
        log += gl.load(growth + i_ch, mask=m_i, other=0.0)
        up_to_here = gl.associative_scan(gl.maximum(log, -256.0), 0, add)
        far: gl.constexpr = 2 * BS
        end = gl.min(gl.where(m_i & (up_to_here < -104.0), o_i + 1, far), axis=0)
        visible = gl.where(end < far, 0.0, 1.0)  # what lies behind `end`
        end = gl.minimum(end, num_chunks)

    p_q = q + batch * q_b + first_token * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + first_token * k_t + (i_h // GROUP) * k_h
    p_do = do + batch * do_b + first_token * do_t + i_h * do_h

    s_k = gl.allocate_shared_memory(
        half, [2, R, BK], gl.NVMMASharedLayout.get_default_for([R, BK], half)
    )
    s_q = gl.allocate_shared_memory(
        half, [2, BC, BK], gl.NVMMASharedLayout.get_default_for([BC, BK], half)
    )
    s_do = gl.allocate_shared_memory(
        half, [2, BC, BV], gl.NVMMASharedLayout.get_default_for([BC, BV], half)
    )
    s_t = gl.allocate_shared_memory(
        half, [2, R, R], gl.NVMMASharedLayout.get_default_for([R, R], half)
    )
    s_a = gl.allocate_shared_memory(
        half, [R, BC], gl.NVMMASharedLayout.get_default_for([R, BC], half)
    )
    k_rows, o_krows = tile_rows(R, N, k_t, k_n, load_k)
    q_rows, o_qrows = tile_rows(BC, 1, q_t, 0, load_k)
    d_rows, o_drows = tile_rows(BC, 1, do_t, 0, load_v)
    t_rows, o_trows = tile_rows(R, 1, R, 0, load_r)

    sv = i_v + gl.arange(0, BV, layout=gl.SliceLayout(1, by_key))
    sk = gl.arange(0, BK, layout=gl.SliceLayout(0, by_key))
    o_state = sk[None, :] * V + sv[:, None]
    b_ds = gl.zeros([BV, BK], gl.float32, layout=by_key)
    if dfinal is not None:
        m_final = (sv < gl.where(index + 1 == count, V, 0))[:, None] & (sk < K)[None, :]
        p_final = dfinal + (i_seq * HV + i_h) * K * V
        b_ds += gl.load(p_final + o_state, mask=m_final, other=0.0).to(gl.float32) / scale
    if GATED:
        b_ds *= visible

    a_row = gl.arange(0, R, layout=gl.SliceLayout(1, by_pair))
    a_token = gl.arange(0, BC, layout=gl.SliceLayout(0, by_pair))
    seen = (a_row // N)[:, None] <= a_token[None, :]

    i = end - 1
    n = gl.minimum(length - i * C, C)
    at = i.to(gl.int64) * C
    i_ch = (chunk + i) * HV + i_h
    copy_tile(s_k.index(0), p_k + at * k_t, k_rows, o_krows, n * N, 0, K, BK, load_k, K % BK != 0)
    copy_tile(s_q.index(0), p_q + at * q_t, q_rows, o_qrows, n, 0, K, BK, load_k, K % BK != 0)
    copy_tile(s_do.index(0), p_do + at * do_t, d_rows, o_drows, n, i_v, V, BV, load_v, V % BV != 0)
    copy_tile(s_t.index(0), ut + i_ch * UT, t_rows, o_trows, R, 0, R, R, load_r, False)
    async_copy.commit_group()
    o_row = gl.arange(0, R, layout=of_row)
    b_beta = gl.load(table + i_ch * width + BETA * R + o_row)

    for step in range(end):
        place = step % 2
        i = end - 1 - step
        before = (i * C - C).to(gl.int64)
        n_before = gl.where(i > 0, C, 0)  # every chunk but the last is full
        i_ch = (chunk + i) * HV + i_h
        p_table = table + i_ch * width
        b_k = s_k.index(place)
        b_q = s_q.index(place)
        b_do = s_do.index(place).permute([1, 0])

        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        b_du = gl.zeros([BV, R], gl.float32, layout=by_row)
        b_dsa = gl.convert_layout(b_ds.to(half), from_state)
        b_a = gl.zeros([R, BC], gl.float32, layout=by_pair)
        b_a = warpgroup_mma(b_k, b_q.permute([1, 0]), b_a, use_acc=False, is_async=True)
        b_du = warpgroup_mma(b_dsa, b_k.permute([1, 0]), b_du, use_acc=False, is_async=True)
        if GATED:
            # The state's decay comes first: nothing of this chunk is in it yet.
            b_ds *= gl.load(p_table + FROM_START * R + R - 1)
            o_c = gl.arange(0, BC, layout=gl.SliceLayout(0, by_token))
            b_doq = b_do.load(by_token).to(gl.float32)
            b_doq *= gl.load(p_table + TOKEN_FROM_START * R + o_c)[None, :]
            b_doq = gl.convert_layout(b_doq.to(half), gl.DotOperandLayout(0, by_key, 2))
            b_ds = warpgroup_mma(b_doq, b_q, b_ds, is_async=True)
        else:
            b_ds = warpgroup_mma(b_do, b_q, b_ds, is_async=True)

        to = 1 - place
        copy_tile(
            s_k.index(to), p_k + before * k_t, k_rows, o_krows, n_before * N, 0, K, BK, load_k,
            K % BK != 0,
        )  # fmt: skip
        copy_tile(
            s_q.index(to), p_q + before * q_t, q_rows, o_qrows, n_before, 0, K, BK, load_k,
            K % BK != 0,
        )  # fmt: skip
        copy_tile(
            s_do.index(to), p_do + before * do_t, d_rows, o_drows, n_before, i_v, V, BV, load_v,
            V % BV != 0,
        )  # fmt: skip
        left = gl.where(i > 0, R, 0)
        copy_tile(
            s_t.index(to), ut + (i_ch - HV) * UT, t_rows, o_trows, left, 0, R, R, load_r, False
        )
        async_copy.commit_group()
        beta_before = gl.load(p_table - HV * width + BETA * R + o_row, mask=o_row < left, other=0.0)

        b_a = warpgroup_mma_wait(2, [b_a])
        if GATED:
            p_query = p_table + gl.minimum(a_token, C - 1) * N
            p_row = p_table + a_row
            high = gl.load(p_query + LOG_HIGH * R)[None, :] - gl.load(p_row + LOG_HIGH * R)[:, None]
            low = gl.load(p_query + LOG_LOW * R)[None, :] - gl.load(p_row + LOG_LOW * R)[:, None]
            b_a *= gl.exp(gl.where(seen, high + low, -float("inf")))
        b_a = gl.where(seen, b_a, 0.0)
        s_a.store(b_a.to(half))
        fence_async_shared()
        barrier()
        b_du = warpgroup_mma_wait(1, [b_du])
        if GATED:
            b_du *= pick(p_table, TO_END, R, of_row)[None, :]
        b_du = warpgroup_mma(b_do, s_a.permute([1, 0]), b_du, is_async=True)
        b_du = warpgroup_mma_wait(0, [b_du])
        b_d = gl.zeros([BV, R], gl.float32, layout=by_row)
        b_d = warpgroup_mma(
            gl.convert_layout(b_du.to(half), from_state), s_t.index(place), b_d, use_acc=False,
            is_async=True,
        )  # fmt: skip
        if GATED:
            b_beta *= pick(p_table, FROM_START, R, of_row)
        b_d, b_ds = warpgroup_mma_wait(0, [b_d, b_ds])
        b_d = (b_d * (-b_beta)[None, :]).to(half)
        b_ds = warpgroup_mma(gl.convert_layout(b_d, from_state), b_k, b_ds, is_async=True)
        b_ds = warpgroup_mma_wait(0, [b_ds])
        b_beta = beta_before

    async_copy.wait_group(0)
    m_state = (sv < V)[:, None] & (sk < K)[None, :]
    gl.store(dends + (i_sh - HV) * K * V + o_state, b_ds * scale, mask=m_state)
