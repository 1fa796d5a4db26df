"""Functions on tensors that have kernels."""

from householder.ops.delta_product import delta_product, delta_product_step
from householder.ops.householder_product import householder_frame, householder_product
from householder.ops.linear_cross_entropy import linear_cross_entropy
from householder.ops.path_attention import PathCache, path_attention

__all__ = [
    "PathCache",
    "delta_product",
    "delta_product_step",
    "householder_frame",
    "householder_product",
    "linear_cross_entropy",
    "path_attention",
]
