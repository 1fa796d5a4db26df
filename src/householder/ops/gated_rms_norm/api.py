"""The public function `gated_rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from householder.ops import _checks
from householder.ops._dispatch import apply, check_impl, runs_triton
from householder.ops.gated_rms_norm import reference
from householder.ops.gated_rms_norm.op import GatedRMSNorm, why_not_triton

IMPLS = ("triton", "reference")


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-5, impl: str = "auto"
) -> Tensor:
    """Normalise by the root mean square, then gate: y = x / √(mean x² + eps) · weight · SiLU(gate).

    Computed in float32 at least.

    Args:
        x: `[..., D]`.
        gate: `[..., D]`.
        weight: `[D]`.
        eps: added to the mean square.
        impl: `"triton"` (a GPU kernel, for float32, bfloat16 and float16, D ≤ 2048), `"reference"`
            (PyTorch), or `"auto"`, which is `"triton"` on a CUDA device for what the kernel takes,
            and `"reference"` otherwise and under `torch.compile`, which fuses it with the rest.

    Returns:
        y `[..., D]` in the dtype of `x`.

    Raises:
        ValueError: a shape or device does not fit, or `impl` is unknown.
        TypeError: an argument is no tensor, or is not real floating point.
        NotImplementedError: `impl="triton"` cannot take the inputs, or a second-order gradient of
            it is asked for.

    Gradients:
        To all three tensors: first order by the kernel, every order by the reference.

    Examples:
        >>> import torch
        >>> gated_rms_norm(torch.ones(2, 4), torch.zeros(2, 4), torch.ones(4)).abs().max().item()
        0.0

    References:
        Gated Delta Networks: Improving Mamba2 with Delta Rule (Yang, Kautz, Hatamizadeh, 2024),
        https://arxiv.org/abs/2412.06464
    """
    op = "gated_rms_norm"
    check_impl(op, impl, IMPLS)
    if impl == "auto" and torch.compiler.is_compiling():
        impl = "reference"
    tensors = {"x": x, "gate": gate, "weight": weight}
    _checks.check_tensors(op, tensors)
    _checks.check_shape(op, "gate", gate, "[..., D], as x", x.shape)
    _checks.check_shape(op, "weight", weight, "[D]", x.shape[-1:])
    if runs_triton(op, impl, x.device, lambda: why_not_triton(**tensors)):
        return apply(GatedRMSNorm, x, gate, weight, eps)
    return reference.forward(x, gate, weight, eps)
