"""`delta_product` forward: one kernel over all chunks in parallel, one that walks along sequences.

With the notation of the chunked form (see `chunk.py`), per chunk and head:

    prepare:  T = (I + strict_lower(diag(β) Γ ⊙ K Kᵀ))⁻¹
    walk:     Y = diag(β) (V − diag(E) K S)    U = T Y    S ← E_C S + (diag(E_C / E) K)ᵀ U
              A = scale · Γ ⊙ lower(Q Kᵀ)      O = scale · diag(E) Q S + A U

The walk holds a block of V's columns of S in registers, and holds everything transposed (Sᵀ, Yᵀ,
Uᵀ, Oᵀ): every product then takes its left factor from the registers of the one before, and the
tokens, few where N is large, lie along the tensor cores' finer dimension. V − K S is taken in
float32, as the difference of two close numbers. A hangs on no state and is cheaper made twice, in
the shadow of the products that do, than written and read.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import (
    Launcher,
    cast_operand,
    compiled_together,
    dot,
    dot_add,
    inverse_unit_lower,
    load_tile,
    load_tile_t,
    on_its_device,
    square,
    store_tile,
    store_tile_t,
)
from householder.ops.delta_product.triton import config
from householder.ops.delta_product.triton.chunks import (
    BETA,
    FROM_START,
    SIZES,
    TO_END,
    TOKEN_FROM_START,
    Problem,
    attention,
    carried,
    empty_table,
    kind_of_call,
    locate_sequence,
    make_problem,
    make_table,
    own_chunk,
    own_columns,
    pair_decay,
    row_offsets,
    steps_of_coefficients,
    strides,
    suits_hopper,
    writes,
)
from householder.ops.delta_product.triton.segments import (
    Segments,
    make_maps,
    make_segments,
    of_sequences,
    segment_starts,
)


@triton.jit(do_not_specialize=SIZES)
def prepare_kernel(
    k, table, ut, growth, cu_seqlens, chunk_sequence, first_chunk, T, HV,
    k_b, k_h, k_t: tl.constexpr, k_n: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write T `[R, R]` of one chunk and value head.

    To `growth`, if there, goes the logarithm of a bound on the norm of the chunk's reflections.
    """
    i_chunk, i_h, batch, start, n = own_chunk(
        T, HV, cu_seqlens, chunk_sequence, first_chunk, C, PACKED
    )
    if n <= 0:
        return
    CARRIED: tl.constexpr = carried(PRECISION)
    o_r = tl.arange(0, R)
    p_k = k + batch * k_b + start * k_t + (i_h // GROUP) * k_h
    p_table = table + (i_chunk * HV + i_h) * (6 * R if GATED else R)
    b_k = cast_operand(
        load_tile(p_k, row_offsets(R, N, k_t, k_n), o_r < n * N, 0, K, BK), PRECISION
    )
    m = square(b_k, CARRIED) * tl.load(p_table + BETA * R + o_r)[:, None]
    if growth is not None:
        norms = tl.abs(1.0 - tl.sum(tl.where(o_r[:, None] == o_r[None, :], m, 0.0), axis=1))
        b_growth = tl.sum(tl.log(tl.maximum(norms, 1.0)), axis=0)
        tl.store(growth + i_chunk * HV + i_h, b_growth)
    below = o_r[:, None] > o_r[None, :]
    if GATED:
        m *= pair_decay(p_table, o_r[:, None], o_r[None, :], below, R)
    m = tl.where(below, m, 0.0)
    p_ut = ut + (i_chunk * HV + i_h) * (R * R)
    # Rows whose β is next to nothing have entries as small as it, whose digits count.
    b_ut = inverse_unit_lower(m, R, "fp32" if PRECISION == "tf32x3" else PRECISION)
    store_tile(p_ut, o_r * R, o_r >= 0, 0, b_ut, R, R)


@triton.jit(do_not_specialize=SIZES)
def walk_kernel(
    q, k, v, table, ut, initial, final, o, states, u, cu_seqlens, first_chunk, scale, T,
    q_b, q_h, k_b, k_h, v_b, v_h, HV: tl.constexpr, q_t: tl.constexpr,
    k_t: tl.constexpr, k_n: tl.constexpr, v_t: tl.constexpr, v_n: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, SEGMENT: tl.constexpr, SAVE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry columns `[BV]` of one sequence's and head's state through its chunks; write their O."""
    CARRIED: tl.constexpr = carried(PRECISION)
    i_v, i_sh, i_s, i_h = own_columns(HV, V, BV)
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
    p_v = v + batch * v_b + first * v_t + i_h * v_h
    p_o = o + ((batch * T + first) * HV + i_h) * V
    p_u = u + ((batch * T + first) * N * HV + i_h) * V
    o_krows = row_offsets(R, N, k_t, k_n)
    o_vrows = row_offsets(R, N, v_t, v_n)

    b_s = tl.zeros((BV, BK), tl.float32)
    if initial is not None:
        b_s += load_tile_t(initial + i_sh * K * V, o_k * V, o_k < K, i_v, V, BV).to(tl.float32)

    for i in range(tl.cdiv(length, C)):
        start = tl.cast(i * C, tl.int64)
        n = tl.minimum(length - i * C, C)
        m_r = o_r < n * N
        m_c = o_c < n
        i_ch = (chunk + i) * HV + i_h

        b_k = load_tile(p_k + start * k_t, o_krows, m_r, 0, K, BK)
        b_k = cast_operand(b_k, PRECISION)
        b_v = load_tile_t(p_v + start * v_t, o_vrows, m_r, i_v, V, BV).to(tl.float32)
        p_table = table + i_ch * (6 * R if GATED else R)
        b_beta = tl.load(p_table + BETA * R + o_r)
        b_ut = load_tile(ut + i_ch * (R * R), o_r * R, everywhere, 0, R, R)
        b_q = load_tile(p_q + start * q_t, o_c * q_t, m_c, 0, K, BK)
        b_q = cast_operand(b_q, PRECISION)
        b_a = attention(b_k, b_q, p_table, scale, N, C, R, BC, GATED, PRECISION)

        b_sh = cast_operand(b_s, PRECISION)
        if SAVE:
            store_tile(states + i_ch * K * V, o_v * K, m_v, 0, b_sh, K, BK)
        recalled = dot(b_sh, tl.trans(b_k), CARRIED)
        b_o = dot(b_sh, tl.trans(b_q), PRECISION) * scale
        if GATED:
            recalled *= tl.load(p_table + FROM_START * R + o_r)[None, :]
            b_o *= tl.load(p_table + TOKEN_FROM_START * R + o_c)[None, :]
        b_u = writes(b_v - recalled, b_beta, b_ut, PRECISION)
        b_uh = cast_operand(b_u, PRECISION)
        if SAVE:
            store_tile_t(p_u + start * N * HV * V, o_r * HV * V, m_r, i_v, b_uh, V, BV)
        b_o = dot_add(b_uh, cast_operand(b_a, PRECISION), b_o, PRECISION)
        if GATED:
            b_uh = cast_operand(b_u * tl.load(p_table + TO_END * R + o_r)[None, :], PRECISION)
            b_s *= tl.load(p_table + FROM_START * R + R - 1)
        b_s = dot_add(b_uh, b_k, b_s, CARRIED)
        store_tile_t(p_o + start * HV * V, o_c * HV * V, m_c, i_v, b_o, V, BV)

    store_tile_t(final + i_sh * K * V, o_k * V, o_k < K, i_v, b_s, V, BV)


def prepare(p: Problem, growth: Tensor | None, for_hopper: bool) -> tuple[Tensor, Tensor]:
    """Make the table of coefficients and T of every chunk and value head."""
    R = p.sizes["R"]
    ut = torch.empty(p.num_chunks * p.heads, R * R, dtype=p.operand, device=p.q.device)
    table = empty_table(p) if for_hopper else make_table(p)
    if p.num_chunks:
        key = "prepare", for_hopper, growth is None
        launch = p.plan.launcher(key, lambda: _prepare_launcher(p, for_hopper))
        inputs = (p.k, p.beta, p.g) if for_hopper else (p.k,)
        launch(*inputs, table, ut, growth, *p.packing)
    return table, ut


def _prepare_launcher(p: Problem, for_hopper: bool) -> Launcher:
    kernel, steps = prepare_kernel, strides("k", p.k)
    launch = config.prepare_launch(p.sizes["K"], p.precision)
    names = ["N", "K", "C", "R", "GROUP", "GATED", "PACKED"]
    if for_hopper:
        from householder.ops.delta_product.triton import hopper_forward

        kernel = hopper_forward.prepare_kernel
        launch = config.hopper_prepare_launch(p.sizes["K"], p.g is not None)
        steps |= steps_of_coefficients(p)
    else:
        names.append("PRECISION")
    return Launcher(
        kernel, (p.num_chunks * p.heads,), T=p.q.shape[1], HV=p.heads,
        **steps, **{n: p.constants[n] for n in names}, BK=launch.block, **launch.options,
    )  # fmt: skip


def _walk_launcher(
    p: Problem, segments: Segments, scale: float, save: bool, for_hopper: bool
) -> Launcher:
    K, V = p.sizes["K"], p.sizes["V"]
    kernel, launch, ahead = walk_kernel, config.walk_launch(K, V, p.precision), {}
    if for_hopper:
        from householder.ops.delta_product.triton import hopper_forward

        kernel, launch = hopper_forward.walk_kernel, config.hopper_walk_launch(V)
        ahead = {"STAGES": launch.num_stages}
    return Launcher(
        kernel, (segments.number * p.heads * -(-V // launch.block),),
        scale=scale, T=p.v.shape[1], HV=p.heads,
        **strides("q", p.q), **strides("k", p.k), **strides("v", p.v), **p.constants,
        SEGMENT=segments.chunks, SAVE=save, BK=config.key_block(K, p.precision),
        BV=launch.block, **ahead, **launch.options,
    )  # fmt: skip


def _kind(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, save: bool = False,
) -> Hashable:  # fmt: skip
    return kind_of_call(k, v, g, cu_seqlens, initial_state is None, save)


@on_its_device
@compiled_together(_kind)
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool = False,
) -> tuple[Tensor, ...]:
    """Run the recurrence; arguments as in the public `delta_product`.

    Returns:
        o, the final state in float32, and what `backward` needs (empty unless `save`): the states
        at the chunks' starts `[chunks·HV, V, K]`, their triangles T `[chunks·HV, R·R]`, the
        writes U `[B, T, N, HV, V]`, of long sequences the segments' maps and the chunks'
        growth (see `segments.py`), and the table of coefficients.
    """
    p = make_problem(q, k, v, beta, g, cu_seqlens)
    sizes, HV = p.sizes, p.heads
    K, V = sizes["K"], sizes["V"]
    segments = make_segments(p)
    maps, growth = make_maps(p, segments)
    for_hopper = suits_hopper(p)
    table, ut = prepare(p, growth if segments.chunks and g is not None else None, for_hopper)
    initial = None if initial_state is None else initial_state.contiguous()
    final = torch.empty(p.num_sequences, HV, K, V, dtype=torch.float32, device=v.device)
    if segments.chunks:
        # A walk leaves a segment's last state where it found the first.
        initial = segment_starts(p, segments, table, ut, initial, maps, growth)
        final = initial

    o = v.new_empty(*v.shape[:2], HV, V)
    room = p.num_chunks * HV if save else 0
    states = torch.empty(room, V, K, dtype=p.operand, device=v.device)
    u = torch.empty(v.shape[0] if save else 0, *v.shape[1:], dtype=p.operand, device=v.device)
    if p.num_sequences:
        key = "walk", segments.chunks, scale, save, for_hopper, initial is None
        launch = p.plan.launcher(key, lambda: _walk_launcher(p, segments, scale, save, for_hopper))
        launch(
            p.q, p.k, p.v, table, ut, initial, final, o, states, u,
            segments.bounds, segments.first_chunk,
        )  # fmt: skip
    final = of_sequences(segments, p, final, last=True)
    if not save:
        ut, maps, growth, table = (
            x.new_empty(0, *x.shape[1:]) if x.shape[0] else x for x in (ut, maps, growth, table)
        )
    return o, final, states, ut, u, maps, growth, table
