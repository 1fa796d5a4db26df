"""One decoded token on a GPU: Triton kernels over the tensors of a `Store`.

Three kernels. `enter` puts the token behind the recent ones, attends to these, and brings its
queries to the end of every block; `attend` lets them meet the blocks' keys, in spans of tokens side
by side; `finish` joins the parts of the softmax and counts the token. How many tokens there are is
read from the device, so that a captured graph can be replayed as the cache grows; and a span has
the same tokens whatever the batch, so that a row's output does not depend on the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from householder.ops._triton import (
    cast_operand,
    dot,
    dot_add,
    dot_precision,
    on_its_device,
    power_of_two,
)

# Tokens whose keys one program of `attend` sees, and how many at a time. Measured on an H200 for
# 4,096 to 65,536 tokens: with tiles of 32 on two warps as long as with 64 on four, within 3%; tiles
# on their way to four stages, or eight warps, a third longer.
SPAN = 256
TILE = 32
OVERLAP = True
# Programs of `enter` that fill a GPU.
ENTER_PROGRAMS = 264
# Keys of the smallest block, as in the store.
BLOCK = 64
LOG2_E = 1.4426950408889634


def one_token(x: Tensor) -> Tensor:
    """Return `x [B, 1, H, …]` without its tokens, with contiguous vectors."""
    x = x[:, 0]
    return x if x.stride(-1) == 1 else x.contiguous()


@on_its_device
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    window: int | None,
    store: dict[str, Tensor],
    counts: Tensor,
    new: Tensor,
    num_spans: int,
) -> Tensor:
    """Append one token to the rows of a batch, and return what it sees.

    Args:
        q: `[B, HQ, K]`; the other tokens likewise without their axis T, any strides.
        k: `[B, H, K]`.
        v: `[B, H, V]`.
        w: `[B, H, K]`.
        beta: `[B, H]`.
        g: `[B, HQ]` or None.
        scale: factor on the inner products.
        sinks: `[HQ]` or None.
        window: how many tokens a query sees, or None.
        store: the store's tensors by name, contiguous, with room for one more token.
        counts: int32 `[2, B]`: tokens in blocks and tokens after them; the second is counted up.
        new: int32 `[B]`: 1 where a row gets its token, 0 where it is left as it is.
        num_spans: spans of `SPAN` tokens that cover all blocks of every row.

    Returns:
        o `[B, HQ, V]` in v's dtype, zero where `new` is.
    """
    B, HQ, K = q.shape
    H, V = k.shape[1], v.shape[2]
    G = HQ // H
    keys, values = store["keys"], store["values"]
    paths, room = store["paths"], store["w"].shape[2]
    gated = g is not None
    num_paths = max(1, paths.shape[0])
    BK, BV = power_of_two(K), power_of_two(V)
    R = power_of_two(store["ut"].shape[2], least=BLOCK)
    precision = dot_precision(keys, values)
    # From Hopper on a kernel can start while the one before it ends, and wait inside for it.
    overlap = OVERLAP and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    early = {"launch_pdl": True} if overlap else {}
    tile_bytes = TILE * (BK + BV) * keys.element_size()
    queries = q.new_empty(B, H, num_paths + 1, G, K, dtype=torch.float32)
    shifts = q.new_empty(B, H, num_paths + 1, G if gated else 0, dtype=torch.float32)
    parts = q.new_empty(B, HQ, num_spans + 1, V, dtype=torch.float32)
    tops = q.new_empty(2, B, HQ, num_spans + 1, dtype=torch.float32)
    o = v.new_empty(B, HQ, V)
    # Whichever program brings a query to a block, it does the same: a matter of speed alone.
    side_by_side = max(1, min(num_paths + 1, ENTER_PROGRAMS // (B * H)))
    enter_kernel[(B * H, side_by_side)](
        q, k, v, w, beta, g, counts, new,
        keys, values, store["w"], store["beta"], store.get("g"), store["ut"], store["wk"],
        paths, store.get("path_decays"), queries, shifts, parts, tops,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *w.stride()[:2], *beta.stride()[:2],
        *((0, 0) if g is None else g.stride()[:2]),
        scale * LOG2_E, 0 if window is None else window, num_spans + 1, num_paths + 1,
        keys.shape[2], room, store["ut"].shape[2],
        B=B, H=H, G=G, K=K, V=V, BK=BK, BV=BV, R=R, KC=min(BK, (1 << 14) // BK), BLOCK=BLOCK,
        GATED=gated, WINDOWED=window is not None, OVERLAP=overlap, num_warps=8,
    )  # fmt: skip
    if num_spans:
        attend_kernel[(num_spans, B * H)](
            keys, values, store.get("block_decay"), counts, new, queries, shifts, parts, tops,
            0 if window is None else window, num_spans + 1, num_paths + 1, keys.shape[2],
            B=B, H=H, G=G, K=K, V=V, BK=BK, BV=BV, BG=power_of_two(G), SPAN=SPAN, TILE=TILE,
            BLOCK=BLOCK, GATED=gated, WINDOWED=window is not None, PRECISION=precision,
            OVERLAP=overlap, num_warps=2 if tile_bytes <= 1 << 14 else 4,
            num_stages=3 if tile_bytes <= 1 << 15 else 2, **early,
        )  # fmt: skip
    finish_kernel[(B * HQ,)](
        parts, tops, sinks, counts, new, o, num_spans + 1,
        B=B, HQ=HQ, V=V, BV=BV, PARTS=(1 << 13) // BV, SPAN=SPAN,
        WITH_SINKS=sinks is not None, OVERLAP=overlap, num_warps=4, **early,
    )  # fmt: skip
    return o


@triton.jit
def count_ones(x):
    """Return how many bits of a number from 0 to 2³¹ − 1 are one."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    return (x + (x >> 16)) & 0x3F


@triton.jit
def later(o_r, values, R: tl.constexpr):
    """Return for each of `values [R]` the sum of those after it."""
    # A sum of terms of one sign: a difference of sums would be ∞ − ∞ after a gate of −∞.
    after = o_r[None, :] > o_r[:, None]
    return tl.sum(tl.where(after, values[None, :], 0.0), axis=1)


@triton.jit
def enter_kernel(
    p_q, p_k, p_v, p_w, p_beta, p_g, p_counts, p_new,
    p_keys, p_values, p_ws, p_betas, p_gs, p_ut, p_wk,
    p_paths, p_path_decays, p_queries, p_shifts, p_parts, p_tops,
    s_qb, s_qh, s_kb, s_kh, s_vb, s_vh, s_wb, s_wh, s_bb, s_bh, s_gb, s_gh,
    scale, window, num_parts, num_queries, room, recent_room, triangle_room,
    B: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, KC: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, WINDOWED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row and key head, i): bring the queries to the end of every so-many-th block.

    The program with i = 0 also attends to recent tokens, and appends the new one. The others read
    nothing that it writes.
    """
    if OVERLAP:
        gdc_launch_dependents()
    i_bh, i_first = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    old, r = tl.load(p_counts + i_b), tl.load(p_counts + B + i_b)
    # Replays of a graph that nobody counted must not write outside.
    r = tl.minimum(r, tl.minimum(triangle_room, room - old) - 1)
    num_blocks = count_ones(old // BLOCK)
    if tl.load(p_new + i_b) == 0 or (i_first > 0 and i_first >= num_blocks):
        return

    o_r, o_k, o_v = tl.arange(0, R), tl.arange(0, BK), tl.arange(0, BV)
    m_r, m_k, m_v = o_r < r, o_k < K, o_v < V
    head = i_bh.to(tl.int64)
    w_new = tl.load(p_w + i_b * s_wb + i_h * s_wh + o_k, mask=m_k, other=0.0).to(tl.float32)
    beta = tl.load(p_beta + i_b * s_bb + i_h * s_bh).to(tl.float32)
    ws = tl.load(
        p_ws + (head * recent_room + o_r)[:, None] * K + o_k[None, :],
        mask=m_r[:, None] & m_k[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    triangle = (head * triangle_room + o_r)[:, None] * triangle_room + o_r[None, :]
    m_rr = m_r[:, None] & m_r[None, :]
    ut = tl.load(p_ut + triangle, mask=m_rr, other=0.0).to(tl.float32)

    for i_g in range(G):
        i_hq = i_h * G + i_g
        q = tl.load(p_q + i_b * s_qb + i_hq * s_qh + o_k, mask=m_k, other=0.0).to(tl.float32)
        q = q * scale
        # The new token's reflector first; then all recent ones, q − Wᵀ Tᵀ W q.
        turned = q - beta * tl.sum(q * w_new, 0) * w_new
        along = tl.sum(ut * tl.sum(ws * turned[None, :], 1)[:, None], 0)
        at_block = turned - tl.sum(ws * along[:, None], 0)
        decay = 0.0
        g_new = 0.0
        g_recent = tl.zeros((R,), tl.float32)
        if GATED:
            g_new = tl.load(p_g + i_b * s_gb + i_hq * s_gh).to(tl.float32)
            p_g_row = p_gs + (head * G + i_g) * recent_room
            g_recent = tl.load(p_g_row + o_r, mask=m_r, other=0.0).to(tl.float32)
            decay = tl.sum(g_recent, 0) + g_new
        for i_path in range(i_first, num_blocks, tl.num_programs(1)):
            query = (head * num_queries + i_path) * G + i_g
            path = head + (i_path - 1) * B * H
            shift = decay
            if i_path == 0:
                tl.store(p_queries + query * K + o_k, at_block, mask=m_k)
            else:
                for start in tl.static_range(0, BK, KC):
                    # In parts of its columns, where the product is too large for the registers.
                    o_c = start + tl.arange(0, KC)
                    product = tl.load(
                        p_paths + path * K * K + o_k[:, None] * K + o_c[None, :],
                        mask=m_k[:, None] & (o_c < K)[None, :], other=0.0,
                    ).to(tl.float32)  # fmt: skip
                    brought = tl.sum(at_block[:, None] * product, 0)
                    tl.store(p_queries + query * K + o_c, brought, mask=o_c < K)
                if GATED:
                    shift += tl.load(p_path_decays + path * G + i_g).to(tl.float32)
            if GATED:
                tl.store(p_shifts + query, shift * 1.4426950408889634)
        if i_first == 0:
            tokens = head * room + old
            rows = (tokens + o_r)[:, None]
            k_recent = tl.load(
                p_keys + rows * K + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0
            ).to(tl.float32)
            wk = tl.load(p_wk + triangle, mask=m_rr, other=0.0).to(tl.float32)
            k_new = tl.load(p_k + i_b * s_kb + i_h * s_kh + o_k, mask=m_k, other=0.0)
            # As it will be read later.
            k_new = k_new.to(p_keys.dtype.element_ty).to(tl.float32)
            logits = tl.sum(k_recent * turned[None, :], 1) - tl.sum(wk * along[:, None], 0)
            own = tl.sum(k_new * q, 0)
            if GATED:
                logits += (later(o_r, g_recent, R) + g_new) * 1.4426950408889634
            seen = m_r
            if WINDOWED:
                seen = seen & (r - o_r < window)
            logits = tl.where(seen, logits, float("-inf"))
            top = tl.maximum(tl.max(logits, 0), own)
            weights, own_weight = tl.exp2(logits - top), tl.exp2(own - top)
            v_recent = tl.load(
                p_values + rows * V + o_v[None, :], mask=m_r[:, None] & m_v[None, :], other=0.0
            ).to(tl.float32)
            v_new = tl.load(p_v + i_b * s_vb + i_h * s_vh + o_v, mask=m_v, other=0.0)
            v_new = v_new.to(p_values.dtype.element_ty).to(tl.float32)
            o = tl.sum(weights[:, None] * v_recent, 0) + own_weight * v_new
            part = (i_b * H * G + i_hq).to(tl.int64) * num_parts
            tl.store(p_parts + part * V + o_v, o, mask=m_v)
            tl.store(p_tops + part, top)
            tl.store(
                p_tops + tl.cast(B * H * G, tl.int64) * num_parts + part,
                tl.sum(weights, 0) + own_weight,
            )
            if GATED:
                tl.store(p_gs + (head * G + i_g) * recent_room + r, g_new)

    if i_first == 0:
        tokens = head * room + old
        k_new = tl.load(p_k + i_b * s_kb + i_h * s_kh + o_k, mask=m_k, other=0.0)
        v_new = tl.load(p_v + i_b * s_vb + i_h * s_vh + o_v, mask=m_v, other=0.0)
        tl.store(p_keys + (tokens + r) * K + o_k, k_new, mask=m_k)
        tl.store(p_values + (tokens + r) * V + o_v, v_new, mask=m_v)
        tl.store(p_ws + (head * recent_room + r) * K + o_k, w_new, mask=m_k)
        tl.store(p_betas + head * recent_room + r, beta)
        # The row of T is −β (w Wᵀ) T, and β on the diagonal; as exact as the store keeps it.
        exact = p_ut.dtype.element_ty
        rows_before = tl.load(p_ut + triangle, mask=m_rr, other=0.0)
        gram = tl.sum(ws.to(exact) * w_new[None, :].to(exact), 1)
        row = -beta.to(exact) * tl.sum(rows_before * gram[:, None], 0)
        p_row = p_ut + (head * triangle_room + r) * triangle_room + o_r
        tl.store(p_row, tl.where(o_r == r, beta.to(exact), row), mask=o_r <= r)
        keys = tl.load(
            p_keys + (tokens + o_r)[:, None] * K + o_k[None, :],
            mask=m_r[:, None] & m_k[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        row = tl.sum(keys.to(exact) * w_new[None, :].to(exact), 1)
        p_row = p_wk + (head * triangle_room + r) * triangle_room + o_r
        tl.store(p_row, tl.where(o_r == r, 0.0, row), mask=o_r <= r)


@triton.jit
def attend_kernel(
    p_keys, p_values, p_block_decay, p_counts, p_new, p_queries, p_shifts, p_parts, p_tops,
    window, num_parts, num_queries, room,
    B: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BG: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (span, row and key head): attend to the blocks' keys of one span."""
    if OVERLAP:
        gdc_launch_dependents()
    i_s, i_bh = tl.program_id(0), tl.program_id(1)
    i_b = i_bh // H
    old, r = tl.load(p_counts + i_b), tl.load(p_counts + B + i_b)
    first = i_s * SPAN
    stop = tl.minimum(first + SPAN, old)
    if WINDOWED:
        first = tl.maximum(first, (tl.maximum(old + r + 1 - window, 0) // TILE) * TILE)
    if tl.load(p_new + i_b) == 0:
        return
    o_g, o_k, o_v, o_n = tl.arange(0, BG), tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, TILE)
    m_g, m_k, m_v = o_g < G, o_k < K, o_v < V
    head = i_bh.to(tl.int64)
    blocks = old // BLOCK
    top = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    o = tl.zeros((BG, BV), tl.float32)
    if OVERLAP:
        # The queries come from the kernel before.
        gdc_wait()
    for start in range(first, stop, TILE):
        # The block of a tile is at the first binary digit in which its number differs from the
        # number of tiles in blocks; as many blocks are newer as there are ones behind that digit.
        tile = start // BLOCK
        behind = blocks ^ tile
        for shift in tl.static_range(5):
            behind |= behind >> (1 << shift)
        i_path = count_ones(blocks & (behind >> 1))
        query = (head * num_queries + i_path) * G + o_g
        q = tl.load(
            p_queries + query[:, None] * K + o_k[None, :],
            mask=m_g[:, None] & m_k[None, :], other=0.0,
        )  # fmt: skip
        tokens = head * room + start + o_n
        keys = tl.load(p_keys + tokens[:, None] * K + o_k[None, :], mask=m_k[None, :], other=0.0)
        values = tl.load(
            p_values + tokens[:, None] * V + o_v[None, :], mask=m_v[None, :], other=0.0
        )
        logits = dot(cast_operand(q, PRECISION), cast_operand(tl.trans(keys), PRECISION), PRECISION)
        if GATED:
            along = (head * G + o_g) * room + start
            decay = tl.load(
                p_block_decay + along[:, None] + o_n[None, :], mask=m_g[:, None], other=0.0
            ).to(tl.float32)
            shifts = tl.load(p_shifts + query, mask=m_g, other=0.0)
            logits += decay * 1.4426950408889634 + shifts[:, None]
        if WINDOWED:
            far = old + r - (start + o_n) >= window
            logits = tl.where(far[None, :], float("-inf"), logits)
        new_top = tl.maximum(top, tl.max(logits, 1))
        # Where nothing is seen yet the top is −∞; 0 in its place leaves the weights zero.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - base[:, None])
        rescale = tl.exp2(top - base)
        total = total * rescale + tl.sum(weights, 1)
        o = o * rescale[:, None]
        o = dot_add(cast_operand(weights, PRECISION), cast_operand(values, PRECISION), o, PRECISION)
        top = new_top
    part = ((i_b * H + i_bh % H) * G + o_g).to(tl.int64) * num_parts + 1 + i_s
    tl.store(p_parts + part[:, None] * V + o_v[None, :], o, mask=m_g[:, None] & m_v[None, :])
    tl.store(p_tops + part, top, mask=m_g)
    tl.store(p_tops + tl.cast(B * H * G, tl.int64) * num_parts + part, total, mask=m_g)


@triton.jit
def finish_kernel(
    p_parts, p_tops, p_sinks, p_counts, p_new, p_o, num_parts,
    B: tl.constexpr, HQ: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr,
    SPAN: tl.constexpr, WITH_SINKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row and query head): join the parts of its softmax, in their order."""
    if OVERLAP:
        gdc_wait()
    row = tl.program_id(0)
    i_b, i_hq = row // HQ, row % HQ
    o_v, o_p = tl.arange(0, BV), tl.arange(0, PARTS)
    m_v = o_v < V
    if tl.load(p_new + i_b) == 0:
        tl.store(p_o + row.to(tl.int64) * V + o_v, tl.zeros((BV,), tl.float32), mask=m_v)
        return
    old = tl.load(p_counts + i_b)
    used = 1 + tl.cdiv(old, SPAN)
    part = row.to(tl.int64) * num_parts
    p_totals = p_tops + tl.cast(B * HQ, tl.int64) * num_parts
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
        sink = tl.load(p_sinks + i_hq).to(tl.float32) * 1.4426950408889634
        new_top = tl.maximum(top, sink)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.exp2(sink - new_top)
        o = o * rescale
    tl.store(p_o + row.to(tl.int64) * V + o_v, o / total, mask=m_v)
    if i_hq == 0:
        # All that read this count have run.
        tl.store(p_counts + B + i_b, tl.load(p_counts + B + i_b) + 1)
