"""What one token needs beside blocks: it meets the recent ones, and is put behind them."""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops.path_attention.cache.triton.append_one import append_token, append_tw
from householder.ops.path_attention.cache.triton.recent import attend_recent_one


@triton.jit
def beside_spans(
    p_q, p_k, p_v, p_w, p_beta, p_g, p_ws, p_betas, p_gs, p_keys, p_values, p_tw, p_ty,
    p_counts, p_new, p_parts, p_tops,
    s_qb, s_qh, s_kb, s_kh, s_vb, s_vh, s_wb, s_wh, s_bb, s_bh, s_gb, s_gh,
    i_kind, head, scale, window, B, H, num_parts, room, recent_room, triangle_room, last_row,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Do what one token needs beside blocks: meet recent tokens, append a row to T W, append it.

    Nobody waits here, and nobody reads what is appended.
    """
    head = head.to(tl.int64)
    i_b, i_h = head // H, head % H
    p_w += i_b * s_wb + i_h * s_wh
    p_beta += i_b * s_bb + i_h * s_bh
    p_ws += head * recent_room * K
    if i_kind == 1:
        append_tw(
            p_w, p_beta, p_counts, p_new, p_ws, p_tw + head * triangle_room * K,
            i_b, B, room, triangle_room, last_row, K, BK, BC,
        )  # fmt: skip
    else:
        p_k += i_b * s_kb + i_h * s_kh
        p_v += i_b * s_vb + i_h * s_vh
        p_keys += head * room * K
        p_values += head * room * V
        p_ty += head * triangle_room * triangle_room
        if GATED:
            p_g += i_b * s_gb + i_h * G * s_gh
            p_gs += head * G * recent_room
        if i_kind == 0:
            row = head * G * num_parts
            p_totals = p_tops + tl.cast(B, tl.int64) * H * G * num_parts
            attend_recent_one(
                p_q + i_b * s_qb + i_h * G * s_qh, p_k, p_v, p_w, p_beta, p_g, s_qh, s_gh,
                p_counts, p_new, p_ws, p_keys, p_values, p_gs, p_ty,
                p_parts + row * V, p_tops + row, p_totals + row, num_parts,
                scale, window, i_b, B, room, recent_room, triangle_room, last_row,
                G, K, V, BK, BV, BC, BR, GATED, WINDOWED,
            )  # fmt: skip
        else:
            append_token(
                p_k, p_v, p_w, p_beta, p_g, s_gh, p_counts, p_new, p_keys, p_values, p_ws,
                p_betas + head * recent_room, p_gs, p_ty, i_b, B, room, recent_room, triangle_room,
                last_row, G, K, V, BK, BV, BC, BR, GATED,
            )  # fmt: skip
