"""The definition of `path_attention`: one readable loop over tokens.

Runs on any device and in any floating dtype, and PyTorch differentiates it to any order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from householder.ops._dispatch import without_autocast
from householder.ops.path_attention.inputs import Inputs


@without_autocast
def forward(*inputs: Any) -> Tensor:
    """Attend token by token; `inputs` are those of `Inputs`."""
    x = Inputs(*inputs)
    q, k, v, w, beta, g, sinks, scale, window, cu_seqlens = x
    dtype, first_query = x.dtype, x.first_query
    B, _, HQ, _ = q.shape
    # Every query head gets a copy of its key head.
    k, values, w, beta = (y.to(dtype).repeat_interleave(x.group, dim=2) for y in (k, v, w, beta))
    bounds = [0, k.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs = []
    for lo, hi in pairwise(bounds):
        keys = k.new_zeros(B, 0, HQ, k.shape[-1])
        decay = k.new_zeros(B, 0, HQ)
        for t in range(lo, hi):
            # The reflector of a token acts on all keys before it, its forget gate on their logits.
            along = beta[:, t, None] * torch.einsum("bhk,bjhk->bjh", w[:, t], keys)
            keys = torch.cat([keys - along.unsqueeze(-1) * w[:, t, None], k[:, t : t + 1]], dim=1)
            if g is not None:
                decay = decay + g[:, t, None].to(dtype)
            decay = torch.cat([decay, decay.new_zeros(B, 1, HQ)], dim=1)
            if t < first_query:
                continue
            query = q[:, t - first_query].to(dtype)
            first = 0 if window is None else max(0, t + 1 - lo - window)
            logits = scale * torch.einsum("bhk,bjhk->bjh", query, keys[:, first:])
            logits = logits + decay[:, first:]
            if sinks is not None:
                # A sink takes part in the softmax and has no value.
                logits = torch.cat([logits, sinks.to(dtype).expand(B, 1, HQ)], dim=1)
            attention = logits.softmax(dim=1)[:, : t + 1 - lo - first]
            outputs.append(torch.einsum("bjh,bjhv->bhv", attention, values[:, lo + first : t + 1]))
    o = torch.stack(outputs, dim=1) if outputs else values[:, :0]
    return o.to(v.dtype)
