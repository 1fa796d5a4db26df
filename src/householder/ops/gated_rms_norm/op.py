"""Registration of `householder::gated_rms_norm` with PyTorch: schema, fakes, autograd, vmap."""

from __future__ import annotations

from typing import Any

import torch
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

# The widest rows that a tile holds whole.
TRITON_MAX_ROW = 2048


def why_not_triton(**tensors: Tensor | None) -> str | None:
    """Return why the Triton form cannot take these inputs, or None if it can."""
    reason = _dispatch.why_not_triton(tensors, {})
    x = tensors["x"]
    if reason is None and x is not None and x.shape[-1] > TRITON_MAX_ROW:
        return f"rows must have at most {TRITON_MAX_ROW} entries, got {x.shape[-1]}"
    return reason


def _kernels() -> Any:
    from householder.ops.gated_rms_norm import triton

    return triton


def _forward(*args: Any) -> Tensor:
    return _kernels().forward(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return _kernels().backward(*args)


def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    return contiguous_like(x)


def _backward_fake(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    return contiguous_like(x), contiguous_like(gate), contiguous_like(weight)


# On a CPU it is Triton's interpreter that runs these kernels.
gated_rms_norm_op = register(
    "gated_rms_norm",
    "(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor",
    fake=_forward_fake,
    kernel=_forward,
)
gated_rms_norm_backward_op = register(
    "gated_rms_norm_backward",
    "(Tensor dy, Tensor x, Tensor gate, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernel=_backward,
)


def _each(function: Any, size: int, dims: Any, args: Any) -> tuple[Any, Any]:
    """Call `function` for each entry of the dimensions that vmap batches, and stack the results.

    A weight may be batched, of which one call knows one only.
    """
    results = [
        function(
            *(x if dim is None else x.select(dim, i) for x, dim in zip(args, dims, strict=True))
        )
        for i in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


class GatedRMSNorm(torch.autograd.Function):
    """Differentiable `(x, gate, weight, eps)`, by the kernels."""

    @staticmethod
    @with_signature
    def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        return gated_rms_norm_op(x, gate, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return *apply(GatedRMSNormBackward, dy, *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _each(GatedRMSNorm.apply, info.batch_size, in_dims, args)


class GatedRMSNormBackward(torch.autograd.Function):
    """The gradient, itself not differentiable: `(dy, x, gate, weight, eps)`."""

    @staticmethod
    @with_signature
    def forward(
        dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        return gated_rms_norm_backward_op(dy, x, gate, weight, eps)

    setup_context = staticmethod(keep_nothing)
    backward = first_order_only("gated_rms_norm: the Triton form")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _each(GatedRMSNormBackward.apply, info.batch_size, in_dims, args)
