"""The forward for Hopper's tensor cores (compute capability 9.0), in Gluon.

The same algorithm as in `forward.py`, with what plain Triton does not let one say. In the walk a
chunk's tiles are copied while the chunk before is computed, and products run while the threads
pack, mask and store what does not wait for them. The triangle is inverted by float16 joins alone,
the small ones inside warps, the large ones with only the blocks that are not zero: an error like
that of TF32 joins, below T's rounding to bfloat16 unless keys are nearly parallel and β near 2.
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

from householder.ops._gluon import (
    barrier,
    copy_tile,
    invert_blocks,
    join,
    product_layout,
    row_layout,
    store_rows,
)
from householder.ops.delta_product.triton.chunks import (
    BETA,
    FROM_START,
    LEAST_BETA,
    LOG_HIGH,
    LOG_LOW,
    LOG_STEPS,
    MIN_LOG_GATE,
    SIZES,
    TO_END,
    TOKEN_FROM_START,
)
from householder.ops.delta_product.triton.hopper_tiles import (
    add,
    buffers,
    copy_triangle_and_table,
    exp,
    locate_walk,
    pick,
    tile_rows,
)


@gluon.jit
def copy_chunk(
    i, stage, length, chunk, i_h, i_v, p_q, p_k, p_v, ut, table,
    s_q, s_k, s_v, s_t, s_g, s_l, HV: gl.constexpr, q_t: gl.constexpr,
    k_t: gl.constexpr, k_n: gl.constexpr, v_t: gl.constexpr, v_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BC: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Start to copy all that chunk `i` needs; past the sequence's end nothing is read."""
    warps: gl.constexpr = gl.num_warps()
    load_k: gl.constexpr = row_layout(BK, 8, warps)
    load_v: gl.constexpr = row_layout(BV, 8, warps)
    i = gl.to_tensor(i)
    n = gl.where(i >= 0, gl.minimum(length - i * C, C), 0)
    start = i.to(gl.int64) * C
    i_ch = (chunk + i) * HV + i_h
    k_rows, o_krows = tile_rows(R, N, k_t, k_n, load_k)
    copy_tile(s_k.index(stage), p_k + start * k_t, k_rows, o_krows, n * N, 0, K, BK, load_k)
    q_rows, o_qrows = tile_rows(BC, 1, q_t, 0, load_k)
    copy_tile(s_q.index(stage), p_q + start * q_t, q_rows, o_qrows, n, 0, K, BK, load_k)
    v_rows, o_vrows = tile_rows(R, N, v_t, v_n, load_v)
    copy_tile(s_v.index(stage), p_v + start * v_t, v_rows, o_vrows, n * N, i_v, V, BV, load_v)
    copy_triangle_and_table(stage, i_ch, n > 0, ut, table, s_t, s_g, s_l, N, C, R, BC, GATED, GATED)
    async_copy.commit_group()


@gluon.jit
def store_chunk(
    i, length, i_v, p_o, p_u, s_o, s_u, HV: gl.constexpr, N: gl.constexpr, V: gl.constexpr,
    C: gl.constexpr, R: gl.constexpr, BC: gl.constexpr, BV: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    """Store the outputs and writes of chunk `i`, if it is one, from shared memory."""
    load_v: gl.constexpr = row_layout(BV, 8, gl.num_warps())
    n = gl.where(i >= 0, gl.minimum(length - i * C, C), 0)
    p_rows = p_o + i.to(gl.int64) * (C * HV * V) + i_v
    store_rows(p_rows, s_o, n, HV * V, V - i_v, V, BC, BV, load_v)
    if SAVE:
        p_rows = p_u + i.to(gl.int64) * (C * N * HV * V) + i_v
        store_rows(p_rows, s_u, n * N, HV * V, V - i_v, V, R, BV, load_v)


@gluon.jit
def read_chunk(
    i, num_chunks, b_s, b_o, scale, length, chunk, i_h, i_v, p_q, p_k, p_v, p_o, p_u, ut,
    table, states, s_q, s_k, s_v, s_t, s_g, s_l, s_a, s_o, s_s, s_u, HV: gl.constexpr,
    q_t: gl.constexpr, k_t: gl.constexpr, k_n: gl.constexpr, v_t: gl.constexpr, v_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BC: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GATED: gl.constexpr,
    SAVE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Make Y, A and the state as operands of products with chunk `i`, from the state before it.

    A goes to shared memory. On the way, O of the chunk before is awaited and stored. Past the last
    chunk there is nothing but zeros to read.
    """
    warps: gl.constexpr = gl.num_warps()
    by_row: gl.constexpr = product_layout(BV, R, warps)
    by_pair: gl.constexpr = product_layout(R, BC, warps)
    by_key: gl.constexpr = product_layout(BV, BK, warps)
    from_state: gl.constexpr = gl.DotOperandLayout(0, by_row, 2)
    stage = i % STAGES
    b_k, b_q, b_g = s_k.index(stage), s_q.index(stage), s_g.index(stage)
    async_copy.wait_group(STAGES - 2)
    barrier()
    fence_async_shared()
    b_sh = b_s.to(gl.bfloat16)
    b_sa = gl.convert_layout(b_sh, from_state)
    recalled = gl.zeros([BV, R], gl.float32, layout=by_row)
    recalled = warpgroup_mma(b_sa, b_k.permute([1, 0]), recalled, use_acc=False, is_async=True)
    b_a = gl.zeros([R, BC], gl.float32, layout=by_pair)
    b_a = warpgroup_mma(b_k, b_q.permute([1, 0]), b_a, use_acc=False, is_async=True)
    if GATED:
        # The chunk's last row has the decay of the whole chunk.
        whole = b_g.slice(FROM_START * R + R - 1, 1).load(gl.SliceLayout(0, by_key))[None, :]
        b_s = b_s * gl.where(i < num_chunks, whole, 1.0)
    copy_chunk(
        i + STAGES - 1, (i + STAGES - 1) % STAGES, length, chunk, i_h, i_v,
        p_q, p_k, p_v, ut, table, s_q, s_k, s_v, s_t, s_g, s_l, HV, q_t, k_t, k_n, v_t, v_n,
        N, K, V, C, R, BC, BK, BV, GATED,
    )  # fmt: skip
    s_s.store(b_sh)

    # What the chunk before has left to store.
    b_o = warpgroup_mma_wait(2, [b_o])
    s_o.permute([1, 0]).store((b_o * scale).to(gl.bfloat16))
    barrier()
    store_chunk(i - 1, length, i_v, p_o, p_u, s_o, s_u, HV, N, V, C, R, BC, BV, SAVE)
    if SAVE:
        p_s = states + (((chunk + i) * HV + i_h) * V + i_v) * K
        rows = gl.where(i < num_chunks, V - i_v, 0)
        store_rows(p_s, s_s, rows, K, K, K, BV, BK, row_layout(BK, 8, warps))

    b_v = s_v.index(stage).permute([1, 0]).load(by_row).to(gl.float32)
    recalled = warpgroup_mma_wait(1, [recalled])
    if GATED:
        recalled *= pick(b_g, FROM_START, R, R, gl.SliceLayout(0, by_row))[None, :]
    b_beta = pick(b_g, BETA, R, R, gl.SliceLayout(0, by_row))
    b_ya = gl.convert_layout(((b_v - recalled) * b_beta[None, :]).to(gl.bfloat16), from_state)

    b_a = warpgroup_mma_wait(0, [b_a])
    a_row = gl.arange(0, R, layout=gl.SliceLayout(1, by_pair))
    a_token = gl.arange(0, BC, layout=gl.SliceLayout(0, by_pair))
    seen = (a_row // N)[:, None] <= a_token[None, :]
    if GATED:
        query = s_l.index(stage)
        log = query.slice(0, BC).load(gl.SliceLayout(0, by_pair))[None, :]
        log = log - pick(b_g, LOG_HIGH, R, R, gl.SliceLayout(1, by_pair))[:, None]
        rest = query.slice(BC, BC).load(gl.SliceLayout(0, by_pair))[None, :]
        rest = rest - pick(b_g, LOG_LOW, R, R, gl.SliceLayout(1, by_pair))[:, None]
        b_a *= exp(log + rest)
    s_a.store(gl.where(seen, b_a, 0.0).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    return b_ya, b_s


@gluon.jit(do_not_specialize=SIZES)
def walk_kernel(
    q, k, v, table, ut, initial, final, o, states, u, cu_seqlens, first_chunk, scale, T,
    q_b, q_h, k_b, k_h, v_b, v_h, HV: gl.constexpr, q_t: gl.constexpr,
    k_t: gl.constexpr, k_n: gl.constexpr, v_t: gl.constexpr, v_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BC: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, PACKED: gl.constexpr,
    PRECISION: gl.constexpr, SAVE: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    STAGES: gl.constexpr, SEGMENT: gl.constexpr = 0,
):  # fmt: skip
    """Carry columns `[BV]` of one sequence's and head's state through its chunks; write their O."""
    warps: gl.constexpr = gl.num_warps()
    size_g: gl.constexpr = 8 * R if GATED else R
    num_v: gl.constexpr = (V + BV - 1) // BV
    half: gl.constexpr = gl.bfloat16
    by_row: gl.constexpr = product_layout(BV, R, warps)
    by_token: gl.constexpr = product_layout(BV, BC, warps)
    by_key: gl.constexpr = product_layout(BV, BK, warps)
    from_state: gl.constexpr = gl.DotOperandLayout(0, by_row, 2)

    i_v = (gl.program_id(0) % num_v) * BV
    i_sh = (gl.program_id(0) // num_v).to(gl.int64)
    i_s = i_sh // HV
    i_h = i_sh % HV
    batch, first, length, chunk = locate_walk(
        i_s, gl.to_tensor(T), cu_seqlens, first_chunk, C, PACKED, SEGMENT
    )
    num_chunks = (length + C - 1) // C

    p_q = q + batch * q_b + first * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + first * k_t + (i_h // GROUP) * k_h
    p_v = v + batch * v_b + first * v_t + i_h * v_h
    p_o = o + ((batch * T + first) * HV + i_h) * V
    p_u = u + ((batch * T + first) * N * HV + i_h) * V

    s_k = buffers(STAGES, R, BK)
    s_q = buffers(STAGES, BC, BK)
    s_v = buffers(STAGES, R, BV)
    s_t = buffers(STAGES, R, R)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_g = gl.allocate_shared_memory(gl.float32, [STAGES, size_g], flat)
    s_l = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * BC], flat) if GATED else s_g
    s_a = buffers(1, R, BC).index(0)
    s_o = buffers(1, BC, BV).index(0)
    s_s = buffers(1, BV, BK).index(0)
    s_u = buffers(1, R, BV).index(0) if SAVE else s_a

    # The state, transposed.
    sv = i_v + gl.arange(0, BV, layout=gl.SliceLayout(1, by_key))
    sk = gl.arange(0, BK, layout=gl.SliceLayout(0, by_key))
    m_state = (sv < V)[:, None] & (sk < K)[None, :]
    o_state = i_sh * K * V + sk[None, :] * V + sv[:, None]
    b_s = gl.zeros([BV, BK], gl.float32, layout=by_key)
    if initial is not None:
        b_s += gl.load(initial + o_state, mask=m_state, other=0.0).to(gl.float32)
    # A chunk of zeros goes before the first: then the loop is all there is, and no product is under
    # way where it turns, which is what the compiler can follow.
    s_s.store(gl.zeros([BV, BK], half, layout=by_key))
    s_a.store(gl.zeros([R, BC], half, layout=product_layout(R, BC, warps)))
    b_ya = gl.convert_layout(gl.zeros([BV, R], half, layout=by_row), from_state)
    for i in gl.static_range(-1, STAGES - 1):
        copy_chunk(
            i, (i + STAGES) % STAGES, length, chunk, i_h, i_v, p_q, p_k, p_v, ut, table,
            s_q, s_k, s_v, s_t, s_g, s_l, HV, q_t, k_t, k_n, v_t, v_n,
            N, K, V, C, R, BC, BK, BV, GATED,
        )  # fmt: skip
    async_copy.wait_group(STAGES - 1)
    barrier()
    fence_async_shared()
    for i in range(-1, num_chunks):
        stage = (i + STAGES) % STAGES
        b_k, b_g = s_k.index(stage), s_g.index(stage)
        b_u = gl.zeros([BV, R], gl.float32, layout=by_row)
        b_t = s_t.index(stage).permute([1, 0])
        b_u = warpgroup_mma(b_ya, b_t, b_u, use_acc=False, is_async=True)
        b_out = gl.zeros([BV, BC], gl.float32, layout=by_token)
        b_q = s_q.index(stage).permute([1, 0])
        b_out = warpgroup_mma(s_s, b_q, b_out, use_acc=False, is_async=True)

        b_u = warpgroup_mma_wait(1, [b_u])
        b_uh = b_u.to(half)
        b_ua = gl.convert_layout(b_uh, from_state)
        b_uw = b_ua
        if GATED:
            to_end = pick(b_g, TO_END, R, R, gl.SliceLayout(0, by_row))
            b_uw = gl.convert_layout((b_u * to_end[None, :]).to(half), from_state)
        b_s = warpgroup_mma(b_uw, b_k, b_s, is_async=True)
        if GATED:
            b_out = warpgroup_mma_wait(1, [b_out])
            b_out *= pick(b_g, TOKEN_FROM_START, R, BC, gl.SliceLayout(0, by_token))[None, :]
        b_out = warpgroup_mma(b_ua, s_a, b_out, is_async=True)
        if SAVE:
            s_u.permute([1, 0]).store(b_uh)
        b_s = warpgroup_mma_wait(1, [b_s])
        b_ya, b_s = read_chunk(
            i + 1, num_chunks, b_s, b_out, scale, length, chunk, i_h, i_v,
            p_q, p_k, p_v, p_o, p_u, ut, table, states,
            s_q, s_k, s_v, s_t, s_g, s_l, s_a, s_o, s_s, s_u,
            HV, q_t, k_t, k_n, v_t, v_n, N, K, V, C, R, BC, BK, BV, GATED, SAVE, STAGES,
        )  # fmt: skip

    async_copy.wait_group(0)
    gl.store(final + o_state, b_s, mask=m_state)


@gluon.jit(do_not_specialize=SIZES)
def prepare_kernel(
    k, beta, g, table, ut, growth, cu_seqlens, chunk_sequence, first_chunk, T, HV,
    k_b, k_h, beta_b, beta_h, g_b, g_h, k_t: gl.constexpr, k_n: gl.constexpr,
    beta_t: gl.constexpr, beta_n: gl.constexpr, g_t: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, C: gl.constexpr, R: gl.constexpr, GROUP: gl.constexpr,
    GATED: gl.constexpr, PACKED: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Write T `[R, R]` and the table of coefficients of one chunk and value head.

    To `growth`, if there, goes the logarithm of a bound on the norm of the chunk's reflections.
    """
    warps: gl.constexpr = gl.num_warps()
    half: gl.constexpr = gl.bfloat16
    by_row: gl.constexpr = product_layout(R, R, warps)
    load_k: gl.constexpr = row_layout(BK, 8, warps)
    load_r: gl.constexpr = row_layout(R, 8, warps)
    line: gl.constexpr = gl.BlockedLayout([R // 32], [32], [warps], [0])
    down: gl.constexpr = gl.SliceLayout(1, by_row)
    across: gl.constexpr = gl.SliceLayout(0, by_row)
    B: gl.constexpr = R // 16

    # Heads run side by side: together they read whole rows of memory.
    i_chunk = (gl.program_id(0) // HV).to(gl.int64)
    i_h = (gl.program_id(0) % HV).to(gl.int64)
    if PACKED:
        i_s = gl.load(chunk_sequence + i_chunk)
        start = gl.load(cu_seqlens + i_s) + (i_chunk - gl.load(first_chunk + i_s)) * C
        n = gl.minimum(gl.load(cu_seqlens + i_s + 1) - start, C).to(gl.int32)
        batch = gl.to_tensor(0).to(gl.int64)
    else:
        per_row = (gl.to_tensor(T) + C - 1) // C
        start = (i_chunk % per_row) * C
        n = gl.minimum(T - start, C).to(gl.int32)
        batch = i_chunk // per_row
    if n > 0:
        p_k = k + batch * k_b + start * k_t + (i_h // GROUP) * k_h
        s_k = gl.allocate_shared_memory(
            half, [R, BK], gl.NVMMASharedLayout.get_default_for([R, BK], half)
        )
        k_rows, o_krows = tile_rows(R, N, k_t, k_n, load_k)
        copy_tile(s_k, p_k, k_rows, o_krows, n * N, 0, K, BK, load_k)
        async_copy.commit_group()

        # Coefficients, by every warp for itself.
        p_table = table + (i_chunk * HV + i_h) * (6 * R if GATED else R)
        o_r = gl.arange(0, R, layout=line)
        p_beta = beta + batch * beta_b + start * beta_t + i_h * beta_h
        o_beta = (o_r // N) * beta_t + (o_r % N) * beta_n
        b_beta = gl.load(p_beta + o_beta, mask=o_r < n * N, other=0.0).to(gl.float32)
        b_beta = gl.where(gl.abs(b_beta) < LEAST_BETA, LEAST_BETA, b_beta)
        gl.store(p_table + BETA * R + o_r, b_beta)
        row = gl.arange(0, R, layout=down)
        col = gl.arange(0, R, layout=across)
        if GATED:
            # A log gate counts in the first row of its token, in two parts: see `sum_log_gates`.
            p_g = g + batch * g_b + start * g_t + i_h * g_h
            first = (o_r < n * N) & (o_r % N == 0)
            log = gl.load(p_g + (o_r // N) * g_t, mask=first, other=0.0).to(gl.float32)
            log = gl.maximum(log, MIN_LOG_GATE)
            high = gl.floor(log * LOG_STEPS) / LOG_STEPS
            low = gl.associative_scan(log - high, 0, add)
            high = gl.associative_scan(high, 0, add)
            last = o_r == R - 1
            high_end = gl.sum(gl.where(last, high, 0.0), axis=0)
            low_end = gl.sum(gl.where(last, low, 0.0), axis=0)
            from_start = gl.exp(high + low)
            gl.store(p_table + LOG_HIGH * R + o_r, high)
            gl.store(p_table + LOG_LOW * R + o_r, low)
            gl.store(p_table + FROM_START * R + o_r, from_start)
            gl.store(p_table + TO_END * R + o_r, gl.exp((high_end - high) + (low_end - low)))
            p_token = p_table + TOKEN_FROM_START * R + o_r // N
            gl.store(p_token, from_start, mask=o_r % N == 0)
            if N > 1:
                # Where there are no tokens, numbers all the same: they are factors of zeros.
                p_token = p_table + TOKEN_FROM_START * R + o_r
                gl.store(p_token, gl.zeros_like(from_start), mask=o_r > (R - 1) // N)
            # For T, which is rounded to bfloat16, the sum of both parts is fine enough.
            log_down = gl.convert_layout(high + low, down)
            log_across = gl.convert_layout(high + low, across)
        b_beta = gl.convert_layout(b_beta, down)

        async_copy.wait_group(0)
        barrier()
        fence_async_shared()
        minus = gl.zeros([R, R], gl.float32, layout=by_row)
        minus = warpgroup_mma(s_k, s_k.permute([1, 0]), minus, use_acc=False)
        minus *= -b_beta[:, None]
        if growth is not None:
            norms = gl.where(row[:, None] == col[None, :], minus, 0.0)
            norms = gl.maximum(gl.abs(1.0 + gl.sum(norms, axis=1)), 1.0)
            gl.store(growth + i_chunk * HV + i_h, gl.sum(gl.log(norms), axis=0))
        if GATED:
            minus *= exp(log_down[:, None] - log_across[None, :])

        # The diagonal blocks are inverted in registers, one a warp, and joined in shared memory.
        # What lies above the diagonal is never looked at.
        on_diagonal = (row // 16)[:, None] == (col // 16)[None, :]
        blocks = gl.sum(gl.where(on_diagonal, minus, 0.0).reshape([B, 16, B, 16]), axis=2)
        wide: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        narrow: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 2, [1, 0])
        square: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [warps, 1], [1, 0])
        s_minus = gl.allocate_shared_memory(gl.float16, [R, R], wide, minus.to(gl.float16))
        s_x = gl.allocate_shared_memory(gl.float16, [R, R], wide)
        s_x.store(gl.zeros([R, R], gl.float16, layout=load_r))
        blocks = invert_blocks(blocks).to(gl.float16).reshape([R, 16])
        s_blocks = gl.allocate_shared_memory(gl.float16, [R, 16], narrow, blocks)
        for i in gl.static_range(B):
            block = s_blocks.slice(16 * i, 16, 0).load(square)
            s_x.slice(16 * i, 16, 0).slice(16 * i, 16, 1).store(block)
        for i in gl.static_range(B // 2):
            join(s_x, s_minus, 32 * i, 16)
        join(s_x, s_minus, 0, 32)
        p_ut = ut + (i_chunk * HV + i_h) * (R * R)
        store_rows(p_ut, s_x, R, R, R, R, R, R, load_r)
