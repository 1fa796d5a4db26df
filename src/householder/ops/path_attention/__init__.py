"""Softmax attention with products of Householder transformations between tokens as positions."""

from householder.ops.path_attention.api import path_attention
from householder.ops.path_attention.cache import PathCache

__all__ = ["PathCache", "path_attention"]
