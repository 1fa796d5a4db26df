"""Registration of `householder::path_attention` with PyTorch: schema, fakes, autograd, vmap.

The gradient is a second op in closed form; differentiating that one again is refused with the
remedy rather than answered wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from householder.ops._dispatch import (
    contiguous_like,
    fold_into_heads,
    register,
    unfold_from_heads,
    with_signature,
)
from householder.ops.path_attention import chunk
from householder.ops.wy import compute_dtype


def _backward(do: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    # An op returns tensors only: an absent gradient is an empty tensor.
    grads = chunk.backward(do, *inputs)
    return tuple(do.new_empty(0) if x is None else x for x in grads)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(q, k, v, w, beta)
    o = v.new_empty(*q.shape[:3], v.shape[-1], dtype=dtype)
    return o, v.new_empty(q.shape[:3], dtype=dtype)


def _backward_fake(do: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(do.new_empty(0) if x is None else contiguous_like(x) for x in inputs[:7])


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor w, Tensor beta, Tensor? g, Tensor? sinks, float scale, "
    "int? window, Tensor? cu_seqlens"
)
FORWARD = register(
    "path_attention",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    fake=_forward_fake,
    cpu=chunk.forward,
    cuda=chunk.forward,
)
BACKWARD = register(
    "path_attention_backward",
    f"(Tensor do, {_INPUTS}, Tensor o, Tensor lse) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    cpu=_backward,
    cuda=_backward,
)
path_attention_op = torch.ops.householder.path_attention.default
path_attention_backward_op = torch.ops.householder.path_attention_backward.default


# Where the head axis of each input is, which a dimension batched by vmap joins.
_HEADS = {"q": 2, "k": 2, "v": 2, "w": 2, "beta": 2, "g": 2, "sinks": 0}


def _fold_inputs(size: int, dims: Any, inputs: Any) -> tuple[Any, ...]:
    """Fold the op's ten inputs, of which the first seven have heads."""
    if dims[9] is not None:
        raise NotImplementedError(
            "path_attention: vmap over `cu_seqlens` is not supported, since it changes the "
            "lengths; call it once per packing"
        )
    folded = (
        fold_into_heads(x, dim, size, heads)
        for x, dim, heads in zip(inputs[:7], dims[:7], _HEADS.values(), strict=True)
    )
    return *folded, *inputs[7:10]


class PathAttention(torch.autograd.Function):
    """Differentiable `(q, k, v, w, beta, g, sinks, scale, window, cu_seqlens)`."""

    @staticmethod
    @with_signature
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        beta: Tensor,
        g: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        window: int | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return path_attention_op(q, k, v, w, beta, g, sinks, scale, window, cu_seqlens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.window, cu_seqlens = inputs
        o, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*tensors, cu_seqlens, o, lse)

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        *tensors, cu_seqlens, o, lse = ctx.saved_tensors
        q, k, v, w, beta, g, sinks = tensors
        grads = PathAttentionBackward.apply(
            do, q, k, v, w, beta, g, sinks, ctx.scale, ctx.window, cu_seqlens, o, lse
        )
        wanted = (dx if x is not None else None for x, dx in zip(tensors, grads, strict=True))
        return *wanted, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        o, lse = PathAttention.apply(*_fold_inputs(size, in_dims, args))
        return (unfold_from_heads(o, size, 2), unfold_from_heads(lse, size, 2)), (2, 2)


class PathAttentionBackward(torch.autograd.Function):
    """The gradient, itself not differentiable: `(do, *inputs, o, lse)`."""

    @staticmethod
    @with_signature
    def forward(
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        beta: Tensor,
        g: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        window: int | None,
        cu_seqlens: Tensor | None,
        o: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (q, k, v, w, beta, g, sinks, scale, window, cu_seqlens)
        return path_attention_backward_op(do, *inputs, o, lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError(
            "path_attention: the chunked form has first-order gradients only, and a second order "
            'was asked for; use impl="reference", which has every order'
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        do, o, lse = (fold_into_heads(args[i], in_dims[i], size, 2) for i in (0, 11, 12))
        inputs = _fold_inputs(size, in_dims[1:11], args[1:11])
        grads = PathAttentionBackward.apply(do, *inputs, o, lse)
        # An absent gradient is an empty tensor and has no batched dimension.
        split = [
            (dx, None) if x is None else (unfold_from_heads(dx, size, heads), heads)
            for x, dx, heads in zip(inputs[:7], grads, _HEADS.values(), strict=True)
        ]
        return tuple(x for x, _ in split), tuple(dim for _, dim in split)
