"""Softmax attention with products of data-dependent reflectors as positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from householder.nn._checks import (
    check_choice,
    check_positive_float,
    check_positive_int,
    check_state_tensor,
    check_state_type,
)
from householder.nn.normalization import QK_ACTIVATIONS
from householder.nn.short_convolution import ShortConvolution
from householder.nn.softmax_attention import AttentionOptions, SoftmaxAttention
from householder.ops import PathCache, path_attention
from householder.ops._checks import check_int
from householder.ops.normalization import l2_normalize
from householder.ops.path_attention.api import IMPLS
from householder.ops.wy import compute_dtype


class PaTHState(NamedTuple):
    """What a `PaTHAttention` remembers of the tokens so far.

    Attributes:
        cache: keys, values and reflectors. It is changed by every use of the state.
        conv: the last inputs of the short convolution `[B, n, H·K]`: the conv_size − 1 that it
            needs, and before them those that `rollback` may bring back; `None` in a layer without
            it.
    """

    cache: PathCache
    conv: Tensor | None

    def rollback(self, num_tokens: int) -> PaTHState:
        """Return the state before the last `num_tokens` tokens, using this one up.

        Args:
            num_tokens: every token allows one more, up to the layer's `max_rollback`, and every one
                taken back one less.

        Raises:
            TypeError: it is no int: the convolution's inputs of all sequences are one tensor.
            ValueError: that many cannot be taken back.
        """
        check_int("PaTHState.rollback", "num_tokens", num_tokens)
        self.cache.rollback(num_tokens)
        if self.conv is None:
            return self
        return PaTHState(self.cache, self.conv[:, : self.conv.shape[1] - num_tokens])


class PaTHAttention(SoftmaxAttention):
    """Attend with the product of data-dependent reflectors between two tokens as their position.

    Per query head, with q, k, v, w, beta and g computed from the token and H = I − beta w wᵀ::

        a_ij = K^(−1/2) k_jᵀ H_{j+1} ⋯ H_i q_i + g_{j+1} + … + g_i        j <= i
        o_i  = Σ_j softmax_j(a_ij) v_j
        y    = W_o · o

    w is `l2(w_activation(conv(W_2 W_1 x)))` with W_1 of `w_rank` rows, beta is 2σ(W x + b), one per
    key head, and g, with `use_forget_gate`, is log σ(W x + b), one per query head.

    Beside the layers of every attention there are `w_down_proj`, `w_up_proj` (H, K), `w_conv1d`
    `[H·K, 1, conv_size]`, `b_proj` (H) and `f_proj` (HQ), the last two with biases, which start
    at zero, and `sinks` `[HQ]`, which start at zero too.

    A state holds a `PathCache`, which works in place and has no gradients: a state given to
    `forward` or `step` is used up, and they run under `torch.no_grad()`.

    Args:
        d_model: size of the input and output vectors.
        num_heads: HQ, heads of queries.
        w_rank: rank of the projection to w.
        w_activation: "silu", "relu", "elu" or "identity"; the published one is "silu".
        use_short_conv: convolve w over the last `conv_size` tokens before its activation.
        conv_size: tokens the short convolution sees, the current one included.
        use_forget_gate: add log forget gates to the logits (PaTH-FoX).
        gate_scale: factor on the log gates; the published layer has 1, another implementation of it
            scales gates like inner products, by K^(−1/2).
        use_sinks: give each query head one more logit, learnt, that takes part in the softmax and
            has no value, so that a head may attend to nothing.
        max_rollback: how many of the last tokens a state can forget again.
        impl: the form of `path_attention` that whole sequences run.
        **options: any other option of `SoftmaxAttention`. Its H key heads are those of the
            reflectors too, `norm_eps` is also added to the squared length of w, and `init_std` also
            that of the short convolution.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or two options do not fit together.

    Examples:
        >>> layer = PaTHAttention(32, num_heads=4, use_forget_gate=True)
        >>> x = torch.randn(2, 7, 32)
        >>> y = layer(x)
        >>> state, outputs = layer.init_state(batch_size=2), []
        >>> with torch.no_grad():
        ...     for x_t in x.unbind(1):
        ...         y_t, state = layer.step(x_t, state)
        ...         outputs.append(y_t)
        >>> torch.allclose(torch.stack(outputs, dim=1), y, atol=1e-5)
        True

    References:
        PaTH Attention: Position Encoding via Accumulating Householder Transformations (Yang et al.,
        2025), https://arxiv.org/abs/2505.16381
    """

    reserved_state = PaTHState

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        w_rank: int = 32,
        w_activation: str = "silu",
        use_short_conv: bool = True,
        conv_size: int = 3,
        use_forget_gate: bool = False,
        gate_scale: float = 1.0,
        use_sinks: bool = False,
        max_rollback: int = 0,
        impl: str = "auto",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, **options)
        check_positive_int("PaTHAttention", "w_rank", w_rank)
        check_choice("PaTHAttention", "w_activation", w_activation, QK_ACTIVATIONS)
        check_positive_int("PaTHAttention", "conv_size", conv_size)
        check_positive_float("PaTHAttention", "gate_scale", gate_scale)
        check_choice("PaTHAttention", "impl", impl, ("auto", *IMPLS))
        PathCache(1, max_rollback=max_rollback)  # raises if it is no count
        self.w_activation = w_activation
        self.gate_scale = gate_scale
        self.max_rollback = max_rollback
        self.impl = impl
        key_dim = self.num_key_heads * self.head_dim
        self.w_down_proj = self._linear(d_model, w_rank)
        self.w_up_proj = self._linear(w_rank, key_dim)
        self.w_conv1d = None
        if use_short_conv:
            self.w_conv1d = ShortConvolution(
                key_dim, conv_size, init_std=self.init_std, **self._options
            )
        self.b_proj = self._linear(d_model, self.num_key_heads, bias=True)
        self.f_proj = self._linear(d_model, num_heads, bias=True) if use_forget_gate else None
        self.sinks = nn.Parameter(torch.empty(num_heads, **self._options)) if use_sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's global generator."""
        super().reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def init_state(self, batch_size: int) -> PaTHState:
        """Return the state before the first token, for `batch_size` sequences."""
        check_positive_int("PaTHAttention.init_state", "batch_size", batch_size)
        conv = None if self.w_conv1d is None else self.w_conv1d.init_state(batch_size)
        return PaTHState(PathCache(batch_size, max_rollback=self.max_rollback), conv)

    def reserve(self, state: PaTHState, num_tokens: int) -> PaTHState:
        """Return the state with room for `num_tokens` in all, for `step_`; this one is used up."""
        state.cache.reserve(num_tokens)
        if self.w_conv1d is None or state.conv is None:
            return state
        missing = self.w_conv1d.kernel_size - 1 + self.max_rollback - state.conv.shape[1]
        return PaTHState(state.cache, F.pad(state.conv, (0, 0, missing, 0)).contiguous())

    def extra_repr(self) -> str:
        """Return the sizes and options that `print` shows."""
        return (
            f"{super().extra_repr()}, use_sinks={self.sinks is not None}, "
            f"max_rollback={self.max_rollback}"
        )

    def transitions(
        self, x: Tensor, conv: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return what lies between tokens: reflectors, coefficients, gates.

        Args:
            x: `[B, T, d_model]`.
            conv: the convolution's last inputs, as in `PaTHState`; `None` for the beginning.
            cu_seqlens: as in `forward`.

        Returns:
            w: unit vectors `[B, T, H, K]`, float32 at least.
            beta: `[B, T, H]` in (0, 2), float32 at least.
            g: log forget gates `[B, T, HQ]`, float32 at least, or `None`.
            conv: the convolution's last inputs, or `None`; of packed sequences they mean nothing.
        """
        w = self.w_up_proj(self.w_down_proj(x))
        if self.w_conv1d is not None:
            inputs, needed = w, self.w_conv1d.kernel_size - 1
            seen = None if conv is None else conv[:, conv.shape[1] - needed :]
            w, _ = self.w_conv1d(w, seen, cu_seqlens)
            past = self.w_conv1d.init_state(x.shape[0]) if conv is None else conv
            conv = torch.cat([past.to(inputs.dtype), inputs], dim=1)
            conv = conv[:, max(0, conv.shape[1] - needed - self.max_rollback) :].clone()
        # In float32 at least: in half precision neither is a unit vector one, nor can beta come
        # near to 2, and each error counts once per token between query and key.
        dtype = compute_dtype(w)
        w = QK_ACTIVATIONS[self.w_activation](w).to(dtype).unflatten(-1, (-1, self.head_dim))
        beta = 2 * self.b_proj(x).to(dtype).sigmoid()
        g = None
        if self.f_proj is not None:
            g = self.gate_scale * F.logsigmoid(self.f_proj(x).to(dtype))
        return l2_normalize(w, self.norm_eps), beta, g, conv

    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: PaTHState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, PaTHState | None]:
        past = None if state is None else state.conv
        w, beta, g, conv = self.transitions(x, past, cu_seqlens)
        options: dict[str, Any] = {"sinks": self.sinks, "window": self.window}
        if mask is not None:
            return self._attend_rows(mask, (q, k, v, w, beta, g), conv, options, return_state)
        if state is None and not return_state:
            options.update(cu_seqlens=cu_seqlens, impl=self.impl)
            return path_attention(q, k, v, w, beta, g, **options), None
        cache = self.init_state(x.shape[0]).cache if state is None else state.cache
        return cache.append(q, k, v, w, beta, g, **options), PaTHState(cache, conv)

    def _attend_one(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: PaTHState) -> Tensor:
        o, new_state = self._attend(x, q, k, v, state, None, None, return_state=True)
        if state.conv is not None and new_state is not None and new_state.conv is not None:
            state.conv.copy_(new_state.conv)
        return o

    def _attend_rows(
        self,
        mask: Tensor,
        tensors: tuple[Tensor | None, ...],
        conv: Tensor | None,
        options: dict[str, Any],
        return_state: bool,
    ) -> tuple[Tensor, PaTHState | None]:
        """Attend in rows that are filled up in front: behind, what fills them is seen by nobody."""
        num_tokens = mask.shape[1]
        lengths = mask.sum(1)
        position = torch.arange(num_tokens, device=mask.device)
        to_front = (position + (num_tokens - lengths)[:, None]) % num_tokens
        to_end = (position - (num_tokens - lengths)[:, None]) % num_tokens
        rows = torch.arange(mask.shape[0], device=mask.device)[:, None]
        q, k, v, w, beta, g = (None if x is None else x[rows, to_front] for x in tensors)
        assert q is not None
        assert k is not None
        assert v is not None
        assert w is not None
        assert beta is not None
        state = None
        if return_state:
            cache = self.init_state(mask.shape[0]).cache
            o = cache.append(q, k, v, w, beta, g, lengths=lengths.tolist(), **options)
            state = PaTHState(cache, conv)
        else:
            o = path_attention(q, k, v, w, beta, g, impl=self.impl, **options)
        return o[rows, to_end], state

    def _check_state(self, state: PaTHState, batch_size: int) -> None:
        check_state_type("PaTHAttention", state, PaTHState)
        if state.cache.batch_size != batch_size or (state.conv is None) != (self.w_conv1d is None):
            raise ValueError(
                f"PaTHAttention: `state` must be one of this layer for {batch_size} sequences, got "
                f"one for {state.cache.batch_size}; make it with init_state"
            )
        if self.w_conv1d is not None and state.conv is not None:
            length = max(state.conv.shape[1], self.w_conv1d.kernel_size - 1)
            shape = (batch_size, length, self.w_conv1d.channels)
            check_state_tensor("PaTHAttention", "state.conv", state.conv, shape)
