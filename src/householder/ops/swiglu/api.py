"""The public function `swiglu`."""

from __future__ import annotations

import torch
from torch import Tensor

from householder.ops import _checks
from householder.ops._dispatch import apply, check_impl, runs_triton
from householder.ops.swiglu import reference
from householder.ops.swiglu.op import SwiGLU, why_not_triton

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
    tensors = {"gate": gate, "up": up}
    _checks.check_tensors(op, tensors)
    _checks.check_shape(op, "up", up, "[...], as gate", gate.shape)
    if runs_triton(op, impl, gate.device, lambda: why_not_triton(gate, up)):
        return apply(SwiGLU, gate, up)
    return reference.forward(gate, up)
