"""The two kernels of a decoded step."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from householder.ops.path_attention.cache.triton.attend import (
    attend_recent,
    attend_span,
    count_newer,
    count_ones,
    find_part,
)
from householder.ops.path_attention.cache.triton.enter import (
    as_held,
    load_first,
    load_new,
    put_tokens,
    queries_of_few,
    queries_of_one,
    row_of_tw,
    row_of_ty,
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
    *("window", "fetched", "ahead", "B", "H", "N", "num_queries", "num_parts"),
    *("room", "recent_room", "s_bb", "s_bt", "s_bh", "s_gb", "s_gt", "s_gh"),
]


@triton.jit(do_not_specialize=NOT_SPECIAL)
def step_kernel(
    p_q, p_k, p_v, p_w, p_beta, p_g, p_counts, p_new, p_ready,
    p_keys, p_values, p_ws, p_betas, p_gs, p_tw, p_ty,
    p_paths, p_scales, p_block_decay, p_path_decays,
    p_queries, p_along, p_wk, p_decays, p_shifts, p_parts, p_tops,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_wb, s_wt, s_wh,
    s_bb, s_bt, s_bh, s_gb, s_gt, s_gh,
    scale, window, fetched, ahead, B, H, N, num_queries, num_parts,
    room, recent_room, triangle_room,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BG: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, KC: tl.constexpr, RECENT: tl.constexpr,
    SPAN: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    SINGLE: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
    HALF: tl.constexpr, HALVES: tl.constexpr, VALUE_PRECISION: tl.constexpr,
    EARLY: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr,
    ENTERS: tl.constexpr, ATTENDS: tl.constexpr,
):  # fmt: skip
    """Let new tokens enter, and attend, or one of both.

    Each row and key head has programs that enter, and one for each part of its keys (times parts of
    the queries) that wait for these. Programs for `ahead` heads enter first; then those for as many
    more come in front of the ones that attend for the heads before, and so on.

    Of those that enter, the first bring queries to blocks, in slices of columns or 16 queries each;
    one appends rows to T W; the last one the tokens, rows of T Y, and sums of gates. No program
    reads what another writes without waiting for it.
    """
    if OVERLAP:
        gdc_launch_dependents()
    num_chunks = tl.cdiv(N * G, BG)
    SLICES: tl.constexpr = BK // KC
    num_turning = SLICES if SINGLE else tl.cdiv(N * G, 16)
    num_entering, num_attending = num_turning + 2, num_parts * num_chunks
    front = ahead * num_entering
    turn, place = 0, tl.program_id(0)
    if not ENTERS:
        turn, place = 1, place + front
    elif place >= front:
        turn = 1 + (place - front) // (front + ahead * num_attending)
        place = (place - front) % (front + ahead * num_attending)
    enters = place < front
    if enters:
        i_part, i_chunk = place // ahead, 0
        head = turn * ahead + place % ahead
    else:
        place -= front
        i_part, i_chunk = place % num_parts, place // num_parts % num_chunks
        head = (turn - 1) * ahead + place // num_attending
    if head >= B * H:
        return
    head = head.to(tl.int64)
    i_b, i_h = head // H, head % H
    p_ws += head * recent_room * K
    p_tw += head * triangle_room * K
    p_ty += head * triangle_room * triangle_room
    p_wk += head * 16 * triangle_room
    p_ready += head * 2 * COUNTER
    if ENTERS and EARLY and enters:
        # Before the counts have come.
        fetch_to_l2(p_ws, 64 * K * (p_ws.dtype.element_ty.primitive_bitwidth // 8), 64 * BK * 4)
        fetch_to_l2(p_tw, 64 * K * 4, 64 * BK * 4)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    n = N
    if p_new is not None:
        n = tl.load(p_new + i_b)
    old, r = tl.load(p_counts + i_b), tl.load(p_counts + B + i_b)
    # Replays of a graph that nobody counted must not write outside.
    r = tl.minimum(r, tl.minimum(triangle_room, room - old) - N)
    if n == 0:
        return
    blocks = old // BLOCK
    p_recent = p_keys + (head * room + old) * K
    # Programs that wait for blocks' queries, with gates also for their sums, ask the first counter;
    # the one for recent tokens the second, where these and their queries have arrived.
    num_awaited = num_turning + GATED

    if ENTERS and enters:
        num_paths = tl.maximum(count_ones(blocks) - 1, 0)
        p_w += i_b * s_wb + i_h * s_wh
        p_beta += i_b * s_bb + i_h * s_bh
        p_q += i_b * s_qb + i_h * G * s_qh
        o_n = tl.arange(0, 16)
        if SINGLE:
            w = tl.load(p_w + o_k, mask=m_k, other=0.0).to(tl.float32)
            beta = tl.load(p_beta).to(tl.float32)
        else:
            w = load_new(p_w, s_wt, o_n, n, o_k, K)
            beta = tl.load(p_beta + o_n * s_bt, mask=o_n < n, other=0.0).to(tl.float32)
        if i_part < num_turning:
            if SINGLE:
                # On their way before the counts have come.
                o_c = tl.arange(0, BC)
                ws, tw = load_first(p_ws, o_c, o_k, K), load_first(p_tw, o_c, o_k, K)
            if EARLY:
                size = K * K * (p_paths.dtype.element_ty.primitive_bitwidth // 8)
                for i_path in range(i_part, num_paths, num_turning):
                    fetch_to_l2(p_paths + (head + i_path * B * H) * K * K, size, BK * BK * 4)
            if SINGLE:
                queries_of_one(
                    p_q, s_qh, w, beta, ws, tw, p_ws, p_tw, p_paths, p_scales, p_queries, p_along,
                    p_ready + COUNTER, i_part, scale, head, B * H, num_queries, r, num_paths,
                    triangle_room, G, K, BK, BC, SLICES, STAGES,
                )  # fmt: skip
            else:
                queries_of_few(
                    p_q, s_qt, s_qh, w, beta, p_ws, p_tw, p_paths, p_scales, p_queries, p_along,
                    p_ready + COUNTER, i_part, scale, head, B * H, n, N, num_queries, r, num_paths,
                    triangle_room, G, K, BK, BC, KC, HALF, HALVES, STAGES,
                )  # fmt: skip
            arrive(p_ready)
        elif i_part == num_turning:
            if SINGLE:
                row_of_tw(w, beta, p_ws, p_tw, r, o_k, K, BC)
            else:
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
            if SINGLE:
                row_of_ty(w, beta, p_ws, p_recent, p_ty, p_wk, r, o_k, triangle_room, K, BC)
            else:
                rows_of_ty(
                    k, w, beta, p_ws, p_recent, p_ty, p_wk, r, n, N, o_k, triangle_room,
                    K, BC, HALVES,
                )  # fmt: skip
            put_tokens(
                k, load_new(p_w, s_wt, o_n, n, o_k, K),
                tl.load(p_beta + o_n * s_bt, mask=o_n < n, other=0.0),
                p_v + i_b * s_vb + i_h * s_vh, s_vt, p_recent,
                p_values + (head * room + old) * V, p_ws, p_betas + head * recent_room, r, n,
                K, V, BK, BV,
            )  # fmt: skip
            arrive(p_ready + COUNTER)
        return
    if ATTENDS:
        first, size = find_part(i_part, old, SPAN, LEVELS, BLOCK)
        if size == 0:
            return
        o_g, o_v = i_chunk * BG + tl.arange(0, BG), tl.arange(0, BV)
        i_n = o_g // G
        m_g = i_n < n
        row = head * N * G
        p_query = p_queries + (head * num_queries * N * G + o_g)[:, None] * K
        top = tl.full((BG,), float("-inf"), tl.float32)
        total = tl.zeros((BG,), tl.float32)
        o = tl.zeros((16 if PACKED else BG, BV), tl.float32)
        if i_part == 0:
            wait_for(p_ready + COUNTER, 2 if SINGLE else 1 + num_turning, EARLY)
            top, total, o = attend_recent(
                top, total, o, p_recent, p_values + (head * room + old) * V, p_ty, p_query,
                p_along + row * triangle_room, p_wk,
                p_decays + row * triangle_room if GATED else None, window,
                i_chunk * BG, o_g, i_n, m_g, n, r, triangle_room,
                G, K, V, BK, BV, RECENT, GATED, WINDOWED, PACKED, HALF, VALUE_PRECISION,
            )  # fmt: skip
        else:
            p_keys += (head * room + first) * K
            p_values += (head * room + first) * V
            begin = 0
            if WINDOWED:
                # The first query's window reaches furthest back.
                begin = tl.maximum(old + r + 1 - window - first, 0) // TILE * TILE
            if EARLY:
                # They come while queries are brought to the block.
                bytes_of: tl.constexpr = p_keys.dtype.element_ty.primitive_bitwidth // 8
                fetch_to_l2(p_keys, tl.minimum(size * K * bytes_of, fetched), 1 << 16)
                fetch_to_l2(p_values, tl.minimum(size * V * bytes_of, fetched), 1 << 16)
            i_path = count_newer(blocks, first // BLOCK)
            top, total, o = attend_span(
                top, total, o, p_keys, p_values,
                p_block_decay + head * G * room + first if GATED else None,
                p_path_decays + (head + (i_path - 1) * B * H) * G if GATED else None, i_path > 0,
                p_query + (1 + i_path) * N * G * K, p_shifts + row if GATED else None,
                p_ready, num_awaited, old + r - first, begin, size, window, o_g, i_n, m_g, room,
                G, K, V, BK, BV, TILE, GATED, WINDOWED, PACKED, HALF, VALUE_PRECISION, EARLY,
                STAGES,
            )  # fmt: skip
        part = (row + o_g) * num_parts + i_part
        if PACKED:
            o = fold(o)
        m_g = m_g & (o_g < N * G)
        m_gv = m_g[:, None] & (o_v < V)[None, :]
        tl.store(p_parts + part[:, None] * V + o_v[None, :], o, mask=m_gv)
        tl.store(p_tops + part, top, mask=m_g)
        p_totals = p_tops + tl.cast(B, tl.int64) * H * G * N * num_parts
        tl.store(p_totals + part, total, mask=m_g)
        if OVERLAP and not ENTERS:
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
        o_c = tl.arange(0, 2) * COUNTER
        tl.store(p_ready + (i_b * H + i_h) * 2 * COUNTER + o_c, tl.zeros((2,), tl.int32))
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
