"""The gradients inside the chunks of `path_attention`.

With the notation of the chunked form (see `prepare.py`), dA = P ⊙ (dO Vᵀ − δ) inside the chunk, and
what came down the tree: dQ← and dK→, and of the chunk's product dF the tiles W dF and W dFᵀ. One
kernel takes the query heads,

    R = dQ← Wᵀ        dX = −lower(R diag(β) (I + M)⁻ᵀ + dA Eᵀ)

and leaves P, X, dA, dX and R; one solves the triangle for the key heads, with sums over their query
heads,

    dE = −Σ Xᵀ dA − W dK→ᵀ                   D_E = strict_lower((I + M)⁻ᵀ dE)
    dZ Wᵀ = −Σ Xᵀ R − W dF Wᵀ               D_Z = (I + M)⁻ᵀ dZ
    dM = −strict_lower(D_Z Zᵀ + D_E Eᵀ)      N = diag(β) dM
    dβ = rowsum(D_Z ⊙ W + D_E ⊙ Y + dM ⊙ W Wᵀ)

and leaves E, β ⊙ D_E and N + Nᵀ. All of these are 64 × 64. What has columns of K or V follows in
blocks of columns:

    dQ = scale · (dQ← + dA K + dX W)
    dK = dK→ + (β ⊙ D_E)ᵀ W + scale · Σ dAᵀ Q        dV += Σ Pᵀ dO
    dW = β ⊙ D_Z − E dK→ − Z dFᵀ + (N + Nᵀ) W + (β ⊙ D_E) K + scale · Σ dXᵀ Q

Z = (I + M)⁻¹ diag(β) W itself is never formed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import cast_operand, dot, dot_add, load_tile, store_tile
from householder.ops.path_attention.triton.gates import decay_inside, load_gates
from householder.ops.path_attention.triton.problem import LOG2_E, SIZES, locate_chunk


@triton.jit
def load_pairs(pointer, PRECISION: tl.constexpr):
    """Load a tile of 64 × 64 pairs of a chunk's tokens."""
    o_c = tl.arange(0, 64)
    return cast_operand(load_tile(pointer, o_c * 64, o_c >= 0, 0, 64, 64), PRECISION)


@triton.jit
def store_pairs(pointer, x):
    """Store what `load_pairs` loads."""
    o_c = tl.arange(0, 64)
    store_tile(pointer, o_c * 64, o_c >= 0, 0, x, 64, 64)


@triton.jit(do_not_specialize=SIZES)
def pairs_kernel(
    q, k, v, w, beta, g, o, do, lse, delta, inverse, dq_start, p_pairs, x_pairs,
    da_pairs, dx_pairs, r_pairs, cu_seqlens, tile_sequence, first_tile, scale, window, T,
    num_tiles, HQ, q_b, q_h, k_b, k_h, v_b, v_h, w_b, w_h, beta_b, beta_t, beta_h, g_b, g_t, g_h,
    o_b, o_h, do_b, do_h, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr,
    w_t: tl.constexpr, o_t: tl.constexpr, do_t: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, REFLECTORS: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write P, X, dA, dX and R of one chunk and query head.

    EXACT is the precision of what the logits are made of, REFLECTORS that of X and Y among it, and
    PRECISION that of gradients.
    """
    # Heads run side by side: together they read whole rows of memory.
    i_chunk = tl.program_id(0) // HQ
    i_hq = (tl.program_id(0) % HQ).to(tl.int64)
    i_h = i_hq // GROUP
    batch, start, _, n = locate_chunk(i_chunk, T, cu_seqlens, tile_sequence, first_tile, PACKED)
    if n <= 0:
        return
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    row = i_hq * num_rows + i_chunk.to(tl.int64) * 64
    o_c = tl.arange(0, 64)
    m_c = o_c < n
    everywhere = o_c >= 0
    below = o_c[:, None] > o_c[None, :]
    diagonal = o_c[:, None] == o_c[None, :]
    p_q = q + batch * q_b + start * q_t + i_hq * q_h
    p_k = k + batch * k_b + start * k_t + i_h * k_h
    p_v = v + batch * v_b + start * v_t + i_h * v_h
    p_w = w + batch * w_b + start * w_t + i_h * w_h
    p_o = o + batch * o_b + start * o_t + i_hq * o_h
    p_do = do + batch * do_b + start * do_t + i_hq * do_h
    p_beta = beta + batch * beta_b + start * beta_t + i_h * beta_h
    b_beta = tl.load(p_beta + o_c * beta_t, mask=m_c, other=0.0).to(tl.float32)

    # All loads come before the first store, which they would not be moved across.
    b_inverse = load_pairs(inverse + (i_h * num_rows + i_chunk.to(tl.int64) * 64) * 64, EXACT)
    b_lse = tl.load(lse + (batch * T + start + o_c) * HQ + i_hq, mask=m_c, other=float("inf"))
    b_delta = tl.load(delta + row + o_c)
    b_da = tl.zeros((64, 64), tl.float32)
    b_own = tl.zeros((64,), tl.float32)
    for i in range(0, V, BV):
        b_v = load_tile(p_v, o_c * v_t, m_c, i, V, BV)
        b_do = load_tile(p_do, o_c * do_t, m_c, i, V, BV)
        b_o = load_tile(p_o, o_c * o_t, m_c, i, V, BV).to(tl.float32)
        b_own += tl.sum(b_do.to(tl.float32) * (b_v.to(tl.float32) - b_o), 1)
        b_v, b_do = cast_operand(b_v, PRECISION), cast_operand(b_do, PRECISION)
        b_da = dot_add(b_do, tl.trans(b_v), b_da, PRECISION)
    # A row that sees only itself, as every first one, has o = v and no gradient; as a difference
    # of two inner products that would be their rounding.
    b_da = tl.where(diagonal, b_own[:, None], b_da - b_delta[:, None])
    b_a = tl.zeros((64, 64), tl.float32)
    b_x = tl.zeros((64, 64), tl.float32)
    b_y = tl.zeros((64, 64), tl.float32)
    b_r = tl.zeros((64, 64), tl.float32)
    for i in range(0, K, BK):
        b_q = load_tile(p_q, o_c * q_t, m_c, i, K, BK)
        b_k = load_tile(p_k, o_c * k_t, m_c, i, K, BK)
        b_w = load_tile(p_w, o_c * w_t, m_c, i, K, BK)
        b_dq = load_tile(dq_start + row * K, o_c * K, everywhere, i, K, BK)
        b_a = dot_add(
            cast_operand(b_q, PRECISION), tl.trans(cast_operand(b_k, PRECISION)), b_a, PRECISION
        )
        b_q, b_k = cast_operand(b_q, REFLECTORS), cast_operand(b_k, REFLECTORS)
        b_wx = cast_operand(b_w, REFLECTORS)
        b_x = dot_add(b_q, tl.trans(b_wx), b_x, REFLECTORS)
        b_y = dot_add(b_wx, tl.trans(b_k), b_y, REFLECTORS)
        b_w, b_dq = cast_operand(b_w, PRECISION), cast_operand(b_dq, PRECISION)
        b_r = dot_add(b_dq, tl.trans(b_w), b_r, PRECISION)
    store_pairs(r_pairs + row * 64, b_r)
    b_x = tl.where(below | diagonal, b_x * scale, 0.0)
    store_pairs(x_pairs + row * 64, b_x)
    b_y = cast_operand(tl.where(below, b_y * b_beta[:, None], 0.0), EXACT)
    b_e = cast_operand(dot(b_inverse, b_y, EXACT), EXACT)
    b_a = b_a * scale - dot(cast_operand(b_x, EXACT), b_e, EXACT)
    if GATED:
        p_g = g + batch * g_b + start * g_t + i_hq * g_h
        b_a += decay_inside(load_gates(p_g, g_t, n))
    seen = below | diagonal
    if WINDOWED:
        seen = seen & (o_c[:, None] - o_c[None, :] < window)
    # The difference first: where it is small, as for a row that attends to itself, it is exact.
    b_p = tl.exp2(tl.where(seen, (b_a - b_lse[:, None]) * LOG2_E, -float("inf")))
    store_pairs(p_pairs + row * 64, b_p)
    b_da = cast_operand(b_p * b_da, PRECISION)
    store_pairs(da_pairs + row * 64, b_da)
    b_r = cast_operand(b_r * b_beta[None, :], PRECISION)
    b_dx = dot(b_r, tl.trans(cast_operand(b_inverse, PRECISION)), PRECISION)
    b_dx = dot_add(b_da, tl.trans(cast_operand(b_e, PRECISION)), b_dx, PRECISION)
    store_pairs(dx_pairs + row * 64, tl.where(below | diagonal, -b_dx, 0.0))


@triton.jit(do_not_specialize=SIZES)
def solve_kernel(
    k, w, beta, inverse, dk_end, wdf, x_pairs, da_pairs, r_pairs, e_pairs, de_pairs, n_pairs,
    dbeta, cu_seqlens, tile_sequence, first_tile, T, num_tiles, H, k_b, k_h, w_b, w_h, beta_b,
    beta_t, beta_h, k_t: tl.constexpr, w_t: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write E, β ⊙ D_E, N + Nᵀ and dβ of one chunk and key head."""
    i_chunk = tl.program_id(0) // H
    i_h = (tl.program_id(0) % H).to(tl.int64)
    batch, start, chunk, n = locate_chunk(i_chunk, T, cu_seqlens, tile_sequence, first_tile, PACKED)
    if n <= 0:
        return
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    within = i_chunk.to(tl.int64) * 64
    row = i_h * num_rows + within
    o_c = tl.arange(0, 64)
    m_c = o_c < n
    everywhere = o_c >= 0
    below = o_c[:, None] > o_c[None, :]
    diagonal = o_c[:, None] == o_c[None, :]
    p_k = k + batch * k_b + start * k_t + i_h * k_h
    p_w = w + batch * w_b + start * w_t + i_h * w_h
    p_beta = beta + batch * beta_b + start * beta_t + i_h * beta_h
    b_beta = tl.load(p_beta + o_c * beta_t, mask=m_c, other=0.0).to(tl.float32)
    # The first and the last chunk's products have no gradient.
    passed = 0
    if (chunk > 0) & (n > 64):
        passed = 64

    b_inverse = load_pairs(inverse + row * 64, EXACT)
    ww = tl.zeros((64, 64), tl.float32)
    b_y = tl.zeros((64, 64), tl.float32)
    b_de = tl.zeros((64, 64), tl.float32)
    dzw = tl.zeros((64, 64), tl.float32)
    for i in range(0, K, BK):
        b_w = cast_operand(load_tile(p_w, o_c * w_t, m_c, i, K, BK), PRECISION)
        b_k = cast_operand(load_tile(p_k, o_c * k_t, m_c, i, K, BK), PRECISION)
        b_dk = cast_operand(load_tile(dk_end + row * K, o_c * K, everywhere, i, K, BK), PRECISION)
        b_wdf = cast_operand(load_tile(wdf + row * K, o_c * K, o_c < passed, i, K, BK), PRECISION)
        ww = dot_add(b_w, tl.trans(b_w), ww, PRECISION)
        b_y = dot_add(b_w, tl.trans(b_k), b_y, PRECISION)
        b_de = dot_add(b_w, tl.trans(b_dk), b_de, PRECISION)
        dzw = dot_add(b_wdf, tl.trans(b_w), dzw, PRECISION)
    for i_g in range(GROUP):
        of_head = ((i_h * GROUP + i_g) * num_rows + within) * 64
        b_x = tl.trans(load_pairs(x_pairs + of_head, PRECISION))
        b_de = dot_add(b_x, load_pairs(da_pairs + of_head, PRECISION), b_de, PRECISION)
        dzw = dot_add(b_x, load_pairs(r_pairs + of_head, PRECISION), dzw, PRECISION)
    b_y = tl.where(below, b_y, 0.0)
    b_e = dot(b_inverse, cast_operand(b_y * b_beta[:, None], EXACT), EXACT)
    b_e = cast_operand(b_e, PRECISION)
    store_pairs(e_pairs + row * 64, b_e)
    b_inverse = cast_operand(b_inverse, PRECISION)
    b_de = dot(tl.trans(b_inverse), cast_operand(-b_de, PRECISION), PRECISION)
    b_de = tl.where(below, b_de, 0.0)
    store_pairs(de_pairs + row * 64, b_de * b_beta[:, None])
    dzw = dot(tl.trans(b_inverse), cast_operand(-dzw, PRECISION), PRECISION)
    b_dbeta = tl.sum(b_de * b_y + tl.where(diagonal, dzw, 0.0), 1)
    b_dm = dot(cast_operand(dzw * b_beta[None, :], PRECISION), tl.trans(b_inverse), PRECISION)
    b_dm = dot_add(cast_operand(b_de, PRECISION), tl.trans(b_e), b_dm, PRECISION)
    b_dm = tl.where(below, -b_dm, 0.0)
    b_dbeta += tl.sum(b_dm * ww, 1)
    p_dbeta = dbeta + (batch * T + start) * H + i_h
    tl.store(p_dbeta + o_c * H, b_dbeta.to(dbeta.dtype.element_ty), mask=m_c)
    b_n = b_dm * b_beta[:, None]
    store_pairs(n_pairs + row * 64, b_n + tl.trans(b_n))


@triton.jit(do_not_specialize=SIZES)
def columns_kernel(
    q, k, w, beta, inverse, dq_start, dk_end, wdf, wdft, x_pairs, da_pairs, dx_pairs, e_pairs,
    de_pairs, n_pairs, dq, dk, dw, cu_seqlens, tile_sequence, first_tile, scale, T, num_tiles, H,
    q_b, q_h, k_b, k_h, w_b, w_h, beta_b, beta_t, beta_h, q_t: tl.constexpr, k_t: tl.constexpr,
    w_t: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write columns `[BK]` of dK and dW of one chunk and key head, and of its query heads' dQ."""
    num_k: tl.constexpr = (K + BK - 1) // BK
    # Columns and heads run side by side: together they read whole rows of memory.
    i_k = (tl.program_id(0) % num_k) * BK
    i_h = ((tl.program_id(0) // num_k) % H).to(tl.int64)
    i_chunk = tl.program_id(0) // (num_k * H)
    batch, start, chunk, n = locate_chunk(i_chunk, T, cu_seqlens, tile_sequence, first_tile, PACKED)
    if n <= 0:
        return
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    within = i_chunk.to(tl.int64) * 64
    row = i_h * num_rows + within
    out = (batch * T + start) * H + i_h
    o_c = tl.arange(0, 64)
    m_c = o_c < n
    everywhere = o_c >= 0
    p_beta = beta + batch * beta_b + start * beta_t + i_h * beta_h
    b_beta = tl.load(p_beta + o_c * beta_t, mask=m_c, other=0.0).to(tl.float32)
    p_k = k + batch * k_b + start * k_t + i_h * k_h
    p_w = w + batch * w_b + start * w_t + i_h * w_h
    b_k = cast_operand(load_tile(p_k, o_c * k_t, m_c, i_k, K, BK), PRECISION)
    b_w = cast_operand(load_tile(p_w, o_c * w_t, m_c, i_k, K, BK), PRECISION)
    b_dke = load_tile(dk_end + row * K, o_c * K, everywhere, i_k, K, BK)

    b_dz = tl.zeros((64, BK), tl.float32)
    b_dw = tl.zeros((64, BK), tl.float32)
    b_dk = tl.zeros((64, BK), tl.float32)
    for i_g in range(GROUP):
        i_hq = i_h * GROUP + i_g
        of_head = i_hq * num_rows + within
        p_q = q + batch * q_b + start * q_t + i_hq * q_h
        b_dqs = load_tile(dq_start + of_head * K, o_c * K, everywhere, i_k, K, BK)
        b_q = cast_operand(load_tile(p_q, o_c * q_t, m_c, i_k, K, BK), PRECISION)
        b_da = load_pairs(da_pairs + of_head * 64, PRECISION)
        b_dx = load_pairs(dx_pairs + of_head * 64, PRECISION)
        b_x = tl.trans(load_pairs(x_pairs + of_head * 64, PRECISION))
        b_dq = dot_add(b_da, b_k, b_dqs.to(tl.float32), PRECISION)
        b_dq = dot_add(b_dx, b_w, b_dq, PRECISION) * scale
        p_dq = dq + ((batch * T + start) * (H * GROUP) + i_hq) * K
        store_tile(p_dq, o_c * (H * GROUP * K), m_c, i_k, b_dq, K, BK)
        b_dz = dot_add(b_x, cast_operand(b_dqs, PRECISION), b_dz, PRECISION)
        b_dk = dot_add(tl.trans(b_da), b_q, b_dk, PRECISION)
        b_dw = dot_add(tl.trans(b_dx), b_q, b_dw, PRECISION)

    b_de = load_pairs(de_pairs + row * 64, PRECISION)
    b_dk = dot_add(tl.trans(b_de), b_w, b_dk * scale + b_dke.to(tl.float32), PRECISION)
    store_tile(dk + out * K, o_c * (H * K), m_c, i_k, b_dk, K, BK)

    b_dw = dot_add(b_de, b_k, b_dw * scale, PRECISION)
    b_dw = dot_add(load_pairs(n_pairs + row * 64, PRECISION), b_w, b_dw, PRECISION)
    b_dw -= dot(
        load_pairs(e_pairs + row * 64, PRECISION), cast_operand(b_dke, PRECISION), PRECISION
    )
    b_inverse = load_pairs(inverse + row * 64, PRECISION)
    # The first and the last chunk's products have no gradient.
    if (chunk > 0) & (n > 64):
        b_dz += load_tile(wdf + row * K, o_c * K, everywhere, i_k, K, BK).to(tl.float32)
        b_wdft = load_tile(wdft + row * K, o_c * K, everywhere, i_k, K, BK).to(tl.float32)
        b_wdft = cast_operand(b_wdft * b_beta[:, None], PRECISION)
        b_dw -= dot(b_inverse, b_wdft, PRECISION)
    b_dz = dot(tl.trans(b_inverse), cast_operand(b_dz, PRECISION), PRECISION)
    b_dw -= b_dz * b_beta[:, None]
    store_tile(dw + out * K, o_c * (H * K), m_c, i_k, b_dw, K, BK)


@triton.jit(do_not_specialize=SIZES)
def values_kernel(
    do, p_pairs, dv_part, dv, cu_seqlens, tile_sequence, first_tile, T, num_tiles, H, do_b, do_h,
    do_t: tl.constexpr, GROUP: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write columns `[BV]` of dV of one chunk and key head."""
    num_v: tl.constexpr = (V + BV - 1) // BV
    i_v = (tl.program_id(0) % num_v) * BV
    i_h = ((tl.program_id(0) // num_v) % H).to(tl.int64)
    i_chunk = tl.program_id(0) // (num_v * H)
    batch, start, _, n = locate_chunk(i_chunk, T, cu_seqlens, tile_sequence, first_tile, PACKED)
    if n <= 0:
        return
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    within = i_chunk.to(tl.int64) * 64
    o_c = tl.arange(0, 64)
    m_c = o_c < n
    p_part = dv_part + (i_h * num_rows + within) * V
    b_dv = load_tile(p_part, o_c * V, o_c >= 0, i_v, V, BV).to(tl.float32)
    for i_g in range(GROUP):
        i_hq = i_h * GROUP + i_g
        p_do = do + batch * do_b + start * do_t + i_hq * do_h
        b_do = cast_operand(load_tile(p_do, o_c * do_t, m_c, i_v, V, BV), PRECISION)
        b_p = load_pairs(p_pairs + (i_hq * num_rows + within) * 64, PRECISION)
        b_dv = dot_add(tl.trans(b_p), b_do, b_dv, PRECISION)
    p_dv = dv + ((batch * T + start) * H + i_h) * V
    store_tile(p_dv, o_c * (H * V), m_c, i_v, b_dv, V, BV)
