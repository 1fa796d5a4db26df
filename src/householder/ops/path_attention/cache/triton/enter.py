"""The first kernel of a decoded step: new tokens meet the recent ones' compact WY form."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from householder.ops._triton import beside_diagonal, dot
from householder.ops.path_attention.cache.triton.fetch import fetch_to_l2

# Numbers of which no kernel is the faster for knowing that they are 1 or divisible by 16.
NOT_SPECIAL = [
    *("B", "H", "N", "num_queries", "room", "recent_room"),
    *("s_bb", "s_bt", "s_bh", "s_gb", "s_gt", "s_gh"),
]


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
    same = o_n[:, None] == o_n[None, :]
    if SINGLE:
        ut = tl.where(same, beta[:, None], 0.0)
    else:
        # Joined from pairs, as in `inverse_unit_lower`: no power of the triangle is formed.
        gram = dot(w, tl.trans(w), "tf32x3") * beta[:, None]
        gram = tl.where(o_n[:, None] > o_n[None, :], gram, 0.0)
        inverse = tl.where(same, 1.0, 0.0) - tl.where(beside_diagonal(o_n, 1), gram, 0.0)
        for level in range(1, 4):
            beside = tl.where(beside_diagonal(o_n, 1 << level), -gram, 0.0)
            inverse += dot(dot(inverse, beside, "tf32x3"), inverse, "tf32x3")
        ut = inverse * beta[None, :]
    return ut


@triton.jit
def as_held(k, dtype: tl.constexpr):
    """Return keys in the dtype they are held in, and what is beyond its range at its end."""
    if dtype == tl.float16:
        k = tl.clamp(k.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return k.to(dtype)


@triton.jit
def sum_gates(
    p_g, p_gs, p_decays, p_shifts, s_t, s_h, head, n, r, N, recent_room, triangle_room,
    G: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Append new gates, and sum those between recent keys and queries, and of all recent tokens."""
    # Sums of terms of one sign: a difference of sums would be ∞ − ∞ after a gate of −∞.
    o_r, o_n = tl.arange(0, BR), tl.arange(0, 16)
    m_n = o_n < n
    for i_g in range(G):
        p_g_row = p_gs + (head * G + i_g) * recent_room
        recent = tl.load(p_g_row + o_r, mask=o_r < r, other=0.0).to(tl.float32)
        after = tl.load(p_g_row + o_r + 1, mask=o_r + 1 < r, other=0.0).to(tl.float32)
        after = tl.cumsum(after, 0, reverse=True)
        g = tl.load(p_g + o_n * s_t + i_g * s_h, mask=m_n, other=0.0).to(tl.float32)
        before = tl.cumsum(g, 0)
        row = head * N * G + o_n * G + i_g
        tl.store(p_shifts + row, tl.sum(recent, 0) + before, mask=m_n)
        p_decay = p_decays + row[:, None] * triangle_room
        m_r = m_n[:, None] & (o_r < r)[None, :]
        tl.store(p_decay + o_r[None, :], before[:, None] + after[None, :], mask=m_r)
        later = tl.where(o_n[:, None] > o_n[None, :], g[:, None], 0.0)
        m_nn = m_n[:, None] & (o_n[None, :] <= o_n[:, None])
        tl.store(p_decay + r + o_n[None, :], tl.cumsum(later, 0), mask=m_nn)
        tl.store(p_g_row + r + o_n, g, mask=m_n)


@triton.jit(do_not_specialize=NOT_SPECIAL)
def enter_one_kernel(
    p_q, p_k, p_v, p_w, p_beta, p_g, p_counts, p_new,
    p_keys, p_values, p_ws, p_betas, p_gs, p_tw, p_ty,
    p_queries, p_along, p_wk, p_decays, p_shifts,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_wb, s_wt, s_wh,
    s_bb, s_bt, s_bh, s_gb, s_gt, s_gh,
    scale, B, H, N, num_queries, room, recent_room, triangle_room,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Do what `enter_kernel` does for one token and few query heads a key head.

    Program (row and key head, i): the queries, the row of T W, or the token, its row of T Y and
    sums of gates. Vectors take sums where tiles would take the tensor cores' sixteen rows.
    """
    if OVERLAP:
        gdc_launch_dependents()
    i_part, head = tl.program_id(1), tl.program_id(0).to(tl.int64)
    i_b, i_h = head // H, head % H
    p_ws += head * recent_room * K
    p_tw += head * triangle_room * K
    p_ty += head * triangle_room * triangle_room
    if OVERLAP:
        # Before the counts have come.
        fetch_to_l2(p_ws, BC * K * (p_ws.dtype.element_ty.primitive_bitwidth // 8), BC * BK * 4)
        fetch_to_l2(p_tw, BC * K * 4, BC * BK * 4)
    n = N
    if p_new is not None:
        n = tl.load(p_new + i_b)
    o_c, o_k = tl.arange(0, BC), tl.arange(0, BK)
    m_k = o_k < K
    w = tl.load(p_w + i_b * s_wb + i_h * s_wh + o_k, mask=m_k, other=0.0).to(tl.float32)
    beta = tl.load(p_beta + i_b * s_bb + i_h * s_bh).to(tl.float32)
    old, r = tl.load(p_counts + i_b), tl.load(p_counts + B + i_b)
    # Replays of a graph that nobody counted must not write outside.
    r = tl.minimum(r, tl.minimum(triangle_room, room - old) - 1)
    if n == 0:
        return
    exact = p_ty.dtype.element_ty
    if i_part == 0:
        for i_g in range(G):
            p_q_row = p_q + i_b * s_qb + (i_h * G + i_g) * s_qh
            q = tl.load(p_q_row + o_k, mask=m_k, other=0.0).to(tl.float32) * scale
            p_query = p_queries + (head * num_queries * G + i_g) * K + o_k
            tl.store(p_query, q, mask=m_k)
            # The new token's reflector first; then the recent ones, x − (x Wᵀ) (T W).
            p_along_row = p_along + (head * G + i_g) * triangle_room
            along_new = beta * tl.sum(q * w, 0)
            tl.store(p_along_row + r, along_new)
            x = q - along_new * w
            turned = x
            for start in range(0, r, BC):
                ws = load_rows(p_ws, start, o_c, r - start, o_k, K)
                tw = load_rows(p_tw, start, o_c, r - start, o_k, K)
                along = tl.sum(ws * x[None, :], 1)
                tl.store(p_along_row + start + o_c, along, mask=start + o_c < r)
                turned -= tl.sum(tw * along[:, None], 0)
            tl.store(p_query + G * K, turned, mask=m_k)
    elif i_part == 1:
        row = w
        for start in range(0, r, BC):
            ws = load_rows(p_ws, start, o_c, r - start, o_k, K)
            tw = load_rows(p_tw, start, o_c, r - start, o_k, K)
            row -= tl.sum(tw * tl.sum(ws * w[None, :], 1)[:, None], 0)
        tl.store(p_tw + r * K + o_k, (row * beta).to(exact), mask=m_k)
    else:
        tokens = head * room + old
        p_wk_row, p_ty_row = p_wk + head * 16 * triangle_room, p_ty + r * triangle_room
        for column in range(0, r, BC):
            o_j = column + o_c
            before = load_rows(p_keys + tokens * K, column, o_c, r - column, o_k, K)
            y = tl.sum(before * w[None, :], 1)
            tl.store(p_wk_row + o_j, y, mask=o_j < r)
            for start in range(column, r, BC):
                ws = load_rows(p_ws, start, o_c, r - start, o_k, K)
                ty = tl.load(
                    p_ty + (start + o_c)[:, None] * triangle_room + o_j[None, :],
                    mask=(start + o_c < r)[:, None] & (o_j < r)[None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
                y -= tl.sum(ty * tl.sum(ws * w[None, :], 1)[:, None], 0)
            tl.store(p_ty_row + o_j, (y * beta).to(exact), mask=o_j < r)
        tl.store(p_ty_row + r, tl.zeros((), exact))
        o_v = tl.arange(0, BV)
        k = tl.load(p_k + i_b * s_kb + i_h * s_kh + o_k, mask=m_k, other=0.0)
        v = tl.load(p_v + i_b * s_vb + i_h * s_vh + o_v, mask=o_v < V, other=0.0)
        tl.store(p_keys + (tokens + r) * K + o_k, as_held(k, p_keys.dtype.element_ty), mask=m_k)
        tl.store(p_values + (tokens + r) * V + o_v, v, mask=o_v < V)
        tl.store(p_ws + r * K + o_k, w, mask=m_k)
        tl.store(p_betas + head * recent_room + r, beta)
        if GATED:
            p_g_new = p_g + i_b * s_gb + i_h * G * s_gh
            sum_gates(
                p_g_new, p_gs, p_decays, p_shifts, s_gt, s_gh, head, n, r, N,
                recent_room, triangle_room, G, BR,
            )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIAL)
def enter_kernel(
    p_q, p_k, p_v, p_w, p_beta, p_g, p_counts, p_new,
    p_keys, p_values, p_ws, p_betas, p_gs, p_tw, p_ty,
    p_queries, p_along, p_wk, p_decays, p_shifts,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_wb, s_wt, s_wh,
    s_bb, s_bt, s_bh, s_gb, s_gt, s_gh,
    scale, B, H, N, num_queries, room, recent_room, triangle_room,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    SINGLE: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row and key head, i): bring the i-th 16 queries to the end of the newest block.

    The last program but one appends rows to T W instead, and the last one the tokens, rows of T Y,
    and sums of gates. No program reads what another writes.
    """
    if OVERLAP:
        gdc_launch_dependents()
    i_bh, i_part = tl.program_id(0), tl.program_id(1)
    head = i_bh.to(tl.int64)
    i_b, i_h = head // H, head % H
    p_ws += head * recent_room * K
    p_tw += head * triangle_room * K
    p_ty += head * triangle_room * triangle_room
    if OVERLAP:
        # Before the counts have come.
        fetch_to_l2(p_ws, BC * K * (p_ws.dtype.element_ty.primitive_bitwidth // 8), BC * BK * 4)
        fetch_to_l2(p_tw, BC * K * 4, BC * BK * 4)
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
    exact = p_ty.dtype.element_ty
    w = load_new(p_w + i_b * s_wb + i_h * s_wh, s_wt, o_n, n, o_k, K)
    p_beta += i_b * s_bb + i_h * s_bh
    beta = tl.load(p_beta + o_n * s_bt, mask=m_n, other=0.0).to(tl.float32)
    num_chunks = tl.num_programs(1) - 2
    ut = triangle_of_new(w, beta, o_n, SINGLE)

    if i_part <= num_chunks:
        o_g = i_part * 16 + tl.arange(0, 16)
        i_n = o_g // G  # a query's token
        m_g = i_n < n
        m_gk = m_g[:, None] & m_k[None, :]
        p_along_row = p_along + (head * N * G + o_g)[:, None] * triangle_room
        p_query = p_queries + (head * num_queries * N * G + o_g)[:, None] * K + o_k[None, :]
        if i_part < num_chunks:
            p_row = p_q + i_b * s_qb + i_n * s_qt + (i_h * G + o_g % G) * s_qh
            q = tl.load(p_row[:, None] + o_k[None, :], mask=m_gk, other=0.0).to(tl.float32) * scale
            tl.store(p_query, q, mask=m_gk)
            # A query's own reflector first, and those of the new tokens before it.
            if SINGLE:
                along = tl.sum(q * tl.sum(w, 0)[None, :], 1) * tl.sum(beta, 0)
                x = q - along[:, None] * tl.sum(w, 0)[None, :]
                along = tl.where((o_n == 0)[None, :], along[:, None], 0.0)
            else:
                seen = o_n[None, :] <= i_n[:, None]
                along = tl.where(seen, dot(q, tl.trans(w), "tf32x3"), 0.0)
                along = dot(along, ut, "tf32x3")
                x = q - dot(along, w, "tf32x3")
            tl.store(p_along_row + r + o_n[None, :], along, mask=m_g[:, None] & m_n[None, :])
        else:
            x = w
        # Then the recent ones: x − (x Wᵀ) (T W).
        turned = x
        for start in range(0, r, BC):
            along = dot(x, tl.trans(load_rows(p_ws, start, o_c, r - start, o_k, K)), "tf32x3")
            if i_part < num_chunks:
                m_gc = m_g[:, None] & (start + o_c < r)[None, :]
                tl.store(p_along_row + start + o_c[None, :], along, mask=m_gc)
            turned -= dot(along, load_rows(p_tw, start, o_c, r - start, o_k, K), "tf32x3")
        if i_part < num_chunks:
            tl.store(p_query + N * G * K, turned, mask=m_gk)
        else:
            # Rows of T W are T₂₂ times what has been made of W₂.
            if SINGLE:
                rows = turned * beta[:, None]
            else:
                rows = dot(ut, turned, "tf32x3")
            p_row = p_tw + (r + o_n)[:, None] * K + o_k[None, :]
            tl.store(p_row, rows.to(exact), mask=m_n[:, None] & m_k[None, :])
    else:
        # Rows of T Y likewise, T₂₂ (Y₂₁ − (W₂ W₁ᵀ) (T Y)₁₁); Y₂ is W₂ times the keys before it.
        tokens = head * room + old
        p_k += i_b * s_kb + i_h * s_kh
        m_nk = m_n[:, None] & m_k[None, :]
        k = tl.load(p_k + o_n[:, None] * s_kt + o_k[None, :], mask=m_nk, other=0.0)
        k = as_held(k, p_keys.dtype.element_ty)
        p_ty_row = p_ty + (r + o_n)[:, None] * triangle_room
        p_wk_row = p_wk + (head * 16 + o_n)[:, None] * triangle_room
        for column in range(0, r, BC):
            o_j = column + o_c
            m_nj = m_n[:, None] & (o_j < r)[None, :]
            before = load_rows(p_keys + tokens * K, column, o_c, r - column, o_k, K)
            y = dot(w, tl.trans(before), "tf32x3")
            tl.store(p_wk_row + o_j[None, :], y, mask=m_nj)
            for start in range(column, r, BC):
                along = dot(w, tl.trans(load_rows(p_ws, start, o_c, r - start, o_k, K)), "tf32x3")
                ty = tl.load(
                    p_ty + (start + o_c)[:, None] * triangle_room + o_j[None, :],
                    mask=(start + o_c < r)[:, None] & (o_j < r)[None, :], other=0.0,
                ).to(tl.float32)  # fmt: skip
                y -= dot(along, ty, "tf32x3")
            y = dot(ut, y, "tf32x3")
            tl.store(p_ty_row + o_j[None, :], y.to(exact), mask=m_nj)
        y = dot(w, tl.trans(k.to(tl.float32)), "tf32x3")
        y = tl.where(o_n[:, None] > o_n[None, :], y, 0.0)
        tl.store(p_wk_row + r + o_n[None, :], y, mask=m_n[:, None] & m_n[None, :])
        y = dot(ut, y, "tf32x3")
        tl.store(p_ty_row + r + o_n[None, :], y.to(exact), mask=m_nn)

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
            p_g_new = p_g + i_b * s_gb + i_h * G * s_gh
            sum_gates(
                p_g_new, p_gs, p_decays, p_shifts, s_gt, s_gh, head, n, r, N,
                recent_room, triangle_room, G, BR,
            )  # fmt: skip
