"""Registration of `householder::householder_product` with PyTorch: schema, fakes, autograd, vmap.

The op works on `x [G, M, D]`, `reflectors [G, N, D]`, `beta [G, N]`; `api.py` brings every call to
this form. First-order gradients run a second op in closed form. Where higher orders are wanted the
gradient is computed by the same closed form in differentiable PyTorch instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from householder.ops._dispatch import contiguous_like, register
from householder.ops.householder_product import chunk


def _forward_fake(x: Tensor, reflectors: Tensor, beta: Tensor) -> Tensor:
    return contiguous_like(x)


def _backward_fake(
    dy: Tensor, x: Tensor, reflectors: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return contiguous_like(x), contiguous_like(reflectors), contiguous_like(beta)


def _forward(x: Tensor, reflectors: Tensor, beta: Tensor) -> Tensor:
    y = chunk.forward(x, reflectors, beta).contiguous()
    # An op must not return its input.
    return y.clone() if y.data_ptr() == x.data_ptr() else y


def _backward(*args: Tensor) -> tuple[Tensor, ...]:
    return tuple(d.contiguous() for d in chunk.backward(*args))


FORWARD = register(
    "householder_product",
    "(Tensor x, Tensor reflectors, Tensor beta) -> Tensor",
    fake=_forward_fake,
    cpu=_forward,
    cuda=_forward,
)
BACKWARD = register(
    "householder_product_backward",
    "(Tensor dy, Tensor x, Tensor reflectors, Tensor beta) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    cpu=_backward,
    cuda=_backward,
)
householder_product_op = torch.ops.householder.householder_product.default
householder_product_backward_op = torch.ops.householder.householder_product_backward.default


class CompiledHouseholderProduct(torch.autograd.Function):
    """Differentiable op for `torch.compile`, whose tracer takes no custom forward mode."""

    @staticmethod
    def forward(x: Tensor, reflectors: Tensor, beta: Tensor) -> Tensor:
        return householder_product_op(x, reflectors, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return householder_product_backward_op(dy, *ctx.saved_tensors)


class HouseholderProductFunction(CompiledHouseholderProduct):
    """Differentiable op with every order, reverse and forward mode, and vmap."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():  # the graph of the gradient itself is wanted
            return chunk.backward(dy, *ctx.saved_tensors)
        return householder_product_backward_op(dy, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        primals = ctx.saved_tensors
        tangents = tuple(
            torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True)
        )
        return chunk.tangent(*primals, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        # [G, …] with a batched dimension before it is [size · G, …].
        x, reflectors, beta = (
            (x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0))
            for x, dim in zip(args, in_dims, strict=True)
        )
        folded = (x.flatten(0, 1), reflectors.flatten(0, 1), beta.flatten(0, 1))
        y = HouseholderProductFunction.apply(*folded)
        return y.unflatten(0, x.shape[:2]), 0
