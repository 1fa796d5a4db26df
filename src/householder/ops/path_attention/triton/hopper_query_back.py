"""The gradients of queries in the rectangles for Hopper (compute capability 9.0), in Gluon.

The kernel of the queries of `attend_back.py`, its warps in roles as `hopper_roles.py` has them.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from householder.ops._gluon import barrier, exp2
from householder.ops._triton import launch
from householder.ops.path_attention.triton.hopper_roles import (
    COPY_REGISTERS,
    PLACES,
    REGISTERS,
    barriers,
    copy_block,
    copy_product,
    copy_rows,
    describe_rows,
    describe_tokens,
    highest_bit,
    leave_level,
    lifted,
    locate_tile,
    multiply,
    store_through,
)
from householder.ops.path_attention.triton.problem import LOG2_E, SIZES, Problem, locate_program


@gluon.jit
def copy_for_queries(
    queries, keys, values, outputs, products, s_q, s_k, s_v, s_do, s_f, q_full, q_empty, do_full,
    full, empty, f_full, f_empty, i_hq, i_h, HQ, H, num_rows, batch, first, sequence, token,
    v_column, do_column, pair, odd, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy what the queries' groups need, in the order in which they need it."""
    BYTES: gl.constexpr = 128 * (s_k.shape[2] + s_v.shape[2]) * 2
    DO_BYTES: gl.constexpr = 64 * s_v.shape[2] * 2
    row = sequence + token
    for half in gl.static_range(2):
        at = first + token + 64 * half
        mbarrier.expect(do_full.index(half), DO_BYTES)
        copy_block(outputs, [batch, at, do_column], do_full.index(half), lifted(s_do.index(half)))
    step = gl.to_tensor(0)
    number = gl.to_tensor(0)
    p_f = i_h * (num_rows // 32) + sequence // 32
    chunk = 2 * pair + odd
    rest = chunk
    while rest > 0:
        level = highest_bit(rest)
        left = (chunk >> level) - 1
        if number > 0:
            copy_product(products, p_f, level, left, s_f, f_full, f_empty, number)
        start = (left << level) * 64
        k_row = (level * H + i_h) * num_rows + sequence + start
        for i in range((1 << level) - (1 << level) // 2):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, BYTES)
            copy_block(keys, [k_row + i * 128, 0], bar, s_k.index(slot))
            key = first + start + i * 128
            copy_block(values, [batch, key, v_column], bar, lifted(s_v.index(slot)))
            step += 1
            if i == 0:
                q_row = (level * HQ + i_hq) * num_rows + row
                if level > 0:
                    mbarrier.wait(q_empty.index(0), (number & 1) ^ 1)
                    copy_rows(queries, q_row, s_q.index(0), q_full.index(0))
                mbarrier.wait(q_empty.index(1), (number & 1) ^ 1)
                copy_rows(queries, q_row + 64, s_q.index(1), q_full.index(1))
        number += 1
        rest = rest ^ (1 << level)


@gluon.jit
def differentiate_rows(
    s_q, s_k, s_v, s_do, s_f, q_full, q_empty, do_full, full, empty, f_full, f_empty, lse, delta,
    dq_levels, dq, of_row, of_level, pair, odd, WHO: gl.constexpr, K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Write dQ← of one chunk of the tile: the first one, or with WHO = 1 the second one."""
    half: gl.constexpr = s_q.dtype
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    by_near_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    by_column: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, by_column, 2)
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, by_key))
    b_lse = gl.load(lse + of_row + o_m)
    b_delta = gl.load(delta + of_row + o_m)
    b_dq = gl.zeros([64, K], gl.float32, layout=by_column)
    step = gl.to_tensor(0)
    number = gl.to_tensor(0)
    mbarrier.wait(do_full, 0)
    rest = pair
    while rest > 0:
        level = highest_bit(rest) + 1
        if number > 0:
            p_level = dq_levels + (level * of_level + of_row) * K
            product = s_f.permute([1, 0])
            b_dq = leave_level(s_q, p_level, b_dq, q_empty, product, f_full, number, by_column)
            barrier()
            mbarrier.arrive(f_empty, count=1)
        mbarrier.wait(q_full, number & 1)
        for _ in range(1 << (level - 1)):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            b_k = s_k.index(slot)
            b_a = multiply(s_q, b_k.permute([1, 0]), by_key)
            b_dp = multiply(s_do, s_v.index(slot).permute([1, 0]), by_key)
            b_a = warpgroup_mma_wait(1, [b_a])
            b_p = exp2(b_a * LOG2_E - b_lse[:, None])
            b_dp = warpgroup_mma_wait(0, [b_dp])
            b_p = b_p * (b_dp - b_delta[:, None])
            b_da = gl.convert_layout(b_p.to(half), operand)
            b_dq = warpgroup_mma(b_da, b_k, b_dq)
            barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            step += 1
        number += 1
        rest = rest ^ (1 << (level - 1))
    if WHO == 1:  # noqa: SIM102 - a constant of the kernel, and a number that it reads
        if odd > 0:
            # The second chunk sees the first one, which is half of the tile of keys.
            if number > 0:
                p_level = dq_levels + of_row * K
                product = s_f.permute([1, 0])
                b_dq = leave_level(s_q, p_level, b_dq, q_empty, product, f_full, number, by_column)
            mbarrier.wait(q_full, number & 1)
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            b_k = s_k.index(slot).slice(0, 64)
            b_a = multiply(s_q, b_k.permute([1, 0]), by_near_key)
            b_dp = multiply(s_do, s_v.index(slot).slice(0, 64).permute([1, 0]), by_near_key)
            b_a, b_dp = warpgroup_mma_wait(0, [b_a, b_dp])
            near: gl.constexpr = gl.SliceLayout(1, by_near_key)
            b_p = exp2(b_a * LOG2_E - gl.convert_layout(b_lse, near)[:, None])
            b_p = b_p * (b_dp - gl.convert_layout(b_delta, near)[:, None])
            b_dq = warpgroup_mma(gl.convert_layout(b_p.to(half), operand), b_k, b_dq)
    barrier()
    store_through(s_q, dq + of_row * K, b_dq, 64, K, K)


@gluon.jit(do_not_specialize=SIZES)
def query_kernel(
    queries, keys, values, outputs, products, lse, delta, dq_levels, dq, cu_seqlens, tile_sequence,
    first_tile, T, num_tiles, H, first_query, v_h, do_h, GROUP: gl.constexpr, K: gl.constexpr,
    V: gl.constexpr, PACKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Write dQ← of 128 query rows of one head."""
    half: gl.constexpr = queries.dtype
    HQ = gl.to_tensor(H) * GROUP
    num_tiles = gl.to_tensor(num_tiles)
    per_row = num_tiles if PACKED else (gl.to_tensor(T) + 127) // 128
    i_sequence, i_m = locate_program(gl.program_id(0), per_row, num_tiles // per_row * HQ, PLACES)
    i_hq = i_sequence % HQ
    i_m = (i_sequence // HQ + 1) * per_row - 1 - i_m
    batch, first, length, tile = locate_tile(i_m, T, cu_seqlens, tile_sequence, first_tile, PACKED)
    i_h = i_hq // GROUP
    num_rows = num_tiles * 128
    token = (i_m - tile) * 128
    left = length - token
    # Tiles behind the end of a packed batch have nothing to do, and zeros get those that ask
    # nothing.
    pair = gl.where(left > 0, i_m - tile, 0)
    odd = (left > 64).to(gl.int32)
    if first_query is not None:
        pair = gl.where(token + 128 <= first_query, 0, pair)
        odd = gl.where(token + 128 <= first_query, 0, odd)
    of_row = i_hq.to(gl.int64) * num_rows + i_m * 128
    of_level = HQ.to(gl.int64) * num_rows

    rows_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, K], half)
    rows_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, V], half)
    tiles_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, K], half)
    tiles_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, V], half)
    squares: gl.constexpr = gl.NVMMASharedLayout.get_default_for([K, K], gl.float16)
    s_q = gl.allocate_shared_memory(half, [2, 64, K], rows_k)
    s_do = gl.allocate_shared_memory(half, [2, 64, V], rows_v)
    s_k = gl.allocate_shared_memory(half, [STAGES, 128, K], tiles_k)
    s_v = gl.allocate_shared_memory(half, [STAGES, 128, V], tiles_v)
    s_f = gl.allocate_shared_memory(gl.float16, [K, K], squares)
    q_full = barriers(2, 1)
    q_empty = barriers(2, 1)
    do_full = barriers(2, 1)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    f_full = barriers(1, 1).index(0)
    f_empty = barriers(1, 2).index(0)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (
                differentiate_rows,
                (
                    s_q.index(0), s_k, s_v, s_do.index(0), s_f, q_full.index(0), q_empty.index(0),
                    do_full.index(0), full, empty, f_full, f_empty, lse, delta, dq_levels, dq,
                    of_row, of_level, pair, odd, 0, K, STAGES,
                ),
            ),
            (
                differentiate_rows,
                (
                    s_q.index(1), s_k, s_v, s_do.index(1), s_f, q_full.index(1), q_empty.index(1),
                    do_full.index(1), full, empty, f_full, f_empty, lse, delta, dq_levels, dq,
                    of_row + 64, of_level, pair, odd, 1, K, STAGES,
                ),
            ),
            (
                copy_for_queries,
                (
                    queries, keys, values, outputs, products, s_q, s_k, s_v, s_do, s_f, q_full,
                    q_empty, do_full, full, empty, f_full, f_empty, i_hq, i_h, HQ, H, num_rows,
                    batch, first, tile * 128, token, i_h * v_h, i_hq * do_h, pair, odd, STAGES,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def differentiate_queries(
    p: Problem, q: Tensor, k: Tensor, f: Tensor, lse: Tensor, delta: Tensor, do: Tensor,
    dq_levels: Tensor, dq: Tensor,
) -> None:  # fmt: skip
    """Write dQ← of all queries, from the tree's queries, keys and products."""
    H, K = p.k.shape[2:]
    V, T = p.v.shape[-1], p.q.shape[1]
    launch(
        query_kernel, (p.num_tiles * p.heads,),
        describe_rows(q, 64), describe_rows(k, 128), describe_tokens(p.v, 128),
        describe_tokens(do, 64), describe_rows(f, K), lse, delta, dq_levels, dq, *p.packing, T,
        p.num_tiles, H, p.first_query, p.v.stride(2), do.stride(2), GROUP=p.heads // H, K=K, V=V,
        PACKED=p.cu_seqlens is not None, STAGES=2, num_warps=4,
    )  # fmt: skip
