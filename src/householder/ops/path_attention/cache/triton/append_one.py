"""One token is put behind the recent ones, with its rows of T W and T Y."""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops.path_attention.cache.triton.enter import as_held
from householder.ops.path_attention.cache.triton.enter_one import load_counts, turn
from householder.ops.path_attention.cache.triton.loads import (
    load_later,
    load_tile,
    load_vector,
    seen_rows,
)


@triton.jit
def append_tw(
    p_w, p_beta, p_counts, p_new, p_ws, p_tw, i_b, B, room, triangle_room, last_row,
    K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Append a token's row to T W."""
    o_k, o_c = tl.arange(0, BK), tl.arange(0, BC)
    first_ws = load_tile(p_ws, 0, o_c, triangle_room, o_k, K)
    first_tw = load_tile(p_tw, 0, o_c, triangle_room, o_k, K)
    w, beta = load_vector(p_w, o_k, K), tl.load(p_beta).to(tl.float32)
    n, _, r = load_counts(p_counts, p_new, i_b, B, room, last_row)
    row = turn(w, first_ws, first_tw, p_ws, p_tw, r, o_k, K, BC) * beta
    tl.store(p_tw + r * K + o_k, row, mask=o_k < tl.where(n > 0, K, 0))


@triton.jit
def append_token(
    p_k, p_v, p_w, p_beta, p_g, s_gh, p_counts, p_new, p_keys, p_values, p_ws, p_betas, p_gs, p_ty,
    i_b, B, room, recent_room, triangle_room, last_row,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Append a token, and its row to T Y: T₂₂ (Y₂₁ − (W₂ W₁ᵀ) (T Y)₁₁), Y₂₁ its w times keys."""
    o_k, o_v, o_c, o_r = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BC), tl.arange(0, BR)
    ws = load_tile(p_ws, 0, o_c, triangle_room, o_k, K)
    ty = load_later(p_ty, 0, o_c, o_r, triangle_room, triangle_room)
    new_w, new_beta = tl.load(p_w + o_k, mask=o_k < K, other=0.0), tl.load(p_beta)
    k = as_held(tl.load(p_k + o_k, mask=o_k < K, other=0.0), p_keys.dtype.element_ty)
    v = tl.load(p_v + o_v, mask=o_v < V, other=0.0)
    n, old, r = load_counts(p_counts, p_new, i_b, B, room, last_row)
    p_keys, p_values = p_keys + old * K, p_values + old * V
    keys = load_tile(p_keys, 0, o_c, r, o_k, K)
    if n > 0:
        w, y = new_w.to(tl.float32), tl.zeros((BR,), tl.float32)
        for start in range(0, r, BC):
            before = tl.sum(seen_rows(keys, start, o_c, r) * w[None, :], 1)
            along = tl.sum(seen_rows(ws, start, o_c, r) * w[None, :], 1)
            here = o_r[None, :] == start + o_c[:, None]
            y += tl.sum(tl.where(here, before[:, None], 0.0), 0)
            y -= tl.sum(seen_rows(ty, start, o_c, r) * along[:, None], 0)
            keys = load_tile(p_keys, start + BC, o_c, r, o_k, K)
            ws = load_tile(p_ws, start + BC, o_c, r, o_k, K)
            ty = load_later(p_ty, start + BC, o_c, o_r, r, triangle_room)
        # Zero in its own column.
        tl.store(p_ty + r * triangle_room + o_r, y * new_beta.to(tl.float32), mask=o_r <= r)
        tl.store(p_keys + r * K + o_k, k, mask=o_k < K)
        tl.store(p_values + r * V + o_v, v, mask=o_v < V)
        tl.store(p_ws + r * K + o_k, new_w, mask=o_k < K)
        tl.store(p_betas + r, new_beta)
        if GATED:
            for i_g in range(G):
                tl.store(p_gs + i_g * recent_room + r, tl.load(p_g + i_g * s_gh))
