"""The softmax attention layers by the name a configuration file gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from householder.nn.attention_baselines import ForgettingAttention, RotaryAttention
from householder.nn.path_attention import PaTHAttention
from householder.nn.softmax_attention import SoftmaxAttention

ATTENTIONS: Mapping[str, Callable[..., SoftmaxAttention]] = {
    "path_attention": PaTHAttention,
    "forgetting_path_attention": partial(PaTHAttention, use_forget_gate=True),
    "rotary_attention": RotaryAttention,
    "forgetting_attention": ForgettingAttention,
}
"""Makers of the softmax attention layers by the name a configuration file gives them."""
