"""The activation of a gated MLP."""

from householder.ops.swiglu.api import swiglu

__all__ = ["swiglu"]
