"""The kernels of a decoded step: several tokens enter, queries attend, parts are joined."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from householder.ops.path_attention.cache.triton.attend import (
    attend_recent,
    attend_span,
    attend_span_by_sums,
)
from householder.ops.path_attention.cache.triton.beside import beside_spans
from householder.ops.path_attention.cache.triton.blocks import count_newer, count_ones, find_part
from householder.ops.path_attention.cache.triton.enter import (
    as_held,
    load_new,
    put_tokens,
    queries_of_few,
    rows_of_tw,
    rows_of_ty,
    sum_gates,
)
from householder.ops.path_attention.cache.triton.products import fold
from householder.ops.path_attention.cache.triton.signals import (
    COUNTER,
    arrive,
    fetch_to_l2,
    wait_for,
)

# Numbers of which no kernel is the faster for knowing that they are 1 or divisible by 16.
NOT_SPECIAL = [
    *("window", "B", "H", "N", "path_programs", "num_queries", "num_parts"),
    *("room", "recent_room", "last_row"),
    *("s_bb", "s_bt", "s_bh", "s_gb", "s_gt", "s_gh"),
]


@triton.jit(do_not_specialize=[x for x in NOT_SPECIAL if x not in ("window", "num_parts")])
def enter_kernel(
    p_q, p_k, p_v, p_w, p_beta, p_g, p_counts, p_new, p_ready,
    p_keys, p_values, p_ws, p_betas, p_gs, p_tw, p_ty, p_paths, p_scales,
    p_queries, p_along, p_wk, p_decays, p_shifts,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_wb, s_wt, s_wh,
    s_bb, s_bt, s_bh, s_gb, s_gt, s_gh,
    scale, B, H, N, num_queries, room, recent_room, triangle_room,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, KC: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, HALF: tl.constexpr, HALVES: tl.constexpr,
    EARLY: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, row and key head): bring several tokens' queries to blocks, or append them.

    The first ones bring 16 queries each to the end of the newest block and from there to all
    others. The next one appends rows to T W; the last the tokens, rows of T Y, and sums of gates.
    No program reads what another writes.
    """
    if OVERLAP:
        gdc_launch_dependents()
    # One kind of programs after the other: so those waited for have started before.
    i_part, head = tl.program_id(0) // (B * H), (tl.program_id(0) % (B * H)).to(tl.int64)
    i_b, i_h = head // H, head % H
    p_ws += head * recent_room * K
    p_tw += head * triangle_room * K
    p_ty += head * triangle_room * triangle_room
    p_wk += head * 16 * triangle_room
    p_ready += head * 2 * COUNTER
    p_w += i_b * s_wb + i_h * s_wh
    p_beta += i_b * s_bb + i_h * s_bh
    p_q += i_b * s_qb + i_h * G * s_qh
    n = N
    if p_new is not None:
        n = tl.load(p_new + i_b)
    old, r = tl.load(p_counts + i_b), tl.load(p_counts + B + i_b)
    # Replays of a graph that nobody counted must not write outside.
    r = tl.minimum(r, tl.minimum(triangle_room, room - old) - N)
    if n == 0:
        return
    p_recent = p_keys + (head * room + old) * K
    num_paths = tl.maximum(count_ones(old // BLOCK) - 1, 0)
    num_turning = tl.cdiv(N * G, 16)
    o_n, o_k = tl.arange(0, 16), tl.arange(0, BK)
    m_k = o_k < K
    w = load_new(p_w, s_wt, o_n, n, o_k, K)
    beta = tl.load(p_beta + o_n * s_bt, mask=o_n < n, other=0.0).to(tl.float32)
    if i_part < num_turning:
        if EARLY:
            size = K * K * (p_paths.dtype.element_ty.primitive_bitwidth // 8)
            for i_path in range(i_part, num_paths, num_turning):
                fetch_to_l2(p_paths + (head + i_path * B * H) * K * K, size, BK * BK * 4)
        queries_of_few(
            p_q, s_qt, s_qh, w, beta, p_ws, p_tw, p_paths, p_scales, p_queries, p_along,
            p_ready + COUNTER, i_part, scale, head, B * H, n, N, num_queries, r, num_paths,
            triangle_room, G, K, BK, BC, KC, HALF, HALVES, STAGES,
        )  # fmt: skip
        arrive(p_ready)
    elif i_part == num_turning:
        rows_of_tw(w, beta, p_ws, p_tw, r, n, N, o_k, K, BC, HALVES)
    else:
        if GATED:
            p_g += i_b * s_gb + i_h * G * s_gh
            sum_gates(
                p_g, p_gs, p_decays, p_shifts, s_gt, s_gh, head, n, r, N,
                recent_room, triangle_room, G, BR,
            )  # fmt: skip
            arrive(p_ready)
        k = tl.load(
            p_k + i_b * s_kb + i_h * s_kh + o_n[:, None] * s_kt + o_k[None, :],
            mask=(o_n < n)[:, None] & m_k[None, :], other=0.0,
        )  # fmt: skip
        k = as_held(k, p_keys.dtype.element_ty)
        put_tokens(
            k, load_new(p_w, s_wt, o_n, n, o_k, K),
            tl.load(p_beta + o_n * s_bt, mask=o_n < n, other=0.0),
            p_v + i_b * s_vb + i_h * s_vh, s_vt, p_recent,
            p_values + (head * room + old) * V, p_ws, p_betas + head * recent_room, r, n,
            K, V, BK, BV,
        )  # fmt: skip
        rows_of_ty(
            k, w, beta, p_ws, p_recent, p_ty, p_wk, r, n, N, o_k, triangle_room, K, BC, HALVES
        )
        arrive(p_ready + COUNTER)


@triton.jit(do_not_specialize=NOT_SPECIAL)
def attend_kernel(
    p_q, p_k, p_v, p_w, p_beta, p_g, p_ws, p_betas, p_gs,
    p_keys, p_values, p_tw, p_ty, p_block_decay, p_path_decays, p_counts, p_new, p_ready,
    p_queries, p_along, p_wk, p_decays, p_shifts, p_parts, p_tops,
    s_qb, s_qh, s_kb, s_kh, s_vb, s_vh, s_wb, s_wh, s_bb, s_bh, s_gb, s_gh,
    scale, window, B, H, N, path_programs, num_queries, num_parts, room, recent_room,
    triangle_room, last_row,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, BR: tl.constexpr, RECENT: tl.constexpr, SPAN: tl.constexpr,
    LEVELS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    GATED: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, HALF: tl.constexpr,
    SIDE: tl.constexpr, TOGETHER: tl.constexpr, VALUE_PRECISION: tl.constexpr, EARLY: tl.constexpr,
    OVERLAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, row and key head and part of the queries): attend to a part of the keys.

    Of one token some attend to the recent tokens, and some append it.
    """
    if OVERLAP:
        gdc_launch_dependents()
    # One axis: there may be more heads of rows than a grid's second axis has.
    num_programs = num_parts + 2 * SINGLE
    i_part, i_head = tl.program_id(0) % num_programs, tl.program_id(0) // num_programs
    if SINGLE:
        # Some heads at a time, so that the first keys are read soon whatever the batch; of those
        # first the programs that wait for nobody.
        o_first = tl.program_id(0) // (TOGETHER * num_programs) * TOGETHER
        i_program = tl.program_id(0) - o_first * num_programs
        num_heads = tl.minimum(B * H - o_first, TOGETHER)
        if i_program < 3 * num_heads:
            beside_spans(
                p_q, p_k, p_v, p_w, p_beta, p_g, p_ws, p_betas, p_gs, p_keys, p_values, p_tw, p_ty,
                p_counts, p_new, p_parts, p_tops,
                s_qb, s_qh, s_kb, s_kh, s_vb, s_vh, s_wb, s_wh, s_bb, s_bh, s_gb, s_gh,
                i_program // num_heads, o_first + i_program % num_heads, scale, window, B, H,
                num_parts, room, recent_room, triangle_room, last_row,
                G, K, V, BK, BV, RECENT, BR, GATED, WINDOWED,
            )  # fmt: skip
            if OVERLAP:
                gdc_wait()
            return
        i_program -= 3 * num_heads
        i_part = 1 + i_program % (num_parts - 1)
        i_head = o_first + i_program // (num_parts - 1)
    num_chunks = tl.cdiv(N * G, BG)
    i_chunk, head = i_head % num_chunks, (i_head // num_chunks).to(tl.int64)
    i_b, row = head // H, head * N * G
    p_ty += head * triangle_room * triangle_room
    p_parts += (row * num_parts + i_part) * V
    p_totals = p_tops + tl.cast(B, tl.int64) * H * G * N * num_parts + row * num_parts + i_part
    p_tops += row * num_parts + i_part
    n = N
    if p_new is not None:
        n = tl.load(p_new + i_b)
    old, r = tl.load(p_counts + i_b), tl.load(p_counts + B + i_b)
    r = tl.minimum(r, tl.minimum(last_row, room - old - N))
    if n == 0:
        return
    first, size = find_part(i_part, old, SPAN, LEVELS, BLOCK)
    if size == 0:
        return
    p_recent, p_recent_values = p_keys + (head * room + old) * K, p_values + (head * room + old) * V
    p_ready += head * 2 * COUNTER
    o_g, o_v = i_chunk * BG + tl.arange(0, BG), tl.arange(0, BV)
    i_n = o_g // G
    m_g = i_n < n
    p_query = p_queries + (head * num_queries * N * G + o_g)[:, None] * K
    # Programs that are waited for: of several tokens with gates also the one that sums them.
    num_turning = tl.cdiv(N * G, 16)
    blocks = old // BLOCK
    i_path = count_newer(blocks, first // BLOCK)
    num_awaited = path_programs if SINGLE else num_turning + GATED
    begin = 0
    if WINDOWED:
        # The first query's window reaches furthest back.
        begin = tl.maximum(old + r + 1 - window - first, 0) // TILE * TILE
    if GATED:
        p_block_decay += head * G * room + first
        p_path_decays += (head + (i_path - 1) * B * H) * G
        p_shifts += row
    if SINGLE and G == 1:
        attend_span_by_sums(
            p_keys + (head * room + first) * K, p_values + (head * room + first) * V,
            p_block_decay, p_path_decays, i_path > 0,
            p_queries + (head * num_queries + 1 + i_path) * K, p_shifts, p_ready, num_awaited,
            old + r - first, begin, size, window, p_parts, p_tops, p_totals,
            K, V, BK, BV, TILE, SIDE, GATED, WINDOWED, EARLY, STAGES,
        )  # fmt: skip
    else:
        top = tl.full((BG,), float("-inf"), tl.float32)
        total = tl.zeros((BG,), tl.float32)
        o = tl.zeros((16 if PACKED else BG, BV), tl.float32)
        if not SINGLE and i_part == 0:
            wait_for(p_ready + COUNTER, 1 + num_turning, EARLY)
            top, total, o = attend_recent(
                top, total, o, p_recent, p_recent_values, p_ty, p_query,
                p_along + row * triangle_room, p_wk + head * 16 * triangle_room,
                p_decays + row * triangle_room if GATED else None, window,
                i_chunk * BG, o_g, i_n, m_g, n, r, triangle_room,
                G, K, V, BK, BV, RECENT, GATED, WINDOWED, PACKED, HALF, VALUE_PRECISION,
            )  # fmt: skip
        else:
            top, total, o = attend_span(
                top, total, o, p_keys + (head * room + first) * K,
                p_values + (head * room + first) * V, p_block_decay, p_path_decays, i_path > 0,
                p_query + (1 + i_path) * N * G * K, p_shifts, p_ready, num_awaited,
                old + r - first, begin, size, window, o_g, i_n, m_g, room,
                G, K, V, BK, BV, TILE, GATED, WINDOWED, PACKED, HALF, VALUE_PRECISION, EARLY,
                STAGES,
            )  # fmt: skip
        if PACKED:
            o = fold(o)
        m_g = m_g & (o_g < N * G)
        m_gv, part = m_g[:, None] & (o_v < V)[None, :], o_g * num_parts
        tl.store(p_parts + part[:, None] * V + o_v[None, :], o, mask=m_gv)
        tl.store(p_tops + part, top, mask=m_g)
        tl.store(p_totals + part, total, mask=m_g)
    if OVERLAP:
        # Who waits for this kernel waits for the one before it too.
        gdc_wait()


@triton.jit(do_not_specialize=["B", "H", "N", "num_parts"])
def finish_kernel(
    p_parts, p_tops, p_sinks, p_counts, p_new, p_ready, p_o, B, H, N, num_parts,
    G: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, WITH_SINKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row, key head, token and query head): join the parts of its softmax in order."""
    row = tl.program_id(0).to(tl.int64)
    i_b, i_h = row // (H * N * G), row // (N * G) % H
    i_n, i_g = row // G % N, row % G
    o_v, o_p = tl.arange(0, BV), tl.arange(0, PARTS)
    m_v = o_v < V
    p_o += ((i_b * N + i_n) * H * G + i_h * G + i_g) * V
    n = N
    if p_new is not None:
        n = tl.load(p_new + i_b)
    old = tl.load(p_counts + i_b)
    used = 1 + old // SPAN + count_ones(old % SPAN // BLOCK)
    if OVERLAP:
        gdc_wait()
    if (i_n == 0) & (i_g == 0):
        # Nobody waits any more.
        p_ready += (i_b * H + i_h) * 2 * COUNTER
        tl.store(p_ready + tl.arange(0, 2) * COUNTER, tl.zeros((2,), tl.int32))
    if i_n >= n:
        tl.store(p_o + o_v, tl.zeros((BV,), tl.float32), mask=m_v)
        return
    part = row * num_parts
    p_totals = p_tops + tl.cast(B, tl.int64) * H * G * N * num_parts
    # The first part, that of the recent tokens, is never empty: from then on the top is a number.
    top, total, o = float("-inf"), 0.0, tl.zeros((BV,), tl.float32)
    for start in range(0, used, PARTS):
        m_p = start + o_p < used
        tops = tl.load(p_tops + part + start + o_p, mask=m_p, other=float("-inf"))
        totals = tl.load(p_totals + part + start + o_p, mask=m_p, other=0.0)
        some = tl.load(
            p_parts + (part + start + o_p)[:, None] * V + o_v[None, :],
            mask=m_p[:, None] & m_v[None, :], other=0.0,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(tops, 0))
        rescale, weights = tl.exp2(top - new_top), tl.exp2(tops - new_top)
        total = total * rescale + tl.sum(totals * weights, 0)
        o = o * rescale + tl.sum(some * weights[:, None], 0)
        top = new_top
    if WITH_SINKS:
        sink = tl.load(p_sinks + i_h * G + i_g).to(tl.float32) * 1.4426950408889634
        new_top = tl.maximum(top, sink)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.exp2(sink - new_top)
        o = o * rescale
    tl.store(p_o + o_v, o / total, mask=m_v)
    if (i_h == 0) & (i_n == 0) & (i_g == 0):
        # All that read this count have run.
        tl.store(p_counts + B + i_b, tl.load(p_counts + B + i_b) + n)
