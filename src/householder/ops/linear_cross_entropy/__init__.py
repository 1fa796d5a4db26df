"""The cross entropy of a linear head, without all of its logits at once."""

from householder.ops.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
