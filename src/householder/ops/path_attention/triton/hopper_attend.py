"""The attention for Hopper (compute capability 9.0), in Gluon: the rectangles of `attend.py`.

A program has 128 queries. Two groups of warps have a chunk of them each, and a warp of its own
copies keys, values and products ahead of both, across the borders of levels too: at a border no
group waits for memory.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from householder.ops._gluon import barrier, exp2, row_layout
from householder.ops._triton import launch
from householder.ops.path_attention.triton import config
from householder.ops.path_attention.triton.hopper_roles import (
    COPY_REGISTERS,
    PLACES,
    REGISTERS,
    barriers,
    copy_rows,
    copy_values,
    describe_rows,
    describe_tokens,
    locate_tile,
    lowest_bit,
    store_through,
)
from householder.ops.path_attention.triton.problem import (
    LN_2,
    LOG2_E,
    SIZES,
    Problem,
    locate_program,
)
from householder.ops.path_attention.triton.tree import Tree


@gluon.jit
def copy_all(
    queries, keys, values, products, weights, s_q, s_k, s_v, s_f, s_w, q_full, k_full, v_full,
    empty, f_full, f_empty, w_full, i_hq, i_h, HQ, H, num_rows, batch, first, sequence, token,
    column, pair, odd, K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy what both groups need, in the order in which they need it."""
    row = sequence + token
    step = gl.to_tensor(1)
    passed = gl.to_tensor(0)
    p_f = i_h * (num_rows // 32) + sequence // 32
    if odd > 0:
        copy_rows(queries, i_hq * num_rows + row + 64, s_q.index(1), q_full.index(1))
    # A tile's own keys are for its second chunk, which sees the first, its values for both.
    copy_rows(keys, i_h * num_rows + row, s_k.index(0), k_full.index(0))
    for half in gl.static_range(2):
        w_row = i_hq * num_rows + row + 64 * half
        copy_rows(weights, w_row, s_w.index(half), w_full.index(half))
    copy_values(values, batch, first + token, column, s_v.index(0), v_full.index(0))
    if (odd > 0) & (pair > 0):
        copy_rows(products, (p_f + token // 32) * K, s_f, f_full)
        passed += 1
    if pair > 0:
        level = lowest_bit(pair) + 1
        copy_rows(queries, (level * HQ + i_hq) * num_rows + row, s_q.index(0), q_full.index(0))
    rest = pair
    while rest > 0:
        level = lowest_bit(rest) + 1
        left = ((2 * pair) >> level) - 1
        start = (left << level) * 64
        k_row = (level * H + i_h) * num_rows + sequence + start
        for i in range(1 << (level - 1)):
            slot = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(empty.index(slot), phase ^ 1)
            copy_rows(keys, k_row + i * 128, s_k.index(slot), k_full.index(slot))
            key = first + start + i * 128
            copy_values(values, batch, key, column, s_v.index(slot), v_full.index(slot))
            step += 1
            if (i == 0) & ((rest & (rest - 1)) > 0):
                mbarrier.wait(f_empty, (passed & 1) ^ 1)
                p_product = p_f + ((2 * left + 1) << level) - 1
                copy_rows(products, p_product * K, s_f, f_full)
                passed += 1
        rest = rest & (rest - 1)


@gluon.jit
def soften(b_a, b_top, b_total, weights: gl.constexpr, half: gl.constexpr):
    """Take logits into the softmax of their rows.

    Returns the weights as operand of a product, the factor on what the rows have so far, and the
    new tops and totals.
    """
    by_row: gl.constexpr = b_top.type.layout
    new = gl.convert_layout(gl.max(b_a, axis=1), by_row) * LOG2_E
    new = gl.maximum(b_top, new)
    shift = gl.convert_layout(new, gl.SliceLayout(1, b_a.type.layout))[:, None]
    b_a = exp2(b_a * LOG2_E - shift)
    rescale = exp2(b_top - new)
    b_total = b_total * rescale + gl.convert_layout(gl.sum(b_a, axis=1), by_row)
    return gl.convert_layout(b_a.to(half), weights), rescale, new, b_total


@gluon.jit
def attend_rows(
    s_q, s_k, s_v, s_f, s_w, s_o, q_full, k_full, v_full, empty, f_full, f_empty, w_full, sinks, o,
    lse, i_hq, of_token, HQ, left, pair, odd, WHO: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Attend for one chunk of the tile: the first one, or with WHO = 1 the second one."""
    half: gl.constexpr = s_q.dtype
    by_key: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    by_value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    by_column: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, by_value)
    weights: gl.constexpr = gl.DotOperandLayout(0, by_value, 2)
    operand: gl.constexpr = gl.DotOperandLayout(0, by_column, 2)

    o_m = gl.arange(0, 64, layout=by_row)
    m_m = o_m < left
    p_lse = lse + of_token + o_m * HQ
    b_top = gl.load(p_lse, mask=m_m, other=0.0)
    b_total = gl.full([64], 1.0, gl.float32, layout=by_row)
    none = gl.zeros([64, 128], gl.float32, layout=by_key)

    # What the chunk sees in itself, with weights of which the total is 1.
    mbarrier.wait(w_full, 0)
    mbarrier.wait(v_full.index(0), 0)
    own = s_v.index(0).slice(64 * WHO, 64)
    if left < 64:
        # Behind the sequence's end is what another has, be it infinite.
        whole: gl.constexpr = row_layout(V, 8, gl.num_warps())
        inside = gl.arange(0, 64, layout=gl.SliceLayout(1, whole)) < left
        own.store(gl.where(inside[:, None], own.load(whole), 0.0))
        fence_async_shared()
        barrier()
    b_o = gl.zeros([64, V], gl.float32, layout=by_value)
    b_o = warpgroup_mma(s_w, own, b_o, use_acc=False)

    step = gl.to_tensor(1)
    passed = gl.to_tensor(0)
    if WHO == 1:
        mbarrier.wait(q_full, 0, pred=odd > 0)
    else:
        mbarrier.wait(q_full, 0, pred=pair > 0)
    b_q = s_q.load(operand).to(gl.float16)
    if odd > 0:
        if WHO == 1:
            # The second chunk sees the first one; the other half of the tile are its own keys.
            chunk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
            b_a = gl.zeros([64, 64], gl.float32, layout=chunk_layout)
            b_k = s_k.index(0).slice(0, 64).permute([1, 0])
            mbarrier.wait(k_full.index(0), 0)
            b_a = warpgroup_mma(s_q, b_k, b_a, use_acc=False)
            b_p, rescale, b_top, b_total = soften(b_a, b_top, b_total, weights, half)
            b_o = warpgroup_mma(b_p, s_v.index(0).slice(0, 64), b_o * rescale[:, None])
            if pair > 0:
                mbarrier.wait(f_full, 0)
                b_f = gl.zeros([64, K], gl.float32, layout=by_column)
                b_f = warpgroup_mma(b_q, s_f, b_f, use_acc=False)
                b_q = gl.convert_layout(b_f.to(gl.float16), operand)
                barrier()
                s_q.store(b_f.to(half))
                fence_async_shared()
        else:
            # Who lets go of what it has no use for waits for it too: of a barrier it can only ask
            # whether the last phase but one is over.
            mbarrier.wait(f_full, 0, pred=pair > 0)
        if pair > 0:
            barrier()
            mbarrier.arrive(f_empty, count=1)
            passed += 1
    # Of a tile's own keys the first chunk has none to see.
    mbarrier.wait(k_full.index(0), 0)
    barrier()
    mbarrier.arrive(empty.index(0), count=1)

    rest = pair
    while rest > 0:
        level = lowest_bit(rest) + 1
        for _ in range(1 << (level - 1)):
            slot = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_full.index(slot), phase)
            b_a = warpgroup_mma(s_q, s_k.index(slot).permute([1, 0]), none, use_acc=False)
            b_p, rescale, b_top, b_total = soften(b_a, b_top, b_total, weights, half)
            mbarrier.wait(v_full.index(slot), phase)
            b_o = warpgroup_mma(b_p, s_v.index(slot), b_o * rescale[:, None])
            barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            step += 1
        rest = rest & (rest - 1)
        if rest > 0:
            mbarrier.wait(f_full, passed & 1)
            b_f = gl.zeros([64, K], gl.float32, layout=by_column)
            b_f = warpgroup_mma(b_q, s_f, b_f, use_acc=False)
            b_q = gl.convert_layout(b_f.to(gl.float16), operand)
            barrier()
            mbarrier.arrive(f_empty, count=1)
            s_q.store(b_f.to(half))
            fence_async_shared()
            barrier()
            passed += 1

    if sinks is not None:
        # A sink takes part in the softmax and has no value.
        sink = gl.load(sinks + i_hq).to(gl.float32) * LOG2_E
        new = gl.maximum(b_top, sink)
        rescale = exp2(b_top - new)
        b_total = b_total * rescale + exp2(sink - new)
        b_o *= rescale[:, None]
        b_top = new
    b_o = b_o / b_total[:, None]
    barrier()
    store_through(s_o, o + of_token * V, b_o, left, HQ * V, V)
    gl.store(p_lse, (b_top + gl.log2(b_total)) * LN_2, mask=m_m)


@gluon.jit(do_not_specialize=SIZES)
def attend_kernel(
    queries, keys, values, products, weights, sinks, o, lse, cu_seqlens, tile_sequence, first_tile,
    T, num_tiles, H, first_query, v_h, GROUP: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    PACKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Write o and log Σ exp of 128 query rows of one head; `lse` has those of their own chunks.

    `queries` and `keys` are rows of all levels, `products` rows of those of all blocks, `weights`
    what rows give to tokens of their own chunks, and `values` is `[B, T, H · V]`; all as
    descriptors of what is copied at a time.
    """
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
    # Tiles behind the end of a packed batch have nothing to do, nor have those that ask nothing.
    pair = gl.where(left > 0, i_m - tile, 0)
    odd = (left > 64).to(gl.int32)
    if first_query is not None:
        pair = gl.where(token + 128 <= first_query, 0, pair)
        odd = gl.where(token + 128 <= first_query, 0, odd)
    of_token = (batch.to(gl.int64) * T + first + token) * HQ + i_hq

    s_q = gl.allocate_shared_memory(
        half, [2, 64, K], gl.NVMMASharedLayout.get_default_for([64, K], half)
    )
    s_k = gl.allocate_shared_memory(
        half, [STAGES, 128, K], gl.NVMMASharedLayout.get_default_for([128, K], half)
    )
    s_v = gl.allocate_shared_memory(
        half, [STAGES, 128, V], gl.NVMMASharedLayout.get_default_for([128, V], half)
    )
    s_f = gl.allocate_shared_memory(
        gl.float16, [K, K], gl.NVMMASharedLayout.get_default_for([K, K], gl.float16)
    )
    s_w = gl.allocate_shared_memory(
        half, [2, 64, 64], gl.NVMMASharedLayout.get_default_for([64, 64], half)
    )
    # Queries are not needed any more where outputs leave.
    s_o = s_q
    if K != V:
        s_o = gl.allocate_shared_memory(
            half, [2, 64, V], gl.NVMMASharedLayout.get_default_for([64, V], half)
        )
    q_full = barriers(2, 1)
    w_full = barriers(2, 1)
    k_full = barriers(STAGES, 1)
    v_full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    f_full = barriers(1, 1).index(0)
    f_empty = barriers(1, 2).index(0)
    fence_async_shared()
    barrier()
    # Tuples with names of their own would lose what is constant in them.
    gl.warp_specialize(
        [
            (
                attend_rows,
                (
                    s_q.index(0), s_k, s_v, s_f, s_w.index(0), s_o.index(0), q_full.index(0),
                    k_full, v_full, empty, f_full, f_empty, w_full.index(0), sinks, o, lse, i_hq,
                    of_token, HQ, left, pair, odd, 0, K, V, STAGES,
                ),
            ),
            (
                attend_rows,
                (
                    s_q.index(1), s_k, s_v, s_f, s_w.index(1), s_o.index(1), q_full.index(1),
                    k_full, v_full, empty, f_full, f_empty, w_full.index(1), sinks, o, lse, i_hq,
                    of_token + 64 * HQ, HQ, left - 64, pair, odd, 1, K, V, STAGES,
                ),
            ),
            (
                copy_all,
                (
                    queries, keys, values, products, weights, s_q, s_k, s_v, s_f, s_w, q_full,
                    k_full, v_full, empty, f_full, f_empty, w_full, i_hq, i_h, HQ, H, num_rows,
                    batch, first, tile * 128, token, i_h * v_h, pair, odd, K, STAGES,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def attend(p: Problem, tree: Tree, weights: Tensor, o: Tensor, lse: Tensor) -> None:
    """Attend, from the tree, and the `weights` of the chunks' own tokens with their `lse`."""
    H, K = p.k.shape[2:]
    V, T = p.v.shape[-1], p.q.shape[1]
    launch(
        attend_kernel, (p.num_tiles * p.heads,),
        describe_rows(tree.q, 64), describe_rows(tree.k, 128), describe_tokens(p.v, 128),
        describe_rows(tree.f, K), describe_rows(weights, 64), p.sinks, o, lse, *p.packing, T,
        p.num_tiles, H, p.first_query, p.v.stride(2), GROUP=p.heads // H, K=K, V=V,
        PACKED=p.cu_seqlens is not None, STAGES=config.hopper_attend_stages(K, V), num_warps=4,
    )  # fmt: skip
