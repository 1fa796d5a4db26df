"""`delta_product` for one token: the state is read once and written once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from householder.ops._dispatch import remember
from householder.ops._triton import Launcher, on_its_device
from householder.ops.delta_product.triton import config
from householder.ops.delta_product.triton.activations import sigmoid, softplus_gate

# By all that the launch depends on but the dtypes, which a launcher looks at itself.
LAUNCHERS: dict[Any, Launcher] = {}


@triton.jit
def step_kernel(
    q, k, v, beta, g, A_log, dt_bias, state, o, new_state, scale, qk_eps, HV,
    q_b, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d, beta_b, beta_n, beta_h, g_b, g_h,
    state_b, state_h, state_k, state_v, new_b, new_h, new_k, new_v,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    NORM: tl.constexpr, BETA_SCALE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Advance columns `[BV]` of one head's state by a token's N reflectors."""
    num_v: tl.constexpr = (V + BV - 1) // BV
    i_bh = (tl.program_id(0) // num_v).to(tl.int64)
    i_b = i_bh // HV
    i_h = i_bh % HV
    o_k = tl.arange(0, BK)
    o_v = (tl.program_id(0) % num_v) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    p_state = state + i_b * state_b + i_h * state_h
    p_k = k + i_b * k_b + (i_h // GROUP) * k_h + o_k * k_d
    p_v = v + i_b * v_b + i_h * v_h + o_v * v_d
    p_beta = beta + i_b * beta_b + i_h * beta_h

    b_s = tl.load(p_state + o_k[:, None] * state_k + o_v[None, :] * state_v, mask=m_s, other=0.0)
    b_s = b_s.to(tl.float32)
    b_q = tl.load(q + i_b * q_b + (i_h // GROUP) * q_h + o_k * q_d, mask=m_k, other=0.0)
    b_q = b_q.to(tl.float32)
    if NORM:
        b_q *= tl.rsqrt(tl.sum(b_q * b_q, axis=0) + qk_eps)
    if GATED:
        b_g = tl.load(g + i_b * g_b + i_h * g_h).to(tl.float32)
        if A_log is not None:
            _, rate, soft = softplus_gate(b_g, A_log, dt_bias, i_h, i_h < HV)
            b_g = -rate * soft
        b_s *= tl.exp(b_g)
    for j in tl.static_range(N):
        b_k = tl.load(p_k + j * k_n, mask=m_k, other=0.0).to(tl.float32)
        if NORM:
            b_k *= tl.rsqrt(tl.sum(b_k * b_k, axis=0) + qk_eps)
        b_v = tl.load(p_v + j * v_n, mask=m_v, other=0.0).to(tl.float32)
        b_beta = tl.load(p_beta + j * beta_n).to(tl.float32)
        if BETA_SCALE is not None:
            b_beta = BETA_SCALE * sigmoid(b_beta)
        b_u = b_beta * (b_v - tl.sum(b_k[:, None] * b_s, axis=0))
        b_s += b_k[:, None] * b_u[None, :]
    b_o = tl.sum(b_q[:, None] * b_s, axis=0) * scale
    tl.store(o + i_bh * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    p_new = new_state + i_b * new_b + i_h * new_h
    p_new += o_k[:, None] * new_k + o_v[None, :] * new_v
    tl.store(p_new, b_s.to(new_state.dtype.element_ty), mask=m_s)


@on_its_device
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    state: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    qk_eps: float | None = None,
    beta_scale: float | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token; arguments as in the public `delta_product_step`.

    The four before the last are those of `activations.definition`. What they ask for happens in
    registers, in the kernel of the recurrence, and is not rounded in between. A program reads all
    of its columns of the state before it writes them, and nobody else's: the new state may take the
    place of the old one.

    Returns:
        `o [B, HV, V]` in v's dtype and the new state in the state's dtype.
    """
    B, _, HV, V = v.shape
    o = v.new_empty(B, HV, V)
    A_log, dt_bias = (x if x is None else x.contiguous() for x in (A_log, dt_bias))
    new_state = state if inplace else state.new_empty(state.shape)
    if B:
        key = (
            tuple(None if x is None else x.stride() for x in (q, k, v, beta, g, state, new_state)),
            q.shape, v.shape, v.device, scale, A_log is None, dt_bias is None, qk_eps, beta_scale,
        )  # fmt: skip
        launch = LAUNCHERS.get(key)
        if launch is None:
            launch = _launcher(q, k, v, beta, g, scale, state, new_state, qk_eps, beta_scale)
            remember(LAUNCHERS, key, launch)
        launch(q, k, v, beta, g, A_log, dt_bias, state, o, new_state)
    return o, new_state


def _launcher(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    state: Tensor,
    new_state: Tensor,
    qk_eps: float | None,
    beta_scale: float | None,
) -> Launcher:
    B, N, HV, V = v.shape
    H, K = k.shape[2:]
    launch = config.step_launch(V, N)
    inputs = (q, k, v, beta, state, new_state)
    axes = {"q": "bhd", "k": "bnhd", "v": "bnhd", "beta": "bnh", "state": "bhkv", "new": "bhkv"}
    steps = {
        f"{name}_{axis}": step
        for (name, letters), x in zip(axes.items(), inputs, strict=True)
        for axis, step in zip(letters, x.stride(), strict=True)
    }
    steps["g_b"], steps["g_h"] = (0, 0) if g is None else g.stride()
    return Launcher(
        step_kernel, (B * HV * -(-V // launch.block),), scale=scale,
        qk_eps=0.0 if qk_eps is None else qk_eps, HV=HV, **steps,
        N=N, K=K, V=V, GROUP=HV // H, GATED=g is not None,
        NORM=qk_eps is not None, BETA_SCALE=beta_scale,
        BK=config.power_of_two(K), BV=launch.block, **launch.options,
    )  # fmt: skip
