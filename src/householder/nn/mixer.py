"""The token mixer whose memory is updated by products of Householder transformations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from householder.nn._checks import (
    check_choice,
    check_mask,
    check_positive_float,
    check_positive_int,
    check_sequences,
    check_state_tensor,
    check_state_type,
    check_token,
    default_head_dim,
)
from householder.nn.initialization import init_forget_gate, init_residual_weight, init_weight
from householder.nn.normalization import QK_ACTIVATIONS, QK_NORMS, GatedRMSNorm, sum_normalize
from householder.nn.short_convolution import ShortConvolution
from householder.ops import delta_product, delta_product_step
from householder.ops.delta_product.api import IMPLS
from householder.ops.wy import compute_dtype


class MixerState(NamedTuple):
    """What a mixer remembers of the tokens so far.

    Attributes:
        matrix: the matrix state `[B, HV, K, V]`, float32 (float64 for a float64 mixer).
        conv: the last `conv_size − 1` inputs of the three short convolutions, for q
            `[B, conv_size − 1, H·K]`, for k `[B, conv_size − 1, N·H·K]`, for v
            `[B, conv_size − 1, N·HV·V]`; `None` in a mixer without them.
    """

    matrix: Tensor
    conv: tuple[Tensor, Tensor, Tensor] | None


class DeltaProductMixer(nn.Module):
    """Mix tokens through a matrix state that each token multiplies by N generalised reflections.

    Per token and value head, with q, k_j, v_j, beta_j and g computed from the token::

        S <- exp(g) S
        S <- S + beta_j k_j (v_j − Sᵀ k_j)ᵀ        j = 0 … N−1
        o  = K^(−1/2) Sᵀ q
        y  = W_o · norm(o)

    q and k_j are `qk_norm(qk_activation(conv(W x)))`, v_j is `SiLU(conv(W x))`, beta_j is σ(W x)
    or, with `allow_neg_eigval`, 2σ(W x), and g = −exp(A_log) · softplus(W_a x + dt_bias). The norm
    is an RMSNorm over each head's V values, times SiLU(W_g x) with `use_output_gate`.

    This one class is every published layer of the family; `DeltaNet`, `GatedDeltaNet`,
    `DeltaProduct` and `GatedDeltaProduct` only set its options.

    The linear layers have no biases. Their outputs are laid out, slowest index first, as
    `q_proj` (H, K), `k_proj` (N, H, K), `v_proj` (N, HV, V), `b_proj` (N, HV), `a_proj` (HV) and
    `g_proj` (HV, V); `o_proj` reads (HV, V). `q_conv1d`, `k_conv1d` and `v_conv1d` have weights
    `[channels, 1, conv_size]`, `o_norm` has `[V]`. `A_log` and `dt_bias`, both `[HV]`, carry
    `_no_weight_decay = True` for the optimiser.

    Args:
        d_model: size of the input and output vectors.
        num_heads: H, heads of queries and keys.
        head_dim: K, size of a query or key; `None` for d_model / num_heads.
        num_householder: N, reflections per token.
        num_value_heads: HV, a multiple of H: value head h reads with query head h // (HV / H);
            `None` for H.
        value_head_dim: V, size of a value; `None` for K.
        use_forget_gate: scale the state by exp(g), one g <= 0 (natural log) per token and value
            head.
        use_output_gate: multiply the normalised output by SiLU(W_g x).
        use_short_conv: convolve q, k and v over the last `conv_size` tokens.
        conv_size: tokens a short convolution sees, the current one included.
        allow_neg_eigval: beta in (0, 2) in place of (0, 1), so that a reflection can reverse a
            direction of the state; state tracking needs it.
        qk_activation: "silu", "relu", "elu" (1 + ELU, which is positive) or "identity".
        qk_norm: "l2", "sum" or "none", over each head. "sum" wants a non-negative activation.
            "none" does not bound the keys, and so not the state either.
        qk_norm_eps: added to the squared length ("l2"), or what a smaller sum counts as ("sum").
        norm_eps: added to the mean square in the output norm.
        init_std: standard deviation of the initial projections and kernels; `None` for PyTorch's
            own rule for linear layers.
        num_layers: mixers in the model, which scales the initial `o_proj` down; `None` for none.
        recompute: on a GPU, make the recurrence's states anew in the backward pass instead of
            keeping them: less memory for more time, as `delta_product` says.
        impl: the form of `delta_product` that whole sequences run. It and `recompute` are kept in
            attributes of their names, and may be changed at any time.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or two options do not fit together.

    Examples:
        >>> mixer = DeltaProductMixer(32, num_heads=4, num_householder=2, allow_neg_eigval=True)
        >>> x = torch.randn(2, 7, 32)
        >>> mixer(x).shape
        torch.Size([2, 7, 32])

        The same token by token:

        >>> state, outputs = mixer.init_state(batch_size=2), []
        >>> for x_t in x.unbind(1):
        ...     y_t, state = mixer.step(x_t, state)
        ...     outputs.append(y_t)
        >>> torch.allclose(torch.stack(outputs, dim=1), mixer(x), atol=1e-5)
        True

    References:
        DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products (Siems,
        Carstensen, Zela, Hutter, Pontil, Grazzi, 2025), https://arxiv.org/abs/2502.10297
    """

    # Options that make a published layer what it is, and so cannot be changed in it.
    FIXED: ClassVar[Mapping[str, object]] = {}

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int | None = None,
        num_householder: int = 1,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        use_forget_gate: bool = False,
        use_output_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        qk_norm_eps: float = 1e-6,
        norm_eps: float = 1e-5,
        init_std: float | None = None,
        num_layers: int | None = None,
        recompute: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_positive_int(where, "d_model", d_model)
        check_positive_int(where, "num_heads", num_heads)
        self.d_model = d_model
        self.num_heads = num_heads
        self.head_dim = (
            default_head_dim(where, d_model, num_heads) if head_dim is None else head_dim
        )
        self.num_householder = num_householder
        self.num_value_heads = num_heads if num_value_heads is None else num_value_heads
        self.value_head_dim = self.head_dim if value_head_dim is None else value_head_dim
        self.use_forget_gate = use_forget_gate
        self.use_output_gate = use_output_gate
        self.use_short_conv = use_short_conv
        self.conv_size = conv_size
        self.allow_neg_eigval = allow_neg_eigval
        self.qk_activation = qk_activation
        self.qk_norm = qk_norm
        self.qk_norm_eps = qk_norm_eps
        self.norm_eps = norm_eps
        self.init_std = init_std
        self.num_layers = num_layers
        self.recompute = recompute
        self.impl = impl
        self._check_options()
        self._create_parameters(device, dtype)
        self.reset_parameters()

    def _check_options(self) -> None:
        where = type(self).__name__
        for name in (
            "head_dim",
            "num_householder",
            "num_value_heads",
            "value_head_dim",
            "conv_size",
        ):
            check_positive_int(where, name, getattr(self, name))
        for name in ("qk_norm_eps", "norm_eps"):
            check_positive_float(where, name, getattr(self, name))
        if self.init_std is not None:
            check_positive_float(where, "init_std", self.init_std)
        if self.num_layers is not None:
            check_positive_int(where, "num_layers", self.num_layers)
        check_choice(where, "qk_activation", self.qk_activation, QK_ACTIVATIONS)
        check_choice(where, "qk_norm", self.qk_norm, QK_NORMS)
        check_choice(where, "impl", self.impl, ("auto", *IMPLS))
        if self.num_value_heads % self.num_heads:
            raise ValueError(
                f"{where}: `num_value_heads` must be a multiple of num_heads={self.num_heads}, "
                f"got {self.num_value_heads}; each key head serves equally many value heads"
            )
        if self.qk_norm == "sum" and self.qk_activation not in ("relu", "elu"):
            raise ValueError(
                f"{where}: `qk_norm='sum'` must follow a non-negative activation, got "
                f"qk_activation={self.qk_activation!r}; use 'relu' or 'elu', or qk_norm='l2'"
            )
        for name, required in self.FIXED.items():
            if getattr(self, name) != required:
                raise ValueError(
                    f"{where}: `{name}` must be {required}, got {getattr(self, name)}; "
                    "use the layer that has it, or DeltaProductMixer, which fixes nothing"
                )

    def _create_parameters(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        def linear(in_features: int, out_features: int) -> nn.Linear:
            return nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)

        def convolution(channels: int) -> ShortConvolution:
            return ShortConvolution(
                channels, self.conv_size, init_std=self.init_std, device=device, dtype=dtype
            )

        query_dim = self.num_heads * self.head_dim
        key_dim = self.num_householder * query_dim
        output_dim = self.num_value_heads * self.value_head_dim
        value_dim = self.num_householder * output_dim

        self.q_proj = linear(self.d_model, query_dim)
        self.k_proj = linear(self.d_model, key_dim)
        self.v_proj = linear(self.d_model, value_dim)
        self.b_proj = linear(self.d_model, self.num_householder * self.num_value_heads)
        self.o_proj = linear(output_dim, self.d_model)
        if self.use_forget_gate:
            self.a_proj = linear(self.d_model, self.num_value_heads)
            self.A_log = nn.Parameter(torch.empty(self.num_value_heads, device=device, dtype=dtype))
            self.dt_bias = nn.Parameter(
                torch.empty(self.num_value_heads, device=device, dtype=dtype)
            )
            for parameter in (self.A_log, self.dt_bias):
                # Decay would pull every head's rate of forgetting towards one value.
                parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if self.use_short_conv:
            self.q_conv1d = convolution(query_dim)
            self.k_conv1d = convolution(key_dim)
            self.v_conv1d = convolution(value_dim)
        if self.use_output_gate:
            self.g_proj = linear(self.d_model, output_dim)
        norm = GatedRMSNorm if self.use_output_gate else nn.RMSNorm
        self.o_norm = norm(self.value_head_dim, eps=self.norm_eps, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew from PyTorch's global generator, as published."""
        linears = [self.q_proj, self.k_proj, self.v_proj, self.b_proj]
        if self.use_forget_gate:
            linears.append(self.a_proj)
            init_forget_gate(self.A_log, self.dt_bias)
        if self.use_output_gate:
            linears.append(self.g_proj)
        for linear in linears:
            init_weight(linear.weight, self.init_std)
        init_residual_weight(self.o_proj.weight, self.init_std, self.num_layers)
        if self.use_short_conv:
            for convolution in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
                convolution.reset_parameters()
        self.o_norm.reset_parameters()

    def init_state(self, batch_size: int) -> MixerState:
        """Return the state before the first token, all zeros, on the parameters' device.

        Args:
            batch_size: B, sequences that advance together.
        """
        check_positive_int(f"{type(self).__name__}.init_state", "batch_size", batch_size)
        weight = self.q_proj.weight
        matrix = weight.new_zeros(
            batch_size,
            self.num_value_heads,
            self.head_dim,
            self.value_head_dim,
            dtype=compute_dtype(weight),
        )
        if not self.use_short_conv:
            return MixerState(matrix, None)
        conv = (
            self.q_conv1d.init_state(batch_size),
            self.k_conv1d.init_state(batch_size),
            self.v_conv1d.init_state(batch_size),
        )
        return MixerState(matrix, conv)

    def forward(
        self,
        x: Tensor,
        *,
        state: MixerState | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """Mix whole sequences, or continue them from a state.

        Args:
            x: `[B, T, d_model]`; with `cu_seqlens`, `[1, T, d_model]` holding S sequences end to
                end, which do not see one another.
            state: where the sequences continue from, of batch size B (S with `cu_seqlens`); `None`
                for their beginning. It is not changed.
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
        """
        self._check_inputs(x, state, cu_seqlens)
        if mask is not None:
            check_mask(type(self).__name__, mask, x, state, cu_seqlens)
            # Keys and values of nothing are zero, and leave a state of zeros as it is.
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        q, k, v, conv = self._queries_keys_values(x, state, cu_seqlens)
        o, matrix = delta_product(
            q,
            k,
            v,
            self._beta_logits(x),
            self._gate_logits(x),
            initial_state=None if state is None else state.matrix,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            recompute=self.recompute and x.is_cuda,
            impl=self.impl,
            **self._activations(),
        )
        y = self._output(o, x)
        return y if matrix is None else (y, MixerState(matrix, conv))

    def step(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """Mix one more token of each sequence.

        Args:
            x: `[B, d_model]`.
            state: after the tokens so far, from `init_state`, `forward` or `step`. Not changed.

        Returns:
            y: `[B, d_model]`.
            new_state: after this token.

        Raises:
            ValueError: a shape does not fit.
        """
        check_token(type(self).__name__, x, self.d_model)
        sequence = x.unsqueeze(1)
        self._check_inputs(sequence, state, None)
        q, k, v, conv = self._queries_keys_values(sequence, state)
        qkv = (q.squeeze(1), k.squeeze(1), v.squeeze(1))
        y, matrix = self._step_output(x, qkv, state.matrix, inplace=False)
        return y, MixerState(matrix, conv)

    def reserve(self, state: MixerState, num_tokens: int) -> MixerState:
        """Return a state that `step_` can change, using this one up.

        Args:
            state: after the tokens so far, from `init_state`, `forward` or `step`.
            num_tokens: in all, that there must be room for; a state of this mixer has always room.
        """
        check_positive_int(f"{type(self).__name__}.reserve", "num_tokens", num_tokens)
        conv = None if state.conv is None else tuple(x.contiguous() for x in state.conv)
        return MixerState(state.matrix.contiguous(), conv)  # type: ignore[arg-type]

    def step_(self, x: Tensor, state: MixerState) -> Tensor:
        """Mix one more token of each sequence and change the state in place, without gradients.

        Its memory stays where it is, so that a CUDA graph of the call can be replayed.

        Args:
            x: `[B, d_model]`.
            state: from `reserve`.

        Returns:
            y: `[B, d_model]`.

        Raises:
            ValueError: a shape does not fit.
            NotImplementedError: gradients are on.
        """
        check_token(type(self).__name__, x, self.d_model)
        self._check_inputs(x.unsqueeze(1), state, None)
        q, k, v = self._step_queries_keys_values(x, state)
        return self._step_output(x, (q, k, v), state.matrix, inplace=True)[0]

    def _step_output(
        self, x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], matrix: Tensor, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        """Return y `[B, d_model]` of one token and the matrix state after it."""
        o, matrix = delta_product_step(
            *qkv,
            self._beta_logits(x),
            self._gate_logits(x),
            state=matrix,
            inplace=inplace,
            **self._activations(),
        )
        return self._output(o, x), matrix

    def extra_repr(self) -> str:
        """Return the sizes and options that `print` shows."""
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"num_householder={self.num_householder}, num_value_heads={self.num_value_heads}, "
            f"value_head_dim={self.value_head_dim}, allow_neg_eigval={self.allow_neg_eigval}, "
            f"qk_activation={self.qk_activation!r}, qk_norm={self.qk_norm!r}"
        )

    def _queries_keys_values(
        self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """Return q `[B, T, H, K]`, k `[B, T, N, H, K]`, v `[B, T, N, HV, V]`, the conv state.

        Where `qk_norm` is "l2", q and k do not have unit length yet: the op brings them to it.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        conv = None
        if self.use_short_conv:
            q_past, k_past, v_past = (state and state.conv) or (None, None, None)
            silu = self.qk_activation == "silu"
            q, q_past = self.q_conv1d(q, q_past, cu_seqlens, silu=silu)
            k, k_past = self.k_conv1d(k, k_past, cu_seqlens, silu=silu)
            v, v_past = self.v_conv1d(v, v_past, cu_seqlens, silu=True)
            conv = (q_past, k_past, v_past)
        return *self._heads(q, k, v), conv

    def _step_queries_keys_values(
        self, x: Tensor, state: MixerState
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of one token `x [B, d_model]`, moving the convolutions' state on."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if state.conv is not None:
            silu = self.qk_activation == "silu"
            q = self.q_conv1d.step_(q, state.conv[0], silu=silu)
            k = self.k_conv1d.step_(k, state.conv[1], silu=silu)
            v = self.v_conv1d.step_(v, state.conv[2], silu=True)
        return self._heads(q, k, v)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the heads of q, k and v and activate them; the convolutions have applied SiLU."""
        if not self.use_short_conv:
            v = F.silu(v)
        if not (self.use_short_conv and self.qk_activation == "silu"):
            activate = QK_ACTIVATIONS[self.qk_activation]
            q, k = activate(q), activate(k)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        k = k.unflatten(-1, (self.num_householder, self.num_heads, self.head_dim))
        v = v.unflatten(-1, (self.num_householder, self.num_value_heads, self.value_head_dim))
        if self.qk_norm == "sum":
            q, k = (sum_normalize(heads, self.qk_norm_eps) for heads in (q, k))
        return q, k, v

    def _beta_logits(self, x: Tensor) -> Tensor:
        return self.b_proj(x).unflatten(-1, (self.num_householder, self.num_value_heads))

    def _gate_logits(self, x: Tensor) -> Tensor | None:
        return self.a_proj(x) if self.use_forget_gate else None

    def _activations(self) -> dict[str, Any]:
        """Return what the op does to q, k and the logits itself, as its options."""
        options: dict[str, Any] = {
            "qk_norm": "l2" if self.qk_norm == "l2" else None,
            "qk_norm_eps": self.qk_norm_eps,
            "beta_activation": "2sigmoid" if self.allow_neg_eigval else "sigmoid",
        }
        if self.use_forget_gate:
            options |= {"gate_activation": "softplus", "A_log": self.A_log, "dt_bias": self.dt_bias}
        return options

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        if self.use_output_gate:
            gate = self.g_proj(x).unflatten(-1, (self.num_value_heads, self.value_head_dim))
            o = self.o_norm(o, gate)
        else:
            # Under autocast o is narrower than the weight, which nn.RMSNorm warns about.
            o = self.o_norm(o.to(self.o_norm.weight.dtype))
        return self.o_proj(o.flatten(-2))

    def _check_inputs(self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None) -> None:
        where = type(self).__name__
        batch_size = check_sequences(where, x, self.d_model, cu_seqlens)
        if state is None:
            return
        check_state_type(where, state, MixerState)
        matrix_shape = (batch_size, self.num_value_heads, self.head_dim, self.value_head_dim)
        check_state_tensor(where, "state.matrix", state.matrix, matrix_shape)
        if (state.conv is not None) != self.use_short_conv:
            raise ValueError(
                f"{where}: `state.conv` must be {'three tensors' if self.use_short_conv else None} "
                f"with use_short_conv={self.use_short_conv}, got {type(state.conv).__name__}; "
                "use a state of this mixer"
            )
        channels = [linear.out_features for linear in (self.q_proj, self.k_proj, self.v_proj)]
        for i, conv in enumerate(state.conv or ()):
            conv_shape = (batch_size, self.conv_size - 1, channels[i])
            check_state_tensor(where, f"state.conv[{i}]", conv, conv_shape)
