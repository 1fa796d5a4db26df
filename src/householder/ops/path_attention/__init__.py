"""Softmax attention with products of Householder transformations between tokens as positions."""

from householder.ops.path_attention.api import path_attention

__all__ = ["path_attention"]
