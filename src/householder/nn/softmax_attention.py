"""What the softmax attention layers share; they differ in how a query knows where a key is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from householder.nn._checks import (
    check_mask,
    check_positive_float,
    check_positive_int,
    check_sequences,
    check_state_type,
    check_token,
    default_head_dim,
)
from householder.nn.initialization import init_residual_weight, init_weight
from householder.nn.short_convolution import ShortConvolution


class AttentionOptions(TypedDict, total=False):
    """Options that every attention layer hands on to `SoftmaxAttention`."""

    num_key_heads: int | None
    head_dim: int | None
    qk_norm: bool
    norm_eps: float
    window: int | None
    init_std: float | None
    num_layers: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class SoftmaxAttention(nn.Module, ABC):
    """What softmax attention layers share: projections, heads, checks, and the ways to run them.

    The linear layers `q_proj` (HQ, K), `k_proj` and `v_proj` (H, K), and `o_proj`, which reads
    (HQ, K), have no biases.

    Args:
        d_model: size of the input and output vectors.
        num_heads: HQ, heads of queries.
        num_key_heads: H, heads of keys and values, of which HQ is a multiple: query head h attends
            to key head h // (HQ / H); `None` for HQ.
        head_dim: K, size of a query, key or value; `None` for d_model / num_heads.
        qk_norm: normalise each head's queries and keys by their root mean square, with learnt
            weights `q_norm` and `k_norm` of size K.
        norm_eps: added to the mean square.
        window: how many tokens a query sees, its own included; `None` for all earlier ones. A state
            holds all keys all the same.
        init_std: standard deviation of the initial projections; `None` for PyTorch's own rule.
        num_layers: such layers in the model, which scales the initial `o_proj` down; `None` for
            none.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or two options do not fit together.
    """

    # What `reserve` returns.
    reserved_state: type

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_key_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        window: int | None = None,
        init_std: float | None = None,
        num_layers: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_positive_int(where, "d_model", d_model)
        check_positive_int(where, "num_heads", num_heads)
        self.d_model = d_model
        self.num_heads = num_heads
        self.num_key_heads = num_heads if num_key_heads is None else num_key_heads
        if head_dim is None:
            head_dim = default_head_dim(where, d_model, num_heads)
        self.head_dim = head_dim
        self.qk_norm = qk_norm
        self.norm_eps = norm_eps
        self.window = window
        self.init_std = init_std
        self.num_layers = num_layers
        check_positive_int(where, "num_key_heads", self.num_key_heads)
        check_positive_int(where, "head_dim", head_dim)
        check_positive_float(where, "norm_eps", norm_eps)
        if window is not None:
            check_positive_int(where, "window", window)
        if init_std is not None:
            check_positive_float(where, "init_std", init_std)
        if num_layers is not None:
            check_positive_int(where, "num_layers", num_layers)
        if num_heads % self.num_key_heads:
            raise ValueError(
                f"{where}: `num_heads` must be a multiple of num_key_heads={self.num_key_heads}, "
                f"got {num_heads}; each key head serves equally many query heads"
            )
        self._options: dict[str, Any] = {"device": device, "dtype": dtype}
        query_dim, key_dim = num_heads * head_dim, self.num_key_heads * head_dim
        self.q_proj = self._linear(d_model, query_dim)
        self.k_proj = self._linear(d_model, key_dim)
        self.v_proj = self._linear(d_model, key_dim)
        self.o_proj = self._linear(query_dim, d_model)
        if qk_norm:
            self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps, **self._options)
            self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps, **self._options)

    def _linear(self, in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
        return nn.Linear(in_features, out_features, bias=bias, **self._options)

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_weight(module.weight, self.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.RMSNorm, ShortConvolution)):
                module.reset_parameters()
        init_residual_weight(self.o_proj.weight, self.init_std, self.num_layers)

    @abstractmethod
    def init_state(self, batch_size: int) -> Any:
        """Return the state before the first token, for `batch_size` sequences."""

    def forward(
        self,
        x: Tensor,
        *,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attend over whole sequences, or continue them from a state.

        Args:
            x: `[B, T, d_model]`; with `cu_seqlens`, `[1, T, d_model]` holding S sequences end to
                end, which do not see one another.
            state: where the sequences continue from; `None` for their beginning. It is used up.
            cu_seqlens: int32 `[S + 1]`, 0 = c_0 <= c_1 <= … <= c_S = T: sequence s is in the tokens
                c_s … c_{s+1} − 1.
            mask: bool `[B, T]`, True for tokens and False for what fills a row up in front of them,
                in a batch of different lengths; only where the sequences begin.
            return_state: also return the state after the last token.

        Returns:
            `y [B, T, d_model]`, or `(y, new_state)` with `return_state`. Segments of a sequence,
            run in order with the state handed on, give what the whole sequence gives.

        Raises:
            ValueError: a shape, `cu_seqlens` or `mask` does not fit.
            TypeError: `x` is no floating-point tensor, or `state` is another layer's.
            NotImplementedError: `cu_seqlens` comes with a state.
        """
        where = type(self).__name__
        batch_size = check_sequences(where, x, self.d_model, cu_seqlens)
        if cu_seqlens is not None and (state is not None or return_state):
            raise NotImplementedError(
                f"{where}: packed sequences must begin and end in this call, got `cu_seqlens` and "
                "a state; give sequences that continue as rows of a batch"
            )
        if state is not None:
            self._check_state(state, batch_size)
        if mask is not None:
            check_mask(where, mask, x, state, cu_seqlens)
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        q, k, v = self.project(x)
        o, new_state = self._attend(x, q, k, v, state, cu_seqlens, mask, return_state)
        y = self.o_proj(o.flatten(-2))
        return (y, new_state) if return_state else y

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[B, T, HQ, K]`, keys and values `[B, T, H, K]` of `x [B, T, d_model]`.

        They are what the layer attends with in training, prefill and decoding alike: normalised, if
        it normalises, and without positions.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        if self.qk_norm:
            q = self.q_norm(q.to(self.q_norm.weight.dtype)).to(v.dtype)
            k = self.k_norm(k.to(self.k_norm.weight.dtype)).to(v.dtype)
        return q, k, v

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Attend with one more token of each sequence.

        Args:
            x: `[B, d_model]`.
            state: after the tokens so far, from `init_state`, `forward` or `step`. It is used up.

        Returns:
            y: `[B, d_model]`.
            new_state: after this token.

        Raises:
            ValueError: a shape does not fit.
        """
        check_token(type(self).__name__, x, self.d_model)
        y, state = self(x.unsqueeze(1), state=state, return_state=True)
        return y.squeeze(1), state

    @abstractmethod
    def reserve(self, state: Any, num_tokens: int) -> Any:
        """Return a state that `step_` can change, using this one up.

        Args:
            state: after the tokens so far, from `init_state`, `forward` or `step`.
            num_tokens: in all, that there must be room for; at least as many as there are.

        Raises:
            ValueError: there are more tokens already.
        """

    def step_(self, x: Tensor, state: Any) -> Tensor:
        """Attend with one more token of each sequence and change the state in place.

        Its memory stays where it is, so that a CUDA graph of the call can be replayed; see
        `householder.models.Decoder`, which counts the tokens that there is room for. Without
        gradients.

        Args:
            x: `[B, d_model]`.
            state: from `reserve`.

        Returns:
            y: `[B, d_model]`.

        Raises:
            ValueError: a shape does not fit.
            TypeError: `state` does not come from this layer's `reserve`.
        """
        where = type(self).__name__
        check_token(where, x, self.d_model)
        check_state_type(f"{where}.step_", state, self.reserved_state)
        x = x.unsqueeze(1)
        q, k, v = self.project(x)
        return self.o_proj(self._attend_one(x, q, k, v, state).flatten(-2)).squeeze(1)

    def extra_repr(self) -> str:
        """Return the sizes and options that `print` shows."""
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, "
            f"num_key_heads={self.num_key_heads}, head_dim={self.head_dim}, "
            f"qk_norm={self.qk_norm}, window={self.window}"
        )

    @abstractmethod
    def _attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Any,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, Any]:
        """Return `o [B, T, HQ, K]` and the new state, which may be None if not asked for."""

    @abstractmethod
    def _attend_one(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Any) -> Tensor:
        """Return `o [B, 1, HQ, K]` of one token and change the state of `reserve`."""

    @abstractmethod
    def _check_state(self, state: Any, batch_size: int) -> None:
        """Raise unless the state is one of this layer and of this batch size."""
