"""`path_attention` as Triton kernels."""

from householder.ops.path_attention.triton.attend import forward
from householder.ops.path_attention.triton.gradients import backward

__all__ = ["backward", "forward"]
