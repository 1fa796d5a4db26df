"""Modules that own parameters and call maps or ops."""

from householder.nn.attention_baselines import ForgettingAttention, KeyValueState, RotaryAttention
from householder.nn.attentions import ATTENTIONS
from householder.nn.mixer import DeltaProductMixer, MixerState
from householder.nn.normalization import GatedRMSNorm
from householder.nn.path_attention import PaTHAttention, PaTHState
from householder.nn.published import (
    MIXERS,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedDeltaProduct,
)
from householder.nn.short_convolution import ShortConvolution

__all__ = [
    "ATTENTIONS",
    "MIXERS",
    "DeltaNet",
    "DeltaProduct",
    "DeltaProductMixer",
    "ForgettingAttention",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "GatedRMSNorm",
    "KeyValueState",
    "MixerState",
    "PaTHAttention",
    "PaTHState",
    "RotaryAttention",
    "ShortConvolution",
]
