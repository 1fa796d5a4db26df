"""One token, in front of a decoded step: its queries meet the recent ones' compact WY form.

Nobody waits for anybody here, and what is read does not depend on how many tokens there are: tiles
are asked for before the counts are known, and masked when both have come.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from householder.ops.path_attention.cache.triton.blocks import count_ones
from householder.ops.path_attention.cache.triton.enter import load_scale
from householder.ops.path_attention.cache.triton.loads import load_tile, load_vector, seen_rows
from householder.ops.path_attention.cache.triton.signals import COUNTER, arrive


@triton.jit
def load_counts(p_counts, p_new, i_b, B, room, last_row):
    """Return how many tokens come (0 or 1), how many are in blocks, and how many behind them."""
    n = 1
    if p_new is not None:
        n = tl.load(p_new + i_b)
    old, r = tl.load(p_counts + i_b), tl.load(p_counts + B + i_b)
    # Replays of a graph that nobody counted must not write outside.
    return n, old, tl.minimum(r, tl.minimum(last_row, room - old - 1))


@triton.jit
def turn(x, ws, tw, p_ws, p_tw, r, o_k, K: tl.constexpr, BC: tl.constexpr):
    """Return `x − (x Wᵀ) (T W)` of a vector and recent tokens, whose first BC rows are loaded.

    Sums take vectors where products would take the tensor cores' sixteen rows.
    """
    o_c = tl.arange(0, BC)
    turned = x
    for start in range(0, r, BC):
        along = tl.sum(seen_rows(ws, start, o_c, r) * x[None, :], 1)
        turned -= tl.sum(seen_rows(tw, start, o_c, r) * along[:, None], 0)
        ws = load_tile(p_ws, start + BC, o_c, r, o_k, K)
        tw = load_tile(p_tw, start + BC, o_c, r, o_k, K)
    return turned


@triton.jit
def load_slice(
    p_paths, i, num_paths, head, heads, o_k, K: tl.constexpr, SLICES: tl.constexpr, KC: tl.constexpr
):
    """Load the `i`-th KC columns of a head's paths as they are held, zero behind the last path."""
    o_c = i % SLICES * KC + tl.arange(0, KC)
    mask = (o_k < K)[:, None] & (o_c < tl.where(i < num_paths * SLICES, K, 0))[None, :]
    p_path = p_paths + (head + i // SLICES * heads) * K * K
    return tl.load(p_path + o_k[:, None] * K + o_c[None, :], mask=mask, other=0)


@triton.jit
def bring_behind(
    turned, path, p_scales, p_queries, i, head, heads,
    G: tl.constexpr, GP: tl.constexpr, K: tl.constexpr, SLICES: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    """Bring the newest block's queries to another, the columns of the `i`-th slice."""
    i_path, o_c, o_g = i // SLICES, i % SLICES * KC + tl.arange(0, KC), tl.arange(0, GP)
    scales = load_scale(p_scales, head + i_path * heads, o_c, K)
    for i_g in tl.static_range(G):
        x = tl.sum(tl.where((o_g == i_g)[:, None], turned, 0.0), 0)
        behind = tl.sum(path.to(tl.float32) * x[:, None], 0) * scales
        tl.store(p_queries + ((2 + i_path) * G + i_g) * K + o_c, behind, mask=o_c < K)


@triton.jit(
    do_not_specialize=[
        *("B", "H", "path_programs", "num_queries", "room", "recent_room", "last_row"),
        *("s_bb", "s_bh", "s_gb", "s_gh"),
    ]
)
def enter_one_kernel(
    p_q, p_w, p_beta, p_g, p_counts, p_new, p_ready, p_ws, p_gs, p_tw, p_paths, p_scales,
    p_queries, p_shifts, s_qb, s_qh, s_wb, s_wh, s_bb, s_bh, s_gb, s_gh,
    scale, B, H, path_programs, num_queries, room, recent_room, triangle_room, last_row,
    G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    KC: tl.constexpr, GP: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
    OVERLAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, row and key head): bring a token's few queries to blocks.

    Every program brings them to the newest block by itself, the first one for those that attend to
    it too, and then to others some columns at a time: to read the recent tokens again costs less
    than to wait for who has.
    """
    if OVERLAP:
        gdc_launch_dependents()
    SLICES: tl.constexpr = BK // KC
    first, head = tl.program_id(0) // (B * H), (tl.program_id(0) % (B * H)).to(tl.int64)
    i_b, i_h = head // H, head % H
    o_k, o_g, o_c = tl.arange(0, BK), tl.arange(0, GP), tl.arange(0, BC)
    m_k = o_k < K
    p_ws += head * recent_room * K
    p_tw += head * triangle_room * K
    p_queries += head * num_queries * G * K
    first_ws = load_tile(p_ws, 0, o_c, triangle_room, o_k, K)
    first_tw = load_tile(p_tw, 0, o_c, triangle_room, o_k, K)
    w = load_vector(p_w + i_b * s_wb + i_h * s_wh, o_k, K)
    beta = tl.load(p_beta + i_b * s_bb + i_h * s_bh).to(tl.float32)
    path = load_slice(p_paths, first, num_queries - 2, head, B * H, o_k, K, SLICES, KC)
    _, old, r = load_counts(p_counts, p_new, i_b, B, room, last_row)
    num_slices = tl.maximum(count_ones(old // BLOCK) - 1, 0) * SLICES
    if (first > 0) & (first >= num_slices):
        # A row of this batch may have more.
        arrive(p_ready + head * 2 * COUNTER)
        return
    turned = tl.zeros((GP, BK), tl.float32)
    for i_g in tl.static_range(G):
        q = load_vector(p_q + i_b * s_qb + (i_h * G + i_g) * s_qh, o_k, K) * scale
        # The new token's reflector first; then the recent ones.
        x = q - beta * tl.sum(q * w, 0) * w
        x = turn(x, first_ws, first_tw, p_ws, p_tw, r, o_k, K, BC)
        if first == 0:
            tl.store(p_queries + (G + i_g) * K + o_k, x, mask=m_k)
            if GATED:
                # Between the newest block's end and the query.
                o_r = tl.arange(0, BR)
                p_row = p_gs + (head * G + i_g) * recent_room
                gates = tl.load(p_row + o_r, mask=o_r < r, other=0.0).to(tl.float32)
                g = tl.load(p_g + i_b * s_gb + (i_h * G + i_g) * s_gh).to(tl.float32)
                tl.store(p_shifts + head * G + i_g, tl.sum(gates, 0) + g)
        turned = tl.where((o_g == i_g)[:, None], x[None, :], turned)
    if first < num_slices:
        bring_behind(turned, path, p_scales, p_queries, first, head, B * H, G, GP, K, SLICES, KC)
    for i in tl.range(first + path_programs, num_slices, path_programs, num_stages=STAGES):
        path = load_slice(p_paths, i, num_queries - 2, head, B * H, o_k, K, SLICES, KC)
        bring_behind(turned, path, p_scales, p_queries, i, head, B * H, G, GP, K, SLICES, KC)
    arrive(p_ready + head * 2 * COUNTER)
