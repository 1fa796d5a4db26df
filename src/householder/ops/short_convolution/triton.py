"""`short_convolution` on a GPU: x is read once, its neighbours come from the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import addressable, on_its_device, power_of_two

# Tokens and channels of a tile. Measured on an H200 (8 × 4096 × 1024, bfloat16): 0.055 ms forward,
# as with other tiles of 16 to 32 tokens.
TOKENS, CHANNELS, WARPS = 16, 128, 4
# The same of one warp that goes through a sequence, and for how many tiles.
LONG_TOKENS, LONG_CHANNELS, TILES = 8, 128, 16


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
def convolution_kernel(
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
def convolution_activation_gradient_kernel(
    x, weight, history, position, dy, du, T, D, x_b, x_t,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write what reaches the convolution through SiLU, of a tile of one sequence."""
    num_t = tl.cdiv(T, BT)
    i_b = (tl.program_id(0) // num_t).to(tl.int64)
    o_t = (tl.program_id(0) % num_t) * BT + tl.arange(0, BT)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (o_t < T)[:, None] & (o_d < D)[None, :]
    rows = (i_b * T + o_t[:, None]) * D + o_d[None, :]
    b_u = convolve(x, weight, history, position, i_b, o_t, o_d, T, D, x_b, x_t, W)
    b_s = tl.sigmoid(b_u)
    b_du = tl.load(dy + rows, mask=mask, other=0.0).to(tl.float32)
    b_du *= b_s * (1 + b_u * (1 - b_s))
    tl.store(du + rows, b_du.to(du.dtype.element_ty), mask=mask)


@triton.jit
def convolution_gradient_kernel(
    du, x, weight, history, position, dx, dhistory, dweight, T, D, x_b, x_t,
    W: tl.constexpr, PAST: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the gradients of some tiles of inputs, and what they add to the weight's.

    An input meets the weight of each lag in a later token: du of that token is part of the input's
    gradient, and times the input part of the weight's. With PAST > 0 the inputs before the first
    token lead. A thread holds channels of all tokens, so that no sum crosses threads.
    """
    num_t = tl.cdiv(T + PAST, BT * TILES)
    i_b = (tl.program_id(0) // num_t).to(tl.int64)
    first = (tl.program_id(0) % num_t) * BT * TILES - PAST
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    b_dw0 = tl.zeros((BD,), tl.float32)
    b_dw1 = tl.zeros((BD,), tl.float32)
    b_dw2 = tl.zeros((BD,), tl.float32)
    b_dw3 = tl.zeros((BD,), tl.float32)
    for tile in range(TILES):
        o_s = first + tile * BT + tl.arange(0, BT)
        inside = ((o_s >= 0) & (o_s < T))[:, None] & m_d
        p_x = x + i_b * x_b + o_s.to(tl.int64)[:, None] * x_t + o_d[None, :]
        b_x = tl.load(p_x, mask=inside, other=0.0).to(tl.float32)
        if PAST > 0:
            before = (o_s < 0)[:, None] & m_d
            rows = (i_b * PAST + o_s[:, None] + PAST) * D + o_d[None, :]
            b_x += tl.load(history + rows, mask=before, other=0.0).to(tl.float32)
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
            b_part = tl.sum(b_du * b_x, axis=0)
            if lag == 0:
                b_dw0 += b_part
            elif lag == 1:
                b_dw1 += b_part
            elif lag == 2:
                b_dw2 += b_part
            else:
                b_dw3 += b_part
        p_dx = dx + (i_b * T + o_s[:, None]) * D + o_d[None, :]
        tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=inside)
        if PAST > 0:
            tl.store(dhistory + rows, b_dx.to(dhistory.dtype.element_ty), mask=before)
    p_dw = dweight + tl.program_id(0).to(tl.int64) * W * D + o_d
    for lag in tl.static_range(W):
        if lag == 0:
            b_part = b_dw0
        elif lag == 1:
            b_part = b_dw1
        elif lag == 2:
            b_part = b_dw2
        else:
            b_part = b_dw3
        tl.store(p_dw + (W - 1 - lag) * D, b_part, mask=o_d < D)


@triton.jit
def convolution_step_kernel(
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
        convolution_kernel[_grid(B, T, D)](
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
    past = 0 if history is None else W - 1
    tile = LONG_TOKENS * TILES
    parts = B * -(-(T + past) // tile)
    dweight = torch.empty(parts, W, D, dtype=torch.float32, device=x.device)
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    dhistory = None if history is None else torch.empty_like(history)
    if dx.numel():
        du = dy
        if silu:
            du = torch.empty_like(dy)
            convolution_activation_gradient_kernel[_grid(B, T, D)](
                x, flat, history, position, dy, du, T, D, x.stride(0), x.stride(1),
                W=W, BT=TOKENS, BD=CHANNELS, num_warps=WARPS,
            )  # fmt: skip
        block = power_of_two(D, most=LONG_CHANNELS)
        convolution_gradient_kernel[(parts, -(-D // block))](
            du, x, flat, history, position, dx, dhistory, dweight, T, D, x.stride(0), x.stride(1),
            W=W, PAST=past, BT=LONG_TOKENS, BD=block, TILES=TILES, num_warps=1,
        )  # fmt: skip
    else:
        dweight.zero_()
        if dhistory is not None:
            dhistory.zero_()
    total = dweight.sum(0).mT.contiguous().to(weight.dtype)
    return dx, total.view(weight.shape), dhistory


@on_its_device
def step_(x: Tensor, weight: Tensor, state: Tensor, silu: bool) -> Tensor:
    """Return y `[B, D]` of one token `x [B, D]`, and move `state [B, W − 1, D]` on by it."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    B, D = x.shape
    y = torch.empty(B, D, dtype=x.dtype, device=x.device)
    if B:
        block = 256
        convolution_step_kernel[(B, -(-D // block))](
            x, weight.contiguous(), state, y, D, x.stride(0), W=weight.shape[-1], SILU=silu,
            BD=block, num_warps=WARPS,
        )  # fmt: skip
    return y
