"""`delta_product` backward: one kernel walks each sequence from its end, one takes the chunks.

On Hopper, for bfloat16 and K and V up to 128, one kernel does both: see `hopper_sweep.py`.

The walk carries dS, the gradient of the state, and finds D, the gradient of each chunk's residual
diag(β) (V − …) before the factor β:

    dU = Aᵀ dO + diag(E_C / E) K dS'       D = Tᵀ dU
    dS = E_C dS' + scale · (diag(E) Q)ᵀ dO − (diag(β E) K)ᵀ D

Everything else follows chunk by chunk, with P = Γ ⊙ strict_lower(D Uᵀ) and the gradient of A,
dA = scale · Γ ⊙ lower(dO Uᵀ):

    dV = diag(β) D      dβ = rowsum(D ⊙ U) / β      dQ = scale · diag(E) dO Sᵀ + dA K
    dK = diag(E_C / E) U dS'ᵀ + dAᵀ Q − diag(β E) D Sᵀ − diag(β) P K − Pᵀ diag(β) K

U_r = β_r · (the residual that row r writes), and D is the gradient of U_r: hence dβ. So that the
residual is known where β is zero, a zero counts as 2⁻⁴⁰ throughout.

A log gate scales all that crosses its token, and dg is the sum of these parts of the loss: what
reads S at or after the token, what an earlier row of the chunk gives to a read at or after it, and
what S and the earlier rows give to the next chunk.

The walk leaves D where dV will be; the second kernel reads it there and scales it by β in place.
Products are arranged so that no result has to be transposed: where Pᵀ is needed as well as P, it
is a product of its own.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import (
    Launcher,
    addressable,
    cast_operand,
    compiled_together,
    dot,
    dot_add,
    dot_precision,
    is_hopper,
    load_tile,
    load_tile_t,
    on_its_device,
    store_tile,
    store_tile_t,
)
from householder.ops.delta_product.triton import config
from householder.ops.delta_product.triton.chunks import (
    BETA,
    FROM_START,
    TO_END,
    TOKEN_FROM_START,
    Gradients,
    Problem,
    Saved,
    attention,
    kind_of_call,
    locate_chunk,
    locate_sequence,
    make_problem,
    pair_decay,
    row_offsets,
    strides,
)
from householder.ops.delta_product.triton.segments import (
    Segments,
    make_segments,
    of_sequences,
    segment_ends,
)


@triton.jit
def walk_back_kernel(
    do, q, k, table, ut, dfinal, dinitial, dstates, d, cu_seqlens, first_chunk, scale, T,
    do_b, do_h, q_b, q_h, k_b, k_h, HV: tl.constexpr, do_t: tl.constexpr, q_t: tl.constexpr,
    k_t: tl.constexpr, k_n: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, SEGMENT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry columns `[BV]` of dS from a sequence's end to its start; write each chunk's dS', D."""
    num_v: tl.constexpr = (V + BV - 1) // BV
    i_v = (tl.program_id(0) % num_v) * BV
    i_sh = (tl.program_id(0) // num_v).to(tl.int64)
    i_s = i_sh // HV
    i_h = i_sh % HV
    batch, first, length, chunk = locate_sequence(
        i_s, T, cu_seqlens, first_chunk, C, PACKED, SEGMENT
    )

    o_r = tl.arange(0, R)
    o_c = tl.arange(0, BC)
    o_k = tl.arange(0, BK)
    o_v = i_v + tl.arange(0, BV)
    everywhere = o_r >= 0
    m_v = o_v < V
    p_q = q + batch * q_b + first * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + first * k_t + (i_h // GROUP) * k_h
    p_do = do + batch * do_b + first * do_t + i_h * do_h
    p_d = d + ((batch * T + first) * N * HV + i_h) * V
    o_krows = row_offsets(R, N, k_t, k_n)

    b_ds = tl.zeros((BV, BK), tl.float32)
    if dfinal is not None:
        b_ds += load_tile_t(dfinal + i_sh * K * V, o_k * V, o_k < K, i_v, V, BV).to(tl.float32)

    num_chunks = tl.cdiv(length, C)
    for step in range(num_chunks):
        i = num_chunks - 1 - step
        start = tl.cast(i * C, tl.int64)
        n = tl.minimum(length - i * C, C)
        m_r = o_r < n * N
        m_c = o_c < n
        i_ch = (chunk + i) * HV + i_h

        b_k = load_tile(p_k + start * k_t, o_krows, m_r, 0, K, BK)
        b_k = cast_operand(b_k, PRECISION)
        b_do = load_tile_t(p_do + start * do_t, o_c * do_t, m_c, i_v, V, BV)
        b_do = cast_operand(b_do, PRECISION)
        b_ut = load_tile(ut + i_ch * (R * R), o_r * R, everywhere, 0, R, R)
        p_table = table + i_ch * (6 * R if GATED else R)
        b_beta = tl.load(p_table + BETA * R + o_r)
        b_q = load_tile(p_q + start * q_t, o_c * q_t, m_c, 0, K, BK)
        b_q = cast_operand(b_q, PRECISION)

        b_dsh = cast_operand(b_ds, PRECISION)
        store_tile(dstates + i_ch * K * V, o_v * K, m_v, 0, b_dsh, K, BK)
        b_a = attention(b_k, b_q, p_table, scale, N, C, R, BC, GATED, PRECISION)
        b_a = cast_operand(b_a, PRECISION)
        b_du = dot(b_dsh, tl.trans(b_k), PRECISION)
        b_doq = b_do.to(tl.float32) * scale
        if GATED:
            b_du *= tl.load(p_table + TO_END * R + o_r)[None, :]
            b_doq *= tl.load(p_table + TOKEN_FROM_START * R + o_c)[None, :]
            b_ds *= tl.load(p_table + FROM_START * R + R - 1)
            b_beta *= tl.load(p_table + FROM_START * R + o_r)
        b_du = dot_add(b_do, tl.trans(b_a), b_du, PRECISION)
        b_d = dot(cast_operand(b_du, PRECISION), b_ut, PRECISION)
        store_tile_t(p_d + start * N * HV * V, o_r * HV * V, m_r, i_v, b_d, V, BV)
        b_ds = dot_add(cast_operand(b_doq, PRECISION), b_q, b_ds, PRECISION)
        b_ds = dot_add(cast_operand(b_d * (-b_beta)[None, :], PRECISION), b_k, b_ds, PRECISION)

    if dinitial is not None:
        store_tile_t(dinitial + i_sh * K * V, o_k * V, o_k < K, i_v, b_ds, V, BV)


@triton.jit
def crossing_to_rows(
    p_k, offsets, valid, b_p, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return what row s gives to the read of row r, summed over r from each row on, s before it."""
    o_r = tl.arange(0, R)
    token = o_r // N
    kk = tl.zeros((R, R), tl.float32)
    for i_k in range((K + BK - 1) // BK):
        k_tile = cast_operand(load_tile(p_k, offsets, valid, i_k * BK, K, BK), PRECISION)
        kk = dot_add(k_tile, tl.trans(k_tile), kk, PRECISION)
    kk = cast_operand(kk * b_p, PRECISION)
    from_here_on = tl.where(o_r[:, None] <= o_r[None, :], 1.0, 0.0)
    kk = dot(cast_operand(from_here_on, PRECISION), kk, PRECISION)
    return tl.sum(tl.where(token[None, :] < token[:, None], kk, 0.0), axis=1)


@triton.jit
def crossing_to_queries(
    p_k, offsets, valid, p_q, q_offsets, q_valid, b_at, N: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the same for what it gives to outputs, by tokens."""
    o_c = tl.arange(0, BC)
    token = tl.arange(0, R) // N
    kq = tl.zeros((R, BC), tl.float32)
    for i_k in range((K + BK - 1) // BK):
        k_tile = cast_operand(load_tile(p_k, offsets, valid, i_k * BK, K, BK), PRECISION)
        q_tile = cast_operand(load_tile(p_q, q_offsets, q_valid, i_k * BK, K, BK), PRECISION)
        kq = dot_add(k_tile, tl.trans(q_tile), kq, PRECISION)
    kq = cast_operand(kq * b_at, PRECISION)
    from_here_on = tl.where(o_c[:, None] >= o_c[None, :], 1.0, 0.0)
    crossing = dot(kq, cast_operand(from_here_on, PRECISION), PRECISION)
    return tl.sum(tl.where(token[:, None] < o_c[None, :], crossing, 0.0), axis=0)


@triton.jit
def gradient_kernel(
    do, q, k, table, states, dstates, u, dq, dk, dv, dbeta, dg,
    cu_seqlens, chunk_sequence, first_chunk, scale, T, do_b, do_h, q_b, q_h, k_b, k_h,
    HV: tl.constexpr, do_t: tl.constexpr, q_t: tl.constexpr, k_t: tl.constexpr, k_n: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write all gradients of one chunk and value head; dq and dk have a head per value head."""
    num_k: tl.constexpr = (K + BK - 1) // BK
    num_v: tl.constexpr = (V + BV - 1) // BV
    # Heads run side by side: together they read whole rows of memory.
    i_chunk = (tl.program_id(0) // HV).to(tl.int64)
    i_h = (tl.program_id(0) % HV).to(tl.int64)
    batch, start, n = locate_chunk(i_chunk, T, cu_seqlens, chunk_sequence, first_chunk, C, PACKED)
    if n <= 0:
        return
    o_r = tl.arange(0, R)
    o_c = tl.arange(0, BC)
    token = o_r // N
    m_r = o_r < n * N
    m_c = o_c < n
    i_ch = i_chunk * HV + i_h
    first_row = batch * T + start  # of tensors that are contiguous

    p_q = q + batch * q_b + start * q_t + (i_h // GROUP) * q_h
    p_k = k + batch * k_b + start * k_t + (i_h // GROUP) * k_h
    p_do = do + batch * do_b + start * do_t + i_h * do_h
    p_dq = dq + (first_row * HV + i_h) * K
    p_dk = dk + (first_row * N * HV + i_h) * K
    p_u = u + (first_row * N * HV + i_h) * V
    p_dv = dv + (first_row * N * HV + i_h) * V
    o_krows = row_offsets(R, N, k_t, k_n)
    p_table = table + i_ch * (6 * R if GATED else R)
    b_beta = tl.load(p_table + BETA * R + o_r)

    below = o_r[:, None] > o_r[None, :]
    above = o_r[:, None] < o_r[None, :]
    seen = token[:, None] <= o_c[None, :]
    # A query's gates are those of its token's rows; past the chunk's end there is no query.
    query = tl.minimum(o_c, C - 1) * N

    # Where all of V is one block, D, U and dO are loaded once and stay; dV replaces D at once.
    b_d = cast_operand(load_tile(p_dv, o_r * HV * V, m_r, 0, V, BV), PRECISION)
    b_u = load_tile(p_u, o_r * HV * V, m_r, 0, V, BV)
    b_do = cast_operand(load_tile(p_do, o_c * do_t, m_c, 0, V, BV), PRECISION)
    if num_v == 1:
        b_dv = b_d.to(tl.float32) * b_beta[:, None]
        store_tile(p_dv, o_r * HV * V, m_r, 0, b_dv, V, BV)

    # The first tiles of what follows are on their way while the products of pairs are made. Each
    # of these is finished and packed before the next begins, to hold few registers.
    o_v = tl.arange(0, BV)
    b_s = load_tile(states + i_ch * K * V, o_v * K, o_v < V, 0, K, BK)
    b_k = load_tile(p_k, o_krows, m_r, 0, K, BK)
    b_p = tl.zeros((R, R), tl.float32)
    for i in range(num_v):
        if num_v > 1:
            b_d = cast_operand(load_tile(p_dv, o_r * HV * V, m_r, i * BV, V, BV), PRECISION)
            b_u = load_tile(p_u, o_r * HV * V, m_r, i * BV, V, BV)
        b_p = dot_add(b_d, tl.trans(b_u), b_p, PRECISION)
    # U_r = β_r (the residual that row r writes), of which β's gradient is the product with D.
    b_dbeta = tl.sum(tl.where(o_r[:, None] == o_r[None, :], b_p, 0.0), axis=1) / b_beta
    p_dbeta = dbeta + first_row * N * HV + i_h
    tl.store(p_dbeta + o_r * HV, b_dbeta.to(dbeta.dtype.element_ty), mask=m_r)
    b_p *= -b_beta[:, None]
    if GATED:
        b_p *= pair_decay(p_table, o_r[:, None], o_r[None, :], below, R)
    b_p = tl.where(below, b_p, 0.0)
    b_dg = tl.zeros((BC,), tl.float32)
    if GATED:
        crossing = crossing_to_rows(p_k, o_krows, m_r, b_p, N, K, R, PRECISION, BK)
        b_dg += tl.sum(tl.where(o_c[:, None] * N == o_r[None, :], crossing[None, :], 0.0), axis=1)
    b_p = cast_operand(b_p, PRECISION)

    b_pt = tl.zeros((R, R), tl.float32)
    for i in range(num_v):
        if num_v > 1:
            b_d = cast_operand(load_tile(p_dv, o_r * HV * V, m_r, i * BV, V, BV), PRECISION)
            b_u = load_tile(p_u, o_r * HV * V, m_r, i * BV, V, BV)
        b_pt = dot_add(b_u, tl.trans(b_d), b_pt, PRECISION)
    b_pt *= b_beta[None, :]
    if GATED:
        b_pt *= pair_decay(p_table, o_r[None, :], o_r[:, None], above, R)
    b_pt = cast_operand(tl.where(above, -b_pt, 0.0), PRECISION)

    b_at = tl.zeros((R, BC), tl.float32)
    for i in range(num_v):
        if num_v > 1:
            b_do = cast_operand(load_tile(p_do, o_c * do_t, m_c, i * BV, V, BV), PRECISION)
            b_u = load_tile(p_u, o_r * HV * V, m_r, i * BV, V, BV)
        b_at = dot_add(b_u, tl.trans(b_do), b_at, PRECISION)
    if GATED:
        b_at *= scale * pair_decay(p_table, query[None, :], o_r[:, None], seen, R)
        b_dg += crossing_to_queries(
            p_k, o_krows, m_r, p_q, o_c * q_t, m_c, b_at, N, K, R, BC, PRECISION, BK
        )
    else:
        b_at *= scale
    b_at = cast_operand(tl.where(seen, b_at, 0.0), PRECISION)

    b_kept = tl.zeros((BV,), tl.float32)  # what S gives to the next chunk
    b_written = tl.zeros((R,), tl.float32)  # what rows give to it
    b_read = tl.zeros((R,), tl.float32)  # what S gives to rows
    b_asked = tl.zeros((BC,), tl.float32)  # what S gives to outputs
    for i_k in range(num_k):
        if num_k > 1:
            b_s = load_tile(states + i_ch * K * V, o_v * K, o_v < V, i_k * BK, K, BK)
            b_k = load_tile(p_k, o_krows, m_r, i_k * BK, K, BK)
        b_ds = load_tile(dstates + i_ch * K * V, o_v * K, o_v < V, i_k * BK, K, BK)
        b_q = cast_operand(load_tile(p_q, o_c * q_t, m_c, i_k * BK, K, BK), PRECISION)
        k_rows = b_k.to(tl.float32)
        b_kh = cast_operand(b_k, PRECISION)

        # Queries, and what the rows read: both from the state S.
        b_dk = tl.zeros((R, BK), tl.float32)
        b_dq = tl.zeros((BK, BC), tl.float32)
        for i in range(num_v):
            if num_v > 1:
                o_vi = i * BV + o_v
                b_d = cast_operand(load_tile(p_dv, o_r * HV * V, m_r, i * BV, V, BV), PRECISION)
                b_do = cast_operand(load_tile(p_do, o_c * do_t, m_c, i * BV, V, BV), PRECISION)
                b_s = load_tile(states + i_ch * K * V, o_vi * K, o_vi < V, i_k * BK, K, BK)
                b_ds = load_tile(dstates + i_ch * K * V, o_vi * K, o_vi < V, i_k * BK, K, BK)
            if GATED:
                b_kept += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)
            b_dk = dot_add(b_d, b_s, b_dk, PRECISION)
            b_dq = dot_add(tl.trans(b_s), tl.trans(b_do), b_dq, PRECISION)
        b_dq *= scale
        b_dk *= -b_beta[:, None]
        if GATED:
            b_dk *= tl.load(p_table + FROM_START * R + o_r)[:, None]
            b_read += tl.sum(b_dk * k_rows, axis=1)
            b_dq *= tl.load(p_table + TOKEN_FROM_START * R + o_c)[None, :]
            q_columns = load_tile_t(p_q, o_c * q_t, m_c, i_k * BK, K, BK).to(tl.float32)
            b_asked += tl.sum(q_columns * b_dq, axis=0)
        b_dq = dot_add(tl.trans(b_kh), b_at, b_dq, PRECISION)
        store_tile_t(p_dq, o_c * HV * K, m_c, i_k * BK, b_dq, K, BK)

        # What the rows write: into the next chunk's state, into later rows, into outputs.
        write = b_dk
        if GATED:
            write = tl.zeros((R, BK), tl.float32)
        for i in range(num_v):
            if num_v > 1:
                o_vi = i * BV + o_v
                b_u = load_tile(p_u, o_r * HV * V, m_r, i * BV, V, BV)
                b_ds = load_tile(dstates + i_ch * K * V, o_vi * K, o_vi < V, i_k * BK, K, BK)
            write = dot_add(b_u, b_ds, write, PRECISION)
        if GATED:
            write *= tl.load(p_table + TO_END * R + o_r)[:, None]
            b_written += tl.sum(write * k_rows, axis=1)
            write += b_dk
        b_dk = dot_add(b_p, b_kh, write, PRECISION)
        b_dk = dot_add(b_pt, b_kh, b_dk, PRECISION)
        b_dk = dot_add(b_at, b_q, b_dk, PRECISION)
        store_tile(p_dk, o_r * HV * K, m_r, i_k * BK, b_dk, K, BK)

    if GATED:
        at_or_after = token[None, :] >= o_c[:, None]
        b_dg += tl.sum(tl.where(at_or_after, b_read[None, :], b_written[None, :]), axis=1)
        at_or_after = o_c[None, :] >= o_c[:, None]
        b_dg += tl.sum(tl.where(at_or_after, b_asked[None, :], 0.0), axis=1)
        b_dg += tl.load(p_table + FROM_START * R + R - 1) * tl.sum(b_kept, axis=0)
        p_dg = dg + first_row * HV + i_h + o_c * HV
        tl.store(p_dg, b_dg.to(dg.dtype.element_ty), mask=m_c)
    if num_v > 1:
        # D has been read for the last time by every thread: what is there becomes dV.
        tl.debug_barrier()
        for i in range(num_v):
            d_rows = load_tile(p_dv, o_r * HV * V, m_r, i * BV, V, BV).to(tl.float32)
            store_tile(p_dv, o_r * HV * V, m_r, i * BV, d_rows * b_beta[:, None], V, BV)


def sum_groups(x: Tensor, H: int, dtype: torch.dtype) -> Tensor:
    """Sum gradients `[…, HV, K]` over the value heads of each key head, in a fixed order."""
    groups = x.unflatten(-2, (H, -1)).unbind(-2)
    total = groups[0]
    for part in groups[1:]:
        total = total + part
    return total.to(dtype)


def sweep(
    p: Problem,
    segments: Segments,
    do: Tensor,
    scale: float,
    saved: Saved,
    dfinal: Tensor | None,
    dinitial: Tensor | None,
    out: Gradients,
) -> None:
    """Run both kernels: the gradients are written to `dinitial` and `out`."""
    dstates = torch.empty_like(saved.states)
    key = segments.chunks, scale, do.stride(), dfinal is None, dinitial is None
    if p.num_sequences:
        launch = p.plan.launcher(
            ("walk back", *key), lambda: _walk_launcher(p, segments, do, scale)
        )
        launch(
            do, p.q, p.k, saved.table, saved.ut, dfinal, dinitial, dstates, out.v,
            segments.bounds, segments.first_chunk,
        )  # fmt: skip
    if p.num_chunks:
        launch = p.plan.launcher(("gradient", *key), lambda: _gradient_launcher(p, do, scale))
        launch(
            do, p.q, p.k, saved.table, saved.states, dstates, saved.u, *out, *p.packing
        )  # fmt: skip


def _tiles(p: Problem, do: Tensor, scale: float) -> dict[str, Any]:
    """Return what the launches of both kernels share."""
    return {
        "scale": scale, "T": p.v.shape[1], "HV": p.heads, **p.constants,
        **strides("do", do), **strides("q", p.q), **strides("k", p.k),
    }  # fmt: skip


def _walk_launcher(p: Problem, segments: Segments, do: Tensor, scale: float) -> Launcher:
    K, V = p.sizes["K"], p.sizes["V"]
    launch = config.walk_launch(K, V, p.precision)
    return Launcher(
        walk_back_kernel, (segments.number * p.heads * -(-V // launch.block),),
        **_tiles(p, do, scale), SEGMENT=segments.chunks, BK=config.key_block(K, p.precision),
        BV=launch.block, **launch.options,
    )  # fmt: skip


def _gradient_launcher(p: Problem, do: Tensor, scale: float) -> Launcher:
    K, V = p.sizes["K"], p.sizes["V"]
    launch = config.gradient_launch(K, V, p.precision)
    return Launcher(
        gradient_kernel, (p.num_chunks * p.heads,), **_tiles(p, do, scale),
        BK=launch.block, BV=config.gradient_block_v(V, p.precision), **launch.options,
    )  # fmt: skip


def sweep_launch(
    precision: str, K: int, V: int, scale: float, device: torch.device
) -> config.Launch | None:
    """Return the launch of the kernel for Hopper, or None if it does not take such inputs."""
    # It carries dS / scale.
    return config.hopper_sweep_launch(K, V, precision) if is_hopper(device) and scale else None


def overwrites_u(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Return whether `backward` can leave dv where U was.

    One program reads each of U's rows, and a chunk before it writes that of dv. The kernels for all
    chips need both at once.
    """
    sizes = k.shape[-1], v.shape[-1]
    return sweep_launch(dot_precision(q, k, v), *sizes, scale, v.device) is not None


def _kind(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    g: Tensor | None, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    *_: Any,
) -> Hashable:  # fmt: skip
    return kind_of_call(k, v, g, cu_seqlens, dfinal_state is None, initial_state is None)


@on_its_device
@compiled_together(_kind)
def backward(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    ut: Tensor,
    u: Tensor,
    maps: Tensor,
    growth: Tensor,
    table: Tensor,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, beta, g and initial_state, in closed form.

    That of v is written to `dv`, if there. It may be `u` where `overwrites_u` says so, and then
    `ut` is overwritten as well.
    """
    p = make_problem(q, k, v, beta, g, cu_seqlens)
    H, HV = k.shape[3], p.heads
    saved = Saved(states, ut, u, maps, growth, table)
    out = _empty_gradients(q, k, v, beta, g, dv)
    do = addressable(do)
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    dinitial = None
    if initial_state is not None:
        dinitial = initial_state.new_empty(initial_state.shape)
    segments = make_segments(p)
    if segments.chunks:
        dfinal = segment_ends(p, segments, do, scale, saved, dfinal)
        # A segment's first state gets its gradient where that of its last was found.
        dinitial = None if dinitial is None else dfinal
    launch = sweep_launch(p.precision, p.sizes["K"], p.sizes["V"], scale, v.device)
    if launch is not None:
        from householder.ops.delta_product.triton.hopper_sweep import hopper_sweep

        hopper_sweep(p, segments, launch, do, scale, saved, dfinal, dinitial, out)
    else:
        sweep(p, segments, do, scale, saved, dfinal, dinitial, out)
    if dinitial is not None and initial_state is not None:
        dinitial = of_sequences(segments, p, dinitial, last=False).to(initial_state.dtype)
    dq, dk = out.q, out.k
    if HV != H:
        dq, dk = sum_groups(dq, H, q.dtype), sum_groups(dk, H, k.dtype)
    return dq, dk, out.v, out.beta, out.g, dinitial


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, dv: Tensor | None
) -> Gradients:
    H, HV = k.shape[3], v.shape[3]
    # With grouped value heads, those of q and k are summed afterwards: no atomics, one order.
    partial = torch.float32 if HV != H else None
    return Gradients(
        q=q.new_empty(*q.shape[:2], HV, q.shape[3], dtype=partial),
        k=k.new_empty(*k.shape[:3], HV, k.shape[4], dtype=partial),
        v=v.new_empty(v.shape) if dv is None else dv,
        beta=beta.new_empty(beta.shape),
        g=None if g is None else g.new_empty(g.shape),
    )
