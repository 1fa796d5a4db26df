"""Keys and values of softmax attention in memory that stays where it is, for decoding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueBuffer:
    """Hold the keys and values of the tokens so far, with room for those to come.

    Appending a token changes the buffer in place and reads no number from the device, so that a
    CUDA graph can capture it. What is not filled yet is masked. With a window there is room for as
    many tokens, and a new one takes the place of the oldest.

    Args:
        k: keys so far `[B, T, H, K]`.
        v: values so far `[B, T, H, V]`.
        g: their log forget gates `[B, T, HQ]`, or None.
        mask: bool `[B, T]`, False for what fills rows up in front; None where nothing does.
        num_tokens: how many tokens there must be room for, those so far included.
        window: how many tokens a query sees, its own included; all earlier ones if None.

    Attributes:
        length: of the sequences, int64 `[1]`, on their device.

    Raises:
        ValueError: there are more than `num_tokens` already.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        mask: Tensor | None,
        *,
        num_tokens: int,
        window: int | None,
    ) -> None:
        B, T = k.shape[:2]
        if num_tokens < T:
            raise ValueError(
                f"KeyValueBuffer: `num_tokens` must be at least {T}, which are held, got "
                f"{num_tokens}; give a larger one"
            )
        room = max(1, num_tokens if window is None else min(window, num_tokens))
        kept = torch.arange(max(0, T - room), T, device=k.device)
        slots = kept % room
        self.length = torch.full((1,), T, dtype=torch.int64, device=k.device)
        self._k, self._v = (
            x.new_zeros(B, room, *x.shape[2:]).index_copy_(1, slots, x[:, kept]) for x in (k, v)
        )
        seen = k.new_ones(B, T, dtype=torch.bool) if mask is None else mask
        self._seen = seen.new_zeros(B, room).index_copy_(1, slots, seen[:, kept])
        self._total: Tensor | None = None
        if g is not None:
            # In float64, or a weak gate after a strong one would drown in the sum's rounding.
            totals = g.double().cumsum(1)
            self._total = totals.new_zeros(B, 1, g.shape[2])
            if T:
                self._total.copy_(totals[:, -1:])
            self._totals = totals.new_zeros(B, room, g.shape[2])
            self._totals.index_copy_(1, slots, totals[:, kept])

    def append(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
        """Add a token and return what its query attends to.

        Args:
            q: query `[B, 1, HQ, K]`.
            k: key `[B, 1, H, K]`.
            v: value `[B, 1, H, V]`.
            g: log forget gate `[B, 1, HQ]`, where those so far had some.

        Returns:
            `[B, 1, HQ, V]`.
        """
        slot = self.length % self._k.shape[1]
        self._k.index_copy_(1, slot, k.to(self._k.dtype))
        self._v.index_copy_(1, slot, v.to(self._v.dtype))
        self._seen.index_fill_(1, slot, True)
        self.length += 1
        mask = self._seen[:, None, None]
        if self._total is not None and g is not None:
            self._total += g.double()
            self._totals.index_copy_(1, slot, self._total)
            bias = (self._total - self._totals).transpose(1, 2).unsqueeze(2)
            mask = bias.to(q.dtype).masked_fill(~mask, float("-inf"))
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            self._k.transpose(1, 2).to(q.dtype),
            self._v.transpose(1, 2).to(q.dtype),
            attn_mask=mask,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return o.transpose(1, 2)
