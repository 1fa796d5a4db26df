"""Registration of `householder::delta_product` with PyTorch: schema, fakes, autograd, vmap.

The dispatcher is the device switch. The gradient is a second op in closed form; differentiating
that one again is refused with the remedy rather than answered wrongly.
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
from householder.ops.delta_product import chunk
from householder.ops.wy import compute_dtype

# How many reflectors of a token the Triton kernels are made for.
TRITON_MAX_REFLECTORS = 8


def why_not_triton(q: Tensor, k: Tensor, v: Tensor, **others: Tensor | None) -> str | None:
    """Return why the Triton form cannot take these inputs, or None if it can.

    A pure function of device, dtypes and sizes, and of whether triton is installed.
    """
    tensors = {"q": q, "k": k, "v": v, **others}
    reason = _dispatch.why_not_triton(tensors, {"K": k.shape[-1], "V": v.shape[-1]})
    if reason is None and v.shape[-3] > TRITON_MAX_REFLECTORS:
        return f"N must be at most {TRITON_MAX_REFLECTORS}, got {v.shape[-3]}"
    return reason


def _kernels(form: str) -> Any:
    """Return the module of a form; triton is imported when first needed."""
    if form == "triton":
        from householder.ops.delta_product import triton

        return triton
    return chunk


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *inputs, save, form = args
    return _kernels(form).forward(*inputs, save)


def _backward(do: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, form = args
    # An op returns tensors only: an absent gradient is an empty tensor.
    grads = _kernels(form).backward(do, *inputs)
    return tuple(do.new_empty(0) if x is None else x for x in grads)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
    form: str,
) -> tuple[Tensor, ...]:
    B, T, _, HV, V = v.shape
    K = k.shape[-1]
    dtype = compute_dtype(q, k, v, beta)
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = v.new_empty(B, T, HV, V)
    state = v.new_empty(B if sequences is None else sequences, HV, K, V, dtype=dtype)
    saved = _kernels(form).saved_shapes(q, k, v, beta, g, sequences)
    if not save:
        saved = tuple(((0, *shape[1:]), dtype) for shape, dtype in saved)
    return o, state, *(v.new_empty(shape, dtype=dtype) for shape, dtype in saved)


def _backward_over_u(do: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, form = args
    u = inputs[-4]
    dq, dk, _, *others = _kernels(form).backward(do, *inputs, u)
    return tuple(do.new_empty(0) if x is None else x for x in (dq, dk, *others))


def _backward_fake(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    inputs = (q, k, v, beta, g, initial_state)
    return tuple(q.new_empty(0) if x is None else contiguous_like(x) for x in inputs)


def _backward_over_u_fake(*args: Any) -> tuple[Tensor, ...]:
    dq, dk, _, *others = _backward_fake(*args)
    return (dq, dk, *others)


def _backward_anew(do: Tensor, dfinal_state: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *inputs, form = args
    kernels = _kernels(form)
    saved = kernels.forward(*inputs, True)[2:]
    q, k, v, _, _, scale, *_ = inputs
    # Nobody else holds what was made here.
    over_u = form == "triton" and kernels.overwrites_u(q, k, v, scale)
    dv = (saved[2],) if over_u else ()
    grads = kernels.backward(do, dfinal_state, *inputs, *saved, *dv)
    return tuple(do.new_empty(0) if x is None else x for x in grads)


def _step(*args: Any) -> tuple[Tensor, Tensor]:
    return _kernels("triton").step(*args)


def _step_inplace(*args: Any) -> Tensor:
    return _kernels("triton").step(*args, inplace=True)[0]


def _step_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    state: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape[0], *v.shape[2:]), contiguous_like(state)


def _step_inplace_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape[0], *v.shape[2:])


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, float scale, "
    "Tensor? initial_state, Tensor? cu_seqlens"
)
# What the forward keeps: states, triangles, writes, maps and growth of segments, coefficients.
_SAVED = "Tensor states, Tensor ut, Tensor u, Tensor maps, Tensor growth, Tensor table"
delta_product_op = register(
    "delta_product",
    f"({_INPUTS}, bool save, str form) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    kernel=_forward,
)
delta_product_backward_op = register(
    "delta_product_backward",
    f"(Tensor do, Tensor? dfinal_state, {_INPUTS}, {_SAVED}, str form) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernel=_backward,
)
# Leaves the gradient of v where `u` was, which has its shape and dtype, and something else where
# `ut` was.
delta_product_backward_over_u_op = register(
    "delta_product_backward_over_u",
    f"(Tensor do, Tensor? dfinal_state, {_INPUTS}, Tensor states, Tensor(a!) ut, Tensor(b!) u, "
    "Tensor maps, Tensor growth, Tensor table, str form) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_over_u_fake,
    kernel=_backward_over_u,
)
# For a forward pass that kept nothing: makes that anew.
delta_product_backward_anew_op = register(
    "delta_product_backward_anew",
    f"(Tensor do, Tensor? dfinal_state, {_INPUTS}, str form) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernel=_backward_anew,
)
_STEP_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, float scale"
_STEP_OPTIONS = (
    "Tensor? A_log=None, Tensor? dt_bias=None, float? qk_eps=None, float? beta_scale=None"
)
delta_product_step_op = register(
    "delta_product_step",
    f"({_STEP_INPUTS}, Tensor state, {_STEP_OPTIONS}) -> (Tensor, Tensor)",
    fake=_step_fake,
    kernel=_step,
)
delta_product_step_inplace_op = register(
    "delta_product_step_",
    f"({_STEP_INPUTS}, Tensor(a!) state, {_STEP_OPTIONS}) -> Tensor",
    fake=_step_inplace_fake,
    kernel=_step_inplace,
)


def _may_overwrite_u(q: Tensor, k: Tensor, v: Tensor, scale: float, form: str) -> bool:
    """Return whether the gradient of v may take the place of what the forward saved as `u`.

    Nobody reads that again if this backward pass frees its graph. Outside of a backward pass, and
    where one is traced, it stays.
    """
    return (
        form == "triton"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and _kernels(form).overwrites_u(q, k, v, scale)
    )


# Where the head axis of each input is, which a dimension batched by vmap joins.
_HEADS = {"q": 2, "k": 3, "v": 3, "beta": 3, "g": 2, "initial_state": 1}


def _fold_inputs(size: int, dims: Any, inputs: Any) -> tuple[Any, ...]:
    """Fold the op's inputs `(q, k, v, beta, g, scale, initial_state, cu_seqlens)`."""
    q, k, v, beta, g, scale, initial_state, cu_seqlens = inputs
    if dims[7] is not None:
        raise NotImplementedError(
            "delta_product: vmap over `cu_seqlens` is not supported, since it changes the lengths; "
            "call it once per packing"
        )
    q, k, v, beta, g, initial_state = (
        fold_into_heads(x, dim, size, heads)
        for x, dim, heads in zip(
            (q, k, v, beta, g, initial_state), (*dims[:5], dims[6]), _HEADS.values(), strict=True
        )
    )
    return q, k, v, beta, g, scale, initial_state, cu_seqlens


class DeltaProduct(torch.autograd.Function):
    """Differentiable `(q, k, v, beta, g, scale, initial_state, cu_seqlens, save, form)`.

    `save` says to keep for the gradient more than the inputs, which spares `backward` making it
    anew. Under function transforms nothing is kept. `form` is "chunk" or "triton".
    """

    @staticmethod
    @with_signature
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        save: bool,
        form: str,
    ) -> tuple[Tensor, ...]:
        return delta_product_op(q, k, v, beta, g, scale, initial_state, cu_seqlens, save, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, beta, g, ctx.scale, initial_state, cu_seqlens, _, ctx.form = inputs
        saved = output[2:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, beta, g, initial_state, cu_seqlens, *saved)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dstate: Tensor | None, *_: Any) -> tuple[Any, ...]:
        q, k, v, beta, g, initial_state, cu_seqlens, *saved = ctx.saved_tensors
        if do is None:
            do = v.new_zeros(*q.shape[:2], *v.shape[3:])
        inputs = (q, k, v, beta, g, ctx.scale, initial_state, cu_seqlens)
        grads = apply(DeltaProductBackward, do, dstate, *inputs, *saved, ctx.form)
        dq, dk, dv, dbeta, dg, dinitial = grads
        dg = None if g is None else dg
        dinitial = None if initial_state is None else dinitial
        return dq, dk, dv, dbeta, dg, None, dinitial, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        inputs = _fold_inputs(size, in_dims[:8], args[:8])
        o, state, *saved = DeltaProduct.apply(*inputs, False, args[9])
        # Nothing was saved, for it could not be split by the batched dimension.
        saved = [x.new_empty(size, *x.shape) for x in saved]
        outputs = (unfold_from_heads(o, size, 2), unfold_from_heads(state, size, 1), *saved)
        return outputs, (2, 1, *(0 for _ in saved))


class DeltaProductBackward(torch.autograd.Function):
    """The gradient, itself not differentiable: `(do, dstate, *inputs, *saved, form)`."""

    @staticmethod
    @with_signature
    def forward(
        do: Tensor,
        dstate: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        scale: float,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        states: Tensor,
        ut: Tensor,
        u: Tensor,
        maps: Tensor,
        growth: Tensor,
        table: Tensor,
        form: str,
    ) -> tuple[Tensor, ...]:
        inputs = (q, k, v, beta, g, scale, initial_state, cu_seqlens)
        saved = (states, ut, u, maps, growth, table)
        if states.shape[0] == 0:
            return delta_product_backward_anew_op(do, dstate, *inputs, form)
        if _may_overwrite_u(q, k, v, scale, form):
            dq, dk, *others = delta_product_backward_over_u_op(do, dstate, *inputs, *saved, form)
            return dq, dk, u.detach(), *others
        return delta_product_backward_op(do, dstate, *inputs, *saved, form)

    setup_context = staticmethod(keep_nothing)
    backward = first_order_only("delta_product: the chunked form")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        do, dstate = (
            fold_into_heads(x, dim, size, heads)
            for x, dim, heads in zip(args[:2], in_dims[:2], (2, 1), strict=True)
        )
        inputs = _fold_inputs(size, in_dims[2:10], args[2:10])
        nothing = [args[4].new_empty(0) for _ in args[10:-1]]
        grads = DeltaProductBackward.apply(do, dstate, *inputs, *nothing, args[-1])
        # An absent gradient is an empty tensor and has no batched dimension.
        split = [
            (dx, None) if dx.dim() == 1 else (unfold_from_heads(dx, size, heads), heads)
            for dx, heads in zip(grads, _HEADS.values(), strict=True)
        ]
        return tuple(x for x, _ in split), tuple(dim for _, dim in split)
