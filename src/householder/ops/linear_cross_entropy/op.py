"""Registration of the op behind `linear_cross_entropy`, and its autograd.

The gradient is made together with the loss, block by block, while a block's logits are there: its
two products take the place of making the logits anew. What is left of them are the gradients of x
and of the weight, up to a factor that the backward pass knows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from householder.ops._dispatch import (
    TRITON_DTYPES,
    first_order_only,
    keep_nothing,
    register,
    with_signature,
)
from householder.ops._dispatch import why_not_triton as why_no_kernel
from householder.ops.linear_cross_entropy import chunk
from householder.ops.linear_cross_entropy.reference import IGNORE_INDEX


def why_not_triton(x: Tensor, weight: Tensor, dtype: torch.dtype) -> str | None:
    """Return why the Triton form cannot take these inputs, or None if it can."""
    if dtype not in TRITON_DTYPES:
        return f"it takes float32, bfloat16 and float16, got {dtype}"
    return why_no_kernel({"x": x, "weight": weight}, {})


def _softmax_gradient(
    logits: Tensor, labels: Tensor, ignore: int, gradient: bool, form: str
) -> Tensor:
    if form == "triton":
        from householder.ops.linear_cross_entropy import triton

        return triton.softmax_gradient_(logits, labels, ignore, gradient)
    return chunk.softmax_gradient_(logits, labels, ignore, gradient)


def _softmax_gradient_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


softmax_gradient_op = register(
    "softmax_gradient_",
    "(Tensor(a!) logits, Tensor labels, int ignore, bool gradient, str form) -> Tensor",
    fake=_softmax_gradient_fake,
    kernel=_softmax_gradient,
)


class LinearCrossEntropy(torch.autograd.Function):
    """Differentiable `(x, weight, labels, dtype, rows, save, form)`: the mean loss.

    Beside it there are the gradients, which nobody is to use, of the sum of the losses, and the
    number of rows that are meant. `dtype` is that of the products, `rows` how many are worked
    through at a time, `save` says which of x and weight need a gradient.
    """

    @staticmethod
    @with_signature
    def forward(
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        rows: int,
        save: tuple[bool, bool],
        form: str,
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        head = weight.to(dtype)
        total = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x, dtype=dtype) if save[0] else x.new_empty(0)
        dweight = torch.zeros_like(weight, dtype=wide) if save[1] else x.new_empty(0)
        for start in range(0, x.shape[0], rows):
            block = slice(start, start + rows)
            vectors = x[block].to(dtype)
            logits = F.linear(vectors, head)
            losses = softmax_gradient_op(logits, labels[block], IGNORE_INDEX, any(save), form)
            total = total + losses.sum()
            if save[0]:
                torch.mm(logits, head, out=dx[block])
            if save[1]:
                dweight += logits.mT @ vectors
        count = (labels != IGNORE_INDEX).sum().clamp(min=1)
        return total / count, dx, dweight, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, *_, ctx.save, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        # One that needs a gradient, so that the gradient depends on it and one more is refused;
        # the weight rather than x, which nobody else may be holding.
        ctx.save_for_backward(*output[1:], weight if ctx.save[1] else x)
        ctx.dtypes = x.dtype, weight.dtype

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
        grads = LinearCrossEntropyBackward.apply(dloss, *ctx.saved_tensors, *ctx.dtypes)
        dx, dweight = (x if needed else None for x, needed in zip(grads, ctx.save, strict=True))
        return dx, dweight, None, None, None, None, None


class LinearCrossEntropyBackward(torch.autograd.Function):
    """The gradient, itself not differentiable."""

    @staticmethod
    @with_signature
    def forward(
        dloss: Tensor,
        dx: Tensor,
        dweight: Tensor,
        count: Tensor,
        source: Tensor,
        x_dtype: torch.dtype,
        weight_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        factor = dloss / count
        return (dx * factor).to(x_dtype), (dweight * factor).to(weight_dtype)

    setup_context = staticmethod(keep_nothing)
    backward = first_order_only("linear_cross_entropy: the form in blocks")
