"""Models made of the mixers in `householder.nn`."""

from householder.models.block import Block, SwiGLU
from householder.models.sequence_tagger import SequenceTagger, SequenceTaggerConfig

__all__ = ["Block", "SequenceTagger", "SequenceTaggerConfig", "SwiGLU"]
