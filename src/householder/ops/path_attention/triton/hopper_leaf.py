"""The gradients of the chunks' own products for Hopper (compute capability 9.0), in Gluon.

The kernel of the leaves of `descend.py`, for as many query as key heads: queries and keys of all
levels, and their gradients, are then one tensor each. All that a chunk needs is copied at once.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from householder.ops._gluon import barrier, row_layout, store_rows
from householder.ops._triton import launch
from householder.ops.path_attention.triton.hopper_roles import locate_tile
from householder.ops.path_attention.triton.hopper_squares import (
    add,
    copy_square,
    in_float16,
    load_part,
    publish,
    squares,
    start,
)
from householder.ops.path_attention.triton.problem import SIZES, Problem


@gluon.jit(do_not_specialize=SIZES)
def leaf_kernel(
    levels, dlevels, w, f, df, wdf, wdft, cu_seqlens, tile_sequence, first_tile, T, num_tiles, H,
    first_query, w_b, w_h, w_t: gl.constexpr, K: gl.constexpr, PACKED: gl.constexpr,
    NK: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Write W dF and W dFᵀ of one chunk and head, for chunks whose product has a gradient.

    NK squares hold 64 rows of K columns; WIDE says that W is float32.
    """
    bf16: gl.constexpr = gl.bfloat16
    pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 64, 16])
    load: gl.constexpr = row_layout(64, 8, gl.num_warps())
    # Where in shared memory the product above and the one beside the chunk's own are, and W.
    ABOVE: gl.constexpr = 2 * NK
    BESIDE: gl.constexpr = ABOVE + NK * NK
    W: gl.constexpr = BESIDE + NK * NK
    H = gl.to_tensor(H)
    i_chunk = gl.program_id(0) // H
    i_h = (gl.program_id(0) % H).to(gl.int64)
    batch, first, length, tile = locate_tile(
        i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    chunk = i_chunk - 2 * tile
    last = (length + 63) // 64 - 1
    if (chunk > 0) & (chunk < last):
        num_rows = gl.to_tensor(num_tiles).to(gl.int64) * 128
        is_left = chunk % 2 == 0
        other = i_chunk + gl.where(is_left, 1, -1)
        row = (i_h * num_rows + i_chunk.to(gl.int64) * 64) * K
        p_other = (i_h * num_rows + other.to(gl.int64) * 64) * K
        above = chunk // 2
        slot = i_h * (num_rows // 64) + 2 * tile + 2 * above
        p_above = df + slot * (K * K)
        p_beside = f + (i_h * (num_rows // 32) + 2 * other) * (K * K)
        p_w = w + batch.to(gl.int64) * w_b + (first + chunk * 64).to(gl.int64) * w_t + i_h * w_h
        n_other = 64
        if first_query is not None:
            # Tiles that ask nothing have no gradients here.
            n_other = gl.where(is_left & ((above + 1) * 128 <= first_query), 0, 64)
        passed = gl.where((above > 0) & (above < last // 2), K, 0)
        s = squares(W + NK, bf16)
        for c in gl.static_range(NK):
            copy_square(s.index(c), levels + p_other, 64, K, 64 * c, K)
            copy_square(s.index(NK + c), dlevels + p_other, n_other, K, 64 * c, K)
            if WIDE:
                s.index(W + c).store(load_part(p_w, 64, w_t, 64 * c, K, load).to(bf16))
            else:
                copy_square(s.index(W + c), p_w, 64, w_t, 64 * c, K)
            for r in gl.static_range(NK):
                at = 64 * r * K
                n = passed - 64 * r
                copy_square(s.index(ABOVE + r * NK + c), p_above + at, n, K, 64 * c, K)
                beside = in_float16(s.index(BESIDE + r * NK + c))
                copy_square(beside, p_beside + at, n, K, 64 * c, K)
        async_copy.commit_group()
        async_copy.wait_group(0)
        barrier()
        for i in gl.static_range(NK * NK):
            b_f = in_float16(s.index(BESIDE + i)).load(load)
            s.index(BESIDE + i).store(b_f.to(bf16))
        publish()
        # The rows that pass the product of a left block are X, those of a right one's are dX.
        x = gl.where(is_left, 0, NK)
        b_wdf_0 = gl.full([64, 64], 0.0, gl.float32, layout=pairs)
        b_wdf_1 = gl.full([64, 64], 0.0, gl.float32, layout=pairs)
        for r in gl.static_range(NK):
            # Rows 64 r … of dF take the place of what no other rows need.
            place = gl.where(is_left, BESIDE + r, ABOVE + r * NK)
            step = gl.where(is_left, NK, 1)
            b_df_0 = make_square(s, x, is_left, r, 0, ABOVE, BESIDE, NK, pairs)
            if NK == 2:
                b_df_1 = make_square(s, x, is_left, r, 1, ABOVE, BESIDE, NK, pairs)
            barrier()
            s.index(place).store(b_df_0.to(bf16))
            if NK == 2:
                s.index(place + step).store(b_df_1.to(bf16))
            publish()
            b_wdft = start(s.index(W), s.index(place).permute([1, 0]), pairs)
            b_wdf_0 = add(s.index(W + r), s.index(place), b_wdf_0)
            if NK == 2:
                b_wdft = add(s.index(W + 1), s.index(place + step).permute([1, 0]), b_wdft)
                b_wdf_1 = add(s.index(W + r), s.index(place + step), b_wdf_1)
            b_wdft, b_wdf_0, b_wdf_1 = warpgroup_mma_wait(0, [b_wdft, b_wdf_0, b_wdf_1])
            s_out = s.index(x + r)
            s_out.store(b_wdft.to(bf16))
            barrier()
            store_rows(wdft + row + 64 * r, s_out, 64, K, K - 64 * r, K, 64, 64, load)
        x = NK - x
        s.index(x).store(b_wdf_0.to(bf16))
        if NK == 2:
            s.index(x + 1).store(b_wdf_1.to(bf16))
        barrier()
        for c in gl.static_range(NK):
            store_rows(wdf + row + 64 * c, s.index(x + c), 64, K, K - 64 * c, K, 64, 64, load)


@gluon.jit
def make_square(
    s, x, is_left, r: gl.constexpr, c: gl.constexpr, ABOVE: gl.constexpr, BESIDE: gl.constexpr,
    NK: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Return a square of dF: of Xᵀ dX + F_besideᵀ dF_above, or of dXᵀ X + dF_above F_besideᵀ."""
    acc = start(s.index(x + r).permute([1, 0]), s.index(NK - x + c), layout)
    acc = warpgroup_mma_wait(0, [acc])
    if is_left:
        for m in gl.static_range(NK):
            beside = s.index(BESIDE + m * NK + r).permute([1, 0])
            acc = add(beside, s.index(ABOVE + m * NK + c), acc)
        acc = warpgroup_mma_wait(0, [acc])
    else:
        for m in gl.static_range(NK):
            beside = s.index(BESIDE + c * NK + m).permute([1, 0])
            acc = add(s.index(ABOVE + r * NK + m), beside, acc)
        acc = warpgroup_mma_wait(0, [acc])
    return acc


def finish_leaves(
    p: Problem, levels: Tensor, dlevels: Tensor, f: Tensor, df: Tensor, wdf: Tensor, wdft: Tensor
) -> None:
    """Write W dF and W dFᵀ of all chunks, from the rows of all levels and their gradients."""
    H, K = p.k.shape[2:]
    w_b, w_t, w_h = p.w.stride()[:3]
    launch(
        leaf_kernel, (p.chunks * H,),
        levels, dlevels, p.w, f, df, wdf, wdft, *p.packing, p.q.shape[1], p.num_tiles, H,
        p.first_query, w_b, w_h, w_t=w_t, K=K, PACKED=p.cu_seqlens is not None, NK=-(-K // 64),
        WIDE=p.w.dtype != p.k.dtype, num_warps=4,
    )  # fmt: skip
