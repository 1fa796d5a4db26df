"""One token meets the recent ones: its program waits for no other."""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops.path_attention.cache.triton.attend import load_later
from householder.ops.path_attention.cache.triton.enter import as_held, load_rows


@triton.jit
def load_vector(pointer, o_d, D: tl.constexpr):
    """Load a vector in float32."""
    return tl.load(pointer + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def attend_recent_one(
    p_q, p_k, p_v, p_w, p_beta, p_g, s_qh, s_gh, p_ws, p_keys, p_values, p_gs, p_ty,
    p_parts, p_tops, p_totals, num_parts, scale, window, r, recent_room, triangle_room,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Let one token's queries meet the recent tokens and itself."""
    o_c, o_k, o_v, o_r = tl.arange(0, BC), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BR)
    w, beta = load_vector(p_w, o_k, K), tl.load(p_beta).to(tl.float32)
    # As they are held.
    k = tl.load(p_k + o_k, mask=o_k < K, other=0.0)
    k = as_held(k, p_keys.dtype.element_ty).to(tl.float32)
    v = tl.load(p_v + o_v, mask=o_v < V, other=0.0).to(p_values.dtype.element_ty).to(tl.float32)
    for i_g in range(G):
        q = load_vector(p_q + i_g * s_qh, o_k, K) * scale
        along_new = beta * tl.sum(q * w, 0)
        x = q - along_new * w
        # The new token is always seen, and so the top is a number.
        top, total, o = tl.sum(q * k, 0), 1.0, v
        # What the reflectors behind recent keys take from them.
        taken = tl.zeros((BR,), tl.float32)
        for start in range(0, r, BC):
            ws = load_rows(p_ws, start, o_c, r - start, o_k, K)
            ty = load_later(p_ty, start + o_c, o_r, r, triangle_room)
            along = tl.sum(ws * x[None, :], 1)
            taken += tl.sum(ty * along[:, None], 0)
        for start in range(0, r, BC):
            keys = load_rows(p_keys, start, o_c, r - start, o_k, K)
            values = load_rows(p_values, start, o_c, r - start, o_v, V)
            here = o_r[None, :] == start + o_c[:, None]
            less = tl.sum(tl.where(here, taken[None, :], 0.0), 1)
            logits = tl.sum(keys * x[None, :], 1) - less
            after = r - start - o_c
            if GATED:
                g = tl.load(p_g + i_g * s_gh).to(tl.float32)
                # Sums of terms of one sign: a difference of sums would be ∞ − ∞ after a gate of −∞.
                p_g_row = p_gs + i_g * recent_room
                behind = tl.load(p_g_row + o_r, mask=o_r < r, other=0.0).to(tl.float32)
                decay = tl.sum(
                    tl.where(o_r[None, :] > start + o_c[:, None], behind[None, :], 0.0), 1
                )
                logits += (decay + g) * 1.4426950408889634
            seen = after > 0
            if WINDOWED:
                seen = seen & (after < window)
            logits = tl.where(seen, logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 0))
            weights, rescale = tl.exp2(logits - new_top), tl.exp2(top - new_top)
            total = total * rescale + tl.sum(weights, 0)
            o = o * rescale + tl.sum(values * weights[:, None], 0)
            top = new_top
        tl.store(p_parts + i_g * num_parts * V + o_v, o, mask=o_v < V)
        tl.store(p_tops + i_g * num_parts, top)
        tl.store(p_totals + i_g * num_parts, total)
