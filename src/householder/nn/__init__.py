"""Modules that own parameters and call maps or ops."""

from householder.nn import parametrizations
from householder.nn.activations import GroupSort, HouseholderActivation, MaxMin
from householder.nn.attention_baselines import ForgettingAttention, KeyValueState, RotaryAttention
from householder.nn.attentions import ATTENTIONS
from householder.nn.frames import OrthonormalFrame
from householder.nn.mixer import DeltaProductMixer, MixerState
from householder.nn.normalization import GatedRMSNorm
from householder.nn.orthogonal import OrthogonalLinear, StiefelLinear
from householder.nn.path_attention import PaTHAttention, PaTHState
from householder.nn.published import (
    MIXERS,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedDeltaProduct,
)
from householder.nn.short_convolution import ShortConvolution
from householder.nn.softmax_attention import SoftmaxAttention
from householder.nn.svd import SVDLinear

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
    "GroupSort",
    "HouseholderActivation",
    "KeyValueState",
    "MaxMin",
    "MixerState",
    "OrthogonalLinear",
    "OrthonormalFrame",
    "PaTHAttention",
    "PaTHState",
    "RotaryAttention",
    "SVDLinear",
    "ShortConvolution",
    "SoftmaxAttention",
    "StiefelLinear",
    "parametrizations",
]
