"""Queries of a decoded step meet keys, in parts of a softmax that are joined afterwards."""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import cast_operand, dot_add
from householder.ops.path_attention.cache.triton.loads import load_later
from householder.ops.path_attention.cache.triton.products import (
    dot_query,
    dot_whole,
    pack,
    split_query,
)
from householder.ops.path_attention.cache.triton.signals import wait_for


@triton.jit
def weigh(weights, values, acc, PACKED: tl.constexpr, PRECISION: tl.constexpr):
    """Return `acc + weights values`, with weights in float32 and values as they lie in the cache.

    16-bit values are not to cost the weights their digits: their two halves are multiplied one
    after the other, while the products wait for the cache to be read anyway, or PACKED for rows of
    their own of `acc`, which `fold` is to add up at the end.
    """
    if PACKED:
        high = weights.to(values.dtype)
        low = (weights - high.to(tl.float32)).to(values.dtype)
        return tl.dot(pack(high, low), values, acc)
    elif PRECISION == "bf16":
        high = weights.to(tl.bfloat16)
        low = (weights - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, values, tl.dot(high, values, acc))
    else:
        weights, values = cast_operand(weights, PRECISION), cast_operand(values, PRECISION)
        return dot_add(weights, values, acc, PRECISION)


@triton.jit
def add_tile(logits, values, top, total, o, PACKED: tl.constexpr, PRECISION: tl.constexpr):
    """Add a tile of keys to a softmax: its largest logit, its sum and its weighted values."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    # Where nothing is seen yet the top is −∞; 0 in its place leaves the weights zero.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    rescale = tl.exp2(top - base)
    total = total * rescale + tl.sum(weights, 1)
    of_o = rescale
    if PACKED:
        of_o = tl.reshape(tl.broadcast_to(rescale[None, :], (2, 8)), (16,))
    o = weigh(weights, values, o * of_o[:, None], PACKED, PRECISION)
    return new_top, total, o


@triton.jit
def load_along(p_along, o_l, m_row, r):
    """Load what queries have along recent reflectors, zero from the `r`-th on."""
    return tl.load(p_along + o_l[None, :], mask=m_row[:, None] & (o_l < r)[None, :], other=0.0)


@triton.jit
def attend_recent(
    top, total, o, p_keys, p_values, p_ty, p_query, p_along, p_wk, p_decays, window,
    i_first, o_g, i_n, m_g, n, r, triangle_room,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BC: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
    HALF: tl.constexpr, VALUE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add recent tokens, new ones included, to a softmax."""
    o_n, o_c, o_k, o_v = tl.arange(0, 16), tl.arange(0, BC), tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    q = tl.load(p_query + o_k[None, :], mask=m_g[:, None] & m_k[None, :], other=0.0)
    high, low = split_query(q, PACKED, HALF)
    # In products there are sixteen rows at least; those that are packed in no others are zero.
    ROWS: tl.constexpr = 16 if PACKED else o_g.shape[0]
    o_row = i_first + tl.arange(0, ROWS)
    m_row = (o_row // G < n) & (tl.arange(0, ROWS) < o_g.shape[0])
    p_along += o_row[:, None] * triangle_room
    m_gn = m_row[:, None] & (o_n[None, :] <= (o_row // G)[:, None]) & (o_n < n)[None, :]
    along_new = tl.load(p_along + r + o_n[None, :], mask=m_gn, other=0.0)
    for start in range(0, r + n, BC):
        # All loads first: what follows waits for them once.
        o_j = start + o_c
        m_j = o_j < r + n
        keys = tl.load(
            p_keys + o_j[:, None] * K + o_k[None, :], mask=m_j[:, None] & m_k[None, :], other=0.0
        )
        wk = tl.load(
            p_wk + o_n[:, None] * triangle_room + o_j[None, :],
            mask=(o_n < n)[:, None] & (o_j[None, :] < r + o_n[:, None]), other=0.0,
        )  # fmt: skip
        along = load_along(p_along, o_j, m_row, r)
        ty = load_later(p_ty, 0, o_j, o_j, r, triangle_room).to(tl.float32)
        values = tl.load(
            p_values + o_j[:, None] * V + o_v[None, :], mask=m_j[:, None] & m_v[None, :], other=0.0
        )
        # What the reflectors behind a key take from it, those of new tokens first.
        taken = dot_whole(along_new, wk, HALF) + dot_whole(along, ty, HALF)
        for later in range(start + BC, r, BC):
            o_l = later + o_c
            more = load_later(p_ty, 0, o_l, o_j, r, triangle_room).to(tl.float32)
            taken += dot_whole(load_along(p_along, o_l, m_row, r), more, HALF)
        logits = dot_query(high, low, keys, taken, PACKED, HALF)
        after = r + i_n[:, None] - o_j[None, :]
        if GATED:
            decay = tl.load(
                p_decays + o_g[:, None] * triangle_room + o_j[None, :],
                mask=m_g[:, None] & (after >= 0), other=0.0,
            )  # fmt: skip
            logits += decay * 1.4426950408889634
        seen = after >= 0
        if WINDOWED:
            seen = seen & (after < window)
        logits = tl.where(seen, logits, float("-inf"))
        top, total, o = add_tile(logits, values, top, total, o, PACKED, VALUE_PRECISION)
    return top, total, o


@triton.jit
def load_shift(p_shifts, p_path_decay, is_behind, o_g, m_g, G: tl.constexpr, GATED: tl.constexpr):
    """Load the log gates between a block's end and the queries."""
    shift = tl.zeros((o_g.shape[0],), tl.float32)
    if GATED:
        shift = tl.load(p_shifts + o_g, mask=m_g, other=0.0)
        if is_behind:
            shift += tl.load(p_path_decay + o_g % G, mask=m_g, other=0.0).to(tl.float32)
        shift *= 1.4426950408889634
    return shift


@triton.jit
def attend_span(
    top, total, o, p_keys, p_values, p_block_decay, p_path_decay, is_behind, p_query, p_shifts,
    p_ready, num_awaited, before, begin, size, window, o_g, i_n, m_g, room,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TILE: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
    HALF: tl.constexpr, VALUE_PRECISION: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add a span of one block to a softmax, once its queries are there.

    `before` is how far behind its first token the first query is; `is_behind` that the block is not
    the newest, and that there are log gates on the way to it.
    """
    o_k, o_v, o_t = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, TILE)
    m_k, m_v = o_k < K, o_v < V
    high, low = split_query(tl.zeros((o_g.shape[0], BK), tl.float32), PACKED, HALF)
    shift = tl.zeros((o_g.shape[0],), tl.float32)
    for start in tl.range(begin, size, TILE, num_stages=STAGES):
        o_j = start + o_t
        keys = tl.load(p_keys + o_j[:, None] * K + o_k[None, :], mask=m_k[None, :], other=0.0)
        values = tl.load(p_values + o_j[:, None] * V + o_v[None, :], mask=m_v[None, :], other=0.0)
        if start == begin:
            # The first keys are on their way by now.
            wait_for(p_ready, num_awaited, EARLY)
            q = tl.load(p_query + o_k[None, :], mask=m_g[:, None] & m_k[None, :], other=0.0)
            high, low = split_query(q, PACKED, HALF)
            shift = load_shift(p_shifts, p_path_decay, is_behind, o_g, m_g, G, GATED)
        logits = dot_query(high, low, keys, 0.0, PACKED, HALF)
        if GATED:
            p_decay = p_block_decay + (o_g % G)[:, None] * room
            decay = tl.load(p_decay + o_j[None, :], mask=m_g[:, None], other=0.0).to(tl.float32)
            logits += decay * 1.4426950408889634 + shift[:, None]
        if WINDOWED:
            far = before + i_n[:, None] - o_j[None, :] >= window
            logits = tl.where(far, float("-inf"), logits)
        top, total, o = add_tile(logits, values, top, total, o, PACKED, VALUE_PRECISION)
    return top, total, o


@triton.jit
def attend_span_by_sums(
    p_keys, p_values, p_block_decay, p_path_decay, is_behind, p_query, p_shift, p_ready,
    num_awaited, before, begin, size, window, p_part, p_top, p_total,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TILE: tl.constexpr, SIDE: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr,
    EARLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Let one query meet a span of one block, once it is there.

    SIDE tokens side by side, as many as the threads read at once, have a softmax each: in the loop
    no thread needs what others have but for sums over a key. They are joined behind it.
    """
    o_i, o_j = tl.arange(0, SIDE), tl.arange(0, TILE // SIDE)
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = (o_k < K)[None, None, :], (o_v < V)[None, None, :]
    top = tl.full((SIDE,), float("-inf"), tl.float32)
    total = tl.zeros((SIDE,), tl.float32)
    o = tl.zeros((SIDE, BV), tl.float32)
    q = tl.zeros((BK,), tl.float32)
    shift = 0.0
    for start in tl.range(begin, size, TILE, num_stages=STAGES):
        token = start + o_i[:, None] + SIDE * o_j[None, :]
        keys = tl.load(p_keys + token[:, :, None] * K + o_k[None, None, :], mask=m_k, other=0.0)
        values = tl.load(p_values + token[:, :, None] * V + o_v[None, None, :], mask=m_v, other=0.0)
        if start == begin:
            # The first keys are on their way by now.
            wait_for(p_ready, num_awaited, EARLY)
            q = tl.load(p_query + o_k, mask=o_k < K, other=0.0)
            if GATED:
                shift = tl.load(p_shift)
                if is_behind:
                    shift += tl.load(p_path_decay).to(tl.float32)
                shift *= 1.4426950408889634
        logits = tl.sum(keys.to(tl.float32) * q[None, None, :], 2)
        if GATED:
            decay = tl.load(p_block_decay + token).to(tl.float32)
            logits += decay * 1.4426950408889634 + shift
        if WINDOWED:
            logits = tl.where(before - token >= window, float("-inf"), logits)
        new_top = tl.maximum(top, tl.max(logits, 1))
        # Where nothing is seen yet the top is −∞; 0 in its place leaves the weights zero.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, rescale = tl.exp2(logits - base[:, None]), tl.exp2(top - base)
        top = new_top
        total = total * rescale + tl.sum(weights, 1)
        o = o * rescale[:, None] + tl.sum(values.to(tl.float32) * weights[:, :, None], 1)
    highest = tl.max(top, 0)
    shares = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    tl.store(p_part + o_v, tl.sum(o * shares[:, None], 0), mask=o_v < V)
    tl.store(p_top, highest)
    tl.store(p_total, tl.sum(total * shares, 0))
