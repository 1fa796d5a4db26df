"""The first kernel of a decoded step: new tokens meet the recent ones' compact WY form."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from householder.ops._triton import dot, dot_add, inverse_unit_lower
from householder.ops.path_attention.cache.triton.fetch import fetch_to_l2


@triton.jit
def load_rows(pointer, first, o_r, stop, o_d, D: tl.constexpr):
    """Load rows `first + o_r` of `[·, D]` in float32, zero from row `stop` of `o_r` on."""
    rows = (first + o_r)[:, None] * D + o_d[None, :]
    x = tl.load(pointer + rows, mask=(o_r < stop)[:, None] & (o_d < D)[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def load_new(pointer, s_t, o_n, n, o_d, D: tl.constexpr):
    """Load the vectors of new tokens in float32, zero behind the last one."""
    mask = (o_n < n)[:, None] & (o_d < D)[None, :]
    x = tl.load(pointer + o_n[:, None] * s_t + o_d[None, :], mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def triangle_of_new(w, beta, o_n, SINGLE: tl.constexpr):
    """Return T of the new tokens alone, `(I + tril(β W Wᵀ, −1))⁻¹ diag(β)`, rows from zero on."""
    if SINGLE:
        ut = tl.where(o_n[:, None] == o_n[None, :], beta[:, None], 0.0)
    else:
        gram = dot(w, tl.trans(w), "tf32x3") * beta[:, None]
        gram = tl.where(o_n[:, None] > o_n[None, :], gram, 0.0)
        ut = inverse_unit_lower(gram, 16, "tf32x3") * beta[None, :]
        ut = tl.where(o_n[:, None] >= o_n[None, :], ut, 0.0)
    return ut


@triton.jit
def load_triangle(p_ut, room, o_i, o_j, r):
    """Load rows `o_i` and columns `o_j` of the recent tokens' T."""
    mask = (o_i < r)[:, None] & (o_j < r)[None, :]
    x = tl.load(p_ut + o_i[:, None] * room + o_j[None, :], mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["B", "H", "room", "recent_room"])
def enter_kernel(
    p_q, p_k, p_v, p_w, p_beta, p_g, p_counts, p_new,
    p_keys, p_values, p_ws, p_betas, p_gs, p_ut, p_wk,
    p_queries, p_along, p_decays, p_shifts,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_wb, s_wt, s_wh,
    s_bb, s_bt, s_bh, s_gb, s_gt, s_gh,
    scale, B, H, N, room, recent_room, triangle_room,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    SINGLE: tl.constexpr, GATED: tl.constexpr, FETCHED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row and key head, i): bring the i-th 16 queries to the end of the newest block.

    The last program but one appends rows to the triangle T instead, and the last one the tokens,
    rows of Y, and sums of gates. No program reads what another writes.
    """
    if OVERLAP:
        gdc_launch_dependents()
    i_bh, i_part = tl.program_id(0), tl.program_id(1)
    head = i_bh.to(tl.int64)
    i_b, i_h = head // H, head % H
    p_ws += head * recent_room * K
    p_ut += head * triangle_room * triangle_room
    if FETCHED:
        # Before the counts have come.
        fetch_to_l2(p_ws, BC * K * (p_ws.dtype.element_ty.primitive_bitwidth // 8), FETCHED)
        fetch_to_l2(p_ut, BC * triangle_room * 4, 1 << 15)
    n = N
    if p_new is not None:
        n = tl.load(p_new + i_b)
    old, r = tl.load(p_counts + i_b), tl.load(p_counts + B + i_b)
    # Replays of a graph that nobody counted must not write outside.
    r = tl.minimum(r, tl.minimum(triangle_room, room - old) - N)
    if n == 0:
        return
    o_c, o_k, o_n = tl.arange(0, BC), tl.arange(0, BK), tl.arange(0, 16)
    m_n, m_k = o_n < n, o_k < K
    m_nn = m_n[:, None] & (o_n[None, :] <= o_n[:, None])
    exact = p_ut.dtype.element_ty
    w = load_new(p_w + i_b * s_wb + i_h * s_wh, s_wt, o_n, n, o_k, K)
    p_beta += i_b * s_bb + i_h * s_bh
    beta = tl.load(p_beta + o_n * s_bt, mask=m_n, other=0.0).to(tl.float32)
    num_chunks = tl.num_programs(1) - 2

    if i_part <= num_chunks:
        ut_new = triangle_of_new(w, beta, o_n, SINGLE)
        o_g = i_part * 16 + tl.arange(0, 16)
        i_n = o_g // G  # a query's token
        m_g = i_n < n
        m_gk = m_g[:, None] & m_k[None, :]
        p_along_row = p_along + (head * N * G + o_g)[:, None] * triangle_room
        p_query = p_queries + (head * 2 * N * G + o_g)[:, None] * K + o_k[None, :]
        if i_part < num_chunks:
            p_row = p_q + i_b * s_qb + i_n * s_qt + (i_h * G + o_g % G) * s_qh
            q = tl.load(p_row[:, None] + o_k[None, :], mask=m_gk, other=0.0).to(tl.float32) * scale
            tl.store(p_query, q, mask=m_gk)
            # A query's own reflector first, and those of the new tokens before it.
            if SINGLE:
                along = tl.sum(q * tl.sum(w, 0)[None, :], 1) * tl.sum(beta, 0)
                turned = q - along[:, None] * tl.sum(w, 0)[None, :]
                along = tl.where((o_n == 0)[None, :], along[:, None], 0.0)
            else:
                seen = o_n[None, :] <= i_n[:, None]
                along = tl.where(seen, dot(q, tl.trans(w), "tf32x3"), 0.0)
                along = dot(along, ut_new, "tf32x3")
                turned = q - dot(along, w, "tf32x3")
            tl.store(p_along_row + r + o_n[None, :], along, mask=m_g[:, None] & m_n[None, :])
        else:
            turned = w
        at_block = turned
        for column in range(0, r, BC):
            # Then all recent ones: q − Wᵀ Tᵀ W q, 64 columns of T at a time.
            along = tl.zeros((16, BC), tl.float32)
            for first in range(column, r, BC):
                ws = load_rows(p_ws, first, o_c, r - first, o_k, K)
                ut = load_triangle(p_ut, triangle_room, first + o_c, column + o_c, r)
                along = dot_add(dot(turned, tl.trans(ws), "tf32x3"), ut, along, "tf32x3")
            m_c = (column + o_c < r)[None, :]
            if i_part < num_chunks:
                tl.store(p_along_row + column + o_c[None, :], along, mask=m_g[:, None] & m_c)
                at_block -= dot(along, load_rows(p_ws, column, o_c, r - column, o_k, K), "tf32x3")
            else:
                # Rows of T: −T₂₂ (W₂ W₁ᵀ T₁₁).
                rows = -dot(ut_new, along, "tf32x3")
                p_row = p_ut + (r + o_n)[:, None] * triangle_room + column + o_c[None, :]
                tl.store(p_row, rows.to(exact), mask=m_n[:, None] & m_c)
        if i_part < num_chunks:
            tl.store(p_query + N * G * K, at_block, mask=m_gk)
        else:
            # And T₂₂ on the diagonal; the zeros above it remain.
            p_row = p_ut + (r + o_n)[:, None] * triangle_room + r + o_n[None, :]
            tl.store(p_row, ut_new.to(exact), mask=m_nn)
    else:
        # Rows of Y: W₂ times the keys before them, as they are read later.
        tokens = head * room + old
        p_k += i_b * s_kb + i_h * s_kh
        m_nk = m_n[:, None] & m_k[None, :]
        k = tl.load(p_k + o_n[:, None] * s_kt + o_k[None, :], mask=m_nk, other=0.0)
        k = k.to(p_keys.dtype.element_ty)
        p_row = p_wk + (head * triangle_room + r + o_n)[:, None] * triangle_room
        for column in range(0, r, BC):
            before = load_rows(p_keys + tokens * K, column, o_c, r - column, o_k, K)
            y = dot(w, tl.trans(before), "tf32x3")
            m_c = (column + o_c < r)[None, :]
            tl.store(p_row + column + o_c[None, :], y.to(exact), mask=m_n[:, None] & m_c)
        y = dot(w, tl.trans(k.to(tl.float32)), "tf32x3")
        y = tl.where(o_n[:, None] > o_n[None, :], y, 0.0)
        tl.store(p_row + r + o_n[None, :], y.to(exact), mask=m_nn)

        o_v = tl.arange(0, BV)
        m_nv = m_n[:, None] & (o_v < V)[None, :]
        p_v += i_b * s_vb + i_h * s_vh
        v = tl.load(p_v + o_n[:, None] * s_vt + o_v[None, :], mask=m_nv, other=0.0)
        new = (tokens + r + o_n)[:, None]
        tl.store(p_keys + new * K + o_k[None, :], k, mask=m_nk)
        tl.store(p_values + new * V + o_v[None, :], v, mask=m_nv)
        tl.store(p_ws + (r + o_n)[:, None] * K + o_k[None, :], w, mask=m_nk)
        tl.store(p_betas + head * recent_room + r + o_n, beta, mask=m_n)
        if GATED:
            # Sums of terms of one sign: a difference of sums would be ∞ − ∞ after a gate of −∞.
            o_r = tl.arange(0, BR)
            for i_g in range(G):
                p_g_row = p_gs + (head * G + i_g) * recent_room
                recent = tl.load(p_g_row + o_r, mask=o_r < r, other=0.0).to(tl.float32)
                after = tl.load(p_g_row + o_r + 1, mask=o_r + 1 < r, other=0.0).to(tl.float32)
                after = tl.cumsum(after, 0, reverse=True)
                p_g_new = p_g + i_b * s_gb + (i_h * G + i_g) * s_gh
                g = tl.load(p_g_new + o_n * s_gt, mask=m_n, other=0.0).to(tl.float32)
                before = tl.cumsum(g, 0)
                row = head * N * G + o_n * G + i_g
                tl.store(p_shifts + row, tl.sum(recent, 0) + before, mask=m_n)
                p_decay = p_decays + row[:, None] * triangle_room
                m_r = m_n[:, None] & (o_r < r)[None, :]
                tl.store(p_decay + o_r[None, :], before[:, None] + after[None, :], mask=m_r)
                later = tl.where(o_n[:, None] > o_n[None, :], g[:, None], 0.0)
                tl.store(p_decay + r + o_n[None, :], tl.cumsum(later, 0), mask=m_nn)
                tl.store(p_g_row + r + o_n, g, mask=m_n)
