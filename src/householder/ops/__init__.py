"""Functions on tensors that have kernels."""

from householder.ops.delta_product import delta_product, delta_product_step
from householder.ops.householder_product import householder_frame, householder_product
from householder.ops.path_attention import PathCache, path_attention

__all__ = [
    "PathCache",
    "delta_product",
    "delta_product_step",
    "householder_frame",
    "householder_product",
    "path_attention",
]
