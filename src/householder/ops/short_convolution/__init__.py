"""A short causal convolution along the tokens, one kernel per channel."""

from householder.ops.short_convolution.api import short_convolution, short_convolution_step_

__all__ = ["short_convolution", "short_convolution_step_"]
