"""Registration of `householder::short_convolution` with PyTorch: schema, fakes, autograd, vmap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from householder.ops import _dispatch
from householder.ops._dispatch import (
    apply,
    contiguous_like,
    first_order_only,
    fold_into_heads,
    keep_nothing,
    register,
    unfold_from_heads,
    with_signature,
)

# How many tokens an output sees in the Triton kernels.
TRITON_MAX_WIDTH = 4


def why_not_triton(width: int, tensors: Mapping[str, Tensor | None]) -> str | None:
    """Return why the Triton form cannot take these inputs, or None if it can."""
    if width > TRITON_MAX_WIDTH:
        return f"W must be at most {TRITON_MAX_WIDTH}, got {width}"
    return _dispatch.why_not_triton(tensors, {})


def _kernels() -> Any:
    from householder.ops.short_convolution import triton

    return triton


def _forward(*args: Any) -> Tensor:
    return _kernels().forward(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    dx, dweight, dhistory = _kernels().backward(*args)
    # An op returns tensors only: an absent gradient is an empty tensor.
    return dx, dweight, dx.new_empty(0) if dhistory is None else dhistory


def _step(*args: Any) -> Tensor:
    return _kernels().step_(*args)


def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    return contiguous_like(x)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, history: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    dhistory = x.new_empty(0) if history is None else contiguous_like(history)
    return contiguous_like(x), contiguous_like(weight), dhistory


_INPUTS = "Tensor x, Tensor weight, Tensor? history, Tensor? position, bool silu"
# On a CPU it is Triton's interpreter that runs these kernels.
short_convolution_op = register(
    "short_convolution", f"({_INPUTS}) -> Tensor", fake=_forward_fake, kernel=_forward
)
short_convolution_backward_op = register(
    "short_convolution_backward",
    f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernel=_backward,
)
short_convolution_step_op = register(
    "short_convolution_step_",
    "(Tensor x, Tensor weight, Tensor(a!) state, bool silu) -> Tensor",
    fake=_forward_fake,
    kernel=_step,
)

# The axes of channels in x, weight and history, which a dimension batched by vmap joins.
_CHANNELS = (2, 0, 2)


def _fold(size: int, dims: Any, x: Any, weight: Any, history: Any) -> tuple[Any, ...]:
    return tuple(
        fold_into_heads(y, dim, size, axis)
        for y, dim, axis in zip((x, weight, history), dims, _CHANNELS, strict=True)
    )


def _refuse_positions(dim: int | None) -> None:
    if dim is not None:
        raise NotImplementedError(
            "short_convolution: vmap over `cu_seqlens` is not supported; call it once per packing"
        )


class Convolve(torch.autograd.Function):
    """Differentiable `(x, weight, history, position, silu)`, by the kernels."""

    @staticmethod
    @with_signature
    def forward(
        x: Tensor, weight: Tensor, history: Tensor | None, position: Tensor | None, silu: bool
    ) -> Tensor:
        return short_convolution_op(x, weight, history, position, silu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # Once: activation checkpointing hands each out a single time.
        dx, dweight, dhistory = apply(ConvolveBackward, dy, *saved, ctx.silu)
        history = saved[2]
        return dx, dweight, None if history is None else dhistory, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        _refuse_positions(in_dims[3])
        folded = _fold(info.batch_size, in_dims[:3], *args[:3])
        return unfold_from_heads(Convolve.apply(*folded, *args[3:]), info.batch_size, 2), 2


class ConvolveBackward(torch.autograd.Function):
    """The gradient, itself not differentiable: `(dy, x, weight, history, position, silu)`."""

    @staticmethod
    @with_signature
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        history: Tensor | None,
        position: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, ...]:
        return short_convolution_backward_op(dy, x, weight, history, position, silu)

    setup_context = staticmethod(keep_nothing)
    backward = first_order_only("short_convolution: the Triton form")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        _refuse_positions(in_dims[4])
        dy = fold_into_heads(args[0], in_dims[0], size, 2)
        folded = _fold(size, in_dims[1:4], *args[1:4])
        grads = ConvolveBackward.apply(dy, *folded, *args[4:])
        present = (True, True, args[3] is not None)
        split = tuple(
            (unfold_from_heads(y, size, axis), axis) if there else (y, None)
            for y, there, axis in zip(grads, present, _CHANNELS, strict=True)
        )
        return tuple(y for y, _ in split), tuple(axis for _, axis in split)
