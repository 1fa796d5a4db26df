"""Registration of `householder::householder_product` with PyTorch: schema, fakes, autograd, vmap.

The op works on `x [G, M, D]`, `reflectors [G, N, D]`, `beta [G, N]`; `api.py` brings every call to
this form. Without x the rows are the first M of the identity; without beta reflectors are
orthogonal. First-order gradients run a second op in closed form. Where
higher orders are wanted the gradient is computed by the same closed form in differentiable PyTorch
instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from householder.ops._dispatch import contiguous_like, register, why_not_triton
from householder.ops.householder_product import chunk
from householder.ops.wy import result_dtype


def why_no_kernels(x: Tensor | None, reflectors: Tensor, beta: Tensor | None) -> str | None:
    """Return why the Triton form cannot take these inputs, or None if it can."""
    return why_not_triton({"x": x, "reflectors": reflectors, "beta": beta}, {})


def _triton() -> Any:
    """Return the module of the kernels; triton is imported when first needed."""
    from householder.ops.householder_product import triton

    return triton


def _forward(
    x: Tensor | None,
    reflectors: Tensor,
    beta: Tensor | None,
    rows: int,
    transpose: bool,
    save: bool,
    form: str,
) -> tuple[Tensor, ...]:
    if form == "triton":
        y, *saved = _triton().forward(reflectors, beta, x, rows, transpose, save)
        return y, *(saved if save else (y.new_empty(0) for _ in range(NUM_SAVED)))
    y = _chunk_forward(x, reflectors, beta, rows, transpose).contiguous()
    # An op must not return its input.
    y = y.clone() if x is not None and y.data_ptr() == x.data_ptr() else y
    return y, *(y.new_empty(0) for _ in range(NUM_SAVED))


def _forward_alone(
    x: Tensor | None, reflectors: Tensor, beta: Tensor | None, rows: int, transpose: bool, form: str
) -> Tensor:
    if form == "triton":
        return _triton().forward(reflectors, beta, x, rows, transpose, False)[0]
    return _forward(x, reflectors, beta, rows, transpose, False, form)[0]


def _backward(
    dy: Tensor,
    x: Tensor | None,
    reflectors: Tensor,
    beta: Tensor | None,
    transpose: bool,
    *saved_and_form: Any,
) -> tuple[Tensor, ...]:
    *saved, form = saved_and_form
    if form == "triton":
        grads = _triton().backward(dy, reflectors, beta, x, transpose, *saved)
    else:
        grads = _chunk_backward(dy, x, reflectors, beta, transpose)
    # An op returns tensors only: an absent gradient is an empty tensor.
    return tuple(dy.new_empty(0) if d is None else d.contiguous() for d in grads)


def reverse(reflectors: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the reflectors and coefficients of the (conjugate) transpose; its own inverse."""
    return reflectors.flip(-2), None if beta is None else beta.flip(-1).conj()


def _chunk_forward(
    x: Tensor | None, reflectors: Tensor, beta: Tensor | None, rows: int, transpose: bool
) -> Tensor:
    if transpose:
        reflectors, beta = reverse(reflectors, beta)
    return chunk.forward(reflectors, beta, x, rows)


def _chunk_backward(
    dy: Tensor, x: Tensor | None, reflectors: Tensor, beta: Tensor | None, transpose: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    arguments = reverse(reflectors, beta) if transpose else (reflectors, beta)
    dx, dk, dbeta = chunk.backward(dy, x, *arguments)
    return (dx, *reverse(dk, dbeta)) if transpose else (dx, dk, dbeta)


def _chunk_tangent(
    x: Tensor | None, reflectors: Tensor, beta: Tensor | None, rows: int, transpose: bool,
    dx: Tensor | None, dreflectors: Tensor, dbeta: Tensor | None,
) -> Tensor:  # fmt: skip
    primals, tangents = (reflectors, beta), (dreflectors, dbeta)
    if transpose:
        primals, tangents = reverse(*primals), reverse(*tangents)
    return chunk.tangent(*primals, x, rows, dx, *tangents)


# What the Triton forward keeps for the gradient; see `triton.saved_shapes`.
_SAVED = "Tensor p, Tensor left, Tensor right, Tensor inverse, Tensor gram, Tensor coefficients"
NUM_SAVED = _SAVED.count("Tensor")


def _forward_fake(
    x: Tensor | None,
    reflectors: Tensor,
    beta: Tensor | None,
    rows: int,
    transpose: bool,
    save: bool,
    form: str,
) -> tuple[Tensor, ...]:
    G, _, D = reflectors.shape
    if x is not None:
        y = contiguous_like(x)
    else:
        dtype = reflectors.dtype
        if beta is not None and beta.is_complex():
            dtype = result_dtype(reflectors, beta)
        y = reflectors.new_empty(G, rows, D, dtype=dtype)
    if form != "triton" or not save:
        return y, *(y.new_empty(0) for _ in range(NUM_SAVED))
    shapes = _triton().saved_shapes(x, reflectors, rows)
    return y, *(y.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


def _forward_alone_fake(
    x: Tensor | None, reflectors: Tensor, beta: Tensor | None, rows: int, transpose: bool, form: str
) -> Tensor:
    return _forward_fake(x, reflectors, beta, rows, transpose, False, form)[0]


def _backward_fake(
    dy: Tensor, x: Tensor | None, reflectors: Tensor, beta: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(
        dy.new_empty(0) if t is None else contiguous_like(t) for t in (x, reflectors, beta)
    )


_INPUTS = "Tensor? x, Tensor reflectors, Tensor? beta"
householder_product_op = register(
    "householder_product",
    f"({_INPUTS}, int rows, bool transpose, bool save, str form) "
    f"-> ({', '.join(['Tensor'] * (1 + NUM_SAVED))})",
    fake=_forward_fake,
    kernel=_forward,
)
# Where no gradient is wanted: empty tensors in place of what is saved take the host as long as a
# launch.
householder_product_alone_op = register(
    "householder_product_alone",
    f"({_INPUTS}, int rows, bool transpose, str form) -> Tensor",
    fake=_forward_alone_fake,
    kernel=_forward_alone,
)
householder_product_backward_op = register(
    "householder_product_backward",
    f"(Tensor dy, {_INPUTS}, bool transpose, {_SAVED}, str form) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernel=_backward,
)


class CompiledHouseholderProduct(torch.autograd.Function):
    """Differentiable op for `torch.compile`, whose tracer takes no custom forward mode.

    `(x, reflectors, beta, rows, transpose, save, form)`; `save` says that a gradient is expected.
    It only spares work: under function transforms a caller cannot know, and then `backward` makes
    what was not saved. `form` is "chunk" or "triton".
    """

    @staticmethod
    def forward(
        x: Tensor | None,
        reflectors: Tensor,
        beta: Tensor | None,
        rows: int,
        transpose: bool,
        save: bool,
        form: str,
    ) -> tuple[Tensor, ...]:
        return householder_product_op(x, reflectors, beta, rows, transpose, save, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, reflectors, beta, ctx.rows, ctx.transpose, _, ctx.form = inputs
        saved = output[1:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, reflectors, beta, *saved)
        ctx.save_for_forward(x, reflectors, beta)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return _first_order(ctx, dy)


def _first_order(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients by the registered op."""
    x, reflectors, beta, *saved = ctx.saved_tensors
    if dy is None:
        return (None,) * 7
    if ctx.form == "triton" and saved[-1].numel() == 0:
        arguments = (x, reflectors, beta, ctx.rows, ctx.transpose, True, ctx.form)
        saved = householder_product_op(*arguments)[1:]
    dx, dk, dbeta = householder_product_backward_op(
        dy, x, reflectors, beta, ctx.transpose, *saved, ctx.form
    )
    dx = None if x is None else dx
    dbeta = None if beta is None else dbeta
    return dx, dk, dbeta, None, None, None, None


class HouseholderProductFunction(CompiledHouseholderProduct):
    """Differentiable op with every order, reverse and forward mode, and vmap."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dy is not None and torch.is_grad_enabled():  # the graph of the gradient itself is wanted
            x, reflectors, beta = ctx.saved_tensors[:3]
            grads = _chunk_backward(dy, x, reflectors, beta, ctx.transpose)
            return *grads, None, None, None, None
        return _first_order(ctx, dy)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        x, k, beta = ctx.saved_tensors[:3]
        dx, dk, dbeta = (
            torch.zeros_like(t) if t is not None and dt is None else dt
            for t, dt in zip((x, k, beta), tangents[:3], strict=True)
        )
        dy = _chunk_tangent(x, k, beta, ctx.rows, ctx.transpose, dx, dk, dbeta)
        return dy, *(None,) * NUM_SAVED

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        # [G, …] with a batched dimension before it is [size · G, …].
        folded = []
        for x, dim in zip(args[:3], in_dims[:3], strict=True):
            if x is not None:
                stacked = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
                x = stacked.expand(info.batch_size, *stacked.shape[1:]).flatten(0, 1)
            folded.append(x)
        rows, transpose, _, form = args[3:]
        y, *saved = HouseholderProductFunction.apply(*folded, rows, transpose, False, form)
        y = y.unflatten(0, (info.batch_size, y.shape[0] // info.batch_size))
        # Nothing was saved, for it could not be split by the batched dimension.
        saved = [x.new_empty(info.batch_size, 0) for x in saved]
        return (y, *saved), (0,) * (1 + NUM_SAVED)
