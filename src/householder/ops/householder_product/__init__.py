"""Products of Householder transformations applied to vectors."""

from householder.ops.householder_product.api import householder_frame, householder_product

__all__ = ["householder_frame", "householder_product"]
