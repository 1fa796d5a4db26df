"""The definition of `delta_product`: one readable loop over tokens and reflectors.

Runs on any device and in any floating dtype, and PyTorch differentiates it to any order.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from householder.ops._dispatch import without_autocast
from householder.ops.wy import compute_dtype


@without_autocast
def step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token.

    Args:
        q: `[B, H, K]`.
        k: `[B, N, H, K]`.
        v: `[B, N, HV, V]`, HV a multiple of H.
        beta: `[B, N, HV]`.
        g: `[B, HV]` or None.
        scale: factor on the output.
        state: `[B, HV, K, V]`, in the dtype of the computation.

    Returns:
        `o [B, HV, V]` and the new state, both in the state's dtype.
    """
    group = v.shape[-2] // k.shape[-2]
    q, k = (x.to(state.dtype).repeat_interleave(group, dim=-2) for x in (q, k))
    v, beta = v.to(state.dtype), beta.to(state.dtype)
    if g is not None:
        state = state * g.to(state.dtype).exp()[..., None, None]
    for j in range(k.shape[1]):
        column, v_j, beta_j = k[:, j, :, :, None], v[:, j, :, None], beta[:, j, :, None, None]
        recalled = column.mT @ state  # a row, as is v_j
        state = torch.addcmul(state, column, beta_j * (v_j - recalled))
    return ((scale * q)[..., None, :] @ state).squeeze(-2), state


@without_autocast
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over whole sequences; arguments as in the public `delta_product`."""
    B, _, _, HV, V = v.shape
    K = k.shape[-1]
    dtype = compute_dtype(q, k, v, beta)
    if cu_seqlens is None:
        # A batch row each: the tokens of all rows advance together.
        segments = [(slice(None), 0, q.shape[1])]
    else:
        # Packed: one batch row, sequence s in its tokens cu_seqlens[s] .. cu_seqlens[s + 1].
        bounds = cu_seqlens.tolist()
        segments = [(slice(0, 1), lo, hi) for lo, hi in pairwise(bounds)]

    outputs, final_states = [], []
    for s, (row, lo, hi) in enumerate(segments):
        if initial_state is None:
            state = q.new_zeros(B, HV, K, V, dtype=dtype)
        else:
            state = (initial_state if cu_seqlens is None else initial_state[s : s + 1]).to(dtype)
        for t in range(lo, hi):
            g_t = None if g is None else g[row, t]
            o_t, state = step(q[row, t], k[row, t], v[row, t], beta[row, t], g_t, scale, state)
            outputs.append(o_t)
        final_states.append(state)
    o = torch.stack(outputs, dim=1) if outputs else v.new_zeros(B, 0, HV, V, dtype=dtype)
    return o.to(v.dtype), torch.cat(final_states)
