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
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma_wait

from householder.ops._gluon import barrier
from householder.ops._triton import Launcher, has_wide_rows
from householder.ops.delta_product.triton import config
from householder.ops.delta_product.triton.chunks import (
    BETA,
    FROM_START,
    LOG_HIGH,
    SIZES,
    TO_END,
    TOKEN_FROM_START,
    Gradients,
    Problem,
    Saved,
    strides,
)
from householder.ops.delta_product.triton.hopper_gates import (
    ASKED,
    CROSSING,
    KEPT,
    PARTS_SIZE,
    TAKEN,
    WRITTEN,
    gate_kernel,
    inner_product,
    pair_decay,
    store_column_sums,
    store_row_products,
    store_row_sums,
    sum_rows,
)
from householder.ops.delta_product.triton.hopper_tiles import (
    copy_coefficients,
    copy_query_logs,
    copy_rows,
    hidden_zero,
    hide,
    in_pairs,
    locate_walk,
    multiply,
    multiply_add,
    pick,
    publish,
    reinterpret,
    store_tile_rows,
    times,
)
from householder.ops.delta_product.triton.segments import Segments


@gluon.constexpr_function
def wide_rows(BK, WARPS):
    """Return how threads copy tiles of BK columns, 16 bytes at a time."""
    return gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [WARPS, 1], [1, 0])


@gluon.jit
def copy_triangle(t_tile, ut, i_ch, n, R: gl.constexpr, WARPS: gl.constexpr, z=0):
    """Start copying a chunk's T, if `n` is not zero."""
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    copy_rows(t_tile, ut + i_ch * (R * R), n * R, 1, R, 0, R, narrow, z)


@gluon.jit
def copy_chunk(
    place, start, i_ch, n, p_do, p_q, p_k, table, do_tiles, q_tiles, k_tiles, tables, query_logs,
    do_t: gl.constexpr, q_t: gl.constexpr, k_t: gl.constexpr, k_n: gl.constexpr, N: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, R: gl.constexpr, GATED: gl.constexpr,
    BK: gl.constexpr, WARPS: gl.constexpr, z=0,
):  # fmt: skip
    """Start copying what `n` tokens from `start` on give to a place of the ring, and commit."""
    wide: gl.constexpr = wide_rows(BK, WARPS)
    copy_rows(k_tiles.index(place), p_k + start * k_t, n * N, N, k_t, k_n, K, wide, z)
    copy_rows(q_tiles.index(place), p_q + start * q_t, n, 1, q_t, 0, K, wide, z)
    copy_rows(do_tiles.index(place), p_do + start * do_t, n, 1, do_t, 0, V, wide, z)
    if GATED:
        p_table = table + i_ch * (6 * R)
        copy_coefficients(tables.index(place), p_table, n, 6 * R, WARPS)
        if N > 1:
            copy_query_logs(query_logs.index(place), p_table, n, C, N, R, WARPS)
    async_copy.commit_group()


@gluon.jit
def store_beta_gradient(
    p_dbeta, b_m, coefficients, rows, stride, factor, z, R: gl.constexpr, GROUPS: gl.constexpr
):
    """Store the diagonal of U Dᵀ, here with −β D / scale for D, over β: the gradient of β.

    U_r = β_r (the residual that row r writes), of which β's gradient is the product with D.
    """
    row = gl.arange(0, R, layout=gl.SliceLayout(1, b_m.type.layout))
    column = gl.arange(0, R, layout=gl.SliceLayout(0, b_m.type.layout))
    b_dbeta = sum_rows(gl.where(row[:, None] == column[None, :], b_m, 0.0), GROUPS)
    by_row: gl.constexpr = gl.SliceLayout(1, b_dbeta.type.layout)
    o_r = gl.arange(0, R, layout=by_row) + z
    o_p = gl.arange(0, GROUPS, layout=gl.SliceLayout(0, b_dbeta.type.layout))
    b_beta = pick(coefficients, BETA, R, R, by_row)
    b_dbeta *= (factor / (b_beta * b_beta))[:, None]
    pointers = p_dbeta + o_r[:, None] * stride + o_p[None, :] * 0
    mask = (o_r // (R // GROUPS))[:, None] == o_p[None, :]
    mask = mask & (o_r < rows)[:, None]
    gl.store(pointers, b_dbeta.to(p_dbeta.dtype.element_ty), mask=mask)


@gluon.jit
def store_kept(p_parts, s_tile, ds_tile, coefficients, z, R: gl.constexpr, WARPS: gl.constexpr):
    """Store the parts of what S keeps to the chunk's end."""
    b_kept = inner_product(s_tile, ds_tile)
    o_part = gl.arange(0, WARPS, layout=b_kept.type.layout) + z
    b_decay = coefficients.slice(FROM_START * R + R - 1, 1)
    b_kept *= b_decay.load(b_kept.type.layout)
    gl.store(p_parts + KEPT * R + o_part, b_kept)


@gluon.jit
def sum_from_here_on(
    rows_tile, queries_tile, N: gl.constexpr, R: gl.constexpr, BC: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start to sum what each row gives to rows and queries at or after each token.

    They are products with ones; a token's sum stands in all its rows. Returns them with the ones,
    which are read until they are done.
    """
    ones: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    o_t = gl.arange(0, R, layout=gl.SliceLayout(1, ones)) // N
    o_r = gl.arange(0, R, layout=gl.SliceLayout(0, ones)) // N
    here_on = gl.where(o_r[None, :] >= o_t[:, None], 1.0, 0.0).to(gl.bfloat16)
    b_crossing = multiply(here_on, rows_tile.permute((1, 0)), LAYOUT)
    queries_on = here_on
    if N > 1:
        o_c = gl.arange(0, BC, layout=gl.SliceLayout(0, ones))
        queries_on = gl.where(o_c[None, :] >= o_t[:, None], 1.0, 0.0).to(gl.bfloat16)
        b_crossing = multiply_add(queries_on, queries_tile.permute((1, 0)), b_crossing)
    return b_crossing, here_on, queries_on


@gluon.jit(do_not_specialize=SIZES)
def hopper_sweep_kernel(
    do, q, k, table, ut, states, u, dfinal, dinitial, dq, dk, dv, dbeta, parts,
    cu_seqlens, first_chunk, parts_step, scale, T, do_b, do_h, q_b, q_h, k_b, k_h,
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
    flat_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BK // GROUPS, 16])
    pair_r: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, R // GROUPS, 16])
    pair_c: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BC // GROUPS, 16])
    wide: gl.constexpr = wide_rows(BK, WARPS)
    bf16: gl.constexpr = gl.bfloat16
    # dK and, beside gates and where there are as many queries as rows, dQ are held by rows: then
    # sums over K need no other warp.
    FLAT_Q: gl.constexpr = GATED and BC == R
    sh_rk: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, BK], bf16)
    sh_kk: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BK], bf16)
    sh_ck: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, BK], bf16)
    sh_rr: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, R], bf16)
    sh_rc: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, BC], bf16)

    i_sh = gl.program_id(0).to(gl.int64)
    i_s = i_sh // HV
    i_h = i_sh % HV
    batch, first, length, chunk = locate_walk(i_s, T, cu_seqlens, first_chunk, C, PACKED, SEGMENT)
    p_q = q + batch * q_b + first * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + first * k_t + (i_h // GROUP) * k_h
    p_do = do + batch * do_b + first * do_t + i_h * do_h
    first_row = batch * T + first  # of tensors that are contiguous
    p_dq = dq + (first_row * HV + i_h) * K
    p_dk = dk + (first_row * N * HV + i_h) * K
    p_u = u + (first_row * N * HV + i_h) * V
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
    # When pairs of rows are stored, those of queries and rows have been read for the last time.
    m_tile = a_tile
    if BC < R:
        m_tile = gl.allocate_shared_memory(bf16, [R, R], sh_rr)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # With gates, the next chunk's coefficients come with its tiles: rows of a table of six, or β.
    TABLES: gl.constexpr = 2 if GATED else 1
    tables = gl.allocate_shared_memory(gl.float32, [TABLES, 8 * R if GATED else R], vector)
    query_logs = tables
    LOGS: gl.constexpr = LOG_HIGH if N == 1 else 0
    if GATED and N > 1:
        query_logs = gl.allocate_shared_memory(gl.float32, [2, 2 * BC], vector)
    by_column: gl.constexpr = gl.SliceLayout(0, tall_r)
    if GATED:
        # Pairs for the gates' gradient stand where A and T have been read for the last time.
        rows_tile = t_tile
        queries_tile = a_tile
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
    copy_rows(u_tile, p_u + start * (N * HV * V), n * N, 1, HV * V, 0, V, wide)
    if not GATED:
        copy_coefficients(tables.index(0), table + i_ch * R, n, R, WARPS)
    copy_chunk(
        0, start, i_ch, n, p_do, p_q, p_k, table, do_tiles, q_tiles, k_tiles, tables, query_logs,
        do_t, q_t, k_t, k_n, N, K, V, C, R, GATED, BK, WARPS,
    )  # fmt: skip
    copy_triangle(t_tile, ut, i_ch, n, R, WARPS)
    async_copy.commit_group()
    for step in tl.range(num_chunks, disable_licm=True):
        i = hide(num_chunks - 1 - step)
        n = gl.minimum(length - i * C, C)
        start = i.to(gl.int64) * C
        i_ch = (chunk + i) * HV + i_h
        z = 0
        if GATED:
            z = hidden_zero(i)
        k_tile = k_tiles.index(step % 2)
        q_tile = q_tiles.index(step % 2)
        do_tile = do_tiles.index(step % 2)
        k_t_tile = k_tile.permute((1, 0))
        do_t_tile = do_tile.permute((1, 0))
        coefficients = tables.index(step % 2 if GATED else 0)
        b_dsh = b_ds.to(bf16)
        ds_operand = gl.convert_layout(b_dsh, gl.DotOperandLayout(0, tall_r, 2))
        async_copy.wait_group(1 if GATED else 0)
        publish()
        ds_tile.store(b_dsh)
        if GATED:
            p_parts = parts + i_ch * parts_step
            logs = query_logs.index(step % 2)
            # Waiting for no product pins the scaling here, before the first one is started.
            b_decay = coefficients.slice(FROM_START * R + R - 1, 1)
            b_decay = b_decay.load(gl.SliceLayout(0, tall_k))[None, :]
            b_ds = warpgroup_mma_wait(0, [b_ds * b_decay])

        # dU = dS' Kᵀ + dOᵀ A, with A's transpose made on the way; dS gets what the queries give.
        b_a = multiply(k_tile, q_tile.permute((1, 0)), pair_c)
        b_du = multiply(ds_operand, k_t_tile, tall_r)
        if GATED:
            do_layout: gl.constexpr = gl.DotOperandLayout(0, tall_k, 2)
            b_decay = pick(coefficients, TOKEN_FROM_START, R, BC, gl.SliceLayout(0, do_layout))
            do_operand = do_t_tile.load(do_layout).to(gl.float32)
            do_operand = (do_operand * b_decay[None, :]).to(bf16)
            b_ds = multiply_add(do_operand, q_tile, b_ds)
        else:
            do_operand = ds_operand
            b_ds = multiply_add(do_t_tile, q_tile, b_ds)

        # The next chunk's tiles, and this one's state, are on their way meanwhile.
        copy_rows(s_tile, states + i_ch * K * V, V, 1, K, 0, K, wide, z)
        async_copy.commit_group()
        before = gl.maximum(i - 1, 0)
        n_before = gl.minimum(i, 1) * C
        start_before = before.to(gl.int64) * C
        i_before = (chunk + before) * HV + i_h
        copy_chunk(
            1 - step % 2, start_before, i_before, n_before, p_do, p_q, p_k, table,
            do_tiles, q_tiles, k_tiles, tables, query_logs,
            do_t, q_t, k_t, k_n, N, K, V, C, R, GATED, BK, WARPS, z,
        )  # fmt: skip

        b_a = warpgroup_mma_wait(2, [b_a])
        seen = row_of_query[:, None] <= column_of_query[None, :]
        if GATED:
            b_gamma = pair_decay(coefficients, logs, LOGS, BC, R, pair_c)
            b_gamma = gl.where(seen, b_gamma, 0.0)
            b_a *= b_gamma
        else:
            b_a *= gl.where(seen, 1.0, 0.0)
        a_tile.store(b_a.to(bf16))
        if GATED:
            b_du, ds_operand = warpgroup_mma_wait(1, [b_du, ds_operand])
            to_end = pick(coefficients, TO_END, R, R, by_column)
            b_du *= to_end[None, :]
            async_copy.wait_group(2)  # T came last
        publish()
        b_du = multiply_add(do_t_tile, a_tile.permute((1, 0)), b_du)
        b_at = multiply(u_tile, do_t_tile, pair_c)
        b_dk = multiply(u_tile, ds_tile, flat_k)
        b_du, b_ds, ds_operand, do_operand = warpgroup_mma_wait(
            2, [b_du, b_ds, ds_operand, do_operand]
        )

        # −β D, from registers into dS and through shared memory into all else.
        du_operand = gl.convert_layout(b_du.to(bf16), gl.DotOperandLayout(0, tall_r, 2))
        b_d = multiply(du_operand, t_tile, tall_r)
        if GATED:
            b_kk = multiply(k_tile, k_t_tile, pair_r)
        b_at = warpgroup_mma_wait(3 if GATED else 2, [b_at])
        if GATED:
            crossing = in_pairs(b_at * a_tile.load(pair_c).to(gl.float32))
            b_at *= b_gamma
        else:
            b_at *= gl.where(seen, 1.0, 0.0)
        at_tile.store(b_at.to(bf16))
        b_d, b_dk, du_operand = warpgroup_mma_wait(1 if GATED else 0, [b_d, b_dk, du_operand])
        b_d *= -pick(coefficients, BETA, R, R, by_column)[None, :]
        b_dh = b_d.to(bf16)
        d_tile.permute((1, 0)).store(b_dh)
        async_copy.wait_group(1)
        publish()
        b_m = multiply(u_tile, d_tile.permute((1, 0)), pair_r)
        if GATED:
            from_start = pick(coefficients, FROM_START, R, R, by_column)
            b_dh = (b_d * from_start[None, :]).to(bf16)
        d_operand = gl.convert_layout(b_dh, gl.DotOperandLayout(0, tall_k, 2))
        b_ds = multiply_add(d_operand, k_tile, b_ds)
        s_t_tile = s_tile.permute((1, 0))
        if GATED:
            b_read = multiply(d_tile, s_tile, flat_k)
        else:
            b_dk = multiply_add(d_tile, s_tile, b_dk)
            b_dq = multiply(s_t_tile, do_t_tile, tall_c)
            b_dq = multiply_add(k_t_tile, at_tile, b_dq)

        p_row = start * (N * HV)
        b_dv = times(d_tile.load(wide), -scale)
        store_tile_rows(p_dv + p_row * V, b_dv, n * N, HV * V, V, wide, z)
        if GATED:
            b_kk = warpgroup_mma_wait(3, [b_kk])
            store_kept(p_parts, s_tile, ds_tile, coefficients, z, R, WARPS)

        b_m = warpgroup_mma_wait(2 if GATED else 4, [b_m])
        store_beta_gradient(p_dbeta + p_row, b_m, coefficients, n * N, HV, -scale, z, R, GROUPS)
        above = row_of_pair[:, None] < column_of_pair[None, :]
        if GATED:
            b_decays = pair_decay(coefficients, coefficients, LOG_HIGH, R, R, pair_r)
            b_m *= gl.where(above, b_decays, 0.0)
        else:
            b_m *= gl.where(above, 1.0, 0.0)
        m_tile.store(b_m.to(bf16))
        if GATED:
            b_kk *= b_m
            if N == 1:
                b_kk += crossing.to(gl.float32)
            else:
                queries_tile.store(crossing)
            rows_tile.store(b_kk.to(bf16))
            # What rows write to the chunk's end, and what they take from its start.
            store_row_products(p_parts + WRITTEN * R, b_dk, k_tile, z, GROUPS)
            b_read, b_ds, d_operand = warpgroup_mma_wait(0, [b_read, b_ds, d_operand])
            from_start = pick(coefficients, FROM_START, R, R, gl.SliceLayout(1, flat_k))[:, None]
            store_row_products(p_parts + TAKEN * R, b_read, k_tile, z, GROUPS)
            to_end = pick(coefficients, TO_END, R, R, gl.SliceLayout(1, flat_k))[:, None]
            b_dk = b_dk * to_end + b_read * from_start
        publish()
        if GATED:
            b_crossing, here_on, queries_on = sum_from_here_on(
                rows_tile, queries_tile, N, R, BC, pair_r
            )
            if FLAT_Q:
                b_dq = multiply(do_tile, s_tile, flat_k)
            else:
                b_dq = multiply(s_tile.permute((1, 0)), do_t_tile, tall_c)
        p = p_u + start_before * (N * HV * V)
        copy_rows(u_tile, p, n_before * N, 1, HV * V, 0, V, wide, z)
        if not GATED:
            copy_triangle(t_tile, ut, i_before, n_before, R, WARPS, z)
            copy_coefficients(coefficients, table + i_before * R, n_before, R, WARPS)
        async_copy.commit_group()
        b_dk = multiply_add(m_tile, k_tile, b_dk)
        b_dk = multiply_add(m_tile.permute((1, 0)), k_tile, b_dk)
        b_dk = multiply_add(at_tile, q_tile, b_dk)
        if GATED:
            b_crossing, b_dq, here_on, queries_on = warpgroup_mma_wait(
                3, [b_crossing, b_dq, here_on, queries_on]
            )
            if FLAT_Q:
                from_start = pick(coefficients, TOKEN_FROM_START, R, BC, gl.SliceLayout(1, flat_k))
                b_dq *= from_start[:, None]
                store_row_products(p_parts + ASKED * R, b_dq, q_tile, z, GROUPS)
                b_dq = multiply_add(at_tile.permute((1, 0)), k_tile, b_dq)
            else:
                from_start = pick(coefficients, TOKEN_FROM_START, R, BC, gl.SliceLayout(0, tall_c))
                b_dq *= from_start[None, :]
                q_columns = q_tile.permute((1, 0)).load(tall_c).to(gl.float32)
                store_column_sums(p_parts + ASKED * R, b_dq * q_columns, WARPS)
                b_dq = multiply_add(k_t_tile, at_tile, b_dq)
            earlier = column_of_pair[None, :] // N < row_of_pair[:, None] // N
            b_crossing = gl.where(earlier, b_crossing, 0.0)
            store_row_sums(p_parts + CROSSING * R, b_crossing, z, GROUPS)
            b_dk = warpgroup_mma_wait(1, [b_dk])
            if BK == R:
                barrier()
            dk_tile.store((b_dk * scale).to(bf16))
            b_dq = warpgroup_mma_wait(0, [b_dq])
            if FLAT_Q:
                dq_tile.store((b_dq * scale).to(bf16))
            else:
                dq_tile.permute((1, 0)).store((b_dq * scale).to(bf16))
        else:
            b_dq, b_ds, d_operand = warpgroup_mma_wait(3, [b_dq, b_ds, d_operand])
            dq_tile.permute((1, 0)).store((b_dq * scale).to(bf16))
            b_dk = warpgroup_mma_wait(0, [b_dk])
            if BK == R:
                barrier()
            dk_tile.store((b_dk * scale).to(bf16))
        barrier()
        if GATED:
            copy_triangle(t_tile, ut, i_before, n_before, R, WARPS, z)
            async_copy.commit_group()
        store_tile_rows(p_dq + start * (HV * K), dq_tile.load(wide), n, HV * K, K, wide, z)
        store_tile_rows(p_dk + p_row * K, dk_tile.load(wide), n * N, HV * K, K, wide, z)

    async_copy.wait_group(0)
    if dinitial is not None:
        b_ds = (b_ds * scale).to(dinitial.dtype.element_ty)
        gl.store(dinitial + i_sh * K * V + o_k * V + o_v, b_ds, mask=in_state)


def hopper_sweep(
    p: Problem,
    segments: Segments,
    launch: config.Launch,
    do: Tensor,
    scale: float,
    saved: Saved,
    dfinal: Tensor | None,
    dinitial: Tensor | None,
    out: Gradients,
) -> None:
    """Run the kernel: the gradients are written to `dinitial` and `out`.

    If that of v goes where U was, the triangles are not needed afterwards either, and their memory
    is used.
    """
    if not p.num_sequences:
        return
    # Copies take 16 bytes at a time.
    q, k = (
        x if wide else x.clone(memory_format=torch.contiguous_format)
        for x, wide in zip((p.q, p.k), p.plan.wide_rows, strict=False)
    )
    if not has_wide_rows(do):
        do = do.clone(memory_format=torch.contiguous_format)
    parts, step = None, PARTS_SIZE
    if p.g is not None and out.v is saved.u:
        # A chunk's triangle has been read when its parts are written.
        parts, step = saved.ut.view(torch.float32), config.CHUNK_ROWS**2 // 2
    elif p.g is not None:
        parts = saved.table.new_empty(p.num_chunks * p.heads, step)
    key = "sweep", segments.chunks, scale, do.stride(), dfinal is None, dinitial is None, step
    p.plan.launcher(key, lambda: _sweep_launcher(p, segments, launch, do, q, k, scale, step))(
        do, q, k, saved.table, saved.ut, saved.states, saved.u, dfinal, dinitial,
        out.q, out.k, out.v, out.beta, parts, segments.bounds, segments.first_chunk,
    )  # fmt: skip
    if parts is not None and out.g is not None and p.num_chunks:
        p.plan.launcher(("gates", scale, step), lambda: _gate_launcher(p, launch, step, scale))(
            parts, saved.table, out.g, *p.packing
        )


def _sweep_launcher(
    p: Problem,
    segments: Segments,
    launch: config.Launch,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float,
    step: int,
) -> Launcher:
    constants = {name: x for name, x in p.constants.items() if name != "PRECISION"}
    return Launcher(
        hopper_sweep_kernel, (segments.number * p.heads,),
        parts_step=step, scale=scale, T=p.v.shape[1],
        **strides("do", do), **strides("q", q), **strides("k", k), HV=p.heads, **constants,
        SEGMENT=segments.chunks, BK=launch.block, WARPS=launch.num_warps, **launch.options,
    )  # fmt: skip


def _gate_launcher(p: Problem, launch: config.Launch, step: int, scale: float) -> Launcher:
    sizes = {name: p.constants[name] for name in ("N", "C", "R", "BC", "PACKED")}
    return Launcher(
        gate_kernel, (p.num_chunks * p.heads,),
        parts_step=step, scale=scale, T=p.v.shape[1], HV=p.heads, **sizes,
        GROUPS=launch.num_warps // 4, num_warps=1,
    )  # fmt: skip
