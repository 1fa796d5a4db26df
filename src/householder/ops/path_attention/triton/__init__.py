"""`path_attention` as Triton kernels."""

from householder.ops.path_attention.triton.attend import forward

__all__ = ["forward"]
