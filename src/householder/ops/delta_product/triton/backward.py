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
    SIZES,
    TO_END,
    TOKEN_FROM_START,
    Gradients,
    Problem,
    Saved,
    attention,
    carried,
    kind_of_call,
    locate_sequence,
    make_problem,
    own_columns,
    row_offsets,
    strides,
)
from householder.ops.delta_product.triton.gradient import gradient_kernel
from householder.ops.delta_product.triton.segments import (
    Segments,
    make_segments,
    of_sequences,
    segment_ends,
)


@triton.jit(do_not_specialize=SIZES)
def walk_back_kernel(
    do, q, k, table, ut, dfinal, dinitial, dstates, d, cu_seqlens, first_chunk, scale, T,
    do_b, do_h, q_b, q_h, k_b, k_h, HV: tl.constexpr, do_t: tl.constexpr, q_t: tl.constexpr,
    k_t: tl.constexpr, k_n: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, SEGMENT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry columns `[BV]` of dS from a sequence's end to its start; write each chunk's dS', D."""
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
        b_du = dot(b_dsh, tl.trans(b_k), CARRIED)
        b_doq = b_do.to(tl.float32) * scale
        if GATED:
            b_du *= tl.load(p_table + TO_END * R + o_r)[None, :]
            b_doq *= tl.load(p_table + TOKEN_FROM_START * R + o_c)[None, :]
            b_ds *= tl.load(p_table + FROM_START * R + R - 1)
            b_beta *= tl.load(p_table + FROM_START * R + o_r)
        b_du = dot_add(b_do, tl.trans(b_a), b_du, PRECISION)
        b_d = dot(cast_operand(b_du, PRECISION), b_ut, CARRIED)
        store_tile_t(p_d + start * N * HV * V, o_r * HV * V, m_r, i_v, b_d, V, BV)
        b_ds = dot_add(cast_operand(b_doq, PRECISION), b_q, b_ds, PRECISION)
        b_ds = dot_add(cast_operand(b_d * (-b_beta)[None, :], PRECISION), b_k, b_ds, CARRIED)

    if dinitial is not None:
        store_tile_t(dinitial + i_sh * K * V, o_k * V, o_k < K, i_v, b_ds, V, BV)


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
