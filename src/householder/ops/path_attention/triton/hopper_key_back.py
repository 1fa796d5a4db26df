"""The gradients of keys and values in the rectangles for Hopper, in Gluon.

The kernel of the keys of `attend_back.py`, its warps in roles as `hopper_roles.py` has them.
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
from householder.ops.path_attention.triton import gradient_config as config
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
def left_levels(pair, last):
    """Return, by bits, the levels from 1 on at which a tile is in a block with a right neighbour.

    Bit l − 1 stands for level l. The tile's chunks are 2 · pair and the next, the sequence's last
    chunk is `last`.
    """
    top = pair ^ (last >> 1)
    # All bits up to the highest one in which they differ.
    below = (2 << gl.maximum(highest_bit(top), 0)) - 1
    return gl.where(top > 0, below & ~pair, 0)


@gluon.jit
def copy_for_keys(
    queries, chunk_queries, keys, values, outputs, products, lse, delta, s_q, s_k, s_v, s_do, s_f,
    s_lse, s_delta, k_full, k_empty, v_full, full, empty, f_full, f_empty, i_h, HQ, H, num_rows,
    batch, first, sequence, token, v_column, do_h, pair, last, first_query, GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy what the keys' groups need, in the order in which they need it."""
    K: gl.constexpr = s_q.shape[2]
    V: gl.constexpr = s_do.shape[2]
    ROWS: gl.constexpr = s_q.shape[1]
    line: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    o_line = gl.arange(0, ROWS, layout=line)
    row = sequence + token
    for i_chunk in gl.static_range(2):
        at = first + token + 64 * i_chunk
        bar = v_full.index(i_chunk)
        mbarrier.expect(bar, 64 * V * 2)
        copy_block(values, [batch, at, v_column], bar, lifted(s_v.index(i_chunk)))
    step = gl.to_tensor(0)
    number = gl.to_tensor(0)
    p_f = i_h * (num_rows // 32) + sequence // 32
    # With bit 0 for level 0, where only the first chunk of the tile has a neighbour.
    rest = 2 * left_levels(pair, last) + gl.where(2 * pair < last, 1, 0)
    while rest > 0:
        level = highest_bit(rest)
        right = ((2 * pair) >> level) + 1
        k_row = (level * H + i_h) * num_rows + row
        mbarrier.wait(k_empty, (number & 1) ^ 1)
        copy_rows(keys, k_row, s_k.index(0), k_full.index(0))
        if level > 0:
            copy_rows(keys, k_row + 64, s_k.index(1), k_full.index(1))
        if number > 0:
            copy_product(products, p_f, level, right, s_f, f_full, f_empty, number)
        start = right << level
        stop = gl.minimum(start + (1 << level), last + 1)
        if first_query is not None:
            start = gl.maximum(start, first_query // 128 * 2)
        for i_g in range(GROUP):
            i_hq = i_h * GROUP + i_g
            q_row = (level * HQ + i_hq) * num_rows + sequence
            p_rows = i_hq.to(gl.int64) * num_rows + sequence
            for i in range(start, stop, ROWS // 64):
                slot = step % STAGES
                asked = o_line < (stop - i) * 64
                b_lse = gl.load(lse + p_rows + i * 64 + o_line, mask=asked, other=float("inf"))
                b_delta = gl.load(delta + p_rows + i * 64 + o_line, mask=asked, other=0.0)
                mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
                bar = full.index(slot)
                mbarrier.expect(bar, ROWS * (K + V) * 2)
                if (ROWS == 128) & (level == 0):
                    # Only one chunk asks. Queries of the next one were not written at this level,
                    # and what stands in for them, with lse = ∞, must be numbers.
                    for j in gl.static_range(ROWS // 64):
                        tile = s_q.index(slot).slice(64 * j, 64)
                        copy_block(chunk_queries, [q_row + i * 64, 0], bar, tile)
                else:
                    # Of two chunks one may lie behind the sequence's end: its queries are zero.
                    copy_block(queries, [q_row + i * 64, 0], bar, s_q.index(slot))
                column = i_hq * do_h
                copy_block(outputs, [batch, first + i * 64, column], bar, lifted(s_do.index(slot)))
                s_lse.index(slot).store(b_lse)
                s_delta.index(slot).store(b_delta)
                barrier()
                mbarrier.arrive(bar, count=1)
                step += 1
        number += 1
        rest = rest ^ (1 << level)


@gluon.jit
def differentiate_rows(
    s_q, s_k, s_v, s_do, s_f, s_lse, s_delta, k_full, k_empty, v_full, full, empty, f_full, f_empty,
    dk_levels, dk, dv, of_row, of_level, pair, last, first_query, WHO: gl.constexpr,
    GROUP: gl.constexpr, K: gl.constexpr, V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Write dK→ and dV of one chunk of the tile: the first, or with WHO = 1 the second one."""
    half: gl.constexpr = s_q.dtype
    ROWS: gl.constexpr = s_q.shape[1]
    by_query: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    by_column: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    by_value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    row: gl.constexpr = gl.SliceLayout(0, by_query)
    b_dk = gl.zeros([64, K], gl.float32, layout=by_column)
    b_dv = gl.zeros([64, V], gl.float32, layout=by_value)
    step = gl.to_tensor(0)
    number = gl.to_tensor(0)
    mbarrier.wait(v_full, 0)
    rest = 2 * left_levels(pair, last)
    if WHO == 0:
        rest += gl.where(2 * pair < last, 1, 0)
    while rest > 0:
        level = highest_bit(rest)
        right = ((2 * pair) >> level) + 1
        if number > 0:
            p_level = dk_levels + (level * of_level + of_row) * K
            b_dk = leave_level(s_k, p_level, b_dk, k_empty, s_f, f_full, number, by_column)
            barrier()
            mbarrier.arrive(f_empty, count=1)
        mbarrier.wait(k_full, number & 1)
        start = right << level
        stop = gl.minimum(start + (1 << level), last + 1)
        if first_query is not None:
            start = gl.maximum(start, first_query // 128 * 2)
        for _ in range((stop - start + ROWS // 64 - 1) // (ROWS // 64) * GROUP):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            b_q = s_q.index(slot)
            b_do = s_do.index(slot)
            b_a = multiply(s_k, b_q.permute([1, 0]), by_query)
            b_dp = multiply(s_v, b_do.permute([1, 0]), by_query)
            b_lse = s_lse.index(slot).load(row)
            b_a = warpgroup_mma_wait(1, [b_a])
            b_p = exp2(b_a * LOG2_E - b_lse[None, :])
            b_w = gl.convert_layout(b_p.to(half), gl.DotOperandLayout(0, by_value, 2))
            b_dv = warpgroup_mma(b_w, b_do, b_dv, is_async=True)
            b_dp = warpgroup_mma_wait(1, [b_dp])
            b_delta = s_delta.index(slot).load(row)
            b_p = b_p * (b_dp - b_delta[None, :])
            b_da = gl.convert_layout(b_p.to(half), gl.DotOperandLayout(0, by_column, 2))
            b_dk = warpgroup_mma(b_da, b_q, b_dk, is_async=True)
            b_dv, b_dk = warpgroup_mma_wait(0, [b_dv, b_dk])
            barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            step += 1
        number += 1
        rest = rest ^ (1 << level)
    if WHO == 1:  # noqa: SIM102 - a constant of the kernel, and a number that it reads
        if 2 * pair < last:
            # What is copied for the first chunk only is let go of by both.
            mbarrier.arrive(k_empty, count=1, pred=number > 0)
            copied = GROUP
            if first_query is not None:
                copied = gl.where(2 * pair + 1 < first_query // 128 * 2, 0, GROUP)
            for _ in range(copied):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(slot), count=1)
                step += 1
    barrier()
    store_through(s_k, dk + of_row * K, b_dk, 64, K, K)
    store_through(s_v, dv + of_row * V, b_dv, 64, V, V)


@gluon.jit(do_not_specialize=SIZES)
def key_kernel(
    queries, chunk_queries, keys, values, outputs, products, lse, delta, dk_levels, dk, dv,
    cu_seqlens, tile_sequence, first_tile, T, num_tiles, H, first_query, v_h, do_h,
    GROUP: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PACKED: gl.constexpr,
    ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Write dK→ and dV of 128 keys of one head but for what their own chunks give.

    They meet ROWS queries at a time, one chunk or two, which `queries` copies; `chunk_queries`
    copies one.
    """
    half: gl.constexpr = queries.dtype
    H = gl.to_tensor(H)
    num_tiles = gl.to_tensor(num_tiles)
    per_row = num_tiles if PACKED else (gl.to_tensor(T) + 127) // 128
    i_sequence, i_n = locate_program(gl.program_id(0), per_row, num_tiles // per_row * H, PLACES)
    i_h = i_sequence % H
    i_n += i_sequence // H * per_row
    batch, first, length, tile = locate_tile(i_n, T, cu_seqlens, tile_sequence, first_tile, PACKED)
    HQ = H * GROUP
    num_rows = num_tiles * 128
    token = (i_n - tile) * 128
    # Tiles behind the end of a packed batch have nothing to do.
    last = (length + 63) // 64 - 1
    pair = gl.minimum(i_n - tile, last // 2)
    of_row = i_h.to(gl.int64) * num_rows + i_n * 128
    of_level = H.to(gl.int64) * num_rows

    rows_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, K], half)
    rows_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, V], half)
    squares: gl.constexpr = gl.NVMMASharedLayout.get_default_for([K, K], gl.float16)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_q = gl.allocate_shared_memory(half, [STAGES, ROWS, K], rows_k)
    s_do = gl.allocate_shared_memory(half, [STAGES, ROWS, V], rows_v)
    s_k = gl.allocate_shared_memory(half, [2, 64, K], rows_k)
    s_v = gl.allocate_shared_memory(half, [2, 64, V], rows_v)
    s_f = gl.allocate_shared_memory(gl.float16, [K, K], squares)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line)
    k_full = barriers(2, 1)
    k_empty = barriers(1, 2).index(0)
    v_full = barriers(2, 1)
    full = barriers(STAGES, 2)
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
                    s_q, s_k.index(0), s_v.index(0), s_do, s_f, s_lse, s_delta, k_full.index(0),
                    k_empty, v_full.index(0), full, empty, f_full, f_empty, dk_levels, dk, dv,
                    of_row, of_level, pair, last, first_query, 0, GROUP, K, V, STAGES,
                ),
            ),
            (
                differentiate_rows,
                (
                    s_q, s_k.index(1), s_v.index(1), s_do, s_f, s_lse, s_delta, k_full.index(1),
                    k_empty, v_full.index(1), full, empty, f_full, f_empty, dk_levels, dk, dv,
                    of_row + 64, of_level, pair, last, first_query, 1, GROUP, K, V, STAGES,
                ),
            ),
            (
                copy_for_keys,
                (
                    queries, chunk_queries, keys, values, outputs, products, lse, delta, s_q, s_k,
                    s_v, s_do, s_f, s_lse, s_delta, k_full, k_empty, v_full, full, empty, f_full,
                    f_empty, i_h, HQ, H, num_rows, batch, first, tile * 128, token, i_h * v_h, do_h,
                    pair, last, first_query, GROUP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def differentiate_keys(
    p: Problem, q: Tensor, k: Tensor, f: Tensor, lse: Tensor, delta: Tensor, do: Tensor,
    dk_levels: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write dK→ and dV of all keys, from the tree's queries, keys and products."""
    H, K = p.k.shape[2:]
    V, T = p.v.shape[-1], p.q.shape[1]
    rows, stages = config.hopper_key_tiles(K, V)
    launch(
        key_kernel, (p.num_tiles * H,),
        describe_rows(q, rows), describe_rows(q, 64), describe_rows(k, 64),
        describe_tokens(p.v, 64), describe_tokens(do, rows), describe_rows(f, K), lse, delta,
        dk_levels, dk, dv, *p.packing, T, p.num_tiles, H, p.first_query, p.v.stride(2),
        do.stride(2), GROUP=p.heads // H, K=K, V=V, PACKED=p.cu_seqlens is not None, ROWS=rows,
        STAGES=stages, num_warps=4,
    )  # fmt: skip
