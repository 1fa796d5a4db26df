"""Models made of the mixers in `householder.nn`."""

from householder.models.block import Block, SwiGLU
from householder.models.causal_lm import CausalLM
from householder.models.causal_lm_config import PRESETS, CausalLMConfig
from householder.models.generation import Decoder
from householder.models.pretrained import load_causal_lm, save_causal_lm
from householder.models.sequence_tagger import SequenceTagger, SequenceTaggerConfig

__all__ = [
    "PRESETS",
    "Block",
    "CausalLM",
    "CausalLMConfig",
    "Decoder",
    "SequenceTagger",
    "SequenceTaggerConfig",
    "SwiGLU",
    "load_causal_lm",
    "save_causal_lm",
]
