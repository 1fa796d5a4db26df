"""An RMSNorm with a gate, over the last dimension."""

from householder.ops.gated_rms_norm.api import gated_rms_norm

__all__ = ["gated_rms_norm"]
