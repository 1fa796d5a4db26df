"""Registration of `householder::path_attention` with PyTorch: schema, fakes, autograd, vmap.

The gradient is a second op in closed form; differentiating that one again is refused with the
remedy rather than answered wrongly.
"""

from __future__ import annotations

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
from householder.ops.path_attention import chunk
from householder.ops.path_attention.inputs import Inputs


def why_not_triton(q: Tensor, k: Tensor, v: Tensor, **others: Tensor | None) -> str | None:
    """Return why the Triton form cannot take these inputs, or None if it can.

    A pure function of device, dtypes and sizes, and of whether triton is installed.
    """
    tensors = {"q": q, "k": k, "v": v, **others}
    return _dispatch.why_not_triton(tensors, {"K": k.shape[-1], "V": v.shape[-1]})


def _kernels(form: str) -> Any:
    """Return the module of a form; triton is imported when first needed."""
    if form == "triton":
        from householder.ops.path_attention import triton

        return triton
    return chunk


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, form = args
    return _kernels(form).forward(*inputs)


def _backward(do: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, form = args
    # An op returns tensors only: an absent gradient is an empty tensor.
    grads = _kernels(form).backward(do, *inputs)
    return tuple(do.new_empty(0) if x is None else x for x in grads)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, form = args
    x = Inputs(*inputs)
    dtype = x.v.dtype if form == "triton" else x.dtype
    o = x.v.new_empty(*x.q.shape[:3], x.v.shape[-1], dtype=dtype)
    return o, x.v.new_empty(x.q.shape[:3], dtype=x.dtype)


def _backward_fake(do: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(do.new_empty(0) if x is None else contiguous_like(x) for x in inputs[:7])


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor w, Tensor beta, Tensor? g, Tensor? sinks, float scale, "
    "int? window, Tensor? cu_seqlens"
)
path_attention_op = register(
    "path_attention",
    f"({_INPUTS}, str form) -> (Tensor, Tensor)",
    fake=_forward_fake,
    kernel=_forward,
)
path_attention_backward_op = register(
    "path_attention_backward",
    f"(Tensor do, {_INPUTS}, Tensor o, Tensor lse, str form) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernel=_backward,
)


# Where the head axis of each input is, which a dimension batched by vmap joins.
_HEADS = {"q": 2, "k": 2, "v": 2, "w": 2, "beta": 2, "g": 2, "sinks": 0}


def _fold_inputs(size: int, dims: Any, inputs: Any) -> tuple[Any, ...]:
    """Fold the op's inputs, of which the first seven have heads."""
    if Inputs(*dims).cu_seqlens is not None:
        raise NotImplementedError(
            "path_attention: vmap over `cu_seqlens` is not supported, since it changes the "
            "lengths; call it once per packing"
        )
    folded = (
        fold_into_heads(x, dim, size, heads)
        for x, dim, heads in zip(inputs[:7], dims[:7], _HEADS.values(), strict=True)
    )
    return *folded, *inputs[7:]


class PathAttention(torch.autograd.Function):
    """The differentiable op, of the fields of `Inputs` and `form`. Dynamo wants them by name.

    `form` is "chunk", whose o is in the dtype of the computation, or "triton", whose o is in v's.
    """

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
        form: str,
    ) -> tuple[Tensor, Tensor]:
        return path_attention_op(q, k, v, w, beta, g, sinks, scale, window, cu_seqlens, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.window, cu_seqlens, ctx.form = inputs
        o, lse = output
        ctx.set_materialize_grads(False)  # zeros for lse would be one more kernel
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*tensors, cu_seqlens, o, lse)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if do is None:
            return (None,) * 11
        *tensors, cu_seqlens, o, lse = ctx.saved_tensors
        inputs = (*tensors, ctx.scale, ctx.window, cu_seqlens)
        grads = apply(PathAttentionBackward, do, *inputs, o, lse, ctx.form)
        wanted = (dx if x is not None else None for x, dx in zip(tensors, grads, strict=True))
        return *wanted, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        *inputs, form = args
        o, lse = PathAttention.apply(*_fold_inputs(size, in_dims[:-1], inputs), form)
        return (unfold_from_heads(o, size, 2), unfold_from_heads(lse, size, 2)), (2, 2)


class PathAttentionBackward(torch.autograd.Function):
    """The gradient, itself not differentiable: `(do, *inputs, o, lse, form)`."""

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
        form: str,
    ) -> tuple[Tensor, ...]:
        inputs = (q, k, v, w, beta, g, sinks, scale, window, cu_seqlens)
        return path_attention_backward_op(do, *inputs, o, lse, form)

    setup_context = staticmethod(keep_nothing)
    backward = first_order_only("path_attention: the blocked form")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        do, o, lse = (fold_into_heads(args[i], in_dims[i], size, 2) for i in (0, 11, 12))
        inputs = _fold_inputs(size, in_dims[1:11], args[1:11])
        grads = PathAttentionBackward.apply(do, *inputs, o, lse, args[13])
        # An absent gradient is an empty tensor and has no batched dimension.
        split = [
            (dx, None) if x is None else (unfold_from_heads(dx, size, heads), heads)
            for x, dx, heads in zip(inputs[:7], grads, _HEADS.values(), strict=True)
        ]
        return tuple(x for x, _ in split), tuple(dim for _, dim in split)
