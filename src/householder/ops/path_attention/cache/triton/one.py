"""One new token: its queries are brought to blocks, and meet the recent tokens.

Sums take vectors where products would take the tensor cores' sixteen rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops.path_attention.cache.triton.enter import (
    as_held,
    load_path,
    load_scale,
    load_ty,
)
from householder.ops.path_attention.cache.triton.signals import read_mail, send, wait_for_mail


@triton.jit
def load_within(pointer, rows, room, o_d, D: tl.constexpr):
    """Load rows of `[room, D]`, whatever they hold: it need not wait for their number."""
    mask = (rows < room)[:, None] & (o_d < D)[None, :]
    return tl.load(pointer + rows[:, None] * D + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def keep_rows(x, m_rows):
    """Return a tile in float32, zero where `m_rows` says so."""
    return tl.where(m_rows[:, None], x.to(tl.float32), 0.0)


@triton.jit
def first_recent(p_ws, p_tw, recent_room, triangle_room, o_k, K: tl.constexpr, BC: tl.constexpr):
    """Load the first rows of W and T W: they are on their way before anything else is there."""
    o_c = tl.arange(0, BC)
    ws = load_within(p_ws, o_c, recent_room, o_k, K)
    return ws, load_within(p_tw, o_c, triangle_room, o_k, K)


@triton.jit
def turn_one(
    x, ws, tw, p_ws, p_tw, r, recent_room, triangle_room, o_k, K: tl.constexpr, BC: tl.constexpr
):
    """Return `x − (x Wᵀ) (T W)` of a vector and recent tokens, the first of which are loaded."""
    o_c = tl.arange(0, BC)
    along = tl.sum(keep_rows(ws, o_c < r) * x[None, :], 1)
    turned = x - tl.sum(keep_rows(tw, o_c < r) * along[:, None], 0)
    for start in range(BC, r, BC):
        ws = load_within(p_ws, start + o_c, recent_room, o_k, K)
        tw = load_within(p_tw, start + o_c, triangle_room, o_k, K)
        along = tl.sum(keep_rows(ws, start + o_c < r) * x[None, :], 1)
        turned -= tl.sum(keep_rows(tw, start + o_c < r) * along[:, None], 0)
    return turned


@triton.jit
def without_own(q, w, beta):
    """Return a query behind its own token's reflector."""
    return q - beta * tl.sum(q * w, 0) * w


@triton.jit
def queries_of_one(
    p_q, s_qh, w, beta, p_g, s_gh, p_ws, p_gs, p_tw, p_mail, step, scale,
    r, recent_room, triangle_room,
    G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    GATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Send one token's queries at the end of the newest block, and the sums of gates up to it."""
    o_k = tl.arange(0, BK)
    ws, tw = first_recent(p_ws, p_tw, recent_room, triangle_room, o_k, K, BC)
    for i_g in range(G):
        q = tl.load(p_q + i_g * s_qh + o_k, mask=o_k < K, other=0.0).to(tl.float32) * scale
        q = without_own(q, w, beta)
        q = turn_one(q, ws, tw, p_ws, p_tw, r, recent_room, triangle_room, o_k, K, BC)
        send(p_mail + i_g * (K + 1) + o_k, q, step, o_k < K, EARLY)
        if GATED:
            _, shift = decays_of_one(p_g + i_g * s_gh, p_gs + i_g * recent_room, r, BR)
            send(p_mail + i_g * (K + 1) + K, shift, step, step > 0, EARLY)


@triton.jit
def queries_behind(
    p_paths, p_scales, p_mail, s_mail, step, first, stop, stride, column, head, heads,
    G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, KC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Bring one token's queries from the newest block to each `stride`-th other, some columns."""
    o_k, o_c = tl.arange(0, BK), column + tl.arange(0, KC)
    # On its way before the queries are there, and the next one before this one is multiplied.
    path = load_path(p_paths + (head + first * heads) * K * K, o_k, o_c, K)
    for i_g in range(G):
        wait_for_mail(p_mail + i_g * (K + 1) + o_k, step, o_k < K, EARLY)
    for i_path in range(first, stop, stride):
        following = head + tl.minimum(i_path + stride, stop - 1) * heads
        next_path = load_path(p_paths + following * K * K, o_k, o_c, K)
        scales = load_scale(p_scales, head + i_path * heads, o_c, K)
        for i_g in range(G):
            p_row = p_mail + i_g * (K + 1)
            q = read_mail(p_row + o_k, o_k < K)
            q = tl.sum(path.to(tl.float32) * q[:, None], 0) * scales
            send(p_row + (1 + i_path) * s_mail + o_c, q, step, o_c < K, EARLY)
        path = next_path


@triton.jit
def row_of_ty(
    w, beta, p_ws, p_keys, p_ty, p_wk, r, recent_room, triangle_room, o_k,
    K: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Append one token's row to T Y: that of Y, w Kᵀ, less what earlier rows of T take of it."""
    o_c, o_r, o_l = tl.arange(0, BC), tl.arange(0, BR), tl.arange(0, BL)
    p_along = p_wk + triangle_room
    for start in range(0, r, BC):
        m_c = start + o_c < r
        before = keep_rows(load_within(p_keys, start + o_c, r, o_k, K), m_c)
        ws = keep_rows(load_within(p_ws, start + o_c, recent_room, o_k, K), m_c)
        tl.store(p_wk + start + o_c, tl.sum(before * w[None, :], 1), mask=m_c)
        tl.store(p_along + start + o_c, tl.sum(ws * w[None, :], 1), mask=m_c)
    # They are read again by other threads.
    tl.debug_barrier()
    y = tl.load(p_wk + o_r, mask=o_r < r, other=0.0)
    for start in range(0, r, BL):
        along = tl.load(p_along + start + o_l, mask=start + o_l < r, other=0.0)
        y -= tl.sum(load_ty(p_ty, start + o_l, o_r, r, triangle_room) * along[:, None], 0)
    # Zero in its own column.
    tl.store(p_ty + r * triangle_room + o_r, y * beta, mask=o_r <= r)


@triton.jit
def decays_of_one(p_g, p_gs, r, BR: tl.constexpr):
    """Sum gates of one query head: behind each recent token, `[BR]`, and of all."""
    # Sums of terms of one sign: a difference of sums would be ∞ − ∞ after a gate of −∞.
    o_r = tl.arange(0, BR)
    g = tl.load(p_g).to(tl.float32)
    recent = tl.load(p_gs + o_r, mask=o_r < r, other=0.0).to(tl.float32)
    after = tl.load(p_gs + o_r + 1, mask=o_r + 1 < r, other=0.0).to(tl.float32)
    return g + tl.cumsum(after, 0, reverse=True), g + tl.sum(recent, 0)


@triton.jit
def attend_recent_one(
    p_q, w, beta, p_k, p_v, p_g, p_ws, p_keys, p_values, p_gs, p_ty, p_along, scale, window,
    r, recent_room, triangle_room,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, BL: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Return the softmax of one query over recent tokens, its own included.

    It waits for no other program: the new token is read as it comes.
    """
    o_k, o_v, o_c = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BC)
    o_r, o_l = tl.arange(0, BR), tl.arange(0, BL)
    m_k, m_v = o_k < K, o_v < V
    q = tl.load(p_q + o_k, mask=m_k, other=0.0).to(tl.float32) * scale
    k = tl.load(p_k + o_k, mask=m_k, other=0.0)
    own = tl.sum(q * as_held(k, p_keys.dtype.element_ty).to(tl.float32), 0)
    q = without_own(q, w, beta)
    # Its products with keys, and what it has along reflectors: read again by other threads.
    p_logits = p_along + triangle_room
    for start in range(0, r, BC):
        m_c = start + o_c < r
        ws = keep_rows(load_within(p_ws, start + o_c, recent_room, o_k, K), m_c)
        keys = keep_rows(load_within(p_keys, start + o_c, r, o_k, K), m_c)
        tl.store(p_along + start + o_c, tl.sum(ws * q[None, :], 1), mask=m_c)
        tl.store(p_logits + start + o_c, tl.sum(keys * q[None, :], 1), mask=m_c)
    tl.debug_barrier()
    # What the reflectors behind a key take from it.
    logits = tl.load(p_logits + o_r, mask=o_r < r, other=0.0)
    for start in range(0, r, BL):
        along = tl.load(p_along + start + o_l, mask=start + o_l < r, other=0.0)
        logits -= tl.sum(load_ty(p_ty, start + o_l, o_r, r, triangle_room) * along[:, None], 0)
    logits = tl.where(o_r == r, own, logits)
    if GATED:
        decay, _ = decays_of_one(p_g, p_gs, r, BR)
        logits += tl.where(o_r < r, decay, 0.0) * 1.4426950408889634
    seen = o_r <= r
    if WINDOWED:
        seen = seen & (r - o_r < window)
    logits = tl.where(seen, logits, float("-inf"))
    top = tl.max(logits, 0)
    weights = tl.exp2(logits - top)
    tl.debug_barrier()
    tl.store(p_along + o_r, weights, mask=o_r < r)
    tl.debug_barrier()
    v = tl.load(p_v + o_v, mask=m_v, other=0.0).to(tl.float32)
    o = v * tl.sum(tl.where(o_r == r, weights, 0.0), 0)
    for start in range(0, r, BC):
        m_c = start + o_c < r
        values = keep_rows(load_within(p_values, start + o_c, r, o_v, V), m_c)
        some = tl.load(p_along + start + o_c, mask=m_c, other=0.0)
        o += tl.sum(values * some[:, None], 0)
    return top, tl.sum(weights, 0), o
