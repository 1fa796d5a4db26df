"""The public functions `swiglu` and `swiglu_linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from householder.ops import _checks
from householder.ops._dispatch import apply, autocast_dtype, check_impl, runs_triton
from householder.ops.swiglu import reference
from householder.ops.swiglu.op import (
    SwiGLU,
    SwiGLULinear,
    why_not_triton,
    why_not_triton_linear,
)

IMPLS = ("triton", "reference")


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """Gate the hidden vectors of an MLP: y = SiLU(gate) ⊙ up.

    Args:
        gate: `[...]`.
        up: of the same shape.
        impl: `"triton"` (a GPU kernel that computes in float32 and keeps nothing but its inputs for
            the gradient, for float32, bfloat16 and float16), `"reference"` (PyTorch), or `"auto"`,
            which is `"triton"` on a CUDA device for what the kernel takes, and `"reference"`
            otherwise and under `torch.compile`, which fuses it with what is around it.

    Returns:
        y, shaped as they are, in their dtype.

    Raises:
        ValueError: the shapes or devices differ, or `impl` is unknown.
        TypeError: an argument is no tensor, or is not real floating point.
        NotImplementedError: `impl="triton"` cannot take the inputs, or a second-order gradient of
            it is asked for.

    Gradients:
        To both: first order by the kernel, every order by the reference.

    Examples:
        >>> import torch
        >>> swiglu(torch.zeros(2, 3), torch.ones(2, 3)).sum()
        tensor(0.)

    References:
        GLU Variants Improve Transformer (Shazeer, 2020), https://arxiv.org/abs/2002.05202
    """
    op = "swiglu"
    check_impl(op, impl, IMPLS)
    if impl == "auto" and torch.compiler.is_compiling():
        impl = "reference"
    _check_inputs(op, gate, up)
    if runs_triton(op, impl, gate.device, lambda: why_not_triton(gate, up)):
        return apply(SwiGLU, gate, up)
    return reference.forward(gate, up)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """Gate the hidden vectors of an MLP and multiply: y = (SiLU(gate) ⊙ up) Wᵀ.

    For the gradient the product's input, as large as gate, is made anew rather than kept. Under
    autocast the product is made in its dtype.

    Args:
        gate: `[..., width]`.
        up: of the same shape.
        weight: W `[D, width]`.
        impl: `"triton"` (the GPU kernels of `swiglu` around PyTorch's products, for float32,
            bfloat16 and float16, gate and up in the product's dtype), `"reference"` (PyTorch, which
            keeps the product's input), or `"auto"`, which is `"triton"` on a CUDA device for what
            the kernels take, also under `torch.compile`, and `"reference"` otherwise. Under
            transforms of `torch.func` the input is kept.

    Returns:
        y `[..., D]`, in the dtype of the product.

    Raises:
        ValueError: the shapes or devices differ, or `impl` is unknown.
        TypeError: an argument is no tensor, or is not real floating point.
        NotImplementedError: `impl="triton"` cannot take the inputs, or a second-order gradient of
            it is asked for.

    Gradients:
        To all three: first order by the kernels, every order by the reference.

    Examples:
        >>> import torch
        >>> swiglu_linear(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(5, 3)).shape
        torch.Size([2, 5])

    References:
        GLU Variants Improve Transformer (Shazeer, 2020), https://arxiv.org/abs/2002.05202
    """
    op = "swiglu_linear"
    check_impl(op, impl, IMPLS)
    _check_inputs(op, gate, up)
    _checks.check_tensors(op, {"gate": gate, "weight": weight})
    if weight.dim() != 2 or gate.dim() < 1 or weight.shape[1] != gate.shape[-1]:
        raise ValueError(
            f"{op}: `gate` must be [..., width] and `weight` [D, width], got shapes "
            f"{list(gate.shape)} and {list(weight.shape)}; the last sizes must agree"
        )
    dtype = autocast_dtype(gate.device) or weight.dtype
    if runs_triton(op, impl, gate.device, lambda: why_not_triton_linear(gate, up, weight, dtype)):
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return apply(SwiGLULinear, gate, up, weight.to(dtype), weight.requires_grad)
        hidden = swiglu(gate, up, impl="triton")
    elif impl == "auto" and gate.is_cuda:
        hidden = swiglu(gate, up)
    else:
        hidden = reference.forward(gate, up)
    return F.linear(hidden, weight)


def _check_inputs(op: str, gate: Tensor, up: Tensor) -> None:
    tensors = {"gate": gate, "up": up}
    _checks.check_tensors(op, tensors)
    _checks.check_shape(op, "up", up, "[...], as gate", gate.shape)
