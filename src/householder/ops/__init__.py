"""Functions on tensors that have kernels."""

from householder.ops.delta_product import delta_product, delta_product_step
from householder.ops.gated_rms_norm import gated_rms_norm
from householder.ops.householder_product import householder_frame, householder_product
from householder.ops.linear_cross_entropy import linear_cross_entropy
from householder.ops.path_attention import PathCache, path_attention
from householder.ops.short_convolution import short_convolution, short_convolution_step_
from householder.ops.swiglu import swiglu, swiglu_linear

__all__ = [
    "PathCache",
    "delta_product",
    "delta_product_step",
    "gated_rms_norm",
    "householder_frame",
    "householder_product",
    "linear_cross_entropy",
    "path_attention",
    "short_convolution",
    "short_convolution_step_",
    "swiglu",
    "swiglu_linear",
]
