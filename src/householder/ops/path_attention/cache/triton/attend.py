"""The other kernels of a decoded step: queries meet keys, and the parts of a softmax are joined."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from householder.ops._triton import cast_operand, dot, dot_add
from householder.ops.path_attention.cache.triton.fetch import fetch_to_l2

# Numbers of which no kernel is the faster for knowing that they are 1 or divisible by 16.
NOT_SPECIAL = ["B", "H", "N", "num_queries", "num_parts", "room"]


@triton.jit
def weigh(weights, values, acc, PRECISION: tl.constexpr):
    """Return `acc + weights values`, with weights in float32 and values as they lie in the cache.

    bfloat16 values are not to cost the weights their digits: their two halves are multiplied one
    after the other, while the products wait for the cache to be read anyway.
    """
    if PRECISION == "bf16":
        high = weights.to(tl.bfloat16)
        low = (weights - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, values, tl.dot(high, values, acc))
    else:
        weights, values = cast_operand(weights, PRECISION), cast_operand(values, PRECISION)
        return dot_add(weights, values, acc, PRECISION)


@triton.jit
def cast_query(q, PRECISION: tl.constexpr):
    """Bring queries to what is multiplied by keys; float16 is cut off at its range's ends."""
    if PRECISION == "fp16":
        q = tl.clamp(q, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return cast_operand(q, PRECISION)


@triton.jit
def count_ones(x):
    """Return how many bits of a number from 0 to 2³¹ − 1 are one."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    return (x + (x >> 16)) & 0x3F


@triton.jit
def add_tile(logits, values, top, total, o, PRECISION: tl.constexpr):
    """Add a tile of keys to a softmax: its largest logit, its sum and its weighted values."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    # Where nothing is seen yet the top is −∞; 0 in its place leaves the weights zero.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    rescale = tl.exp2(top - base)
    total = total * rescale + tl.sum(weights, 1)
    o = weigh(weights, values, o * rescale[:, None], PRECISION)
    return new_top, total, o


@triton.jit(do_not_specialize=["B", "H", "N", "num_queries"])
def paths_kernel(
    p_paths, p_counts, p_new, p_queries, B, H, N, num_queries,
    G: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, KC: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row and key head and 16 queries, block but the newest, some columns).

    Bring the queries from the end of the newest block to the end of the i-th before it.
    """
    if OVERLAP:
        gdc_launch_dependents()
    num_chunks = tl.cdiv(N * G, 16)
    head = (tl.program_id(0) // num_chunks).to(tl.int64)
    i_path, column = tl.program_id(1) // tl.cdiv(K, KC), tl.program_id(1) % tl.cdiv(K, KC) * KC
    i_b = head // H
    n = N
    if p_new is not None:
        n = tl.load(p_new + i_b)
    # Of a path that is not there nothing is read.
    rows = tl.where(i_path + 1 < count_ones(tl.load(p_counts + i_b) // BLOCK), K, 0)
    o_g = tl.program_id(0) % num_chunks * 16 + tl.arange(0, 16)
    o_k, o_c = tl.arange(0, BK), column + tl.arange(0, KC)
    m_g, m_k, m_c = o_g < n * G, o_k < rows, o_c < K
    path = tl.load(
        p_paths + (head + i_path * B * H) * K * K + o_k[:, None] * K + o_c[None, :],
        mask=m_k[:, None] & m_c[None, :], other=0.0,
    )  # fmt: skip
    if OVERLAP:
        # The queries come from the kernel before. Programs without a block wait as well: who waits
        # for this kernel waits for that one too.
        gdc_wait()
    if (n == 0) | (rows == 0):
        return
    p_query = p_queries + ((head * num_queries + 1) * N * G + o_g)[:, None] * K
    q = tl.load(p_query + o_k[None, :], mask=m_g[:, None] & m_k[None, :], other=0.0)
    if PRECISION == "fp16":
        high = cast_query(q, PRECISION)
        low = (q - high.to(tl.float32)).to(tl.float16)
        q = tl.dot(low, path, tl.dot(high, path))
    else:
        q = dot(q, path.to(tl.float32), "tf32x3")
    p_query += (1 + i_path) * N * G * K
    tl.store(p_query + o_c[None, :], q, mask=m_g[:, None] & m_c[None, :])


@triton.jit(
    do_not_specialize=["window", "fetched", "B", "H", "N", "num_queries", "num_parts", "room"]
)
def attend_kernel(
    p_keys, p_values, p_block_decay, p_ty, p_path_decays, p_counts, p_new,
    p_queries, p_along, p_wk, p_decays, p_shifts, p_parts, p_tops,
    window, fetched, B, H, N, num_queries, num_parts, room, triangle_room,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr,
    SPAN: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    VALUE_PRECISION: tl.constexpr, OVERLAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, row and key head and part of the queries): attend to the i-th part of the keys.

    Part 0 are the recent tokens, new ones included; then come spans of SPAN tokens, each inside one
    block; then, LEVELS at most, the blocks smaller than a span.
    """
    if OVERLAP:
        gdc_launch_dependents()
    i_s, num_chunks = tl.program_id(0), tl.cdiv(N * G, BG)
    head = (tl.program_id(1) // num_chunks).to(tl.int64)
    o_g = tl.program_id(1) % num_chunks * BG + tl.arange(0, BG)
    i_b = head // H
    n = N
    if p_new is not None:
        n = tl.load(p_new + i_b)
    old, r = tl.load(p_counts + i_b), tl.load(p_counts + B + i_b)
    r = tl.minimum(r, tl.minimum(triangle_room, room - old) - N)
    i_n = o_g // G
    m_g = i_n < n
    o_k, o_v, o_t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, TILE)
    m_k, m_v = o_k < K, o_v < V
    row = head * N * G + o_g
    p_query = p_queries + (head * num_queries * N * G + o_g)[:, None] * K
    top = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    o = tl.zeros((BG, BV), tl.float32)

    # The part's first token and size; the block is found where bits of numbers of blocks differ.
    spans, blocks = old // SPAN, old // BLOCK
    first, size = (i_s - 1) * SPAN, SPAN
    if i_s > spans:
        rank = 0
        size = 0
        for bit in tl.static_range(LEVELS - 1, -1, -1):
            is_one = (blocks >> bit) & 1
            if (is_one == 1) & (rank == i_s - 1 - spans):
                size = BLOCK << bit
                first = (blocks >> (bit + 1) << (bit + 1)) * BLOCK
            rank += is_one
    if (n == 0) | (size == 0):
        return

    if i_s == 0:
        tokens = head * room + old
        if OVERLAP:
            gdc_wait()
        q = tl.load(p_query + o_k[None, :], mask=m_g[:, None] & m_k[None, :], other=0.0)
        q = cast_query(q, PRECISION)
        o_n, o_c = tl.arange(0, 16), tl.arange(0, BC)
        for start in range(0, r + n, BC):
            o_j = start + o_c
            m_j = o_j < r + n
            rows = (tokens + o_j)[:, None]
            keys = tl.load(
                p_keys + rows * K + o_k[None, :], mask=m_j[:, None] & m_k[None, :], other=0.0
            )
            values = tl.load(
                p_values + rows * V + o_v[None, :], mask=m_j[:, None] & m_v[None, :], other=0.0
            )
            # What the reflectors behind a key take from it, those of new tokens first.
            p_along_row = p_along + row[:, None] * triangle_room
            m_gn = m_g[:, None] & (o_n[None, :] <= i_n[:, None]) & (o_n < n)[None, :]
            along_new = tl.load(p_along_row + r + o_n[None, :], mask=m_gn, other=0.0)
            wk = tl.load(
                p_wk + (head * 16 + o_n)[:, None] * triangle_room + o_j[None, :],
                mask=(o_n < n)[:, None] & (o_j[None, :] < r + o_n[:, None]), other=0.0,
            )  # fmt: skip
            logits = dot(along_new, wk, "tf32x3")
            for later in range(start, r, BC):
                o_l = later + o_c
                m_gl = m_g[:, None] & (o_l < r)[None, :]
                along = tl.load(p_along_row + o_l[None, :], mask=m_gl, other=0.0)
                ty = tl.load(
                    p_ty + (head * triangle_room + o_l)[:, None] * triangle_room + o_j[None, :],
                    mask=(o_l < r)[:, None] & (o_j[None, :] < o_l[:, None]), other=0.0,
                ).to(tl.float32)  # fmt: skip
                logits += dot(along, ty, "tf32x3")
            keys = cast_operand(tl.trans(keys), PRECISION)
            logits = dot_add(q, keys, -logits, PRECISION)
            after = r + i_n[:, None] - o_j[None, :]
            if GATED:
                decay = tl.load(
                    p_decays + row[:, None] * triangle_room + o_j[None, :],
                    mask=m_g[:, None] & (after >= 0), other=0.0,
                )  # fmt: skip
                logits += decay * 1.4426950408889634
            seen = after >= 0
            if WINDOWED:
                seen = seen & (after < window)
            logits = tl.where(seen, logits, float("-inf"))
            top, total, o = add_tile(logits, values, top, total, o, VALUE_PRECISION)
    else:
        p_keys += (head * room + first) * K
        p_values += (head * room + first) * V
        if OVERLAP:
            # They come while the kernel before this one still runs.
            bytes_of: tl.constexpr = p_keys.dtype.element_ty.primitive_bitwidth // 8
            fetch_to_l2(p_keys, tl.minimum(size * K * bytes_of, fetched), 1 << 16)
            fetch_to_l2(p_values, tl.minimum(size * V * bytes_of, fetched), 1 << 16)
        # As many blocks are newer as there are ones behind the first binary digit in which its
        # number differs from the number of blocks.
        behind = blocks ^ (first // BLOCK)
        for shift in tl.static_range(5):
            behind |= behind >> (1 << shift)
        i_path = count_ones(blocks & (behind >> 1))
        if OVERLAP:
            # The queries come from the kernel before.
            gdc_wait()
        p_query += (1 + i_path) * N * G * K
        q = tl.load(p_query + o_k[None, :], mask=m_g[:, None] & m_k[None, :], other=0.0)
        q = cast_query(q, PRECISION)
        shift = tl.zeros((BG,), tl.float32)
        if GATED:
            shift = tl.load(p_shifts + row, mask=m_g, other=0.0)
            if i_path > 0:
                shift += tl.load(
                    p_path_decays + (head + (i_path - 1) * B * H) * G + o_g % G, mask=m_g, other=0.0
                ).to(tl.float32)
            shift *= 1.4426950408889634
        begin = 0
        if WINDOWED:
            # The first query's window reaches furthest back.
            begin = tl.maximum(old + r + 1 - window - first, 0) // TILE * TILE
        for start in tl.range(begin, size, TILE, num_stages=STAGES):
            o_j = start + o_t
            keys = tl.load(p_keys + o_j[:, None] * K + o_k[None, :], mask=m_k[None, :], other=0.0)
            values = tl.load(
                p_values + o_j[:, None] * V + o_v[None, :], mask=m_v[None, :], other=0.0
            )
            logits = tl.zeros((BG, TILE), tl.float32)
            logits = dot_add(q, cast_operand(tl.trans(keys), PRECISION), logits, PRECISION)
            if GATED:
                along = (head * G + o_g % G) * room + first
                decay = tl.load(
                    p_block_decay + along[:, None] + o_j[None, :], mask=m_g[:, None], other=0.0
                ).to(tl.float32)
                logits += decay * 1.4426950408889634 + shift[:, None]
            if WINDOWED:
                far = old + r + i_n[:, None] - (first + o_j)[None, :] >= window
                logits = tl.where(far, float("-inf"), logits)
            top, total, o = add_tile(logits, values, top, total, o, VALUE_PRECISION)
    part = row * num_parts + i_s
    m_g = m_g & (o_g < N * G)
    tl.store(p_parts + part[:, None] * V + o_v[None, :], o, mask=m_g[:, None] & m_v[None, :])
    tl.store(p_tops + part, top, mask=m_g)
    p_totals = p_tops + tl.cast(B, tl.int64) * H * G * N * num_parts
    tl.store(p_totals + part, total, mask=m_g)


@triton.jit(do_not_specialize=["B", "H", "N", "num_parts"])
def finish_kernel(
    p_parts, p_tops, p_sinks, p_counts, p_new, p_o, B, H, N, num_parts,
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
    if i_n >= n:
        tl.store(p_o + o_v, tl.zeros((BV,), tl.float32), mask=m_v)
        return
    part = row * num_parts
    p_totals = p_tops + tl.cast(B, tl.int64) * H * G * N * num_parts
    # The part of the recent tokens is never empty.
    top = tl.load(p_tops + part)
    total = tl.load(p_totals + part)
    o = tl.load(p_parts + part * V + o_v, mask=m_v, other=0.0)
    for start in range(1, used, PARTS):
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
