"""What each chunk of `path_attention` has to itself: its triangle, its product, its own logits.

With the notation of the chunked form, of one chunk and key head:

    (I + M)⁻¹,  M = strict_lower(diag(β) W Wᵀ)       Z = T W,  E = T Y,  Y = strict_lower(W Kᵀ)
    F = I − Wᵀ Z        K→ = K − Eᵀ W

and of each query head, with X = lower(Q Wᵀ),

    Q← = Q − X Z        A = lower(Q Kᵀ − X E)

The softmax of a row begins inside the chunk, and its weights are kept. Q← and K→ go to the first
level of the tree that uses them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import (
    cast_operand,
    dot,
    dot_add,
    inverse_unit_lower,
    load_tile,
    store_tile,
)
from householder.ops.path_attention.triton.gates import decay_inside, load_gates
from householder.ops.path_attention.triton.problem import (
    LOG2_E,
    SIZES,
    block_slot,
    has_right,
    locate_tile,
    lowest_bit,
)


@triton.jit
def rest_in_float16(x):
    """Return what is lost where a tile is rounded to float16, in float16."""
    return (x.to(tl.float32) - x.to(tl.float16).to(tl.float32)).to(tl.float16)


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    q, k, w, beta, g, q_levels, k_levels, f, inverse, decay, gate_sums, weights, lse,
    cu_seqlens, tile_sequence, first_tile, scale, window, T, H, rows, num_levels,
    q_b, q_h, k_b, k_h, w_b, w_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    q_t: tl.constexpr, k_t: tl.constexpr, w_t: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCTS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write what one chunk and key head has to itself, for the `GROUP` query heads as well.

    That is F and (I + M)⁻¹, the sum of its gates, Q←, K→ and the sums of gates that go with them;
    if they are asked for, also the softmax of its rows over its own keys, and log₂ Σ 2^logit. K is
    worked through in tiles of BK, so that whatever it is the same few tiles are held. PRODUCTS is
    the precision of what makes F, and of what passes reflectors.

    Errors of F add up along the sequence: in float16 whatever it is made of, reflectors if they are
    float32, the triangle and Z, is multiplied in two halves. Of float16 reflectors Triton 3.6 makes
    a wrong program then, and one half must do.
    """
    HALVES: tl.constexpr = PRODUCTS == "fp16" and w.dtype.element_ty != tl.float16
    WIDE: tl.constexpr = PRODUCTS == "fp16" and w.dtype.element_ty == tl.float32
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
    num_rows = tl.cast(rows, tl.int64)
    num_slots = num_rows // 32
    row = i_chunk.to(tl.int64) * 64
    batch = tl.cast(batch, tl.int64)
    start = (first + chunk * 64).to(tl.int64)
    o_c = tl.arange(0, 64)
    m_c = o_c < n
    everywhere = o_c >= 0
    below = o_c[:, None] > o_c[None, :]
    not_above = o_c[:, None] >= o_c[None, :]
    p_w = w + batch * w_b + start * w_t + i_h * w_h
    p_k = k + batch * k_b + start * k_t + i_h * k_h
    p_beta = beta + batch * beta_b + start * beta_t + i_h * beta_h
    b_beta = tl.load(p_beta + o_c * beta_t, mask=m_c, other=0.0).to(tl.float32)

    m = tl.zeros((64, 64), tl.float32)
    b_y = tl.zeros((64, 64), tl.float32)
    for i_k in range(0, K, BK):
        b_w = load_tile(p_w, o_c * w_t, m_c, i_k, K, BK)
        b_w_rest = rest_in_float16(b_w)
        b_w = cast_operand(b_w, PRECISION)
        b_k = cast_operand(load_tile(p_k, o_c * k_t, m_c, i_k, K, BK), PRECISION)
        m = dot_add(b_w, tl.trans(b_w), m, PRODUCTS)
        if WIDE:
            m = dot_add(b_w, tl.trans(b_w_rest), m, PRODUCTS)
            m = dot_add(b_w_rest, tl.trans(b_w), m, PRODUCTS)
        b_y = dot_add(b_w, tl.trans(b_k), b_y, PRECISION)
    m = tl.where(below, m * b_beta[:, None], 0.0)
    b_y = cast_operand(tl.where(below, b_y * b_beta[:, None], 0.0), PRECISION)
    b_t = inverse_unit_lower(m, 64, PRODUCTS)
    b_inverse = cast_operand(b_t, PRECISION)
    if inverse is not None:
        p_inverse = inverse + (i_h * (num_rows // 64) + i_chunk) * 4096
        store_tile(p_inverse, o_c * 64, everywhere, 0, b_inverse, 64, 64)
    b_e = cast_operand(dot(b_inverse, b_y, PRECISION), PRECISION)
    b_t *= b_beta[None, :]
    b_t_rest = rest_in_float16(b_t)
    b_t = cast_operand(b_t, PRECISION)

    queries_rise = (chunk > 0) & (num_levels > 0)
    query_level = lowest_bit(chunk).to(tl.int64)
    key_level = lowest_bit(-1 - chunk).to(tl.int64)
    keys_rise = has_right(chunk, key_level, tl.cdiv(length, 64))
    p_ks = k_levels + ((key_level * H + i_h) * num_rows + row) * K
    slot = block_slot(2 * tile, 0, chunk).to(tl.int64)
    p_f = f + (i_h * num_slots + slot) * (K * K)
    for i in range(GROUP):
        i_hq = i_h * GROUP + i
        p_q = q + batch * q_b + start * q_t + i_hq * q_h
        b_x = tl.zeros((64, 64), tl.float32)
        b_a = tl.zeros((64, 64), tl.float32)
        for i_k in range(0, K, BK):
            b_q = cast_operand(load_tile(p_q, o_c * q_t, m_c, i_k, K, BK), PRECISION)
            b_w = cast_operand(load_tile(p_w, o_c * w_t, m_c, i_k, K, BK), PRECISION)
            b_x = dot_add(b_q, tl.trans(b_w), b_x, PRECISION)
            if weights is not None:
                b_k = cast_operand(load_tile(p_k, o_c * k_t, m_c, i_k, K, BK), PRECISION)
                b_a = dot_add(b_q, tl.trans(b_k), b_a, PRECISION)
        b_x = cast_operand(tl.where(not_above, b_x, 0.0), PRECISION)
        of_head = i_hq * num_rows + row
        of_level = num_rows * (H * GROUP)
        if num_levels > 0:
            p_qs = q_levels + (query_level * of_level + of_head) * K
            for i_k in range(0, K, BK):
                b_w = load_tile(p_w, o_c * w_t, m_c, i_k, K, BK)
                b_w_rest = rest_in_float16(b_w)
                b_w = cast_operand(b_w, PRECISION)
                if HALVES:
                    b_z = dot(b_t, b_w, PRODUCTS)
                    b_z = dot_add(b_t_rest, b_w, b_z, PRODUCTS)
                else:
                    b_z = cast_operand(b_w.to(tl.float32) * b_beta[:, None], PRECISION)
                    b_z = dot(b_inverse, b_z, PRODUCTS)
                if WIDE:
                    b_z = dot_add(b_t, b_w_rest, b_z, PRODUCTS)
                b_z_rest = rest_in_float16(b_z)
                b_z = cast_operand(b_z, PRECISION)
                if queries_rise:
                    b_q = load_tile(p_q, o_c * q_t, m_c, i_k, K, BK).to(tl.float32)
                    b_q = (b_q - dot(b_x, b_z, PRODUCTS)) * scale
                    store_tile(p_qs, o_c * K, everywhere, i_k, b_q, K, BK)
                if i == 0:
                    if keys_rise:
                        b_k = load_tile(p_k, o_c * k_t, m_c, i_k, K, BK).to(tl.float32)
                        b_k -= dot(tl.trans(b_e), b_w, PRODUCTS)
                        store_tile(p_ks, o_c * K, everywhere, i_k, b_k, K, BK)
                    for i_r in range(0, K, BK):
                        b_w = load_tile(p_w, o_c * w_t, m_c, i_r, K, BK)
                        b_w_rest = rest_in_float16(b_w)
                        b_w = cast_operand(b_w, PRECISION)
                        o_r = i_r + tl.arange(0, BK)
                        eye = tl.where(o_r[:, None] == i_k + tl.arange(0, BK)[None, :], 1.0, 0.0)
                        b_f = dot(tl.trans(b_w), b_z, PRODUCTS)
                        if HALVES:
                            b_f = dot_add(tl.trans(b_w), b_z_rest, b_f, PRODUCTS)
                        if WIDE:
                            b_f = dot_add(tl.trans(b_w_rest), b_z, b_f, PRODUCTS)
                        b_f = eye - b_f
                        store_tile(p_f, o_r * K, o_r < K, i_k, b_f, K, BK)
        if GATED:
            b_g = load_gates(g + batch * g_b + start * g_t + i_hq * g_h, g_t, n)
            tl.store(gate_sums + i_hq * num_slots + slot, tl.sum(b_g))
            p_decay = decay + of_head + o_c
            if queries_rise:
                from_start = tl.sum(tl.where(not_above, b_g[None, :], 0.0), 1)
                tl.store(p_decay + query_level * of_level, from_start)
            if keys_rise:
                to_end = tl.sum(tl.where(below, b_g[:, None], 0.0), 0)
                tl.store(p_decay + key_level * of_level, to_end)
        if weights is not None:
            b_a = (b_a - dot(b_x, b_e, PRECISION)) * scale
            if GATED:
                b_a += decay_inside(b_g)
            seen = not_above
            if WINDOWED:
                seen = seen & (o_c[:, None] - o_c[None, :] < window)
            b_a = tl.where(seen, b_a * LOG2_E, -float("inf"))
            b_top = tl.max(b_a, 1)
            b_p = tl.exp2(b_a - b_top[:, None])
            b_total = tl.sum(b_p, 1)
            of_token = (batch * T + start) * (H * GROUP) + i_hq
            p_lse = lse + of_token + o_c * (H * GROUP)
            tl.store(p_lse, b_top + tl.log2(b_total), mask=m_c)
            b_p = b_p / b_total[:, None]
            store_tile(weights + of_head * 64, o_c * 64, everywhere, 0, b_p, 64, 64)
