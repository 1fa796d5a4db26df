"""The activation of a gated MLP, and its product with the matrix behind it."""

from householder.ops.swiglu.api import swiglu, swiglu_linear

__all__ = ["swiglu", "swiglu_linear"]
