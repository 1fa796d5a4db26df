"""The loss and the gradient of a block of logits, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_gradient_(logits: Tensor, labels: Tensor, ignore: int, gradient: bool) -> Tensor:
    """Return each row's cross entropy; with `gradient`, logits become what it has of them.

    That is the softmax, less one at the label, and zero in rows that are ignored. Computed in
    float32 at least.

    Args:
        logits: `[M, V]`.
        labels: int64 `[M]`.
        ignore: label of the rows that are ignored; their loss is zero.
        gradient: whether `logits` are overwritten.

    Returns:
        `[M]`, float32 at least.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    meant = labels != ignore
    at = labels.where(meant, 0).unsqueeze(1)
    log_sum = wide.logsumexp(1, keepdim=True)
    losses = (log_sum - wide.gather(1, at)).squeeze(1).where(meant, 0.0)
    if gradient:
        softmax = (wide - log_sum).exp_()
        softmax.scatter_add_(1, at, softmax.new_full(at.shape, -1.0))
        logits.copy_(softmax.mul_(meant.unsqueeze(1)))
    return losses
