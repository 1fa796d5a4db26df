"""`path_attention` as Triton kernels."""

from householder.ops.path_attention.triton.portions import backward, forward

__all__ = ["backward", "forward"]
