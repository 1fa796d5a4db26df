"""Registration of `householder::delta_product` with PyTorch: schema, fakes, autograd, vmap.

The dispatcher is the device switch. The gradient is a second op in closed form; differentiating
that one again is refused with the remedy rather than answered wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from householder.ops._dispatch import contiguous_like, register
from householder.ops.delta_product import chunk
from householder.ops.wy import compute_dtype


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, N, HV, V = v.shape
    K = k.shape[-1]
    dtype = compute_dtype(q, k, v, beta)
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    R = chunk.chunk_tokens(N, K) * N
    room = HV * chunk.max_chunks(B, T, N, K, sequences) if save else 0
    return (
        v.new_empty(B, T, HV, V),
        v.new_empty(B if sequences is None else sequences, HV, K, V, dtype=dtype),
        v.new_empty(room, K, V, dtype=dtype),
        v.new_empty(room, R, R, dtype=dtype),
        v.new_empty(room, R, V, dtype=dtype),
    )


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
    # An op returns tensors only: an absent gradient is an empty tensor.
    inputs = (q, k, v, beta, g, initial_state)
    return tuple(q.new_empty(0) if x is None else contiguous_like(x) for x in inputs)


def _backward(do: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(do.new_empty(0) if x is None else x for x in chunk.backward(do, *args))


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, float scale, "
    "Tensor? initial_state, Tensor? cu_seqlens"
)
FORWARD = register(
    "delta_product",
    f"({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    cpu=chunk.forward,
    cuda=chunk.forward,
)
BACKWARD = register(
    "delta_product_backward",
    f"(Tensor do, Tensor? dfinal_state, {_INPUTS}, Tensor states, Tensor ut, Tensor u) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    cpu=_backward,
    cuda=_backward,
)
delta_product_op = torch.ops.householder.delta_product.default
delta_product_backward_op = torch.ops.householder.delta_product_backward.default


# vmap: heads are independent, and so a batched dimension joins them. It goes before them, which
# keeps each group of value heads beside its key head. Below, where the head axis of each input is.
_HEADS = {"q": 2, "k": 3, "v": 3, "beta": 3, "g": 2, "initial_state": 1}


def _fold(x: Tensor | None, dim: int | None, size: int, heads: int) -> Tensor | None:
    """Join the batched dimension `dim` of `x` to its head axis."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, heads).flatten(heads, heads + 1)


def _fold_inputs(size: int, dims: Any, inputs: Any) -> tuple[Any, ...]:
    """Fold the op's inputs `(q, k, v, beta, g, scale, initial_state, cu_seqlens)`."""
    q, k, v, beta, g, scale, initial_state, cu_seqlens = inputs
    if dims[7] is not None:
        raise NotImplementedError(
            "delta_product: vmap over `cu_seqlens` is not supported, since it changes the lengths; "
            "call it once per packing"
        )
    q, k, v, beta, g, initial_state = (
        _fold(x, dim, size, heads)
        for x, dim, heads in zip(
            (q, k, v, beta, g, initial_state), (*dims[:5], dims[6]), _HEADS.values(), strict=True
        )
    )
    return q, k, v, beta, g, scale, initial_state, cu_seqlens


def _unfold(x: Tensor, size: int, heads: int) -> Tensor:
    return x.unflatten(heads, (size, x.shape[heads] // size))


class DeltaProduct(torch.autograd.Function):
    """Differentiable `(q, k, v, beta, g, scale, initial_state, cu_seqlens, save)`.

    `save` says that a gradient is expected. It only spares work: under function transforms a
    caller cannot know, and then `backward` makes what was not saved.
    """

    @staticmethod
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
    ) -> tuple[Tensor, ...]:
        return delta_product_op(q, k, v, beta, g, scale, initial_state, cu_seqlens, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, beta, g, ctx.scale, initial_state, cu_seqlens, _ = inputs
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
        dq, dk, dv, dbeta, dg, dinitial = DeltaProductBackward.apply(do, dstate, *inputs, *saved)
        dg = None if g is None else dg
        dinitial = None if initial_state is None else dinitial
        return dq, dk, dv, dbeta, dg, None, dinitial, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        inputs = _fold_inputs(size, in_dims[:8], args[:8])
        o, state, *saved = DeltaProduct.apply(*inputs, False)
        # Nothing was saved, for it could not be split by the batched dimension.
        saved = [x.new_empty(size, *x.shape) for x in saved]
        return (_unfold(o, size, 2), _unfold(state, size, 1), *saved), (2, 1, 0, 0, 0)


class DeltaProductBackward(torch.autograd.Function):
    """The gradient, itself not differentiable: `(do, dstate, *inputs, states, ut, u)`."""

    @staticmethod
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
    ) -> tuple[Tensor, ...]:
        inputs = (q, k, v, beta, g, scale, initial_state, cu_seqlens)
        if states.shape[0] == 0:
            _, _, states, ut, u = delta_product_op(*inputs, True)
        return delta_product_backward_op(do, dstate, *inputs, states, ut, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError(
            "delta_product: the chunked form has first-order gradients only, and a second order "
            'was asked for; use impl="reference", which has every order'
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        do, dstate = (
            _fold(x, dim, size, heads)
            for x, dim, heads in zip(args[:2], in_dims[:2], (2, 1), strict=True)
        )
        inputs = _fold_inputs(size, in_dims[2:10], args[2:10])
        nothing = [args[4].new_empty(0) for _ in range(3)]
        grads = DeltaProductBackward.apply(do, dstate, *inputs, *nothing)
        # An absent gradient is an empty tensor and has no batched dimension.
        split = [
            (dx, None) if dx.dim() == 1 else (_unfold(dx, size, heads), heads)
            for dx, heads in zip(grads, _HEADS.values(), strict=True)
        ]
        return tuple(x for x, _ in split), tuple(dim for _, dim in split)
