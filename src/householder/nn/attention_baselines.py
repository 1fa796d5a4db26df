"""Softmax attention with other positions, on PyTorch's own kernels, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from householder.nn._checks import (
    check_positive_float,
    check_positive_int,
    check_state_tensor,
    check_state_type,
)
from householder.nn.key_value_buffer import KeyValueBuffer
from householder.nn.softmax_attention import AttentionOptions, SoftmaxAttention
from householder.ops.wy import compute_dtype


class KeyValueState(NamedTuple):
    """What a `RotaryAttention` or `ForgettingAttention` remembers of the tokens so far.

    Attributes:
        k: keys `[B, T, H, K]`, rotated in `RotaryAttention`.
        v: values `[B, T, H, K]`.
        g: log forget gates `[B, T, HQ]` in `ForgettingAttention`, else `None`.
        mask: bool `[B, T]`, False for what fills rows up in front; `None` where nothing does.
    """

    k: Tensor
    v: Tensor
    g: Tensor | None
    mask: Tensor | None = None

    def extended(self, k: Tensor, v: Tensor, g: Tensor | None) -> KeyValueState:
        """Return the state with more tokens behind."""
        mask = self.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(k.shape[:2])], dim=1)
        return KeyValueState(
            torch.cat([self.k, k], dim=1),
            torch.cat([self.v, v], dim=1),
            None if self.g is None or g is None else torch.cat([self.g, g], dim=1),
            mask,
        )


class KeyValueAttention(SoftmaxAttention):
    """What the layers share that run on PyTorch's `scaled_dot_product_attention`."""

    reserved_state = KeyValueBuffer

    def init_state(self, batch_size: int) -> KeyValueState:
        """Return the state before the first token, for `batch_size` sequences."""
        check_positive_int(f"{type(self).__name__}.init_state", "batch_size", batch_size)
        weight = self.k_proj.weight
        empty = weight.new_empty(batch_size, 0, self.num_key_heads, self.head_dim)
        return KeyValueState(empty, empty, self._no_gates(batch_size))

    def reserve(self, state: KeyValueState, num_tokens: int) -> KeyValueBuffer:
        """Return the state in a `KeyValueBuffer` with room for `num_tokens` in all, for `step_`."""
        return KeyValueBuffer(
            state.k, state.v, state.g, state.mask, num_tokens=num_tokens, window=self.window
        )

    def _no_gates(self, batch_size: int) -> Tensor | None:
        return None

    def _check_state(self, state: KeyValueState, batch_size: int) -> None:
        check_state_type(type(self).__name__, state, KeyValueState)
        shape = (batch_size, state.k.shape[1], self.num_key_heads, self.head_dim)
        for name, x in (("state.k", state.k), ("state.v", state.v)):
            check_state_tensor(type(self).__name__, name, x, shape)


class RotaryAttention(KeyValueAttention):
    """Attend with rotary positions: queries and keys rotate by angles that grow with the position.

    Coordinates c and c + K/2 of a query or key at position t are a point in the plane, which is
    turned by the angle t · base^(−2c/K). A logit then depends on the positions only through their
    difference. It is the usual position encoding, here for comparison.

    A state's tensors are not changed; gradients flow through them.

    Args:
        d_model: size of the input and output vectors.
        num_heads: HQ, heads of queries.
        base: of the angles.
        **options: any other option of `SoftmaxAttention`. `head_dim` must be even; `qk_norm` comes
            before the rotation.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or two options do not fit together.

    Examples:
        >>> layer = RotaryAttention(32, num_heads=4)
        >>> layer(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])

    References:
        RoFormer: Enhanced Transformer with Rotary Position Embedding (Su et al., 2021),
        https://arxiv.org/abs/2104.09864
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        base: float = 10_000.0,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, **options)
        check_positive_float("RotaryAttention", "base", base)
        if self.head_dim % 2:
            raise ValueError(
                f"RotaryAttention: `head_dim` must be even, got {self.head_dim}; "
                "coordinates turn in pairs"
            )
        self.base = base
        self.reset_parameters()

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: KeyValueState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, KeyValueState]:
        if cu_seqlens is not None and flash_takes(q):
            cu_seqlens = cu_seqlens.to(q.device)
            position = packed_positions(cu_seqlens, q.shape[1])
            q, k = (rotate(y, position, self.base) for y in (q, k))
            return packed_attention(q, k, v, cu_seqlens, self.window), KeyValueState(k, v, None)
        first = 0 if state is None else state.k.shape[1]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, KeyValueState]:
            position = torch.arange(first, first + q.shape[1], device=q.device)
            q, k = (rotate(y, position, self.base) for y in (q, k))
            seen = KeyValueState(k, v, None, mask)
            if state is not None:
                seen = state.extended(k, v, None)
            return causal_attention(q, seen.k, seen.v, None, self.window, seen.mask), seen

        return for_each_sequence(attend, cu_seqlens, q, k, v)

    def _attend_one(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: KeyValueBuffer
    ) -> Tensor:
        q, k = (rotate(y, state.length, self.base) for y in (q, k))
        return state.append(q, k, v)


class ForgettingAttention(KeyValueAttention):
    """Attend without positions, with forget gates: g_{j+1} + … + g_i is added to the logit.

    g is log σ(W x + b), one per query head: every token lowers the weight of all earlier ones. The
    layer `f_proj` (HQ) has a bias, which starts at zero. The sums are handed to PyTorch's attention
    as a bias `[B, HQ, T, T]` in the dtype of the queries, so memory grows with T². `PaTHAttention`
    with a forget gate has the same gates, and the reflectors.

    A state's tensors are not changed; gradients flow through them.

    Args:
        d_model: size of the input and output vectors.
        num_heads: HQ, heads of queries.
        **options: any other option of `SoftmaxAttention`.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or two options do not fit together.

    Examples:
        >>> layer = ForgettingAttention(32, num_heads=4)
        >>> layer(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])

    References:
        Forgetting Transformer: Softmax Attention with a Forget Gate (Lin et al., 2025),
        https://arxiv.org/abs/2503.02130
    """

    def __init__(
        self, d_model: int, *, num_heads: int, **options: Unpack[AttentionOptions]
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, **options)
        self.f_proj = self._linear(d_model, num_heads, bias=True)
        self.reset_parameters()

    def _no_gates(self, batch_size: int) -> Tensor:
        weight = self.f_proj.weight
        dtype = compute_dtype(weight)
        return weight.new_empty(batch_size, 0, self.num_heads, dtype=dtype)

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: KeyValueState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, KeyValueState]:
        g = self._log_gates(x)

        def attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, KeyValueState]:
            seen = KeyValueState(k, v, g, mask)
            if state is not None:
                seen = state.extended(k, v, g)
            assert seen.g is not None
            # In float64, or a weak gate after a strong one would drown in the sum's rounding.
            total = seen.g.double().cumsum(1).transpose(1, 2)
            bias = total[:, :, -q.shape[1] :, None] - total[:, :, None]
            bias = bias.to(q.dtype)
            return causal_attention(q, seen.k, seen.v, bias, self.window, seen.mask), seen

        return for_each_sequence(attend, cu_seqlens, q, k, v, g)

    def _attend_one(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: KeyValueBuffer
    ) -> Tensor:
        return state.append(q, k, v, self._log_gates(x))

    def _log_gates(self, x: Tensor) -> Tensor:
        logits = self.f_proj(x)
        return F.logsigmoid(logits.to(compute_dtype(logits)))

    def _check_state(self, state: KeyValueState, batch_size: int) -> None:
        super()._check_state(state, batch_size)
        if state.g is None:
            raise ValueError(
                "ForgettingAttention: `state.g` must be log gates [B, T, HQ], got None; "
                "use a state of this layer"
            )
        shape = (batch_size, state.k.shape[1], self.num_heads)
        check_state_tensor("ForgettingAttention", "state.g", state.g, shape)


def rotate(x: Tensor, position: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn the coordinate pairs of `x [B, T, H, K]` by angles proportional to `position [T]`.

    Computed in float32 at least, the angles in float64.

    Examples:
        >>> rotate(torch.ones(1, 2, 1, 2), torch.tensor([0, 1])).flatten().round(decimals=4)
        tensor([ 1.0000,  1.0000, -0.3012,  1.3818])
    """
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (position[:, None] * speed)[:, None]
    dtype = compute_dtype(x)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    a, b = x.to(dtype).split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: int | None = None,
    keys_mask: Tensor | None = None,
) -> Tensor:
    """Attend with the last tokens of a sequence, on PyTorch's own kernels.

    Args:
        q: `[B, T', HQ, K]`, queries of the last T' of T tokens.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        bias: added to the logits, `[B, HQ, T', T]`, or None.
        window: how many tokens a query sees, its own included; all earlier ones if None.
        keys_mask: bool `[B, T]`, False for keys that only their own query sees, or None.

    Returns:
        `[B, T', HQ, V]`.
    """
    num_queries = q.shape[1]
    if window is not None and num_queries > 0:
        # What no query sees is left out: a decoded token costs its window.
        seen = window + num_queries - 1
        k, v = k[:, -seen:], v[:, -seen:]
        bias = None if bias is None else bias[..., -seen:]
        keys_mask = None if keys_mask is None else keys_mask[:, -seen:]
    num_keys = k.shape[1]
    windowed = window is not None and num_queries > 1 and window < num_keys
    mask = None
    if bias is not None or keys_mask is not None or windowed or 1 < num_queries < num_keys:
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
        mask = ones.tril(num_keys - num_queries)
        if windowed:
            assert window is not None
            mask = mask.triu(num_keys - num_queries - window + 1)
        if keys_mask is not None:
            own = ones.tril(num_keys - num_queries).triu(num_keys - num_queries)
            mask = mask & (keys_mask[:, None, None] | own)
        if bias is not None:
            mask = bias.masked_fill(~mask, float("-inf"))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        # A bool where the number is a symbol too, as torch.export has it for lengths that vary.
        is_causal=mask is None and bool(num_queries > 1),
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


def flash_takes(q: Tensor) -> bool:
    """Return whether PyTorch's flash kernels attend with such queries in packed sequences."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    fits = q.shape[1] > 0 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.is_cuda and half and fits


def packed_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Return the position `[T]` of every token in its own sequence.

    Examples:
        >>> packed_positions(torch.tensor([0, 3, 3, 5]), 5)
        tensor([0, 1, 2, 0, 1])
    """
    index = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None
) -> Tensor:
    """Attend within all packed sequences at once, as `causal_attention` does within one.

    Args:
        q: `[1, T, HQ, K]`, for which `flash_takes` holds.
        k: `[1, T, H, K]`.
        v: `[1, T, H, K]`.
        cu_seqlens: int32 `[S + 1]`.
        window: as in `causal_attention`.

    Returns:
        `[1, T, HQ, K]`.
    """
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) if groups > 1 else x for x in (k, v))
    longest = int(cu_seqlens.diff().max())
    left = -1 if window is None else window - 1
    q, k, v = (x.squeeze(0).contiguous() for x in (q, k, v))
    bounds = (cu_seqlens, cu_seqlens, longest, longest)
    o = varlen_attn(q, k, v, *bounds, window_size=(left, 0))
    assert isinstance(o, Tensor)
    return o.unsqueeze(0)


def for_each_sequence(
    attend: Callable[..., tuple[Tensor, KeyValueState]], cu_seqlens: Tensor | None, *x: Tensor
) -> tuple[Tensor, KeyValueState]:
    """Call `attend` on the tensors `[B, T, …]`, or on each packed sequence, joining the outputs.

    The state of packed sequences is the last one's, and means nothing.
    """
    if cu_seqlens is None:
        return attend(*x)
    ranges = [(lo, hi) for lo, hi in pairwise(cu_seqlens.tolist()) if hi > lo] or [(0, 0)]
    results = [attend(*(y[:, lo:hi] for y in x)) for lo, hi in ranges]
    return torch.cat([o for o, _ in results], dim=1), results[-1][1]
