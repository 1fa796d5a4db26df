"""The public functions `short_convolution` and `short_convolution_step_`."""

from __future__ import annotations

import torch
from torch import Tensor

from householder.ops import _checks
from householder.ops._dispatch import apply, check_impl, runs_triton
from householder.ops.short_convolution import reference
from householder.ops.short_convolution.op import (
    Convolve,
    short_convolution_step_op,
    why_not_triton,
)

IMPLS = ("triton", "reference")


def short_convolution(
    x: Tensor,
    weight: Tensor,
    history: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    silu: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Convolve each channel over its own recent past.

        y_t = Σ_i weight_i · x_{t − W + 1 + i}        i = 0 … W − 1

    in float32 at least, and through SiLU where that is asked for.

    Args:
        x: `[B, T, D]`; with `cu_seqlens`, `[1, T, D]` holding S sequences end to end.
        weight: `[D, 1, W]`, as a depthwise `torch.nn.Conv1d` has it.
        history: what came before, `[B, W − 1, D]`; zeros if None. Not with `cu_seqlens`.
        cu_seqlens: int32 `[S + 1]`, where the packed sequences begin and end; they do not see one
            another.
        silu: y ← y · σ(y).
        impl: `"triton"` (GPU kernels, for float32, bfloat16 and float16, W ≤ 4), `"reference"`
            (shifted multiply-adds in PyTorch), or `"auto"`, which is `"triton"` on a CUDA device
            for what the kernels take, and `"reference"` otherwise.

    Returns:
        y `[B, T, D]` in the dtype of `x`.

    Raises:
        ValueError: a shape, device or `cu_seqlens` does not fit, or `impl` is unknown.
        TypeError: an argument is no tensor, or is not real floating point.
        NotImplementedError: `impl="triton"` cannot take the inputs, or a second-order gradient of
            it is asked for.

    Gradients:
        To `x`, `weight` and `history`: first order by the kernels, every order by the reference.

    Examples:
        >>> x, weight = torch.randn(2, 6, 8), torch.randn(8, 1, 4)
        >>> y = short_convolution(x, weight)
        >>> conv1d = torch.nn.functional.conv1d(x.mT, weight, padding=3, groups=8)[..., :6].mT
        >>> torch.allclose(y, conv1d, atol=1e-5)
        True
    """
    op = "short_convolution"
    check_impl(op, impl, IMPLS)
    tensors = {"x": x, "weight": weight, "history": history}
    _checks.check_tensors(op, tensors, optional=("history",))
    if x.dim() != 3:
        raise ValueError(
            f"{op}: `x` must be [B, T, D], got shape {list(x.shape)}; put the channels last"
        )
    B, T, D = x.shape
    width = weight.shape[-1] if weight.dim() else 1
    _checks.check_shape(op, "weight", weight, "[D, 1, W]", (D, 1, width))
    if history is not None:
        shape = (B, width - 1, D)
        _checks.check_shape(op, "history", history, "[B, W − 1, D]", shape)
    position = None
    if cu_seqlens is not None:
        _checks.check_cu_seqlens(op, cu_seqlens, x)
        if history is not None:
            raise ValueError(
                f"{op}: `history` must be None with `cu_seqlens`, got both; put what came before a "
                "sequence in front of it"
            )
        position = _positions(cu_seqlens, T)
    if runs_triton(op, impl, x.device, lambda: why_not_triton(weight.shape[-1], tensors)):
        return apply(Convolve, x, weight, history, position, silu)
    return reference.forward(x, weight, history, position, silu)


def short_convolution_step_(
    x: Tensor, weight: Tensor, state: Tensor, *, silu: bool = False, impl: str = "auto"
) -> Tensor:
    """Convolve one more token, and let the state move on by it in place. Without gradients.

    Args:
        x: `[B, D]`.
        weight: `[D, 1, W]`.
        state: the last W − 1 inputs `[B, W − 1, D]`, contiguous, which is changed.
        silu: as in `short_convolution`.
        impl: likewise.

    Returns:
        y `[B, D]` in the dtype of `x`.

    Raises:
        ValueError: a shape or device does not fit, `state` is not contiguous, or `impl` is unknown.
        TypeError: an argument is no tensor, or is not real floating point.
        NotImplementedError: gradients are on, or `impl="triton"` cannot take the inputs.

    Examples:
        >>> x, weight, state = torch.randn(2, 8), torch.randn(8, 1, 4), torch.zeros(2, 3, 8)
        >>> with torch.no_grad():
        ...     y = short_convolution_step_(x, weight, state)
        >>> torch.equal(state[:, -1], x)
        True
    """
    op = "short_convolution_step_"
    check_impl(op, impl, IMPLS)
    tensors = {"x": x, "weight": weight, "state": state}
    _checks.check_tensors(op, tensors)
    if x.dim() != 2:
        raise ValueError(
            f"{op}: `x` must be [B, D], got shape {list(x.shape)}; give a single token"
        )
    B, D = x.shape
    width = weight.shape[-1] if weight.dim() else 1
    _checks.check_shape(op, "weight", weight, "[D, 1, W]", (D, 1, width))
    _checks.check_shape(op, "state", state, "[B, W − 1, D]", (B, width - 1, D))
    if not state.is_contiguous():
        raise ValueError(
            f"{op}: `state` must be contiguous, got strides {state.stride()}; copy it once"
        )
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: a state that is changed has no gradients, and gradients are on; use "
            "torch.no_grad(), or short_convolution with `history`"
        )
    if runs_triton(op, impl, x.device, lambda: why_not_triton(weight.shape[-1], tensors)):
        return short_convolution_step_op(x, weight, state, silu)
    y = reference.forward(x.unsqueeze(1), weight, state, None, silu).squeeze(1)
    state.copy_(
        torch.cat([state[:, 1:], x.unsqueeze(1).to(state.dtype)], dim=1)[:, : state.shape[1]]
    )
    return y


def _positions(cu_seqlens: Tensor, T: int) -> Tensor:
    """Return how many tokens of its sequence are before each of T packed tokens, int32 `[T]`."""
    token = torch.arange(T, device=cu_seqlens.device, dtype=torch.int32)
    # Not in cu_seqlens[1:]: compiled for a GPU by PyTorch 2.11, a slice is searched from where its
    # tensor begins, and sequences would see one another.
    sequence = torch.searchsorted(cu_seqlens.contiguous(), token, right=True) - 1
    return token - cu_seqlens[sequence]
