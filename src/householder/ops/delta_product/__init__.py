"""Products of Householder transformations along time, with a matrix state."""

from householder.ops.delta_product.api import delta_product, delta_product_step

__all__ = ["delta_product", "delta_product_step"]
