"""The attention of `path_attention`: one softmax per row, over the rectangles of all levels.

A tile of queries meets, at each level where its block is a right one, the keys of the left
neighbour. There the logits are plain inner products. The left blocks of a tile, the largest first,
are all tokens before it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._recording import recorded, room
from householder.ops._triton import (
    cast_operand,
    compiled_together,
    dot,
    dot_add,
    launch,
    load_tile,
    on_its_device,
    store_tile,
)
from householder.ops.path_attention.inputs import Inputs
from householder.ops.path_attention.triton import config
from householder.ops.path_attention.triton.config import CHUNK_TOKENS
from householder.ops.path_attention.triton.problem import (
    LN_2,
    LOG2_E,
    PLACES,
    SIZES,
    arrange,
    block_slot,
    kind_of_call,
    locate_program,
    locate_tile,
    lowest_bit,
    make_problem,
    strides,
    take_behind,
)
from householder.ops.path_attention.triton.tree import build_tree_and_begin, multiply_rows


@triton.jit
def attend_keys(
    b_o, b_top, b_total, b_q, b_rows, p_k, p_v, p_columns, v_t, first, stop, token, window,
    K: tl.constexpr, V: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Let rows see keys `first` … `stop` of a left block.

    `b_rows` are the rows' sums of gates, to the base 2. MASKED looks at the window, the first row
    being token `token` of the sequence.
    """
    o_n = tl.arange(0, BN)
    everywhere = o_n >= 0
    for i in range(first, stop, BN):
        start = tl.cast(i, tl.int64)
        b_k = load_tile(p_k + start * K, o_n * K, everywhere, 0, K, BK)
        b_a = dot(b_q, tl.trans(b_k), PRECISION)
        if GATED:
            b_a = b_a * LOG2_E + (tl.load(p_columns + start + o_n) * LOG2_E)[None, :]
        if MASKED:
            apart = token - i + tl.arange(0, 64)[:, None] - o_n[None, :]
            b_a = tl.where(apart < window, b_a, -float("inf"))
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


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    q_levels, k_levels, f, v, decay, weights, sinks, o, lse,
    cu_seqlens, tile_sequence, first_tile, window, T, num_tiles, H, first_query,
    v_b, v_h, v_t: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write o and log Σ exp of one chunk's rows of one head; `lse` has those of the chunk alone.

    From level to level the queries are multiplied by the products that they cross, in registers
    where a product can be held.
    """
    CARRIED: tl.constexpr = BK <= 64 or (BK <= 128 and PRECISION != "tf32x3")
    HQ = H * GROUP
    per_row = 2 * (num_tiles if PACKED else tl.cdiv(T, 128))
    i_sequence, i_chunk = locate_program(
        tl.program_id(0), per_row, 2 * num_tiles // per_row * HQ, PLACES
    )
    i_hq = (i_sequence % HQ).to(tl.int64)
    i_chunk = (i_sequence // HQ + 1) * per_row - 1 - i_chunk
    batch, first, length, tile = locate_tile(
        i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    chunk = i_chunk - tile * 2
    token = chunk * 64
    if token >= length:
        return
    if first_query is not None:  # noqa: SIM102 - a constant of the kernel, and a number
        if token + 64 <= first_query:
            return
    batch = tl.cast(batch, tl.int64)
    first = tl.cast(first, tl.int64)
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    row = i_chunk.to(tl.int64) * 64
    sequence = tl.cast(tile, tl.int64) * 128
    i_h = i_hq // GROUP
    o_m = tl.arange(0, 64)
    o_k = tl.arange(0, BK)
    m_m = o_m < length - token
    of_token = (batch * T + first + token) * HQ + i_hq
    # What the chunk sees in itself, with weights of which the total is 1.
    p_weights = weights + (i_hq * num_rows + row) * 64
    b_p = load_tile(p_weights, o_m * 64, o_m >= 0, 0, 64, 64)
    b_v = load_tile(v + batch * v_b + (first + token) * v_t + i_h * v_h, o_m * v_t, m_m, 0, V, BV)
    b_o = dot(b_p, b_v.to(b_p.dtype), PRECISION)
    b_top = tl.load(lse + of_token + o_m * HQ, mask=m_m, other=0.0)
    b_total = tl.full((64,), 1.0, tl.float32)
    p_v = v + batch * v_b + first * v_t + i_h * v_h

    # The first key that a row of this chunk sees.
    seen = 0
    if WINDOWED:
        seen = tl.maximum(token + 1 - window, 0) // 64 * 64
    rest = chunk
    if seen >= token:
        rest = 0
    level = lowest_bit(rest).to(tl.int64)
    if rest > 0:
        half = q_levels.dtype.element_ty
        of_level = HQ * num_rows * K
        p_q = q_levels + (i_hq * num_rows + row) * K
        b_q = load_tile(p_q + level * of_level, o_m * K, o_m >= 0, 0, K, BK)
        b_carried = cast_operand(b_q, PRECISION) if CARRIED else b_q
        while rest > 0:
            b_q = b_carried.to(half)
            block = chunk >> level
            stop = block * (64 << level)
            begin = tl.maximum(stop - (64 << level), seen).to(tl.int32)
            stop = stop.to(tl.int32)
            p_k = k_levels + ((level * H + i_h) * num_rows + sequence) * K
            b_rows = b_top
            p_columns = decay
            if GATED:
                p_columns = decay + (level * HQ + i_hq) * num_rows + sequence
                p_rows = decay + (level * HQ + i_hq) * num_rows + row
                b_rows = tl.load(p_rows + o_m) * LOG2_E
            if WINDOWED:
                # Up to the last key that some row does not see any more.
                edge = tl.cdiv(tl.maximum(token + 64 - window, 0), BN) * BN
                edge = tl.minimum(tl.maximum(edge, begin), stop)
                b_o, b_top, b_total = attend_keys(
                    b_o, b_top, b_total, b_q, b_rows, p_k, p_v, p_columns, v_t, begin, edge, token,
                    window, K, V, GATED, True, PRECISION, BN, BK, BV,
                )  # fmt: skip
                begin = edge
            b_o, b_top, b_total = attend_keys(
                b_o, b_top, b_total, b_q, b_rows, p_k, p_v, p_columns, v_t, begin, stop, token,
                window, K, V, GATED, False, PRECISION, BN, BK, BV,
            )  # fmt: skip
            rest = rest & (rest - 1)
            if (block - 1) * (64 << level) <= seen:
                rest = 0
            if rest > 0:
                slot = block_slot(2 * tile, level, block - 1)
                p_f = f + (i_h * (num_rows // 32) + slot) * (K * K)
                above = lowest_bit(rest).to(tl.int64)
                if CARRIED:
                    b_f = cast_operand(load_tile(p_f, o_k * K, o_k < K, 0, K, BK), PRECISION)
                    b_carried = cast_operand(dot(b_carried, b_f, PRECISION), PRECISION)
                else:
                    p_above = p_q + above * of_level
                    multiply_rows(p_q + level * of_level, p_above, p_f, False, K, PRECISION)
                    b_carried = load_tile(p_above, o_m * K, o_m >= 0, 0, K, BK)
                level = above

    if sinks is not None:
        # A sink takes part in the softmax and has no value.
        sink = tl.load(sinks + i_hq).to(tl.float32) * LOG2_E
        new = tl.maximum(b_top, sink)
        rescale = tl.exp2(b_top - new)
        b_total = b_total * rescale + tl.exp2(sink - new)
        b_o = b_o * rescale[:, None]
        b_top = new
    store_tile(o + of_token * V, o_m * (HQ * V), m_m, 0, b_o / b_total[:, None], V, BV)
    tl.store(lse + of_token + o_m * HQ, (b_top + tl.log2(b_total)) * LN_2, mask=m_m)


@on_its_device
def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Attend; `inputs` are those of `Inputs`.

    Returns:
        o `[B, T, HQ, V]` in v's dtype, and the logarithms of the softmax's denominators
        `[B, T, HQ]` in float32.
    """
    x = Inputs(*inputs)
    o, lse = _attend(*arrange(x))
    return take_behind(x.first_query, o), take_behind(x.first_query, lse)


@recorded
@compiled_together(kind_of_call)
def _attend(*arranged: Any) -> tuple[Tensor, Tensor]:
    """Do what `forward` does, for what has been arranged for the kernels."""
    p = make_problem(*arranged)
    B, T, HQ, K = p.q.shape
    H, V = p.v.shape[2:]
    o = room((B, T, HQ, V), p.v.dtype, p.v.device)
    lse = room((B, T, HQ), torch.float32, p.v.device)
    weights = room((HQ, p.rows, CHUNK_TOKENS), p.operand, p.v.device)
    tree = build_tree_and_begin(p, weights, lse)
    if o.numel() and p.suits_roles:
        from householder.ops.path_attention.triton import hopper_attend

        hopper_attend.attend(p, tree, weights, o, lse)
    elif o.numel():
        columns, parameters = config.attend_launch(K, V, p.precision)
        launch(
            attend_kernel, (p.chunks * HQ,),
            tree.q, tree.k, tree.f, p.v, tree.decay, weights, p.sinks, o, lse, *p.packing,
            p.window, T, p.num_tiles, H, p.first_query, **strides("v", p.v), **p.constants,
            **p.value_constants, WINDOWED=p.window is not None, BN=columns, **parameters.options,
        )  # fmt: skip
    return o, lse
