"""`gated_rms_norm` on a GPU: one kernel each way, and a sum for the weight's gradient.

With x̂ = r x, r = 1 / √(mean x² + eps), and s = SiLU(gate), y = x̂ w s. Backward, with d = dy w s:

    dx = r (d − x̂ mean(d x̂))      dgate = dy x̂ w SiLU'(gate)      dw = Σ dy s x̂
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import launch, on_its_device, power_of_two

# Numbers in a tile, and tiles that one program sums the weight's gradient over.
TILE, TILES, WARPS = 2048, 8, 4


@triton.jit
def load_rows(x, o_m, o_d, M, D, x_m):
    """Load rows `o_m` of a matrix, `[rows, D]`, in float32."""
    p_x = x + o_m.to(tl.int64)[:, None] * x_m + o_d[None, :]
    mask = (o_m < M)[:, None] & (o_d < D)[None, :]
    return tl.load(p_x, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, b_x, o_m, o_d, M, D):
    """Store what `load_rows` loads, in rows that follow one another."""
    p_x = x + o_m.to(tl.int64)[:, None] * D + o_d[None, :]
    mask = (o_m < M)[:, None] & (o_d < D)[None, :]
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=mask)


@triton.jit
def gated_norm_kernel(
    x, gate, weight, y, eps, M, D, x_m, gate_m, BM: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Normalise and gate a tile of rows."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    b_x = load_rows(x, o_m, o_d, M, D, x_m)
    b_g = load_rows(gate, o_m, o_d, M, D, gate_m)
    b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_r = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)
    b_y = b_x * b_r[:, None] * b_w[None, :] * (b_g * tl.sigmoid(b_g))
    store_rows(y, b_y, o_m, o_d, M, D)


@triton.jit
def gated_norm_gradient_kernel(
    dy, x, gate, weight, dx, dgate, dweight, eps, M, D, x_m, gate_m,
    BM: tl.constexpr, BD: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the gradients of some tiles, and what they add to the weight's."""
    o_d = tl.arange(0, BD)
    b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dw = tl.zeros((BD,), tl.float32)
    for tile in range(TILES):
        o_m = (tl.program_id(0) * TILES + tile) * BM + tl.arange(0, BM)
        b_dy = load_rows(dy, o_m, o_d, M, D, D)
        b_x = load_rows(x, o_m, o_d, M, D, x_m)
        b_g = load_rows(gate, o_m, o_d, M, D, gate_m)
        b_r = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)
        b_x *= b_r[:, None]
        b_s = tl.sigmoid(b_g)
        b_dn = b_dy * (b_g * b_s)
        b_dw += tl.sum(b_dn * b_x, axis=0)
        b_dgate = b_dy * b_x * b_w[None, :] * (b_s * (1 + b_g * (1 - b_s)))
        store_rows(dgate, b_dgate, o_m, o_d, M, D)
        b_dn *= b_w[None, :]
        b_mean = tl.sum(b_dn * b_x, axis=1) / D
        store_rows(dx, b_r[:, None] * (b_dn - b_x * b_mean[:, None]), o_m, o_d, M, D)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * D + o_d, b_dw, mask=o_d < D)


def _rows(x: Tensor) -> Tensor:
    """Return x as a matrix whose rows are contiguous, copied only if need be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _tile(D: int) -> tuple[int, int]:
    BD = power_of_two(D)
    return max(1, TILE // BD), BD


@on_its_device
def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y; arguments as in the public `gated_rms_norm`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, gate = _rows(x), _rows(gate)
    M, D = x.shape
    BM, BD = _tile(D)
    if M:
        launch(
            gated_norm_kernel, (-(-M // BM),),
            x, gate, weight.contiguous(), y, eps, M, D, x.stride(0), gate.stride(0),
            BM=BM, BD=BD, num_warps=WARPS,
        )  # fmt: skip
    return y


@on_its_device
def backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, the gate and the weight."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    dy, x, gate = _rows(dy).contiguous(), _rows(x), _rows(gate)
    M, D = x.shape
    BM, BD = _tile(D)
    parts = -(-M // (BM * TILES))
    dweight = torch.empty(parts, D, dtype=torch.float32, device=x.device)
    if M:
        launch(
            gated_norm_gradient_kernel, (parts,),
            dy, x, gate, weight.contiguous(), dx, dgate, dweight, eps, M, D, x.stride(0),
            gate.stride(0), BM=BM, BD=BD, TILES=TILES, num_warps=WARPS,
        )  # fmt: skip
    return dx, dgate, dweight.sum(0).to(weight.dtype)
