"""What every form of `path_attention` gets, by name."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from householder.ops.wy import compute_dtype


class Inputs(NamedTuple):
    """The op's inputs in their order; `T` are the last of `tokens` tokens, those with a query."""

    q: Tensor  # [B, T, HQ, K]
    k: Tensor  # [B, tokens, H, K]
    v: Tensor  # [B, tokens, H, V]
    w: Tensor  # [B, tokens, H, K]
    beta: Tensor  # [B, tokens, H]
    g: Tensor | None  # [B, tokens, HQ]
    sinks: Tensor | None  # [HQ]
    scale: float
    window: int | None
    cu_seqlens: Tensor | None  # of packed sequences; then every token has a query

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def first_query(self) -> int:
        """The first token that has a query."""
        return self.k.shape[1] - self.q.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation outside of the Triton form."""
        return compute_dtype(self.q, self.k, self.v, self.w, self.beta)
