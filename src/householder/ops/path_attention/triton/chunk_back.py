"""The gradients inside the chunks of `path_attention`.

With the notation of the chunked form (see `prepare.py`), dA = P ⊙ (dO Vᵀ − δ) inside the chunk, and
what came down the tree: dQ← and dK→, and of the chunk's product dF the tiles W dF and W dFᵀ. One
kernel takes the query heads,

    dX = −lower(dQ← Zᵀ + dA Eᵀ)       dQ = scale · (dQ← + dA K + dX W)

and leaves P, X, dA and dX; one takes the key heads, with sums over the query heads of each:

    dZ = −Σ Xᵀ dQ← − W dF              D_Z = (I + M)⁻ᵀ dZ
    dE = −Σ Xᵀ dA − W dK→ᵀ             D_E = strict_lower((I + M)⁻ᵀ dE)
    dM = −strict_lower(D_Z Zᵀ + D_E Eᵀ)        N = diag(β) dM
    dβ = rowsum(D_Z ⊙ W + D_E ⊙ Y + dM ⊙ W Wᵀ)
    dW = β ⊙ D_Z − E dK→ − Z dFᵀ + (N + Nᵀ) W + (β ⊙ D_E) K + scale · Σ dXᵀ Q
    dK = dK→ + (β ⊙ D_E)ᵀ W + scale · Σ dAᵀ Q        dV += Σ Pᵀ dO

Z is never formed: dQ← Zᵀ = (dQ← Wᵀ) diag(β) (I + M)⁻ᵀ, and so on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import cast_operand, dot, dot_add, load_tile, store_tile
from householder.ops.path_attention.triton.prepare import decay_inside, load_gates
from householder.ops.path_attention.triton.problem import LOG2_E, locate_tile


@triton.jit
def query_chunk_kernel(
    q, k, v, w, beta, g, o, do, lse, delta, inverse, dq_start, dq, dg_inside, p_pairs, x_pairs,
    da_pairs, dx_pairs, cu_seqlens, tile_sequence, first_tile, scale, window, T, num_tiles, HQ,
    q_b, q_h, k_b, k_h, v_b, v_h, w_b, w_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, o_b, o_h,
    do_b, do_h, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr, w_t: tl.constexpr,
    o_t: tl.constexpr, do_t: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GATED: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write dQ of one chunk and query head, P, X, dA and dX, and what dA gives to the gates.

    EXACT is the precision of what the logits are made of, PRECISION that of gradients.
    """
    # Heads run side by side: together they read whole rows of memory.
    i_chunk = tl.program_id(0) // HQ
    i_hq = (tl.program_id(0) % HQ).to(tl.int64)
    i_h = i_hq // GROUP
    batch, first, length, tile = locate_tile(
        i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    token = (i_chunk - 2 * tile) * 64
    n = length - token
    if n <= 0:
        return
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    batch = tl.cast(batch, tl.int64)
    start = tl.cast(first, tl.int64) + token
    row = i_hq * num_rows + i_chunk.to(tl.int64) * 64
    pairs = (i_hq * (num_rows // 64) + i_chunk) * 4096
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
    p_dqs = dq_start + row * K
    p_beta = beta + batch * beta_b + start * beta_t + i_h * beta_h
    b_beta = tl.load(p_beta + o_c * beta_t, mask=m_c, other=0.0).to(tl.float32)
    p_inverse = inverse + (i_h * (num_rows // 64) + i_chunk) * 4096
    b_inverse = load_tile(p_inverse, o_c * 64, everywhere, 0, 64, 64)

    qk = tl.zeros((64, 64), tl.float32)
    b_x = tl.zeros((64, 64), tl.float32)
    b_y = tl.zeros((64, 64), tl.float32)
    b_dx = tl.zeros((64, 64), tl.float32)
    for i in tl.static_range(0, K, BK):
        b_q = cast_operand(load_tile(p_q, o_c * q_t, m_c, i, K, BK), PRECISION)
        b_k = cast_operand(load_tile(p_k, o_c * k_t, m_c, i, K, BK), PRECISION)
        b_w = cast_operand(load_tile(p_w, o_c * w_t, m_c, i, K, BK), PRECISION)
        b_dqs = cast_operand(load_tile(p_dqs, o_c * K, everywhere, i, K, BK), PRECISION)
        qk = dot_add(b_q, tl.trans(b_k), qk, PRECISION)
        b_x = dot_add(b_q, tl.trans(b_w), b_x, PRECISION)
        b_y = dot_add(b_w, tl.trans(b_k), b_y, PRECISION)
        b_dx = dot_add(b_dqs, tl.trans(b_w), b_dx, PRECISION)
    b_x = tl.where(below | diagonal, b_x * scale, 0.0)
    store_tile(x_pairs + pairs, o_c * 64, everywhere, 0, b_x, 64, 64)
    b_e = cast_operand(tl.where(below, b_y * b_beta[:, None], 0.0), EXACT)
    b_e = dot(cast_operand(b_inverse, EXACT), b_e, EXACT)
    b_a = qk * scale - dot(cast_operand(b_x, EXACT), cast_operand(b_e, EXACT), EXACT)
    if GATED:
        p_g = g + batch * g_b + start * g_t + i_hq * g_h
        b_a += decay_inside(load_gates(p_g, g_t, n))
    seen = below | diagonal
    if WINDOWED:
        seen = seen & (o_c[:, None] - o_c[None, :] < window)
    b_lse = tl.load(lse + row + o_c)
    b_p = tl.exp2(tl.where(seen, b_a * LOG2_E - b_lse[:, None], -float("inf")))
    store_tile(p_pairs + pairs, o_c * 64, everywhere, 0, b_p, 64, 64)

    b_da = tl.zeros((64, 64), tl.float32)
    b_own = tl.zeros((64,), tl.float32)
    for i in tl.static_range(0, V, BV):
        b_v = load_tile(p_v, o_c * v_t, m_c, i, V, BV)
        b_do = load_tile(p_do, o_c * do_t, m_c, i, V, BV)
        b_o = load_tile(p_o, o_c * o_t, m_c, i, V, BV).to(tl.float32)
        b_own += tl.sum(b_do.to(tl.float32) * (b_v.to(tl.float32) - b_o), 1)
        b_v, b_do = cast_operand(b_v, PRECISION), cast_operand(b_do, PRECISION)
        b_da = dot_add(b_do, tl.trans(b_v), b_da, PRECISION)
    # A row that sees only itself, as every first one, has o = v and no gradient; as a difference
    # of two inner products that would be their rounding.
    b_delta = tl.load(delta + row + o_c)
    b_da = b_p * tl.where(diagonal, b_own[:, None], b_da - b_delta[:, None])
    if GATED:
        # The gate of token s is crossed by the pairs with j < s ≤ i.
        from_here = cast_operand(tl.where(below, 0.0, 1.0), PRECISION)
        later = dot(from_here, cast_operand(b_da, PRECISION), PRECISION)
        tl.store(dg_inside + row + o_c, tl.sum(tl.where(below, later, 0.0), 1))
    b_da = cast_operand(b_da, PRECISION)
    store_tile(da_pairs + pairs, o_c * 64, everywhere, 0, b_da, 64, 64)
    b_dx = cast_operand(b_dx * b_beta[None, :], PRECISION)
    b_dx = dot(b_dx, tl.trans(cast_operand(b_inverse, PRECISION)), PRECISION)
    b_dx = dot_add(b_da, tl.trans(cast_operand(b_e, PRECISION)), b_dx, PRECISION)
    b_dx = cast_operand(tl.where(below | diagonal, -b_dx, 0.0), PRECISION)
    store_tile(dx_pairs + pairs, o_c * 64, everywhere, 0, b_dx, 64, 64)

    p_dq = dq + ((batch * T + start) * HQ + i_hq) * K
    for i in tl.static_range(0, K, BK):
        if K > BK:
            b_k = cast_operand(load_tile(p_k, o_c * k_t, m_c, i, K, BK), PRECISION)
            b_w = cast_operand(load_tile(p_w, o_c * w_t, m_c, i, K, BK), PRECISION)
        b_dq = load_tile(p_dqs, o_c * K, everywhere, i, K, BK).to(tl.float32)
        b_dq = dot_add(b_da, b_k, b_dq, PRECISION)
        b_dq = dot_add(b_dx, b_w, b_dq, PRECISION)
        store_tile(p_dq, o_c * (HQ * K), m_c, i, b_dq * scale, K, BK)


@triton.jit
def solve_transposed(
    p_x, p_dqs, p_wdf, b_inverse, i, first_head, num_rows, passed, GROUP: tl.constexpr,
    K: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return columns `i …` of D_Z, `[64, BK]`."""
    o_c = tl.arange(0, 64)
    everywhere = o_c >= 0
    b_dz = tl.zeros((64, BK), tl.float32)
    for i_g in range(GROUP):
        of_head = first_head + i_g
        b_x = load_tile(p_x + of_head * (num_rows * 64), o_c * 64, everywhere, 0, 64, 64)
        b_dqs = load_tile(p_dqs + of_head * (num_rows * K), o_c * K, everywhere, i, K, BK)
        b_x, b_dqs = cast_operand(b_x, PRECISION), cast_operand(b_dqs, PRECISION)
        b_dz = dot_add(tl.trans(b_x), b_dqs, b_dz, PRECISION)
    b_dz += load_tile(p_wdf, o_c * K, o_c < passed, i, K, BK).to(tl.float32)
    return dot(tl.trans(b_inverse), cast_operand(-b_dz, PRECISION), PRECISION)


@triton.jit
def key_chunk_kernel(
    q, k, w, beta, do, inverse, dq_start, dk_end, dv_part, wdf, wdft, p_pairs, x_pairs, da_pairs,
    dx_pairs, dk, dv, dw, dbeta, cu_seqlens, tile_sequence, first_tile, scale, T, num_tiles, H,
    q_b, q_h, k_b, k_h, w_b, w_h, beta_b, beta_t, beta_h, do_b, do_h, q_t: tl.constexpr,
    k_t: tl.constexpr, w_t: tl.constexpr, do_t: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write dK, dV, dW and dβ of one chunk and key head."""
    i_chunk = tl.program_id(0) // H
    i_h = (tl.program_id(0) % H).to(tl.int64)
    batch, first, length, tile = locate_tile(
        i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    chunk = i_chunk - 2 * tile
    n = length - chunk * 64
    if n <= 0:
        return
    # Rows of W dF: of none where the chunk's product has no gradient.
    passed = 0
    if (chunk > 0) & (chunk < tl.cdiv(length, 64) - 1):
        passed = 64
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    batch = tl.cast(batch, tl.int64)
    start = tl.cast(first, tl.int64) + chunk * 64
    within = i_chunk.to(tl.int64) * 64
    row = i_h * num_rows + within
    first_head = i_h * GROUP
    o_c = tl.arange(0, 64)
    m_c = o_c < n
    everywhere = o_c >= 0
    below = o_c[:, None] > o_c[None, :]
    p_q = q + batch * q_b + start * q_t
    p_k = k + batch * k_b + start * k_t + i_h * k_h
    p_w = w + batch * w_b + start * w_t + i_h * w_h
    p_do = do + batch * do_b + start * do_t
    p_dke = dk_end + row * K
    p_dqs = dq_start + within * K
    p_pp, p_x, p_da, p_dx = (
        p_pairs + within * 64, x_pairs + within * 64, da_pairs + within * 64, dx_pairs + within * 64
    )  # fmt: skip
    out = (batch * T + start) * H + i_h
    b_beta = tl.load(
        beta + batch * beta_b + start * beta_t + i_h * beta_h + o_c * beta_t, mask=m_c, other=0.0
    ).to(tl.float32)
    b_inverse = load_tile(inverse + row * 64, o_c * 64, everywhere, 0, 64, 64)

    for i in tl.static_range(0, V, BV):
        b_dv = load_tile(dv_part + row * V, o_c * V, everywhere, i, V, BV).to(tl.float32)
        for i_g in range(GROUP):
            of_head = first_head + i_g
            b_p = load_tile(p_pp + of_head * (num_rows * 64), o_c * 64, everywhere, 0, 64, 64)
            b_do = load_tile(p_do + of_head * do_h, o_c * do_t, m_c, i, V, BV)
            b_p, b_do = cast_operand(b_p, PRECISION), cast_operand(b_do, PRECISION)
            b_dv = dot_add(tl.trans(b_p), b_do, b_dv, PRECISION)
        store_tile(dv + out * V, o_c * (H * V), m_c, i, b_dv, V, BV)

    # E, and what it gets as gradient.
    ww = tl.zeros((64, 64), tl.float32)
    b_y = tl.zeros((64, 64), tl.float32)
    b_de = tl.zeros((64, 64), tl.float32)
    for i in tl.static_range(0, K, BK):
        b_w = cast_operand(load_tile(p_w, o_c * w_t, m_c, i, K, BK), PRECISION)
        b_k = cast_operand(load_tile(p_k, o_c * k_t, m_c, i, K, BK), PRECISION)
        b_dke = cast_operand(load_tile(p_dke, o_c * K, everywhere, i, K, BK), PRECISION)
        ww = dot_add(b_w, tl.trans(b_w), ww, PRECISION)
        b_y = dot_add(b_w, tl.trans(b_k), b_y, PRECISION)
        b_de = dot_add(b_w, tl.trans(b_dke), b_de, PRECISION)
    for i_g in range(GROUP):
        of_head = (first_head + i_g) * (num_rows * 64)
        b_x = cast_operand(load_tile(p_x + of_head, o_c * 64, everywhere, 0, 64, 64), PRECISION)
        b_da = cast_operand(load_tile(p_da + of_head, o_c * 64, everywhere, 0, 64, 64), PRECISION)
        b_de = dot_add(tl.trans(b_x), b_da, b_de, PRECISION)
    b_y = tl.where(below, b_y, 0.0)
    b_e = cast_operand(b_y * b_beta[:, None], EXACT)
    b_e = dot(cast_operand(b_inverse, EXACT), b_e, EXACT)
    b_e = cast_operand(b_e, PRECISION)
    b_inverse = cast_operand(b_inverse, PRECISION)
    b_de = dot(tl.trans(b_inverse), cast_operand(-b_de, PRECISION), PRECISION)
    b_de = tl.where(below, b_de, 0.0)
    b_dbeta = tl.sum(b_de * b_y, 1)

    # D_Z Wᵀ; where K is one block, D_Z stays.
    dzw = tl.zeros((64, 64), tl.float32)
    for i in tl.static_range(0, K, BK):
        if K > BK:
            b_w = cast_operand(load_tile(p_w, o_c * w_t, m_c, i, K, BK), PRECISION)
        b_dz = solve_transposed(
            p_x, p_dqs, wdf + row * K, b_inverse, i, first_head, num_rows, passed, GROUP, K,
            PRECISION, BK,
        )  # fmt: skip
        b_dbeta += tl.sum(b_dz * b_w.to(tl.float32), 1)
        dzw = dot_add(cast_operand(b_dz, PRECISION), tl.trans(b_w), dzw, PRECISION)
    b_dm = dot(cast_operand(dzw * b_beta[None, :], PRECISION), tl.trans(b_inverse), PRECISION)
    b_dm = dot_add(cast_operand(b_de, PRECISION), tl.trans(b_e), b_dm, PRECISION)
    b_dm = tl.where(below, -b_dm, 0.0)
    b_dbeta += tl.sum(b_dm * ww, 1)
    tl.store(dbeta + out + o_c * H, b_dbeta.to(dbeta.dtype.element_ty), mask=m_c)
    b_n = cast_operand(b_dm * b_beta[:, None], PRECISION)
    b_de = cast_operand(b_de * b_beta[:, None], PRECISION)

    for i in tl.static_range(0, K, BK):
        if K > BK:
            b_w = cast_operand(load_tile(p_w, o_c * w_t, m_c, i, K, BK), PRECISION)
            b_k = cast_operand(load_tile(p_k, o_c * k_t, m_c, i, K, BK), PRECISION)
            b_dke = cast_operand(load_tile(p_dke, o_c * K, everywhere, i, K, BK), PRECISION)
            b_dz = solve_transposed(
                p_x, p_dqs, wdf + row * K, b_inverse, i, first_head, num_rows, passed, GROUP,
                K, PRECISION, BK,
            )  # fmt: skip
        b_dw = tl.zeros((64, BK), tl.float32)
        b_dk = tl.zeros((64, BK), tl.float32)
        for i_g in range(GROUP):
            of_head = (first_head + i_g) * (num_rows * 64)
            b_q = load_tile(p_q + (first_head + i_g) * q_h, o_c * q_t, m_c, i, K, BK)
            b_q = cast_operand(b_q, PRECISION)
            b_dx = load_tile(p_dx + of_head, o_c * 64, everywhere, 0, 64, 64)
            b_da = load_tile(p_da + of_head, o_c * 64, everywhere, 0, 64, 64)
            b_dw = dot_add(tl.trans(cast_operand(b_dx, PRECISION)), b_q, b_dw, PRECISION)
            b_dk = dot_add(tl.trans(cast_operand(b_da, PRECISION)), b_q, b_dk, PRECISION)
        b_dk *= scale
        b_dk = dot_add(tl.trans(b_de), b_w, b_dk, PRECISION)
        b_dk += load_tile(p_dke, o_c * K, everywhere, i, K, BK).to(tl.float32)
        store_tile(dk + out * K, o_c * (H * K), m_c, i, b_dk, K, BK)

        b_dw = b_dw * scale + b_dz * b_beta[:, None]
        b_dw -= dot(b_e, b_dke, PRECISION)
        b_zdft = load_tile(wdft + row * K, o_c * K, o_c < passed, i, K, BK).to(tl.float32)
        b_zdft = cast_operand(b_zdft * b_beta[:, None], PRECISION)
        b_dw -= dot(b_inverse, b_zdft, PRECISION)
        b_dw = dot_add(b_n, b_w, b_dw, PRECISION)
        b_dw = dot_add(tl.trans(b_n), b_w, b_dw, PRECISION)
        b_dw = dot_add(b_de, b_k, b_dw, PRECISION)
        store_tile(dw + out * K, o_c * (H * K), m_c, i, b_dw, K, BK)


@triton.jit
def sum_range(totals, start, stop, BLOCK: tl.constexpr):
    """Return the sum of `totals[start … stop − 1]`, always in the same order."""
    o_b = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(start, stop, BLOCK):
        total += tl.load(totals + i + o_b, mask=i + o_b < stop, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def gate_kernel(
    sums, totals, dg_inside, dg, cu_seqlens, tile_sequence, first_tile, T, num_tiles, num_levels,
    HQ, dg_b, dg_t, dg_h, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dg of one chunk and query head.

    In a rectangle, a gate of the right block is crossed by the rows from its token on, and one of
    the left block by the columns before it. `totals` are the chunks' sums of `sums`.
    """
    i_chunk = tl.program_id(0) // HQ
    i_hq = (tl.program_id(0) % HQ).to(tl.int64)
    batch, first, length, tile = locate_tile(
        i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    chunk = i_chunk - 2 * tile
    n = length - chunk * 64
    if n <= 0:
        return
    num_chunks = tl.cdiv(length, 64)
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    row = i_chunk.to(tl.int64) * 64
    o_c = tl.arange(0, 64)
    from_here = o_c[:, None] <= o_c[None, :]
    b_dg = tl.load(dg_inside + i_hq * num_rows + row + o_c)
    for level in range(num_levels):
        block = chunk >> level
        of_head = (tl.cast(level, tl.int64) * HQ + i_hq) * num_rows
        p_totals = totals + of_head // 64 + tl.cast(tile, tl.int64) * 2
        if block % 2 == 1:
            b_sum = tl.load(sums + of_head + row + o_c)
            b_dg += tl.sum(tl.where(from_here, b_sum[None, :], 0.0), 1)
            stop = tl.minimum((block + 1) << level, num_chunks)
            b_dg += sum_range(p_totals, chunk + 1, stop, BLOCK)
        elif ((block + 1) << level) < num_chunks:
            b_sum = tl.load(sums + of_head + row + o_c)
            b_dg += tl.sum(tl.where(from_here, 0.0, b_sum[None, :]), 1)
            b_dg += sum_range(p_totals, block << level, chunk, BLOCK)
    p_dg = dg + tl.cast(batch, tl.int64) * dg_b + (tl.cast(first, tl.int64) + chunk * 64) * dg_t
    p_dg += i_hq * dg_h
    tl.store(p_dg + o_c * dg_t, b_dg.to(dg.dtype.element_ty), mask=o_c < n)
