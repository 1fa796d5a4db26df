"""One token meets the recent ones: its program waits for no other."""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops.path_attention.cache.triton.enter import as_held
from householder.ops.path_attention.cache.triton.enter_one import load_counts
from householder.ops.path_attention.cache.triton.loads import (
    load_later,
    load_tile,
    load_vector,
    seen_rows,
)


@triton.jit
def attend_recent_one(
    p_q, p_k, p_v, p_w, p_beta, p_g, s_qh, s_gh, p_counts, p_new, p_ws, p_keys, p_values, p_gs,
    p_ty, p_parts, p_tops, p_totals, num_parts, scale, window, i_b, B, room, recent_room,
    triangle_room, last_row,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Let one token's queries meet the recent tokens and itself."""
    o_c, o_k, o_v, o_r = tl.arange(0, BC), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BR)
    first_ws = load_tile(p_ws, 0, o_c, triangle_room, o_k, K)
    first_ty = load_later(p_ty, 0, o_c, o_r, triangle_room, triangle_room)
    w, beta = load_vector(p_w, o_k, K), tl.load(p_beta).to(tl.float32)
    # As they are held.
    k = tl.load(p_k + o_k, mask=o_k < K, other=0.0)
    k = as_held(k, p_keys.dtype.element_ty).to(tl.float32)
    v = tl.load(p_v + o_v, mask=o_v < V, other=0.0).to(p_values.dtype.element_ty).to(tl.float32)
    _, old, r = load_counts(p_counts, p_new, i_b, B, room, last_row)
    p_keys, p_values = p_keys + old * K, p_values + old * V
    for i_g in range(G):
        q = load_vector(p_q + i_g * s_qh, o_k, K) * scale
        along_new = beta * tl.sum(q * w, 0)
        x = q - along_new * w
        # The new token is always seen, and so the top is a number.
        top, total, o = tl.sum(q * k, 0), 1.0, v
        # What the reflectors behind recent keys take from them.
        taken = tl.zeros((BR,), tl.float32)
        keys = load_tile(p_keys, 0, o_c, r, o_k, K)
        values = load_tile(p_values, 0, o_c, r, o_v, V)
        ws, ty = first_ws, first_ty
        for start in range(0, r, BC):
            along = tl.sum(seen_rows(ws, start, o_c, r) * x[None, :], 1)
            taken += tl.sum(seen_rows(ty, start, o_c, r) * along[:, None], 0)
            ws = load_tile(p_ws, start + BC, o_c, r, o_k, K)
            ty = load_later(p_ty, start + BC, o_c, o_r, r, triangle_room)
        for start in range(0, r, BC):
            here = o_r[None, :] == start + o_c[:, None]
            less = tl.sum(tl.where(here, taken[None, :], 0.0), 1)
            logits = tl.sum(seen_rows(keys, start, o_c, r) * x[None, :], 1) - less
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
            o = o * rescale + tl.sum(seen_rows(values, start, o_c, r) * weights[:, None], 0)
            top = new_top
            keys = load_tile(p_keys, start + BC, o_c, r, o_k, K)
            values = load_tile(p_values, start + BC, o_c, r, o_v, V)
        # Where no token comes nobody looks.
        tl.store(p_parts + i_g * num_parts * V + o_v, o, mask=o_v < V)
        tl.store(p_tops + i_g * num_parts, top)
        tl.store(p_totals + i_g * num_parts, total)
