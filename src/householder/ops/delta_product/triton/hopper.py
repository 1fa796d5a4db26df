"""The forward walk for Hopper's tensor cores (compute capability 9.0), in Gluon.

The same algorithm as `forward.walk_kernel`, with what plain Triton does not let one say: a chunk's
tiles are copied while the chunk before is computed, each as soon as its place is free, and products
run while the threads pack, mask and store what does not wait for them.
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

# Renamed in Triton 3.7.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def row_layout(columns, vector, warps):
    """Return how `warps` warps load rows of `columns` elements, `vector` of them a thread."""
    across = min(32, columns // vector)
    return gl.BlockedLayout([1, vector], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def column_layout(rows, vector, warps):
    """Return how `warps` warps store columns of `rows` elements, `vector` of them a thread."""
    down = min(32, rows // vector)
    return gl.BlockedLayout([vector, 1], [down, 32 // down], [1, warps], [0, 1])


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
    layout: gl.constexpr,
):  # fmt: skip
    """Start to copy columns `start …` of the first `n` rows into shared memory; others get zero."""
    o_d = start + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    mask = (rows < n)[:, None]
    if D % BLOCK != 0:
        mask = mask & (o_d < D)[None, :]
    async_load(to, pointer + offsets[:, None] + o_d[None, :], mask=mask)


@gluon.jit
def pick(table, row: gl.constexpr, R: gl.constexpr, layout: gl.constexpr):
    """Load one row of a chunk's table of coefficients."""
    return gl.load(table + row * R + gl.arange(0, R, layout=layout))


@gluon.jit
def walk_kernel(
    q, k, v, table, ut, initial, final, o, states, u, cu_seqlens, first_chunk, scale, T,
    q_b, q_h, k_b, k_h, v_b, v_h, HV: gl.constexpr, q_t: gl.constexpr,
    k_t: gl.constexpr, k_n: gl.constexpr, v_t: gl.constexpr, v_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BC: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, PACKED: gl.constexpr,
    PRECISION: gl.constexpr, SAVE: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
):  # fmt: skip
    """Carry columns `[BV]` of one sequence's and head's state through its chunks; write their O."""
    BETA: gl.constexpr = 0
    LOG_HIGH: gl.constexpr = 1
    LOG_LOW: gl.constexpr = 2
    FROM_START: gl.constexpr = 3
    TO_END: gl.constexpr = 4
    TOKEN_FROM_START: gl.constexpr = 5
    warps: gl.constexpr = gl.num_warps()
    width: gl.constexpr = 6 * R if GATED else R
    num_v: gl.constexpr = (V + BV - 1) // BV
    half: gl.constexpr = gl.bfloat16
    by_row: gl.constexpr = product_layout(BV, R, warps)
    by_token: gl.constexpr = product_layout(BV, BC, warps)
    by_key: gl.constexpr = product_layout(BV, BK, warps)
    by_pair: gl.constexpr = product_layout(R, BC, warps)
    from_state: gl.constexpr = gl.DotOperandLayout(0, by_row, 2)
    load_k: gl.constexpr = row_layout(BK, 8, warps)
    load_r: gl.constexpr = row_layout(R, 8, warps)
    load_v: gl.constexpr = row_layout(BV, 8, warps)
    store_s: gl.constexpr = row_layout(BK, 8, warps)
    store_v: gl.constexpr = column_layout(BV, 8, warps)

    i_v = (gl.program_id(0) % num_v) * BV
    i_sh = (gl.program_id(0) // num_v).to(gl.int64)
    i_s = i_sh // HV
    i_h = i_sh % HV
    if PACKED:
        batch = gl.to_tensor(0).to(gl.int64)
        first = gl.load(cu_seqlens + i_s)
        length = gl.load(cu_seqlens + i_s + 1) - first
        first = first.to(gl.int64)
        chunk = gl.load(first_chunk + i_s).to(gl.int64)
    else:
        batch = i_s
        first = gl.to_tensor(0).to(gl.int64)
        length = gl.to_tensor(T)
        chunk = i_s * ((length + C - 1) // C)
    num_chunks = (length + C - 1) // C

    p_q = q + batch * q_b + first * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + first * k_t + (i_h // GROUP) * k_h
    p_v = v + batch * v_b + first * v_t + i_h * v_h
    p_o = o + ((batch * T + first) * HV + i_h) * V

    s_k = gl.allocate_shared_memory(
        half, [2, R, BK], gl.NVMMASharedLayout.get_default_for([R, BK], half)
    )
    s_q = gl.allocate_shared_memory(
        half, [BC, BK], gl.NVMMASharedLayout.get_default_for([BC, BK], half)
    )
    s_t = gl.allocate_shared_memory(
        half, [R, R], gl.NVMMASharedLayout.get_default_for([R, R], half)
    )
    s_v = gl.allocate_shared_memory(
        half, [R, BV], gl.NVMMASharedLayout.get_default_for([R, BV], half)
    )
    s_a = gl.allocate_shared_memory(
        half, [R, BC], gl.NVMMASharedLayout.get_default_for([R, BC], half)
    )
    s_o = gl.allocate_shared_memory(
        half, [BC, BV], gl.NVMMASharedLayout.get_default_for([BC, BV], half)
    )

    k_rows, o_krows = tile_rows(R, N, k_t, k_n, load_k)
    v_rows, o_vrows = tile_rows(R, N, v_t, v_n, load_v)
    q_rows, o_qrows = tile_rows(BC, 1, q_t, 0, load_k)
    t_rows, o_trows = tile_rows(R, 1, R, 0, load_r)

    # The state, transposed.
    sv = i_v + gl.arange(0, BV, layout=gl.SliceLayout(1, by_key))
    sk = gl.arange(0, BK, layout=gl.SliceLayout(0, by_key))
    m_state = (sv < V)[:, None] & (sk < K)[None, :]
    o_state = i_sh * K * V + sk[None, :] * V + sv[:, None]
    b_s = gl.zeros([BV, BK], gl.float32, layout=by_key)
    if initial is not None:
        b_s += gl.load(initial + o_state, mask=m_state, other=0.0).to(gl.float32)

    # Where rows and tokens of the chunk meet.
    a_row = gl.arange(0, R, layout=gl.SliceLayout(1, by_pair))
    a_token = gl.arange(0, BC, layout=gl.SliceLayout(0, by_pair))
    seen = (a_row // N)[:, None] <= a_token[None, :]

    if num_chunks > 0:
        n = gl.minimum(length, C)
        i_ch = chunk * HV + i_h
        copy_tile(s_k.index(0), p_k, k_rows, o_krows, n * N, 0, K, BK, load_k)
        copy_tile(s_q, p_q, q_rows, o_qrows, n, 0, K, BK, load_k)
        copy_tile(s_v, p_v, v_rows, o_vrows, n * N, i_v, V, BV, load_v)
        copy_tile(s_t, ut + i_ch * (R * R), t_rows, o_trows, R, 0, R, R, load_r)
    async_copy.commit_group()

    for i in range(num_chunks):
        start = (i * C).to(gl.int64)
        n = gl.minimum(length - i * C, C)
        after = start + C
        n_after = gl.minimum(length - (i + 1) * C, C)  # none or fewer past the last chunk
        i_ch = (chunk + i) * HV + i_h
        p_table = table + i_ch * width
        b_k = s_k.index(i % 2)

        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()
        b_beta = pick(p_table, BETA, R, gl.SliceLayout(0, by_row))
        b_sh = b_s.to(half)
        b_sa = gl.convert_layout(b_sh, from_state)
        recalled = gl.zeros([BV, R], gl.float32, layout=by_row)
        recalled = warpgroup_mma(b_sa, b_k.permute([1, 0]), recalled, use_acc=False, is_async=True)
        b_a = gl.zeros([R, BC], gl.float32, layout=by_pair)
        b_a = warpgroup_mma(b_k, s_q.permute([1, 0]), b_a, use_acc=False, is_async=True)
        b_o = gl.zeros([BV, BC], gl.float32, layout=by_token)
        b_o = warpgroup_mma(b_sa, s_q.permute([1, 0]), b_o, use_acc=False, is_async=True)
        copy_tile(
            s_k.index((i + 1) % 2), p_k + after * k_t, k_rows, o_krows, n_after * N, 0, K, BK,
            load_k,
        )  # fmt: skip
        b_v = s_v.permute([1, 0]).load(by_row).to(gl.float32)
        if SAVE:
            o_sv = i_v + gl.arange(0, BV, layout=gl.SliceLayout(1, store_s))
            o_sk = gl.arange(0, BK, layout=gl.SliceLayout(0, store_s))
            m_s = (o_sv < V)[:, None] & (o_sk < K)[None, :]
            p_s = states + i_ch * (K * V) + o_sv[:, None] * K + o_sk[None, :]
            gl.store(p_s, gl.convert_layout(b_sh, store_s), mask=m_s)

        recalled = warpgroup_mma_wait(2, [recalled])
        if GATED:
            recalled *= pick(p_table, FROM_START, R, gl.SliceLayout(0, by_row))[None, :]
        b_y = ((b_v - recalled) * b_beta[None, :]).to(half)

        b_a = warpgroup_mma_wait(1, [b_a])
        if GATED:
            # A query's gates are those of its token's rows; past the chunk's end there is none.
            p_query = p_table + gl.minimum(a_token, C - 1) * N
            p_row = p_table + a_row
            high = gl.load(p_query + LOG_HIGH * R)[None, :] - gl.load(p_row + LOG_HIGH * R)[:, None]
            low = gl.load(p_query + LOG_LOW * R)[None, :] - gl.load(p_row + LOG_LOW * R)[:, None]
            b_a *= gl.exp(gl.where(seen, high + low, -float("inf")))
        b_a = gl.where(seen, b_a, 0.0)
        s_a.store(b_a.to(half))
        fence_async_shared()
        gl.thread_barrier()

        b_ya = gl.convert_layout(b_y, from_state)
        b_u = gl.zeros([BV, R], gl.float32, layout=by_row)
        b_u = warpgroup_mma(b_ya, s_t.permute([1, 0]), b_u, use_acc=False, is_async=True)
        b_u, b_o = warpgroup_mma_wait(0, [b_u, b_o])
        # Q, V and T have been read by every warp.
        gl.thread_barrier()
        copy_tile(s_q, p_q + after * q_t, q_rows, o_qrows, n_after, 0, K, BK, load_k)
        copy_tile(s_v, p_v + after * v_t, v_rows, o_vrows, n_after * N, i_v, V, BV, load_v)
        left = gl.where(n_after > 0, R, 0)
        copy_tile(s_t, ut + (i_ch + HV) * (R * R), t_rows, o_trows, left, 0, R, R, load_r)
        async_copy.commit_group()

        b_uh = b_u.to(half)
        b_ua = gl.convert_layout(b_uh, from_state)
        if GATED:
            o_c = gl.arange(0, BC, layout=gl.SliceLayout(0, by_token))
            b_o *= gl.load(p_table + TOKEN_FROM_START * R + o_c)[None, :]
        b_o = warpgroup_mma(b_ua, s_a, b_o, is_async=True)
        b_uw = b_ua
        if GATED:
            b_uw = (b_u * pick(p_table, TO_END, R, gl.SliceLayout(0, by_row))[None, :]).to(half)
            b_uw = gl.convert_layout(b_uw, from_state)
            b_s *= gl.load(p_table + FROM_START * R + R - 1)
        b_s = warpgroup_mma(b_uw, b_k, b_s, is_async=True)
        if SAVE:
            o_cv = i_v + gl.arange(0, BV, layout=gl.SliceLayout(1, store_v))
            o_ur = gl.arange(0, R, layout=gl.SliceLayout(0, store_v))
            p_u = u + i_ch * (R * V) + o_ur[None, :] * V + o_cv[:, None]
            gl.store(p_u, gl.convert_layout(b_uh, store_v), mask=(o_cv < V)[:, None])
        b_o = warpgroup_mma_wait(1, [b_o])
        s_o.permute([1, 0]).store((b_o * scale).to(half))
        gl.thread_barrier()
        o_oc = gl.arange(0, BC, layout=gl.SliceLayout(1, load_v))
        o_ov = i_v + gl.arange(0, BV, layout=gl.SliceLayout(0, load_v))
        p_out = p_o + start * (HV * V) + o_oc[:, None] * (HV * V) + o_ov[None, :]
        gl.store(p_out, s_o.load(load_v), mask=(o_oc < n)[:, None] & (o_ov < V)[None, :])
        b_s = warpgroup_mma_wait(0, [b_s])

    async_copy.wait_group(0)
    gl.store(final + o_state, b_s, mask=m_state)
