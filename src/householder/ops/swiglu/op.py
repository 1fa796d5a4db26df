"""Registration of `householder::swiglu` with PyTorch: schema, fakes, autograd, vmap.

Followed by a product it has an autograd function of its own, which keeps what gate and up are and
makes the product's input anew, with the kernel that makes the gradients. That kernel is an op too,
and an opaque one: a compiler that saw the same operations in both passes would join them, and keep
the result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from householder.ops import _dispatch
from householder.ops._dispatch import (
    apply,
    contiguous_like,
    first_order_only,
    keep_nothing,
    register,
    with_signature,
)


def why_not_triton(gate: Tensor, up: Tensor) -> str | None:
    """Return why the Triton form cannot take these inputs, or None if it can."""
    if gate.dtype != up.dtype:
        return f"both must have one dtype, got {gate.dtype} and {up.dtype}"
    return _dispatch.why_not_triton({"gate": gate, "up": up}, {})


def why_not_triton_linear(
    gate: Tensor, up: Tensor, weight: Tensor, dtype: torch.dtype
) -> str | None:
    """Return the same of SwiGLU with a product behind it, whose dtype is `dtype`."""
    if gate.dtype != dtype:
        return f"all must have the product's dtype, {dtype}, got {gate.dtype}"
    return why_not_triton(gate, up) or _dispatch.why_not_triton({"weight": weight}, {})


def _kernels() -> Any:
    from householder.ops.swiglu import triton

    return triton


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    return _kernels().forward(gate, up)


def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _kernels().backward(dy, gate, up)


def _forward_fake(gate: Tensor, up: Tensor) -> Tensor:
    return contiguous_like(up)


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return contiguous_like(gate), contiguous_like(up)


def _backward_and_forward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels().backward_and_forward(dy, gate, up)


def _backward_and_forward_fake(
    dy: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return contiguous_like(gate), contiguous_like(up), contiguous_like(up)


# On a CPU it is Triton's interpreter that runs these kernels.
swiglu_op = register(
    "swiglu",
    "(Tensor gate, Tensor up) -> Tensor",
    fake=_forward_fake,
    kernel=_forward,
)
swiglu_backward_op = register(
    "swiglu_backward",
    "(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    fake=_backward_fake,
    kernel=_backward,
)
swiglu_backward_and_forward_op = register(
    "swiglu_backward_and_forward",
    "(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor, Tensor)",
    fake=_backward_and_forward_fake,
    kernel=_backward_and_forward,
)


def _batched(size: int, dims: Any, tensors: Any) -> list[Tensor]:
    """Return the tensors with what vmap batches in front, in all of them."""
    return [
        x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    ]


class SwiGLU(torch.autograd.Function):
    """Differentiable `(gate, up)`, by the kernels."""

    @staticmethod
    @with_signature
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu_op(gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return apply(SwiGLUBackward, dy, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return SwiGLU.apply(*_batched(info.batch_size, in_dims, args)), 0


class SwiGLUBackward(torch.autograd.Function):
    """The gradient, itself not differentiable: `(dy, gate, up)`."""

    @staticmethod
    @with_signature
    def forward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return swiglu_backward_op(dy, gate, up)

    setup_context = staticmethod(keep_nothing)
    backward = first_order_only("swiglu: the Triton form")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return SwiGLUBackward.apply(*_batched(info.batch_size, in_dims, args)), (0, 0)


class SwiGLULinear(torch.autograd.Function):
    """Differentiable `(gate, up, weight, of_weight)`: SwiGLU by its kernel, then the product.

    All are of one dtype; `of_weight` says whether the weight needs a gradient.
    """

    @staticmethod
    @with_signature
    def forward(gate: Tensor, up: Tensor, weight: Tensor, of_weight: bool) -> Tensor:
        return F.linear(swiglu_op(gate, up), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.of_weight = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        grads = apply(SwiGLULinearBackward, dy, *ctx.saved_tensors, ctx.of_weight)
        dgate, dup, dweight = grads
        return dgate, dup, dweight if ctx.of_weight else None, None


class SwiGLULinearBackward(torch.autograd.Function):
    """The gradient, itself not differentiable: `(dy, gate, up, weight, of_weight)`."""

    @staticmethod
    @with_signature
    def forward(
        dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor, of_weight: bool
    ) -> tuple[Tensor, ...]:
        dhidden = dy @ weight
        if not of_weight:
            # An absent gradient is an empty tensor.
            return *swiglu_backward_op(dhidden, gate, up), dy.new_empty(0)
        dgate, dup, hidden = swiglu_backward_and_forward_op(dhidden, gate, up)
        rows = dy.reshape(-1, dy.shape[-1])
        return dgate, dup, rows.mT @ hidden.reshape(-1, hidden.shape[-1])

    setup_context = staticmethod(keep_nothing)
    backward = first_order_only("swiglu_linear: the Triton form")
