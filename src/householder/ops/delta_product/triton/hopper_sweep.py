"""`delta_product` backward for Hopper: both kernels of `backward.py` in one, scheduled by hand.

Products run while the next tiles are copied and the last results are packed and stored. All
accumulators have the rows of one tensor-core instruction along K or V, a warp group to each 64 of
them, so that dS, dU and D go from one product into the next without leaving the registers.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from householder.ops._triton import has_wide_rows
from householder.ops.delta_product.triton import config
from householder.ops.delta_product.triton.chunks import (
    FROM_START,
    LOG_HIGH,
    LOG_LOW,
    TO_END,
    TOKEN_FROM_START,
    Problem,
    strides,
)
from householder.ops.delta_product.triton.hopper_tiles import async_load, barrier
from householder.ops.delta_product.triton.segments import Segments

# A name that changed after Triton 3.6.
REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def multiply(a, b, LAYOUT: gl.constexpr):
    """Start the product of two tiles."""
    zero = gl.full([a.shape[0], b.shape[1]], 0.0, gl.float32, layout=LAYOUT)
    return warpgroup_mma(a, b, zero, use_acc=False, is_async=True)


@gluon.jit
def multiply_add(a, b, acc):
    """Start adding the product of two tiles to `acc`."""
    return warpgroup_mma(a, b, acc, is_async=True)


@gluon.jit
def publish():
    """Make what threads stored and copied visible to the products of all of them."""
    fence_async_shared()
    barrier()


@gluon.jit
def row_offsets(o_r, N: gl.constexpr, stride_t, stride_n):
    """Return the offsets of reflector rows, N to a token."""
    if N == 1:
        return o_r * stride_t
    else:
        return (o_r // N) * stride_t + (o_r % N) * stride_n


@gluon.jit
def reinterpret(smem, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Take shared memory for a tile of another shape."""
    if REINTERPRET:
        return smem.reinterpret(gl.bfloat16, [ROWS, COLUMNS], LAYOUT)
    else:
        return smem._reinterpret(gl.bfloat16, [ROWS, COLUMNS], LAYOUT)


@gluon.jit
def copy_rows(
    smem, pointer, valid, N: gl.constexpr, stride_t, stride_n, D: gl.constexpr, LAYOUT: gl.constexpr
):
    """Start copying rows of D elements to a tile; zero beyond the first `valid` rows."""
    o_r = gl.arange(0, smem.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    mask = (o_r < valid)[:, None] & (o_d < D)[None, :]
    offsets = row_offsets(o_r, N, stride_t, stride_n)[:, None] + o_d[None, :]
    async_load(smem, pointer + offsets, mask=mask)


@gluon.jit
def copy_vector(smem, pointer, WARPS: gl.constexpr):
    """Start copying a vector of coefficients."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    async_load(smem, pointer + gl.arange(0, smem.shape[0], layout=layout))


@gluon.jit
def load_vector(smem, pointer, R: gl.constexpr, LAYOUT: gl.constexpr):
    """Load coefficients from their tile, or from `pointer` if there is none."""
    if smem is None:
        return gl.load(pointer + gl.arange(0, R, layout=LAYOUT))
    else:
        return smem.load(LAYOUT)


@gluon.jit
def store_rows(pointer, x, valid, stride, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Store rows of a tile in `LAYOUT`."""
    o_r = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    mask = (o_r < valid)[:, None] & (o_d < D)[None, :]
    offsets = o_r[:, None] * stride + o_d[None, :]
    gl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=mask)


@gluon.jit
def pair_decay(table, later, earlier, R: gl.constexpr):
    """Return Γ between two rows of a chunk; not above one, whichever is the later."""
    high = gl.load(table + LOG_HIGH * R + later) - gl.load(table + LOG_HIGH * R + earlier)
    low = gl.load(table + LOG_LOW * R + later) - gl.load(table + LOG_LOW * R + earlier)
    return gl.exp(gl.minimum(high + low, 0.0))


@gluon.jit(do_not_specialize=["T"])
def hopper_sweep_kernel(
    do, q, k, table, ut, states, u, dfinal, dinitial, dq, dk, dv, dbeta, dg,
    cu_seqlens, first_chunk, scale, T, do_b, do_h, q_b, q_h, k_b, k_h,
    HV: gl.constexpr, do_t: gl.constexpr, q_t: gl.constexpr, k_t: gl.constexpr, k_n: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    BC: gl.constexpr, GROUP: gl.constexpr, GATED: gl.constexpr, PACKED: gl.constexpr,
    SEGMENT: gl.constexpr, BK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Carry dS of one sequence and value head to its start; write the gradients of all chunks.

    dS and all that follows from it are without the factor `scale`, which outputs get at the end.
    """
    GROUPS: gl.constexpr = WARPS // 4
    tall_r: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, R, 16])
    tall_c: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BC, 16])
    tall_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BK, 16])
    pair_r: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, R // GROUPS, 16])
    pair_c: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BC // GROUPS, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [WARPS, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    bf16: gl.constexpr = gl.bfloat16
    SLICE: gl.constexpr = 32
    sh_rk: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, BK], bf16)
    sh_kk: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BK], bf16)
    sh_ck: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, BK], bf16)
    sh_rr: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, R], bf16)
    sh_rc: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, BC], bf16)

    i_sh = gl.program_id(0).to(gl.int64)
    i_s = i_sh // HV
    i_h = i_sh % HV
    if PACKED:
        batch = 0
        first = gl.load(cu_seqlens + i_s).to(gl.int64)
        length = gl.load(cu_seqlens + i_s + 1) - gl.load(cu_seqlens + i_s)
        chunk = gl.load(first_chunk + i_s).to(gl.int64)
    elif SEGMENT:
        per_row = (T + (SEGMENT * C - 1)) // (SEGMENT * C)
        batch = i_s // per_row
        first = (i_s % per_row) * (SEGMENT * C)
        length = gl.minimum(T - first, SEGMENT * C).to(gl.int32)
        chunk = batch * ((T + C - 1) // C) + (i_s % per_row) * SEGMENT
    else:
        batch = i_s
        first = i_s * 0
        length = T
        chunk = i_s * ((T + C - 1) // C)

    p_q = q + batch * q_b + first * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + first * k_t + (i_h // GROUP) * k_h
    p_do = do + batch * do_b + first * do_t + i_h * do_h
    first_row = batch * T + first  # of tensors that are contiguous
    p_dq = dq + (first_row * HV + i_h) * K
    p_dk = dk + (first_row * N * HV + i_h) * K
    p_dv = dv + (first_row * N * HV + i_h) * V
    p_dbeta = dbeta + first_row * N * HV + i_h

    k_tiles = gl.allocate_shared_memory(bf16, [2, R, BK], sh_rk)
    q_tiles = gl.allocate_shared_memory(bf16, [2, BC, BK], sh_ck)
    do_tiles = gl.allocate_shared_memory(bf16, [2, BC, BK], sh_ck)
    u_tile = gl.allocate_shared_memory(bf16, [R, BK], sh_rk)
    t_tile = gl.allocate_shared_memory(bf16, [R, R], sh_rr)
    s_tile = gl.allocate_shared_memory(bf16, [BK, BK], sh_kk)
    stage = gl.allocate_shared_memory(bf16, [BK // R, R, BK], sh_rk)
    ds_tile = reinterpret(stage, BK, BK, sh_kk)
    d_tile = gl.allocate_shared_memory(bf16, [R, BK], sh_rk)
    a_tile = gl.allocate_shared_memory(bf16, [R, BC], sh_rc)
    at_tile = gl.allocate_shared_memory(bf16, [R, BC], sh_rc)
    m_tile = gl.allocate_shared_memory(bf16, [R, R], sh_rr)
    # Two programs of 64 columns share a multiprocessor; beside gates no room is left for these.
    STAGED: gl.constexpr = BK > R or not GATED
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    by_column: gl.constexpr = gl.SliceLayout(0, tall_r)
    beta_tile = None
    from_start_tile = None
    to_end_tile = None
    if STAGED:
        beta_tile = gl.allocate_shared_memory(gl.float32, [R], vector)
        if GATED:
            from_start_tile = gl.allocate_shared_memory(gl.float32, [R], vector)
            to_end_tile = gl.allocate_shared_memory(gl.float32, [R], vector)
    # dS' has been read for the last time when dQ and dK are laid out for their way to memory.
    dq_tile = reinterpret(stage, BC, BK, sh_ck)
    dk_tile = d_tile
    if BK > R:
        dk_tile = stage.index(1)

    row_of_pair = gl.arange(0, R, layout=gl.SliceLayout(1, pair_r))
    column_of_pair = gl.arange(0, R, layout=gl.SliceLayout(0, pair_r))
    row_of_pair_c = gl.arange(0, R, layout=gl.SliceLayout(1, pair_c))
    row_of_query = row_of_pair_c // N
    column_of_query = gl.arange(0, BC, layout=gl.SliceLayout(0, pair_c))
    # A query's gates are those of its token's rows; past the chunk's end there is no query.
    query = gl.minimum(column_of_query, C - 1) * N
    if GATED:
        # Pairs for the gates' gradient stand where A and T have been read for the last time.
        rows_tile = a_tile
        if BC < R:
            rows_tile = gl.allocate_shared_memory(bf16, [R, R], sh_rr)
        queries_tile = reinterpret(t_tile, R, BC, sh_rc)
        here_r: gl.constexpr = gl.DotOperandLayout(0, pair_r, 2)

    b_ds = gl.zeros([BK, BK], gl.float32, layout=tall_k)
    o_v = gl.arange(0, BK, layout=gl.SliceLayout(1, tall_k))[:, None]
    o_k = gl.arange(0, BK, layout=gl.SliceLayout(0, tall_k))[None, :]
    in_state = (o_v < V) & (o_k < K)
    if dfinal is not None:
        b_ds = gl.load(dfinal + i_sh * K * V + o_k * V + o_v, mask=in_state, other=0.0)
        b_ds = b_ds.to(gl.float32) * (1.0 / scale)

    num_chunks = (length + C - 1) // C
    i = num_chunks - 1
    n = gl.minimum(length - i * C, C) * (num_chunks > 0).to(gl.int32)
    start = gl.maximum(i, 0).to(gl.int64) * C
    i_ch = (chunk + gl.maximum(i, 0)) * HV + i_h
    copy_rows(k_tiles.index(0), p_k + start * k_t, n * N, N, k_t, k_n, K, wide)
    copy_rows(q_tiles.index(0), p_q + start * q_t, n, 1, q_t, 0, K, wide)
    copy_rows(do_tiles.index(0), p_do + start * do_t, n, 1, do_t, 0, V, wide)
    copy_rows(u_tile, u + i_ch * R * V, n * R, 1, V, 0, V, wide)
    async_copy.commit_group()
    copy_rows(t_tile, ut + i_ch * (R * R), n * R, 1, R, 0, R, narrow)
    if num_chunks > 0:
        p_table = table + i_ch * (6 * R if GATED else R)
        if STAGED:
            copy_vector(beta_tile, p_table, WARPS)
        if STAGED and GATED:
            copy_vector(from_start_tile, p_table + FROM_START * R, WARPS)
            copy_vector(to_end_tile, p_table + TO_END * R, WARPS)
    async_copy.commit_group()
    for step in tl.range(num_chunks, disable_licm=True):
        i = num_chunks - 1 - step
        n = gl.minimum(length - i * C, C)
        start = i.to(gl.int64) * C
        i_ch = (chunk + i) * HV + i_h
        k_tile = k_tiles.index(step % 2)
        q_tile = q_tiles.index(step % 2)
        do_tile = do_tiles.index(step % 2)
        k_t_tile = k_tile.permute((1, 0))
        do_t_tile = do_tile.permute((1, 0))
        p_table = table + i_ch * (6 * R if GATED else R)
        b_beta_row = gl.load(p_table + row_of_pair)

        b_dsh = b_ds.to(bf16)
        ds_operand = gl.convert_layout(b_dsh, gl.DotOperandLayout(0, tall_r, 2))
        if GATED:
            b_decay = gl.load(p_table + FROM_START * R + R - 1)
            c_operand: gl.constexpr = gl.SliceLayout(0, gl.DotOperandLayout(0, tall_k, 2))
            o_c = gl.arange(0, BC, layout=c_operand)
            query_from_start = gl.load(p_table + TOKEN_FROM_START * R + o_c)
            # Waiting for no product pins the scaling here, before the first one is started.
            b_ds = warpgroup_mma_wait(0, [b_ds * b_decay])
        async_copy.wait_group(1 if GATED else 0)
        publish()
        ds_tile.store(b_dsh)

        # dU = dS' Kᵀ + dOᵀ A, with A's transpose made on the way; dS gets what the queries give.
        b_a = multiply(k_tile, q_tile.permute((1, 0)), pair_c)
        b_du = multiply(ds_operand, k_t_tile, tall_r)
        if GATED:
            do_operand = do_t_tile.load(gl.DotOperandLayout(0, tall_k, 2)).to(gl.float32)
            do_operand = (do_operand * query_from_start[None, :]).to(bf16)
            b_ds = multiply_add(do_operand, q_tile, b_ds)
        else:
            do_operand = ds_operand
            b_ds = multiply_add(do_t_tile, q_tile, b_ds)

        # The next chunk's tiles, and this one's state, are on their way meanwhile.
        copy_rows(s_tile, states + i_ch * K * V, V, 1, K, 0, K, wide)
        async_copy.commit_group()
        before = gl.maximum(i - 1, 0)
        n_before = gl.minimum(i, 1) * C
        start_before = before.to(gl.int64) * C
        i_before = (chunk + before) * HV + i_h
        p = p_k + start_before * k_t
        copy_rows(k_tiles.index(1 - step % 2), p, n_before * N, N, k_t, k_n, K, wide)
        p = p_q + start_before * q_t
        copy_rows(q_tiles.index(1 - step % 2), p, n_before, 1, q_t, 0, K, wide)
        p = p_do + start_before * do_t
        copy_rows(do_tiles.index(1 - step % 2), p, n_before, 1, do_t, 0, V, wide)
        async_copy.commit_group()

        b_a = warpgroup_mma_wait(2, [b_a])
        seen = row_of_query[:, None] <= column_of_query[None, :]
        if GATED:
            b_gamma = pair_decay(p_table, query[None, :], row_of_pair_c[:, None], R)
            b_a *= b_gamma
        b_a = gl.where(seen, b_a, 0.0).to(bf16)
        a_tile.store(b_a)
        if GATED:
            b_du, ds_operand = warpgroup_mma_wait(1, [b_du, ds_operand])
            # Where T comes late, the coefficients come with it.
            async_copy.wait_group(2)
            if STAGED:
                barrier()
            to_end = load_vector(to_end_tile, p_table + TO_END * R, R, by_column)
            b_du *= to_end[None, :]
        publish()
        b_du = multiply_add(do_t_tile, a_tile.permute((1, 0)), b_du)
        b_dk = multiply(ds_tile.permute((1, 0)), u_tile.permute((1, 0)), tall_r)
        b_at = multiply(u_tile, do_t_tile, pair_c)
        b_du, b_ds, ds_operand, do_operand = warpgroup_mma_wait(
            2, [b_du, b_ds, ds_operand, do_operand]
        )

        # −β D, from registers into dS and through shared memory into all else.
        du_operand = gl.convert_layout(b_du.to(bf16), gl.DotOperandLayout(0, tall_r, 2))
        b_d = multiply(du_operand, t_tile, tall_r)
        b_at, b_dk = warpgroup_mma_wait(1, [b_at, b_dk])
        if GATED:
            to_end = load_vector(to_end_tile, p_table + TO_END * R, R, by_column)
            b_dk *= to_end[None, :]
            attention = (b_a.to(gl.float32) * b_at).to(bf16)
            b_at *= b_gamma
        at_tile.store(gl.where(seen, b_at, 0.0).to(bf16))
        b_d, du_operand = warpgroup_mma_wait(0, [b_d, du_operand])
        b_d *= -load_vector(beta_tile, p_table, R, by_column)[None, :]
        b_dh = b_d.to(bf16)
        d_tile.permute((1, 0)).store(b_dh)
        async_copy.wait_group(1)
        publish()
        b_m = multiply(u_tile, d_tile.permute((1, 0)), pair_r)
        if GATED:
            queries_tile.store(attention)
            b_kk = multiply(k_tile, k_t_tile, pair_r)
            from_start = load_vector(from_start_tile, p_table + FROM_START * R, R, by_column)
            b_dh = (b_d * from_start[None, :]).to(bf16)
        d_operand = gl.convert_layout(b_dh, gl.DotOperandLayout(0, tall_k, 2))
        b_ds = multiply_add(d_operand, k_tile, b_ds)
        s_t_tile = s_tile.permute((1, 0))
        if GATED:
            b_read = multiply(s_t_tile, d_tile.permute((1, 0)), tall_r)
        else:
            b_dk = multiply_add(s_t_tile, d_tile.permute((1, 0)), b_dk)
            b_dq = multiply(s_t_tile, do_t_tile, tall_c)
            b_dq = multiply_add(k_t_tile, at_tile, b_dq)

        p_row = start * (N * HV)
        b_dv = d_tile.load(wide).to(gl.float32) * -scale
        store_rows(p_dv + p_row * V, b_dv, n * N, HV * V, V, wide)
        if GATED:
            # What rows and S give to the next chunk's state.
            k_columns = k_t_tile.load(tall_r).to(gl.float32)
            written = gl.sum(b_dk * k_columns, axis=0)
            written = gl.convert_layout(written, gl.SliceLayout(0, pair_r))
            b_kept = gl.zeros([SLICE, BK], gl.float32, layout=wide)
            for part in gl.static_range(BK // SLICE):
                s_part = s_tile.slice(part * SLICE, SLICE, dim=0).load(wide).to(gl.float32)
                ds_part = ds_tile.slice(part * SLICE, SLICE, dim=0).load(wide).to(gl.float32)
                b_kept += s_part * ds_part
            kept = b_decay * gl.sum(gl.sum(b_kept, axis=1), axis=0)

        # U_r = β_r (the residual that row r writes), of which β's gradient is the product with D.
        b_m = warpgroup_mma_wait(3 if GATED else 4, [b_m])
        b_dbeta = b_m * (-scale / (b_beta_row * b_beta_row))[:, None]
        on_diagonal = row_of_pair[:, None] == column_of_pair[None, :]
        pointers = p_dbeta + p_row + row_of_pair[:, None] * HV + column_of_pair[None, :] * 0
        mask = on_diagonal & (row_of_pair < n * N)[:, None]
        gl.store(pointers, b_dbeta.to(dbeta.dtype.element_ty), mask=mask)
        above = row_of_pair[:, None] < column_of_pair[None, :]
        if GATED:
            b_m *= pair_decay(p_table, column_of_pair[None, :], row_of_pair[:, None], R)
        b_m = gl.where(above, b_m, 0.0)
        m_tile.store(b_m.to(bf16))
        if GATED:
            b_kk = warpgroup_mma_wait(2, [b_kk])
            rows_tile.store((b_kk * b_m).to(bf16))
            b_read, b_ds, d_operand = warpgroup_mma_wait(0, [b_read, b_ds, d_operand])
            from_start = load_vector(from_start_tile, p_table + FROM_START * R, R, by_column)
            b_read *= from_start[None, :]
            k_columns = k_t_tile.load(tall_r).to(gl.float32)
            read = gl.sum(b_read * k_columns, axis=0)
            read = gl.convert_layout(read, gl.SliceLayout(0, pair_r))
            b_dk += b_read
        publish()
        if GATED:
            # What rows give to the reads and outputs at or after each token, from before it: sums
            # over the later ones by products with ones. A token's sum stands in all its rows.
            o_t = gl.arange(0, R, layout=gl.SliceLayout(1, here_r)) // N
            o_r = gl.arange(0, R, layout=gl.SliceLayout(0, here_r)) // N
            here_on = gl.where(o_r[None, :] >= o_t[:, None], 1.0, 0.0).to(bf16)
            b_crossing = multiply(here_on, rows_tile.permute((1, 0)), pair_r)
            o_c = gl.arange(0, BC, layout=gl.SliceLayout(0, here_r))
            queries_on = gl.where(o_c[None, :] >= o_t[:, None], 1.0, 0.0).to(bf16)
            b_crossing = multiply_add(queries_on, queries_tile.permute((1, 0)), b_crossing)
            b_dq = multiply(s_tile.permute((1, 0)), do_t_tile, tall_c)
        copy_rows(u_tile, u + i_before * R * V, n_before * R, 1, V, 0, V, wide)
        if not GATED:
            copy_rows(t_tile, ut + i_before * (R * R), n_before * R, 1, R, 0, R, narrow)
            copy_vector(beta_tile, table + i_before * R, WARPS)
        async_copy.commit_group()
        b_dk = multiply_add(k_t_tile, m_tile, b_dk)
        b_dk = multiply_add(k_t_tile, m_tile.permute((1, 0)), b_dk)
        b_dk = multiply_add(q_tile.permute((1, 0)), at_tile.permute((1, 0)), b_dk)
        if GATED:
            b_crossing, b_dq, here_on, queries_on = warpgroup_mma_wait(
                3, [b_crossing, b_dq, here_on, queries_on]
            )
            o_c = gl.arange(0, BC, layout=gl.SliceLayout(0, tall_c))
            b_dq *= gl.load(p_table + TOKEN_FROM_START * R + o_c)[None, :]
            q_columns = q_tile.permute((1, 0)).load(tall_c).to(gl.float32)
            asked = gl.sum(b_dq * q_columns, axis=0)
            asked = gl.convert_layout(asked, gl.SliceLayout(0, pair_c))
            b_dq = multiply_add(k_t_tile, at_tile, b_dq)
            token = row_of_pair[:, None] // N
            earlier = column_of_pair[None, :] // N < token
            b_crossing = gl.where(earlier, b_crossing + written[None, :], read[None, :])
            b_dg = gl.sum(b_crossing, axis=1) + kept
            at_or_after = column_of_query[None, :] >= row_of_query[:, None]
            asked = gl.sum(gl.where(at_or_after, asked[None, :], 0.0), axis=1)
            b_dg += gl.convert_layout(asked, gl.SliceLayout(1, pair_r))
            p_dg = dg + (first_row + start) * HV + i_h + row_of_pair // N * HV
            mask = (row_of_pair % N == 0) & (row_of_pair < n * N)
            gl.store(p_dg, (b_dg * scale).to(dg.dtype.element_ty), mask=mask)
            b_dk = warpgroup_mma_wait(1, [b_dk])
            dk_tile.permute((1, 0)).store((b_dk * scale).to(bf16))
            b_dq = warpgroup_mma_wait(0, [b_dq])
            dq_tile.permute((1, 0)).store((b_dq * scale).to(bf16))
        else:
            b_dq, b_ds, d_operand = warpgroup_mma_wait(3, [b_dq, b_ds, d_operand])
            dq_tile.permute((1, 0)).store((b_dq * scale).to(bf16))
            b_dk = warpgroup_mma_wait(0, [b_dk])
            if BK == R:
                barrier()
            dk_tile.permute((1, 0)).store((b_dk * scale).to(bf16))
        barrier()
        if GATED:
            copy_rows(t_tile, ut + i_before * (R * R), n_before * R, 1, R, 0, R, narrow)
            if STAGED:
                p_table = table + i_before * (6 * R)
                copy_vector(beta_tile, p_table, WARPS)
                copy_vector(from_start_tile, p_table + FROM_START * R, WARPS)
                copy_vector(to_end_tile, p_table + TO_END * R, WARPS)
            async_copy.commit_group()
        store_rows(p_dq + start * (HV * K), dq_tile.load(wide), n, HV * K, K, wide)
        store_rows(p_dk + p_row * K, dk_tile.load(wide), n * N, HV * K, K, wide)

    async_copy.wait_group(0)
    if dinitial is not None:
        b_ds = (b_ds * scale).to(dinitial.dtype.element_ty)
        gl.store(dinitial + i_sh * K * V + o_k * V + o_v, b_ds, mask=in_state)


def hopper_sweep(
    p: Problem,
    segments: Segments,
    launch: config.Launch,
    do: Tensor,
    table: Tensor,
    scale: float,
    ut: Tensor,
    states: Tensor,
    u: Tensor,
    dfinal: Tensor | None,
    dinitial: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbeta: Tensor,
    dg: Tensor | None,
) -> None:
    """Run the kernel: the gradients are written where the last arguments are."""
    if not p.num_sequences:
        return
    # Copies take 16 bytes at a time.
    do, q, k = (
        x if has_wide_rows(x) else x.clone(memory_format=torch.contiguous_format)
        for x in (do, p.q, p.k)
    )
    constants = {name: x for name, x in p.constants.items() if name != "PRECISION"}
    hopper_sweep_kernel[(segments.number * p.heads,)](
        do, q, k, table, ut, states, u, dfinal, dinitial, dq, dk, dv, dbeta, dg,
        segments.bounds, segments.first_chunk, scale, p.v.shape[1],
        **strides("do", do), **strides("q", q), **strides("k", k),
        HV=p.heads, SEGMENT=segments.chunks, BK=launch.block, WARPS=launch.num_warps,
        **constants, **launch.options,
    )  # fmt: skip
