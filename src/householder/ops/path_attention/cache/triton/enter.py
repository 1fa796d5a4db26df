"""Several tokens, in front of a decoded step: they meet the recent ones' compact WY form."""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import beside_diagonal
from householder.ops.path_attention.cache.triton.loads import load_rows
from householder.ops.path_attention.cache.triton.products import dot_path, dot_whole
from householder.ops.path_attention.cache.triton.signals import arrive


@triton.jit
def load_new(pointer, s_t, o_n, n, o_d, D: tl.constexpr):
    """Load the vectors of new tokens in float32, zero behind the last one."""
    mask = (o_n < n)[:, None] & (o_d < D)[None, :]
    x = tl.load(pointer + o_n[:, None] * s_t + o_d[None, :], mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def triangle_of_new(w, beta, o_n, N, HALVES: tl.constexpr):
    """Return T of the new tokens alone, `(I + tril(β W Wᵀ, −1))⁻¹ diag(β)`, rows from zero on."""
    # Joined from pairs, as in `inverse_unit_lower`: no power of the triangle is formed.
    gram = dot_whole(w, tl.trans(w), HALVES) * beta[:, None]
    gram = tl.where(o_n[:, None] > o_n[None, :], gram, 0.0)
    same = o_n[:, None] == o_n[None, :]
    inverse = tl.where(same, 1.0, 0.0) - tl.where(beside_diagonal(o_n, 1), gram, 0.0)
    levels = tl.where(N > 8, 3, tl.where(N > 4, 2, tl.where(N > 2, 1, 0)))
    for level in range(1, 1 + levels):
        beside = tl.where(beside_diagonal(o_n, 1 << level), -gram, 0.0)
        inverse += dot_whole(dot_whole(inverse, beside, HALVES), inverse, HALVES)
    return inverse * beta[None, :]


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


@triton.jit
def load_path(p_path, o_k, o_c, K: tl.constexpr):
    """Load columns of a block's path as they are held."""
    mask = (o_k < K)[:, None] & (o_c < K)[None, :]
    return tl.load(p_path + o_k[:, None] * K + o_c[None, :], mask=mask, other=0)


@triton.jit
def load_scale(p_scales, row, o_c, K: tl.constexpr):
    """Load what columns of a path are multiplied by, 1 where they are held in float32."""
    if p_scales is None:
        return tl.full((o_c.shape[0],), 1.0, tl.float32)
    else:
        return tl.load(p_scales + row * K + o_c, mask=o_c < K, other=0.0)


@triton.jit
def load_ty(p_ty, o_l, o_j, r, triangle_room):
    """Load a tile of T Y in float32, zero from row and column `r` on."""
    mask = (o_l < r)[:, None] & (o_j < r)[None, :]
    ty = tl.load(p_ty + o_l[:, None] * triangle_room + o_j[None, :], mask=mask, other=0.0)
    return ty.to(tl.float32)


@triton.jit
def queries_of_few(
    p_q, s_qt, s_qh, w, beta, p_ws, p_tw, p_paths, p_scales, p_queries, p_along,
    p_turned_count, i_chunk, scale, head, heads, n, N, num_queries, r, num_paths, triangle_room,
    G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, KC: tl.constexpr,
    HALF: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Bring 16 queries to the end of the newest block, and from there to all others."""
    o_n, o_c, o_k = tl.arange(0, 16), tl.arange(0, BC), tl.arange(0, BK)
    o_g = i_chunk * 16 + o_n
    i_n = o_g // G  # a query's token
    m_n, m_g = o_n < n, i_n < n
    m_gk = m_g[:, None] & (o_k < K)[None, :]
    p_along += (head * N * G + o_g)[:, None] * triangle_room
    p_queries += head * num_queries * N * G * K + o_g[:, None] * K
    p_row = p_q + i_n * s_qt + o_g % G * s_qh
    q = tl.load(p_row[:, None] + o_k[None, :], mask=m_gk, other=0.0).to(tl.float32) * scale
    tl.store(p_queries + o_k[None, :], q, mask=m_gk)
    # A query's own reflector first, and those of the new tokens before it.
    ut = triangle_of_new(w, beta, o_n, N, HALVES)
    along_new = tl.where(o_n[None, :] <= i_n[:, None], dot_whole(q, tl.trans(w), HALVES), 0.0)
    along_new = dot_whole(along_new, ut, HALVES)
    tl.store(p_along + r + o_n[None, :], along_new, mask=m_g[:, None] & m_n[None, :])
    x = q - dot_whole(along_new, w, HALVES)
    # Then the recent ones: x − (x Wᵀ) (T W).
    turned = x
    for start in range(0, r, BC):
        ws = load_rows(p_ws, start, o_c, r - start, o_k, K)
        tw = load_rows(p_tw, start, o_c, r - start, o_k, K)
        along = dot_whole(x, tl.trans(ws), HALVES)
        m_gc = m_g[:, None] & (start + o_c < r)[None, :]
        tl.store(p_along + start + o_c[None, :], along, mask=m_gc)
        turned -= dot_whole(along, tw, HALVES)
    tl.store(p_queries + N * G * K + o_k[None, :], turned, mask=m_gk)
    arrive(p_turned_count)
    SLICES: tl.constexpr = BK // KC
    for i in tl.range(0, num_paths * SLICES, num_stages=STAGES):
        i_path, o_s = i // SLICES, i % SLICES * KC + tl.arange(0, KC)
        row = head + i_path * heads
        path = load_path(p_paths + row * K * K, o_k, o_s, K)
        behind = dot_path(turned, path, HALF) * load_scale(p_scales, row, o_s, K)[None, :]
        p_behind = p_queries + (2 + i_path) * N * G * K
        tl.store(p_behind + o_s[None, :], behind, mask=m_g[:, None] & (o_s < K)[None, :])


@triton.jit
def rows_of_tw(
    w, beta, p_ws, p_tw, r, n, N, o_k, K: tl.constexpr, BC: tl.constexpr, HALVES: tl.constexpr
):
    """Append the new tokens' rows to T W: T₂₂ (W₂ − (W₂ W₁ᵀ) (T W)₁)."""
    o_n, o_c = tl.arange(0, 16), tl.arange(0, BC)
    ut = triangle_of_new(w, beta, o_n, N, HALVES)
    x = w
    for start in range(0, r, BC):
        ws = load_rows(p_ws, start, o_c, r - start, o_k, K)
        tw = load_rows(p_tw, start, o_c, r - start, o_k, K)
        x -= dot_whole(dot_whole(w, tl.trans(ws), HALVES), tw, HALVES)
    p_row = p_tw + (r + o_n)[:, None] * K + o_k[None, :]
    tl.store(p_row, dot_whole(ut, x, HALVES), mask=(o_n < n)[:, None] & (o_k < K)[None, :])


@triton.jit
def rows_of_ty(
    k, w, beta, p_ws, p_keys, p_ty, p_wk, r, n, N, o_k, triangle_room,
    K: tl.constexpr, BC: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Append rows to T Y likewise, T₂₂ (Y₂₁ − (W₂ W₁ᵀ) (T Y)₁₁); Y₂ is W₂ times earlier keys."""
    o_n, o_c = tl.arange(0, 16), tl.arange(0, BC)
    m_n = o_n < n
    ut = triangle_of_new(w, beta, o_n, N, HALVES)
    p_rows = p_ty + (r + o_n)[:, None] * triangle_room
    p_wk += o_n[:, None] * triangle_room
    for column in range(0, r, BC):
        o_j = column + o_c
        m_nj = m_n[:, None] & (o_j < r)[None, :]
        before = load_rows(p_keys, column, o_c, r - column, o_k, K)
        y = dot_whole(w, tl.trans(before), HALVES)
        tl.store(p_wk + o_j[None, :], y, mask=m_nj)
        for start in range(column, r, BC):
            ws = load_rows(p_ws, start, o_c, r - start, o_k, K)
            ty = load_ty(p_ty, start + o_c, o_j, r, triangle_room)
            y -= dot_whole(dot_whole(w, tl.trans(ws), HALVES), ty, HALVES)
        tl.store(p_rows + o_j[None, :], dot_whole(ut, y, HALVES), mask=m_nj)
    y = dot_whole(w, tl.trans(k.to(tl.float32)), HALVES)
    y = tl.where(o_n[:, None] > o_n[None, :], y, 0.0)
    tl.store(p_wk + r + o_n[None, :], y, mask=m_n[:, None] & m_n[None, :])
    m_nn = m_n[:, None] & (o_n[None, :] <= o_n[:, None])
    tl.store(p_rows + r + o_n[None, :], dot_whole(ut, y, HALVES), mask=m_nn)


@triton.jit
def put_tokens(
    k, w, beta, p_v, s_vt, p_keys, p_values, p_ws, p_betas, r, n,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Store new tokens `[16, …]` behind the recent ones."""
    o_n, o_k, o_v = tl.arange(0, 16), tl.arange(0, BK), tl.arange(0, BV)
    m_n = o_n < n
    m_nk = m_n[:, None] & (o_k < K)[None, :]
    m_nv = m_n[:, None] & (o_v < V)[None, :]
    v = tl.load(p_v + o_n[:, None] * s_vt + o_v[None, :], mask=m_nv, other=0.0)
    new = (r + o_n)[:, None]
    tl.store(p_keys + new * K + o_k[None, :], k, mask=m_nk)
    tl.store(p_values + new * V + o_v[None, :], v, mask=m_nv)
    tl.store(p_ws + new * K + o_k[None, :], w, mask=m_nk)
    tl.store(p_betas + r + o_n, beta, mask=m_n)
