"""The loss of a language model, without all of its logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""The label of a position that has no part in the loss."""

# Of one block of logits: 2^24 in float32 are 64 MiB, and with their gradient and the softmax 192.
_LOGITS_AT_ONCE = 2**24


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, logits_at_once: int = _LOGITS_AT_ONCE
) -> Tensor:
    """Return the mean cross entropy of the logits `x Wᵀ`, of which few exist at a time.

    The rows are worked through in blocks, and a block's logits are made anew in the backward pass:
    one more product with W, and `logits_at_once` numbers in place of M · V.

    Args:
        x: `[..., D]`, M vectors in all.
        weight: W `[V, D]`, one row per token of the vocabulary.
        labels: int64 `[...]`, from 0 to V − 1, or `IGNORE_INDEX`.
        logits_at_once: how many logits may be in memory.

    Returns:
        A scalar in float32 at least, in nats: the mean over the labels that are not ignored, 0
        where there are none.

    Gradients:
        Every order, to `x` and `weight`.

    Examples:
        >>> x, weight = torch.randn(2, 5, 4), torch.randn(7, 4)
        >>> labels = torch.randint(7, (2, 5))
        >>> loss = linear_cross_entropy(x, weight, labels, logits_at_once=14)
        >>> logits = torch.nn.functional.linear(x, weight)
        >>> plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        >>> torch.allclose(loss, plain)
        True
    """
    x, labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    count = (labels != IGNORE_INDEX).sum()
    rows = max(1, logits_at_once // weight.shape[0])
    if x.shape[0] <= rows:
        return _summed_loss(x, weight, labels) / count.clamp(min=1)
    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    for x_block, labels_block in zip(x.split(rows), labels.split(rows), strict=True):
        total = total + checkpoint(_summed_loss, x_block, weight, labels_block, use_reentrant=False)
    return total / count.clamp(min=1)


def _summed_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    # In half precision the sum of exponentials would lose the small ones.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
