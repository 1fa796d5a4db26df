"""Products of Householder transformations as fast, trainable building blocks of neural networks."""

from householder.hf.gated_delta import use_in_transformers
from householder.maps import Composition, HouseholderProduct, LinearMap
from householder.ops import (
    PathCache,
    delta_product,
    delta_product_step,
    householder_frame,
    householder_product,
    path_attention,
)

__version__ = "0.1.0"

__all__ = [
    "Composition",
    "HouseholderProduct",
    "LinearMap",
    "PathCache",
    "delta_product",
    "delta_product_step",
    "householder_frame",
    "householder_product",
    "path_attention",
    "use_in_transformers",
]
