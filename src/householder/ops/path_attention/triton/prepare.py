"""What each chunk of `path_attention` has to itself: its triangle, its product, its own logits.

With the notation of the chunked form, of one chunk and key head:

    (I + M)⁻¹,  M = strict_lower(diag(β) W Wᵀ)       Z = T W,  E = T Y,  Y = strict_lower(W Kᵀ)
    F = I − Wᵀ Z        K→ = K − Eᵀ W

and of each query head, with X = lower(Q Wᵀ),

    Q← = Q − X Z        A = lower(Q Kᵀ − X E)

The attention inside the chunk begins the softmax of its rows. Q← and K→ go to the first level of
the tree that uses them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import (
    cast_operand,
    dot,
    inverse_unit_lower,
    load_tile,
    store_tile,
)
from householder.ops.path_attention.triton.problem import (
    LEAST_GATE,
    LOG2_E,
    block_slot,
    has_right,
    locate_tile,
    lowest_bit,
)


@triton.jit
def load_gates(g, stride, n):
    """Load the log gates of a chunk's n tokens, zero behind them."""
    o_c = tl.arange(0, 64)
    b_g = tl.load(g + o_c * stride, mask=o_c < n, other=0.0).to(tl.float32)
    return tl.maximum(b_g, LEAST_GATE)


@triton.jit
def decay_inside(b_g):
    """Return Σ g over j < s ≤ i in row i and column j of `[64, 64]`, and zero where j ≥ i.

    It is summed as such: a difference of running sums would cancel after a strong gate.
    """
    o_c = tl.arange(0, 64)
    up_to = tl.where(o_c[:, None] >= o_c[None, :], 1.0, 0.0)
    after = tl.where(o_c[:, None] > o_c[None, :], b_g[:, None], 0.0)
    return dot(up_to, after, "tf32x3")


@triton.jit
def prepare_kernel(
    q, k, v, w, beta, g, q_levels, k_levels, f, inverse, decay, gate_sums, o, top, total,
    cu_seqlens, tile_sequence, first_tile, scale, window, T, H, rows, num_levels,
    q_b, q_h, k_b, k_h, v_b, v_h, w_b, w_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr, w_t: tl.constexpr,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, WINDOWED: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write what one chunk and key head has to itself, for the `GROUP` query heads as well.

    That is F and (I + M)⁻¹, the sum of its gates, Q←, K→ and the sums of gates that go with them;
    with DIAGONAL also the softmax of its rows over its own keys, not normalised.
    """
    # Heads run side by side: together they read whole rows of memory.
    i_chunk = tl.program_id(0) // H
    i_h = (tl.program_id(0) % H).to(tl.int64)
    batch, first, length, tile = locate_tile(
        i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    chunk = i_chunk - 2 * tile
    if (chunk // 2) * 128 >= length:
        return
    n = length - chunk * 64
    num_chunks = tl.cdiv(length, 64)
    num_rows = tl.cast(rows, tl.int64)
    row = i_chunk.to(tl.int64) * 64
    batch = tl.cast(batch, tl.int64)
    start = (first + chunk * 64).to(tl.int64)
    o_c = tl.arange(0, 64)
    o_k = tl.arange(0, BK)
    m_c = o_c < n
    everywhere = o_c >= 0
    below = o_c[:, None] > o_c[None, :]
    p_w = w + batch * w_b + start * w_t + i_h * w_h
    p_k = k + batch * k_b + start * k_t + i_h * k_h
    b_w = cast_operand(load_tile(p_w, o_c * w_t, m_c, 0, K, BK), PRECISION)
    b_k = cast_operand(load_tile(p_k, o_c * k_t, m_c, 0, K, BK), PRECISION)
    p_beta = beta + batch * beta_b + start * beta_t + i_h * beta_h
    b_beta = tl.load(p_beta + o_c * beta_t, mask=m_c, other=0.0).to(tl.float32)

    m = tl.where(below, dot(b_w, tl.trans(b_w), PRECISION) * b_beta[:, None], 0.0)
    b_inverse = cast_operand(inverse_unit_lower(m, 64, PRECISION), PRECISION)
    num_all = num_rows // 64
    if inverse is not None:
        p_inverse = inverse + (i_h * num_all + i_chunk) * 4096
        store_tile(p_inverse, o_c * 64, everywhere, 0, b_inverse, 64, 64)
    b_y = tl.where(below, dot(b_w, tl.trans(b_k), PRECISION) * b_beta[:, None], 0.0)
    b_e = cast_operand(dot(b_inverse, cast_operand(b_y, PRECISION), PRECISION), PRECISION)
    b_z = cast_operand(b_w.to(tl.float32) * b_beta[:, None], PRECISION)
    b_z = cast_operand(dot(b_inverse, b_z, PRECISION), PRECISION)

    if num_levels > 0:
        slot = block_slot(2 * tile, 0, chunk).to(tl.int64)
        p_f = f + (i_h * 2 * num_all + slot) * (K * K)
        eye = tl.where(o_k[:, None] == o_k[None, :], 1.0, 0.0)
        b_f = eye - dot(tl.trans(b_w), b_z, PRECISION)
        store_tile(p_f, o_k * K, o_k < K, 0, b_f, K, BK)
    level = lowest_bit(-1 - chunk)
    keys_rise = has_right(chunk, level, num_chunks)
    if keys_rise:
        p_k = k_levels + ((level.to(tl.int64) * H + i_h) * num_rows + row) * K
        b_ks = b_k.to(tl.float32) - dot(tl.trans(b_e), b_w, PRECISION)
        store_tile(p_k, o_c * K, everywhere, 0, b_ks, K, BK)

    for i in range(GROUP):
        i_hq = i_h * GROUP + i
        p_q = q + batch * q_b + start * q_t + i_hq * q_h
        b_q = cast_operand(load_tile(p_q, o_c * q_t, m_c, 0, K, BK), PRECISION)
        b_x = tl.where(
            below | (o_c[:, None] == o_c[None, :]), dot(b_q, tl.trans(b_w), PRECISION), 0.0
        )
        b_x = cast_operand(b_x, PRECISION)
        if GATED:
            p_g = g + batch * g_b + start * g_t + i_hq * g_h
            b_g = load_gates(p_g, g_t, n)
            tl.store(gate_sums + i_hq * 2 * num_all + block_slot(2 * tile, 0, chunk), tl.sum(b_g))
            p_decay = decay + i_hq * num_rows + row + o_c
            from_start = tl.sum(
                tl.where(below | (o_c[:, None] == o_c[None, :]), b_g[None, :], 0.0), 1
            )
            to_end = tl.sum(tl.where(below, b_g[:, None], 0.0), 0)
            of_level = num_rows * (H * GROUP)
            if (chunk > 0) & (num_levels > 0):
                tl.store(p_decay + lowest_bit(chunk) * of_level, from_start)
            if keys_rise:
                tl.store(p_decay + level * of_level, to_end)
        if (chunk > 0) & (num_levels > 0):
            of_level = (lowest_bit(chunk).to(tl.int64) * (H * GROUP) + i_hq) * num_rows + row
            b_qs = (b_q.to(tl.float32) - dot(b_x, b_z, PRECISION)) * scale
            store_tile(q_levels + of_level * K, o_c * K, everywhere, 0, b_qs, K, BK)
        if DIAGONAL:
            b_a = dot(b_q, tl.trans(b_k), PRECISION) - dot(b_x, b_e, PRECISION)
            b_a *= scale
            if GATED:
                b_a += decay_inside(b_g)
            unseen = o_c[:, None] < o_c[None, :]
            if WINDOWED:
                unseen = unseen | (o_c[:, None] - o_c[None, :] >= window)
            b_a = tl.where(unseen, -float("inf"), b_a * LOG2_E)
            b_top = tl.max(b_a, 1)
            b_p = tl.exp2(b_a - b_top[:, None])
            p_v = v + batch * v_b + start * v_t + i_h * v_h
            b_v = load_tile(p_v, o_c * v_t, m_c, 0, V, BV).to(q_levels.dtype.element_ty)
            b_o = dot(b_p.to(b_v.dtype), b_v, PRECISION)
            of_head = i_hq * num_rows + row
            store_tile(o + of_head * V, o_c * V, everywhere, 0, b_o, V, BV)
            tl.store(top + of_head + o_c, b_top)
            tl.store(total + of_head + o_c, tl.sum(b_p, 1))
