"""The attention of `path_attention`: one softmax per row, over the rectangles of all levels.

A tile of queries meets, at each level where its block is a right one, the keys of the left
neighbour. There the logits are plain inner products. The left blocks of a tile, the largest first,
are all tokens before it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import dot, dot_add, load_tile, on_its_device, store_tile
from householder.ops.path_attention.triton import config
from householder.ops.path_attention.triton.problem import (
    LN_2,
    LOG2_E,
    locate_tile,
    make_problem,
    strides,
)
from householder.ops.path_attention.triton.tree import build_tree_and_begin


@triton.jit
def attend_keys(
    b_o, b_top, b_total, b_q, b_rows, p_k, p_v, p_columns, v_t, first, stop, token, window,
    first_row: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Let rows see keys `first` … `stop` of a left block.

    `b_rows` are the rows' sums of gates, to the base 2. MASKED looks at the window, the first row
    being token `token` of the sequence; rows before `first_row` see nothing.
    """
    o_n = tl.arange(0, BN)
    everywhere = o_n >= 0
    for i in range(first, stop, BN):
        start = tl.cast(i, tl.int64)
        b_k = load_tile(p_k + start * K, o_n * K, everywhere, 0, K, BK)
        b_a = dot(b_q, tl.trans(b_k), PRECISION)
        if GATED:
            b_a = b_a * LOG2_E + (tl.load(p_columns + start + o_n) * LOG2_E)[None, :]
        if MASKED or first_row > 0:
            o_m = tl.arange(0, BM)[:, None]
            unseen = o_m < first_row
            if MASKED:
                unseen = unseen | (token - i + o_m - o_n[None, :] >= window)
            b_a = tl.where(unseen, -float("inf"), b_a)
        if GATED:
            new = tl.maximum(b_top, tl.max(b_a, 1) + b_rows)
            b_p = tl.exp2(b_a - (new - b_rows)[:, None])
        else:
            new = tl.maximum(b_top, tl.max(b_a, 1) * LOG2_E)
            b_p = tl.exp2(b_a * LOG2_E - new[:, None])
        rescale = tl.exp2(b_top - new)
        b_total = b_total * rescale + tl.sum(b_p, 1)
        b_o = b_o * rescale[:, None]
        b_v = load_tile(p_v + start * v_t, o_n * v_t, everywhere, 0, V, BV).to(b_q.dtype)
        b_o = dot_add(b_p.to(b_v.dtype), b_v, b_o, PRECISION)
        b_top = new
    return b_o, b_top, b_total


@triton.jit
def attend_block(
    b_o, b_top, b_total, q_levels, k_levels, decay, p_v, v_t, level, i_hq, row, sequence, num_rows,
    H, begin, stop, token, window, first_row: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Let a tile's rows see the keys `begin` … `stop` of their left neighbour at `level`."""
    level = tl.cast(level, tl.int64)
    of_queries = (level * (H * GROUP) + i_hq) * num_rows
    o_m = tl.arange(0, BM)
    b_q = load_tile(q_levels + (of_queries + row) * K, o_m * K, o_m >= 0, 0, K, BK)
    p_k = k_levels + ((level * H + i_hq // GROUP) * num_rows + sequence) * K
    b_rows = b_top
    p_columns = decay
    if GATED:
        b_rows = tl.load(decay + of_queries + row + o_m) * LOG2_E
        p_columns = decay + of_queries + sequence
    if WINDOWED:
        # Up to the last key that some row does not see any more.
        edge = tl.cdiv(tl.maximum(token + BM - window, 0), BN) * BN
        edge = tl.minimum(tl.maximum(edge, begin), stop)
        b_o, b_top, b_total = attend_keys(
            b_o, b_top, b_total, b_q, b_rows, p_k, p_v, p_columns, v_t, begin, edge, token, window,
            first_row, K, V, GATED, True, PRECISION, BM, BN, BK, BV,
        )  # fmt: skip
        begin = edge
    return attend_keys(
        b_o, b_top, b_total, b_q, b_rows, p_k, p_v, p_columns, v_t, begin, stop, token, window,
        first_row, K, V, GATED, False, PRECISION, BM, BN, BK, BV,
    )  # fmt: skip


@triton.jit
def attend_kernel(
    q_levels, k_levels, v, decay, sinks, o_chunk, top_chunk, total_chunk, o, lse,
    cu_seqlens, tile_sequence, first_tile, window, T, num_tiles, tiles_per_row, num_levels, H,
    v_b, v_h, v_t: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write o and log Σ exp of BM query rows of one head."""
    # A head's tiles run together, so that they find its keys in the cache; long ones first.
    HQ = H * GROUP
    per_row = tiles_per_row * (128 // BM)
    i_hq = ((tl.program_id(0) // per_row) % HQ).to(tl.int64)
    i_m = (tl.program_id(0) // (per_row * HQ) + 1) * per_row - 1 - tl.program_id(0) % per_row
    batch, first, length, tile = locate_tile(
        i_m // (128 // BM), T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    token = i_m * BM - tile * 128
    if token >= length:
        return
    batch = tl.cast(batch, tl.int64)
    first = tl.cast(first, tl.int64)
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    row = i_m.to(tl.int64) * BM
    sequence = tl.cast(tile, tl.int64) * 128
    o_m = tl.arange(0, BM)

    of_head = i_hq * num_rows + row
    b_o = load_tile(o_chunk + of_head * V, o_m * V, o_m >= 0, 0, V, BV)
    b_top = tl.load(top_chunk + of_head + o_m)
    b_total = tl.load(total_chunk + of_head + o_m)
    p_v = v + batch * v_b + first * v_t + (i_hq // GROUP) * v_h
    # The first key that a row of this tile sees.
    seen = 0
    if WINDOWED:
        seen = tl.maximum(token + 1 - window, 0) // 64 * 64
    # The second chunk of a tile sees its first one.
    if BM == 128 and (length - token > 64) & (seen < token + 64):
        b_o, b_top, b_total = attend_block(
            b_o, b_top, b_total, q_levels, k_levels, decay, p_v, v_t, 0, i_hq, row, sequence,
            num_rows, H, token, token + 64, token, window, 64, GROUP, K, V, GATED, WINDOWED,
            PRECISION, BM, BN if BN < 64 else 64, BK, BV,
        )  # fmt: skip
    for level in range(BM // 128, num_levels):
        block = token // 64 >> level
        stop = block * (64 << level)
        begin = tl.maximum(stop - (64 << level), seen)
        if ((block & 1) == 1) & (begin < stop):
            b_o, b_top, b_total = attend_block(
                b_o, b_top, b_total, q_levels, k_levels, decay, p_v, v_t, level, i_hq, row,
                sequence, num_rows, H, begin, stop, token, window, 0, GROUP, K, V, GATED, WINDOWED,
                PRECISION, BM, BN, BK, BV,
            )  # fmt: skip

    if sinks is not None:
        # A sink takes part in the softmax and has no value.
        sink = tl.load(sinks + i_hq).to(tl.float32) * LOG2_E
        new = tl.maximum(b_top, sink)
        rescale = tl.exp2(b_top - new)
        b_total = b_total * rescale + tl.exp2(sink - new)
        b_o = b_o * rescale[:, None]
        b_top = new
    m_m = o_m < length - token
    of_token = (batch * T + first + token) * HQ + i_hq
    store_tile(o + of_token * V, o_m * (HQ * V), m_m, 0, b_o / b_total[:, None], V, BV)
    tl.store(lse + of_token + o_m * HQ, (b_top + tl.log2(b_total)) * LN_2, mask=m_m)


@on_its_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend; arguments as in the public `path_attention`.

    Returns:
        o `[B, T, HQ, V]` in v's dtype, and the logarithms of the softmax's denominators
        `[B, T, HQ]` in float32.
    """
    p = make_problem(q, k, v, w, beta, g, sinks, scale, window, cu_seqlens)
    tree, softmax = build_tree_and_begin(p)
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    o = v.new_empty(B, T, HQ, V)
    lse = v.new_empty(B, T, HQ, dtype=torch.float32)
    rows, columns, launch = config.attend_launch(K, V, p.precision)
    if o.numel():
        attend_kernel[(p.rows // rows * HQ,)](
            tree.q, tree.k, p.v, tree.decay, p.sinks, *softmax, o, lse, *p.packing, p.window, T,
            p.num_tiles, p.num_tiles // B, p.num_levels, H, **strides("v", p.v), **p.constants,
            **p.value_constants, WINDOWED=p.window is not None, BM=rows, BN=columns,
            **launch.options,
        )  # fmt: skip
    return o, lse
