"""What a gated delta layer of transformers calls, answered by this library's ops.

The functions have the arguments of those in `transformers.models.*.modeling_*` that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from householder.ops import delta_product, delta_product_step, short_convolution

# What transformers adds to the squared length of a query or key before it takes the root.
_NORM_EPS = 1e-6


def over_sequences(impl: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the gated delta rule over whole sequences, in a form of `delta_product`."""

    def chunk_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Answer as transformers' function does; `chunk_size` is of no account."""
        return delta_product(
            query,
            key.unsqueeze(2),
            value.unsqueeze(2),
            beta.unsqueeze(2),
            g,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=packed_bounds(cu_seqlens, seq_idx),
            qk_norm="l2" if use_qk_l2norm_in_kernel else None,
            qk_norm_eps=_NORM_EPS,
            impl=impl,
        )

    return chunk_gated_delta_rule


def over_tokens(impl: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the gated delta rule for one token after another."""
    whole = over_sequences(impl)

    def recurrent_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Answer as transformers' function does."""
        if initial_state is None or query.shape[1] != 1:
            return whole(
                query,
                key,
                value,
                g,
                beta,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                **options,
            )
        o, state = delta_product_step(
            query.squeeze(1),
            key,  # its axis of one token is that of one reflection
            value,
            beta,
            g.squeeze(1),
            state=initial_state,
            qk_norm="l2" if use_qk_l2norm_in_kernel else None,
            qk_norm_eps=_NORM_EPS,
        )
        return o.unsqueeze(1), state if output_final_state else None

    return recurrent_gated_delta_rule


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Convolve channels `[B, D, T]` over their past, those of packed sequences each over its own.

    transformers' own function lets the first tokens of a packed sequence see the one before.
    """
    with_silu = bias is None and activation in ("silu", "swish")
    y = short_convolution(
        hidden_states.mT,
        weight.unsqueeze(1),
        cu_seqlens=packed_bounds(cu_seq_lens_q, seq_idx),
        silu=with_silu,
    ).mT
    return y if with_silu else _activated(y, bias, activation)


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Convolve the next tokens `[B, D, T]`; the last inputs `conv_state` move on in place."""
    T, width = hidden_states.shape[-1], weight.shape[-1]
    seen = torch.cat([conv_state, hidden_states.to(conv_state.dtype)], dim=-1)
    conv_state.copy_(seen[..., T:])
    if T == 1:
        # On one CPU core a quarter of the time of PyTorch's convolution (1024 channels).
        wide = seen[..., -width:].to(torch.promote_types(seen.dtype, torch.float32))
        y = (wide * weight).sum(-1, keepdim=True)
    else:
        y = short_convolution(seen.mT, weight.unsqueeze(1)).mT[..., -T:]
    return _activated(y.to(hidden_states.dtype), bias, activation)


def _activated(y: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    from transformers.activations import ACT2FN

    if bias is not None:
        y = y + bias.to(y.dtype).unsqueeze(-1)
    if activation in ("silu", "swish"):
        return F.silu(y)
    return y if activation is None else ACT2FN[activation](y)


def packed_bounds(cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    """Return where packed sequences begin and end, from either of two ways to say so.

    Args:
        cu_seqlens: the bounds themselves `[S + 1]`, of any integer dtype, or None.
        seq_idx: the number of each token's sequence `[1, T]`, or None.

    Returns:
        int32 `[S + 1]`, or None where neither is given.
    """
    if cu_seqlens is not None:
        return cu_seqlens.to(torch.int32)
    if seq_idx is None:
        return None
    numbers = seq_idx.flatten()
    begins = (numbers[1:] != numbers[:-1]).nonzero().flatten() + 1
    ends = begins.new_tensor([0]), begins, begins.new_tensor([len(numbers)])
    return torch.cat(ends).to(torch.int32)
