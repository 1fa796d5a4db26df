"""`swiglu` on a GPU: one kernel each way, and nothing kept but the inputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import launch, on_its_device

BLOCK, WARPS = 2048, 4


@triton.jit
def swiglu_kernel(gate, up, y, size, BLOCK: tl.constexpr):
    """Gate a range of numbers."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    b_g = tl.load(gate + o, mask=mask, other=0.0).to(tl.float32)
    b_u = tl.load(up + o, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + o, (b_g * tl.sigmoid(b_g) * b_u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_gradient_kernel(dy, gate, up, dgate, dup, y, size, BLOCK: tl.constexpr):
    """Write the gradients of a range of numbers, and y anew if there is room for it."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    b_dy = tl.load(dy + o, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.load(gate + o, mask=mask, other=0.0).to(tl.float32)
    b_u = tl.load(up + o, mask=mask, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_g)
    b_dg = b_dy * b_u * (b_s * (1 + b_g * (1 - b_s)))
    tl.store(dgate + o, b_dg.to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + o, (b_dy * (b_g * b_s)).to(dup.dtype.element_ty), mask=mask)
    if y is not None:
        tl.store(y + o, (b_g * b_s * b_u).to(y.dtype.element_ty), mask=mask)


@on_its_device
def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return y; arguments as in the public `swiglu`."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(up)
    if size := y.numel():
        grid = (-(-size // BLOCK),)
        launch(swiglu_kernel, grid, gate, up, y, size, BLOCK=BLOCK, num_warps=WARPS)
    return y


@on_its_device
def backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    return _backward(dy, gate, up, None)


@on_its_device
def backward_and_forward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and y."""
    y = torch.empty_like(up, memory_format=torch.contiguous_format)
    return *_backward(dy, gate, up, y), y


def _backward(dy: Tensor, gate: Tensor, up: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if size := dy.numel():
        launch(
            swiglu_gradient_kernel, (-(-size // BLOCK),),
            dy, gate, up, dgate, dup, y, size, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return dgate, dup
