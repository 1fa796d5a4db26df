"""`short_convolution` on a GPU: x is read once, its neighbours come from the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import addressable, on_its_device, power_of_two

# Tokens and channels of a tile, and tiles that one program sums the weight's gradient over.
TOKENS, CHANNELS, TILES, WARPS = 16, 128, 16, 4


@triton.jit
def seen(
    x, history, position, i_b, o_t, o_d, lag, T, D, x_b, x_t, W: tl.constexpr
):  # fmt: skip
    """Load what tokens `o_t` see `lag` tokens before them, `[tokens, channels]`, in float32."""
    o_s = o_t - lag
    valid = (o_t < T) & (o_s >= 0)
    if position is not None:
        valid &= tl.load(position + o_t, mask=o_t < T, other=0) >= lag
    m_d = (o_d < D)[None, :]
    p_x = x + i_b * x_b + o_s.to(tl.int64)[:, None] * x_t + o_d[None, :]
    b_x = tl.load(p_x, mask=valid[:, None] & m_d, other=0.0).to(tl.float32)
    if history is not None:
        before = (o_t < T) & (o_s < 0)
        p_h = history + (i_b * (W - 1) + o_s[:, None] + W - 1) * D + o_d[None, :]
        b_x += tl.load(p_h, mask=before[:, None] & m_d, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def convolve(
    x, weight, history, position, i_b, o_t, o_d, T, D, x_b, x_t, W: tl.constexpr
):  # fmt: skip
    """Return the convolution at tokens `o_t` of channels `o_d`."""
    b_y = tl.zeros((o_t.shape[0], o_d.shape[0]), tl.float32)
    for i in tl.static_range(W):
        b_w = tl.load(weight + o_d * W + i, mask=o_d < D, other=0.0).to(tl.float32)
        b_y += seen(x, history, position, i_b, o_t, o_d, W - 1 - i, T, D, x_b, x_t, W) * b_w[None]
    return b_y


@triton.jit
def forward_kernel(
    x, weight, history, position, y, T, D, x_b, x_t,
    W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Convolve a tile of one sequence."""
    num_t = tl.cdiv(T, BT)
    i_b = (tl.program_id(0) // num_t).to(tl.int64)
    o_t = (tl.program_id(0) % num_t) * BT + tl.arange(0, BT)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    b_y = convolve(x, weight, history, position, i_b, o_t, o_d, T, D, x_b, x_t, W)
    if SILU:
        b_y *= tl.sigmoid(b_y)
    p_y = y + (i_b * T + o_t[:, None]) * D + o_d[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=(o_t < T)[:, None] & (o_d < D)[None, :])


@triton.jit
def weight_gradient_kernel(
    x, weight, history, position, dy, du, dweight, T, D, x_b, x_t,
    W: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Sum the weight's gradient over some tiles, and write what reaches the convolution."""
    num_t = tl.cdiv(T, BT * TILES)
    i_b = (tl.program_id(0) // num_t).to(tl.int64)
    first = (tl.program_id(0) % num_t) * BT * TILES
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    o_w = tl.arange(0, BW)
    b_dw = tl.zeros((BW, BD), tl.float32)
    for tile in range(TILES):
        o_t = first + tile * BT + tl.arange(0, BT)
        mask = (o_t < T)[:, None] & m_d[None, :]
        rows = (i_b * T + o_t[:, None]) * D + o_d[None, :]
        b_du = tl.load(dy + rows, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            b_u = convolve(x, weight, history, position, i_b, o_t, o_d, T, D, x_b, x_t, W)
            b_s = tl.sigmoid(b_u)
            b_du *= b_s * (1 + b_u * (1 - b_s))
            tl.store(du + rows, b_du.to(du.dtype.element_ty), mask=mask)
        for i in tl.static_range(W):
            b_x = seen(x, history, position, i_b, o_t, o_d, W - 1 - i, T, D, x_b, x_t, W)
            b_dw += tl.where(o_w[:, None] == i, tl.sum(b_x * b_du, axis=0)[None, :], 0.0)
    p_dw = dweight + (tl.program_id(0).to(tl.int64) * W + o_w[:, None]) * D + o_d[None, :]
    tl.store(p_dw, b_dw, mask=(o_w < W)[:, None] & m_d[None, :])


@triton.jit
def input_gradient_kernel(
    du, weight, position, dx, dhistory, T, D,
    W: tl.constexpr, PAST: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile of inputs; with PAST > 0 those before the first token lead."""
    num_t = tl.cdiv(T + PAST, BT)
    i_b = (tl.program_id(0) // num_t).to(tl.int64)
    o_s = (tl.program_id(0) % num_t) * BT + tl.arange(0, BT) - PAST
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    b_dx = tl.zeros((BT, BD), tl.float32)
    for lag in tl.static_range(W):
        o_t = o_s + lag
        valid = (o_t >= 0) & (o_t < T)
        if position is not None:
            valid &= tl.load(position + o_t, mask=valid, other=0) >= lag
        b_w = tl.load(weight + o_d * W + W - 1 - lag, mask=o_d < D, other=0.0).to(tl.float32)
        p_du = du + (i_b * T + o_t[:, None]) * D + o_d[None, :]
        b_du = tl.load(p_du, mask=valid[:, None] & m_d, other=0.0).to(tl.float32)
        b_dx += b_du * b_w[None, :]
    p_dx = dx + (i_b * T + o_s[:, None]) * D + o_d[None, :]
    inside = ((o_s >= 0) & (o_s < T))[:, None] & m_d
    tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=inside)
    if PAST > 0:
        p_h = dhistory + (i_b * PAST + o_s[:, None] + PAST) * D + o_d[None, :]
        tl.store(p_h, b_dx.to(dhistory.dtype.element_ty), mask=(o_s < 0)[:, None] & m_d)


@triton.jit
def step_kernel(
    x, weight, state, y, D, x_b, W: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Convolve one token's channels and move the state on by it; every thread has its own."""
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_y = tl.zeros((BD,), tl.float32)
    p_state = state + i_b * (W - 1) * D + o_d
    for i in tl.static_range(W - 1):
        b_x = tl.load(p_state + i * D, mask=m_d, other=0.0)
        b_w = tl.load(weight + o_d * W + i, mask=m_d, other=0.0).to(tl.float32)
        b_y += b_x.to(tl.float32) * b_w
        if i > 0:
            tl.store(p_state + (i - 1) * D, b_x, mask=m_d)
    b_x = tl.load(x + i_b * x_b + o_d, mask=m_d, other=0.0)
    b_w = tl.load(weight + o_d * W + W - 1, mask=m_d, other=0.0).to(tl.float32)
    b_y += b_x.to(tl.float32) * b_w
    if W > 1:
        tl.store(p_state + (W - 2) * D, b_x.to(state.dtype.element_ty), mask=m_d)
    if SILU:
        b_y *= tl.sigmoid(b_y)
    tl.store(y + i_b * D + o_d, b_y.to(y.dtype.element_ty), mask=m_d)


def _grid(B: int, tokens: int, D: int) -> tuple[int, int]:
    return B * -(-tokens // TOKENS), -(-D // CHANNELS)


@on_its_device
def forward(
    x: Tensor, weight: Tensor, history: Tensor | None, position: Tensor | None, silu: bool
) -> Tensor:
    """Return y; arguments as in the public `short_convolution`."""
    x, weight = addressable(x), weight.contiguous()
    B, T, D = x.shape
    y = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    if y.numel():
        forward_kernel[_grid(B, T, D)](
            x, weight, None if history is None else history.contiguous(), position, y, T, D,
            x.stride(0), x.stride(1), W=weight.shape[-1], SILU=silu, BT=TOKENS, BD=CHANNELS,
            num_warps=WARPS,
        )  # fmt: skip
    return y


@on_its_device
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    history: Tensor | None,
    position: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, the weight and the history."""
    dy, x, flat = dy.contiguous(), addressable(x), weight.contiguous()
    if history is not None:
        history = history.contiguous()
    B, T, D = x.shape
    W = weight.shape[-1]
    du = torch.empty_like(dy) if silu else dy
    parts = B * -(-T // (TOKENS * TILES))
    dweight = torch.empty(parts, W, D, dtype=torch.float32, device=x.device)
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    dhistory = None if history is None else torch.empty_like(history)
    if dx.numel():
        weight_gradient_kernel[(parts, -(-D // CHANNELS))](
            x, flat, history, position, dy, du, dweight, T, D, x.stride(0), x.stride(1),
            W=W, SILU=silu, BT=TOKENS, BD=CHANNELS, BW=power_of_two(W, least=1), TILES=TILES,
            num_warps=WARPS,
        )  # fmt: skip
        past = 0 if history is None else W - 1
        input_gradient_kernel[_grid(B, T + past, D)](
            du, flat, position, dx, dhistory, T, D, W=W, PAST=past, BT=TOKENS, BD=CHANNELS,
            num_warps=WARPS,
        )  # fmt: skip
    elif dhistory is not None:
        dhistory.zero_()
    return dx, dweight.sum(0).mT.reshape(weight.shape).to(weight.dtype), dhistory


@on_its_device
def step_(x: Tensor, weight: Tensor, state: Tensor, silu: bool) -> Tensor:
    """Return y `[B, D]` of one token `x [B, D]`, and move `state [B, W − 1, D]` on by it."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    B, D = x.shape
    y = torch.empty(B, D, dtype=x.dtype, device=x.device)
    if B:
        block = 256
        step_kernel[(B, -(-D // block))](
            x, weight.contiguous(), state, y, D, x.stride(0), W=weight.shape[-1], SILU=silu,
            BD=block, num_warps=WARPS,
        )  # fmt: skip
    return y
