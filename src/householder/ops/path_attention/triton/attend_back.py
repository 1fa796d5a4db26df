"""The gradients of the rectangles of `path_attention`: one kernel for queries, one for keys.

Both go down the tree. With Q_l of a right block's rows and K_l of the left block's, both at the
border between the two, P = exp(A − lse) and dA = P ⊙ (dO Vᵀ − δ):

    queries:  dQ ← dQ F_leftᵀ + dA K_l       keys:  dK ← dK F_right + dAᵀ Q_l,   dV += Pᵀ dO

A tile of rows keeps its dQ, or its dK and dV, in registers from the top of the tree to the bottom.
No sum is shared by two programs, so its terms always come in the same order. What dQ and dK are
before they pass a product is stored, for the gradient of that product (see `descend.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import cast_operand, dot, dot_add, load_tile, store_tile
from householder.ops.path_attention.triton.problem import (
    LOG2_E,
    PLACES,
    SIZES,
    block_slot,
    has_right,
    locate_program,
    locate_tile,
)


@triton.jit
def pass_product(
    b_d, p_f, p_d, o_rows, mine, TRANSPOSED: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradient d of the rows `mine` at `p_d`, and return it past the product at `p_f`.

    That is d F, or d Fᵀ if TRANSPOSED. Where BP < BK, that much of K is taken at a time, and d is
    read back from where it was stored.
    """
    store_tile(p_d, o_rows, mine, 0, b_d, K, BK)
    # What is moved is taken out of the accumulator before it goes in again: one tile, not two.
    o_k = tl.arange(0, BK)
    if BP == BK:
        moving = cast_operand(tl.where(mine[:, None], b_d, 0.0), PRECISION)
        b_d = tl.where(mine[:, None], 0.0, b_d)
        b_f = cast_operand(load_tile(p_f, o_k * K, o_k < K, 0, K, BK), PRECISION)
        if TRANSPOSED:
            b_f = tl.trans(b_f)
        return dot_add(moving, b_f, b_d, PRECISION)
    else:
        tl.debug_barrier()
        b_d = tl.where(mine[:, None], 0.0, b_d)
        for start in range(0, K, BP):
            o_p = start + tl.arange(0, BP)
            part = cast_operand(load_tile(p_d, o_rows, mine, start, K, BP), PRECISION)
            if TRANSPOSED:
                b_f = tl.trans(load_tile(p_f, o_k * K, o_k < K, start, K, BP))
            else:
                b_f = load_tile(p_f, o_p * K, o_p < K, 0, K, BK)
            b_d = dot_add(part, cast_operand(b_f, PRECISION), b_d, PRECISION)
        return b_d


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    q_levels, k_levels, v, do, lse, delta, decay, f, dq_levels, dq, sums,
    cu_seqlens, tile_sequence, first_tile, window, T, num_tiles, num_levels, H, first_query,
    v_b, v_h, do_b, do_h, v_t: tl.constexpr, do_t: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write dQ← of BM query rows of one head, and with gates the sums of their rows of dA."""
    HQ = H * GROUP
    per_row = (num_tiles if PACKED else tl.cdiv(T, 128)) * (128 // BM)
    sequences = num_tiles * (128 // BM) // per_row * HQ
    i_sequence, i_m = locate_program(tl.program_id(0), per_row, sequences, PLACES)
    i_hq = (i_sequence % HQ).to(tl.int64)
    i_m = (i_sequence // HQ + 1) * per_row - 1 - i_m
    batch, first, length, tile = locate_tile(
        i_m // (128 // BM), T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    token = i_m * BM - tile * 128
    chunk = token // 64
    # All of a chunk is written, zeros behind the sequence's end.
    if chunk * 64 >= length:
        return
    num_chunks = tl.cdiv(length, 64)
    i_h = i_hq // GROUP
    batch = tl.cast(batch, tl.int64)
    first = tl.cast(first, tl.int64)
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    row = i_m.to(tl.int64) * BM
    sequence = tl.cast(tile, tl.int64) * 128

    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_rows = o_m * K
    everywhere = o_n >= 0
    inside = token + o_m < length
    p_v = v + batch * v_b + first * v_t + i_h * v_h
    p_do = do + batch * do_b + (first + token) * do_t + i_hq * do_h
    p_f = f + i_h * (num_rows // 32) * (K * K)
    b_do = cast_operand(load_tile(p_do, o_m * do_t, inside, 0, V, BV), PRECISION)
    b_lse = tl.load(lse + i_hq * num_rows + row + o_m)
    b_delta = tl.load(delta + i_hq * num_rows + row + o_m)

    b_dq = tl.zeros((BM, BK), tl.float32)
    for down in range(num_levels):
        level = num_levels - 1 - down
        block = chunk >> level
        if BM == 128:
            # Of the tile's two chunks the second one is a right block at the first level.
            block = block | (level == 0).to(tl.int32)
        if ((block & 1) == 1) & ((block << level) < num_chunks):
            mine = ((chunk + o_m // 64) >> level) == block
            of_head = (level.to(tl.int64) * HQ + i_hq) * num_rows
            if block > 1:
                slot = block_slot(2 * tile, level, block - 1).to(tl.int64)
                b_dq = pass_product(
                    b_dq, p_f + slot * (K * K), dq_levels + (of_head + row) * K, o_rows, mine,
                    True, K, BK, BP, PRECISION,
                )  # fmt: skip
            b_q = load_tile(q_levels + (of_head + row) * K, o_rows, mine, 0, K, BK)
            b_q = cast_operand(b_q, PRECISION)
            b_top = tl.where(mine, b_lse, float("inf"))
            if GATED:
                b_decay = tl.load(decay + of_head + row + o_m, mask=mine, other=0.0)
                b_top -= b_decay * LOG2_E
            b_sum = tl.zeros((BM,), tl.float32)
            start = ((block - 1) << level) * 64
            stop = (block << level) * 64
            if WINDOWED:
                # The first key that a row of this tile sees.
                seen = tl.maximum(token, stop) + 1 - window
                start = tl.maximum(start, seen // BN * BN)
            if first_query is not None:
                # Rows that ask nothing have zeros as gradients, which are written.
                start = tl.where(token + BM <= first_query, stop, start)
            p_k = k_levels + ((level.to(tl.int64) * H + i_h) * num_rows + sequence) * K
            for key in range(start, stop, BN):
                at = tl.cast(key, tl.int64)
                b_k = load_tile(p_k + at * K, o_n * K, everywhere, 0, K, BK)
                b_k = cast_operand(b_k, PRECISION)
                b_v = load_tile(p_v + at * v_t, o_n * v_t, everywhere, 0, V, BV)
                b_v = cast_operand(b_v, PRECISION)
                # Both products are under way before the first is waited for.
                b_a = dot(b_q, tl.trans(b_k), PRECISION)
                b_dp = dot(b_do, tl.trans(b_v), PRECISION)
                b_a = b_a * LOG2_E - b_top[:, None]
                if GATED:
                    b_a += (tl.load(decay + of_head + sequence + at + o_n) * LOG2_E)[None, :]
                if WINDOWED:
                    apart = token - key + o_m[:, None] - o_n[None, :]
                    b_a = tl.where(apart < window, b_a, -float("inf"))
                b_da = tl.exp2(b_a) * (b_dp - b_delta[:, None])
                if GATED:
                    b_sum += tl.sum(b_da, 1)
                b_dq = dot_add(cast_operand(b_da, PRECISION), b_k, b_dq, PRECISION)
            if GATED:
                tl.store(sums + of_head + row + o_m, b_sum, mask=mine)
    store_tile(dq + (i_hq * num_rows + row) * K, o_rows, o_m >= 0, 0, b_dq, K, BK)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    q_levels, k_levels, v, do, lse, delta, decay, f, dk_levels, dk, dv, sums,
    cu_seqlens, tile_sequence, first_tile, window, T, num_tiles, num_levels, H, first_query,
    v_b, v_h, do_b, do_h, v_t: tl.constexpr, do_t: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, GATED: tl.constexpr, WINDOWED: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write dK→ and dV of BN keys of one head but for what their own chunk gives.

    The query heads that share the key head come one after the other. With gates the sums of the
    keys' columns of dA are written too.
    """
    HQ = H * GROUP
    per_row = (num_tiles if PACKED else tl.cdiv(T, 128)) * (128 // BN)
    sequences = num_tiles * (128 // BN) // per_row * H
    i_sequence, i_n = locate_program(tl.program_id(0), per_row, sequences, PLACES)
    i_h = (i_sequence % H).to(tl.int64)
    i_n += i_sequence // H * per_row
    batch, first, length, tile = locate_tile(
        i_n // (128 // BN), T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    token = i_n * BN - tile * 128
    chunk = token // 64
    # All of a chunk is written, zeros behind the sequence's end.
    if chunk * 64 >= length:
        return
    num_chunks = tl.cdiv(length, 64)
    batch = tl.cast(batch, tl.int64)
    first = tl.cast(first, tl.int64)
    num_rows = tl.cast(num_tiles, tl.int64) * 128
    row = i_n.to(tl.int64) * BN
    sequence = tl.cast(tile, tl.int64) * 128

    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_keys = o_n * K
    everywhere = o_m >= 0
    p_v = v + batch * v_b + (first + token) * v_t + i_h * v_h
    p_f = f + i_h * (num_rows // 32) * (K * K)
    b_v = cast_operand(load_tile(p_v, o_n * v_t, token + o_n < length, 0, V, BV), PRECISION)

    of_tile = i_h * num_rows + row
    b_dk = tl.zeros((BN, BK), tl.float32)
    b_dv = tl.zeros((BN, BV), tl.float32)
    for down in range(num_levels):
        level = num_levels - 1 - down
        block = chunk >> level
        if ((block & 1) == 0) & has_right(chunk, level, num_chunks):
            # At the first level only the first chunk of a tile is a left block. The second one is
            # ready then, and what is still added to it is not looked at.
            mine = ((chunk + o_n // 64) >> level) == block
            if BN == 128:  # noqa: SIM102 - a constant of the kernel, and a number that it reads
                if level == 0:
                    store_tile(dk + of_tile * K, o_keys, o_n >= 64, 0, b_dk, K, BK)
                    store_tile(dv + of_tile * V, o_n * V, o_n >= 64, 0, b_dv, V, BV)
            of_level = level.to(tl.int64)
            of_head = (of_level * H + i_h) * num_rows + row
            if ((chunk ^ (num_chunks - 1)) >> (level + 1)) != 0:
                slot = block_slot(2 * tile, level, block + 1).to(tl.int64)
                b_dk = pass_product(
                    b_dk, p_f + slot * (K * K), dk_levels + of_head * K, o_keys, mine, False,
                    K, BK, BP, PRECISION,
                )  # fmt: skip
            b_k = load_tile(k_levels + of_head * K, o_keys, mine, 0, K, BK)
            b_k = cast_operand(b_k, PRECISION)
            start = ((block + 1) << level) * 64
            stop = tl.minimum(((block + 2) << level) * 64, length)
            if WINDOWED:
                # Behind the last row that sees a key of this tile.
                stop = tl.minimum(stop, tl.minimum(token + BN, start) - 1 + window)
            if first_query is not None:
                start = tl.maximum(start, first_query // 64 * 64)
            for i in range(GROUP):
                i_hq = i_h * GROUP + i
                of_rows = (of_level * HQ + i_hq) * num_rows + sequence
                p_q = q_levels + of_rows * K
                p_do = do + batch * do_b + first * do_t + i_hq * do_h
                p_lse = lse + i_hq * num_rows + sequence
                p_delta = delta + i_hq * num_rows + sequence
                b_decay = tl.zeros((BN,), tl.float32)
                if GATED:
                    b_decay = tl.load(decay + of_rows + token + o_n, mask=mine, other=0.0) * LOG2_E
                b_sum = tl.zeros((BN,), tl.float32)
                for query in range(start, stop, BM):
                    at = tl.cast(query, tl.int64)
                    b_q = load_tile(p_q + at * K, o_m * K, everywhere, 0, K, BK)
                    b_q = cast_operand(b_q, PRECISION)
                    b_do = load_tile(p_do + at * do_t, o_m * do_t, query + o_m < length, 0, V, BV)
                    b_do = cast_operand(b_do, PRECISION)
                    b_top = tl.load(p_lse + at + o_m)
                    if GATED:
                        b_top -= tl.load(decay + of_rows + at + o_m) * LOG2_E
                    b_a = dot(b_k, tl.trans(b_q), PRECISION)
                    b_dp = dot(b_v, tl.trans(b_do), PRECISION)
                    b_a = b_a * LOG2_E - b_top[None, :]
                    if GATED:
                        b_a += b_decay[:, None]
                    if WINDOWED:
                        apart = query - token + o_m[None, :] - o_n[:, None]
                        b_a = tl.where(apart < window, b_a, -float("inf"))
                    b_p = tl.exp2(b_a)
                    b_dv = dot_add(cast_operand(b_p, PRECISION), b_do, b_dv, PRECISION)
                    b_da = b_p * (b_dp - tl.load(p_delta + at + o_m)[None, :])
                    if GATED:
                        b_sum += tl.sum(b_da, 1)
                    b_dk = dot_add(cast_operand(b_da, PRECISION), b_q, b_dk, PRECISION)
                if GATED:
                    tl.store(sums + of_rows + token + o_n, b_sum, mask=mine)
    # All of a tile of one chunk, or the first of two.
    ready = BN
    if has_right(chunk, 0, num_chunks):
        ready = 64
    store_tile(dk + of_tile * K, o_keys, o_n < ready, 0, b_dk, K, BK)
    store_tile(dv + of_tile * V, o_n * V, o_n < ready, 0, b_dv, V, BV)
