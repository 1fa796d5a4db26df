"""The public function `linear_cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor

from householder.ops import _checks
from householder.ops._dispatch import (
    apply,
    autocast_dtype,
    check_impl,
    runs_triton,
    without_autocast,
)
from householder.ops.linear_cross_entropy import reference
from householder.ops.linear_cross_entropy.op import LinearCrossEntropy, why_not_triton

# Of one block of logits, where none is given. On a CPU 2^24 in float32 are 64 MiB, and with their
# softmax 128; on a GPU 2^27 in bfloat16 are 256 MiB, and enough rows for products that fill it.
# Measured on an H200, 32,768 rows of 1,024 and 32,000 tokens, forward and backward: 26.8 ms with
# 2^24, 21.9 with 2^26.
_LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}
# Rows come in multiples of this where there are so many: the tensor cores' tiles are no larger.
_ROWS = 256

IMPLS = ("triton", "chunk", "reference")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logits_at_once: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the mean cross entropy of the logits `x Wᵀ`, of which few exist at a time.

    The rows are worked through in blocks:

        loss = 1/M Σ_m (log Σ_v exp(w_v · x_m) − w_{label_m} · x_m)

    Where a gradient is wanted it is made at once, while a block's logits are in memory. Under
    autocast the products are made in its dtype, sums in float32.

    Args:
        x: `[..., D]`, M vectors in all.
        weight: W `[V, D]`, one row per token of the vocabulary.
        labels: int64 `[...]`, from 0 to V − 1, or −100 where nothing is asked. Another number is an
            error on the CPU, and on a GPU makes the loss NaN.
        logits_at_once: how many logits may be in memory; None for 2²⁴, on a GPU 2²⁷.
        impl: `"chunk"` (in blocks, on any device), `"triton"` (the same with one GPU kernel for all
            that is not a product, for float32, bfloat16 and float16), `"reference"` (all logits at
            once, by PyTorch), or `"auto"`, which is `"triton"` on a CUDA device for what the kernel
            takes, and `"chunk"` otherwise.

    Returns:
        A scalar in float32 at least, in nats: the mean over the labels that are not −100, 0 where
        there are none.

    Raises:
        ValueError: a shape or device does not fit, or `impl` is unknown.
        TypeError: an argument is no tensor, or has the wrong type.
        NotImplementedError: `impl="triton"` cannot take the inputs, or a second-order gradient of a
            form other than the reference is asked for.

    Gradients:
        First order, to `x` and `weight`. Higher orders, forward mode and vmap: `impl="reference"`.

    Examples:
        >>> import torch
        >>> x, weight = torch.randn(2, 5, 4), torch.randn(7, 4)
        >>> labels = torch.randint(7, (2, 5))
        >>> loss = linear_cross_entropy(x, weight, labels, logits_at_once=14)
        >>> logits = torch.nn.functional.linear(x, weight)
        >>> plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        >>> torch.allclose(loss, plain)
        True
    """
    op = "linear_cross_entropy"
    check_impl(op, impl, IMPLS)
    _check_inputs(op, x, weight, labels)
    x, labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    if impl == "reference":
        return reference.forward(x, weight, labels)
    dtype = _product_dtype(x, weight)
    use_triton = runs_triton(op, impl, x.device, lambda: why_not_triton(x, weight, dtype))
    if logits_at_once is None:
        logits_at_once = _LOGITS_AT_ONCE.get(x.device.type, _LOGITS_AT_ONCE["cpu"])
    rows = max(1, logits_at_once // weight.shape[0])
    rows -= rows % _ROWS if rows > _ROWS else 0
    grad = torch.is_grad_enabled()
    save = (grad and x.requires_grad, grad and weight.requires_grad)
    form = "triton" if use_triton else "chunk"
    return _without_autocast(x, weight, labels, dtype, rows, save, form)


@without_autocast
def _without_autocast(x: Tensor, *args: object) -> Tensor:
    loss, *_ = apply(LinearCrossEntropy, x, *args)
    return loss


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    # Autocast leaves float64 alone.
    return dtype if dtype == torch.float64 else autocast_dtype(x.device) or dtype


def _check_inputs(op: str, x: Tensor, weight: Tensor, labels: Tensor) -> None:
    tensors = {"x": x, "weight": weight, "labels": labels}
    for name, tensor in tensors.items():
        _checks.check_tensor(op, name, tensor)
    _checks.check_floating(op, {"x": x, "weight": weight})
    _checks.check_same_device(op, tensors)
    if labels.dtype != torch.int64:
        raise TypeError(
            f"{op}: `labels` must be int64, got {labels.dtype}; convert them with .long()"
        )
    if weight.dim() != 2 or not len(weight) or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: `x` must be [..., D] and `weight` [V, D], V ≥ 1, got shapes "
            f"{list(x.shape)} and {list(weight.shape)}; the last sizes must agree"
        )
    _checks.check_shape(op, "labels", labels, "[...], one per vector of x", x.shape[:-1])
