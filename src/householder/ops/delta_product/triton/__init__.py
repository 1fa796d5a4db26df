"""`delta_product` as Triton kernels: forward, backward and the one-token step."""

from __future__ import annotations

import torch
from torch import Tensor

from householder.ops._triton import dot_precision, operand_dtype
from householder.ops.delta_product.triton import config
from householder.ops.delta_product.triton.activations import activate, activate_backward
from householder.ops.delta_product.triton.backward import backward, overwrites_u
from householder.ops.delta_product.triton.forward import forward
from householder.ops.delta_product.triton.step import step

__all__ = [
    "activate",
    "activate_backward",
    "backward",
    "forward",
    "overwrites_u",
    "saved_shapes",
    "step",
]


def saved_shapes(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, num_sequences: int | None
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Return shapes and dtypes of what `forward` saves, from the inputs' alone."""
    B, T, N, HV, V = v.shape
    K, dtype = k.shape[-1], operand_dtype(dot_precision(q, k, v))
    shapes = config.saved_shapes(B, T, N, HV, K, V, num_sequences)
    maps, growth = config.segment_shapes(B, T, N, HV, K, V, num_sequences)
    table = config.table_shape(B, T, N, HV, num_sequences, g is not None)
    return (
        *((shape, dtype) for shape in shapes),
        *((shape, torch.float32) for shape in (maps, growth, table)),
    )
