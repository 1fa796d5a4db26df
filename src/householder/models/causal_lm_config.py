"""What determines a causal language model, and the sizes that papers use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from householder.models._fields import from_fields
from householder.models.block import Block
from householder.nn import ATTENTIONS, MIXERS, DeltaProductMixer
from householder.nn._checks import check_choice, check_positive_float, check_positive_int
from householder.nn.normalization import QK_ACTIVATIONS, QK_NORMS
from householder.nn.softmax_attention import SoftmaxAttention

SLIDING_WINDOW = "sliding_window_attention"
"""Rotary attention within a window, in a pattern."""

ALIASES: Mapping[str, str] = {
    "delta": "delta_net",
    "gated_delta": "gated_delta_net",
    "path": "path_attention",
    "path_fox": "forgetting_path_attention",
    "rope": "rotary_attention",
    "fox": "forgetting_attention",
    "swa": SLIDING_WINDOW,
}
"""Short names that a pattern may use."""

LAYERS = (*MIXERS, *ATTENTIONS, SLIDING_WINDOW)
"""The mixers that a pattern may name."""

PRESETS: Mapping[str, Mapping[str, int]] = {
    "10m": {"d_model": 256, "num_layers": 8, "head_dim": 64},
    "30m": {"d_model": 384, "num_layers": 12, "head_dim": 64},
    "120m": {"d_model": 768, "num_layers": 12, "head_dim": 64},
    "340m": {"d_model": 1024, "num_layers": 24, "head_dim": 128},
    "760m": {"d_model": 1536, "num_layers": 24, "head_dim": 128},
    "1.3b": {"d_model": 2048, "num_layers": 24, "head_dim": 128},
}
"""Width, depth and head size by the name of a size.

The three largest are the widths and depths of the papers; how many parameters that makes depends on
the mixers and on the vocabulary.
"""


@dataclasses.dataclass(frozen=True)
class CausalLMConfig:
    """Everything that determines the shape and the initialisation of a `CausalLM`.

    A layer's mixer is named in `pattern`, which is repeated until `num_layers` is reached:
    "gated_delta_net,gated_delta_net,swa" puts a window of attention after every two recurrent
    layers. `global_layers` then replaces single layers by attention without a window. The mixers
    are "delta_net", "gated_delta_net", "delta_product", "gated_delta_product", "path_attention",
    "forgetting_path_attention", "rotary_attention", "forgetting_attention" and
    "sliding_window_attention", or by their short names "delta", "gated_delta", "path", "path_fox",
    "rope", "fox" and "swa".

    Attributes:
        vocab_size: number of different tokens.
        d_model: size of the residual stream.
        num_layers: number of blocks.
        pattern: mixers, joined by commas.
        global_layers: indices of layers, from 0, whose mixer is rotary attention in place of the
            pattern's.
        num_heads: H of the recurrent mixers; `None` for as many as fill the mixer's published share
            of d_model.
        head_dim: K.
        num_value_heads: HV of the recurrent mixers, a multiple of H; `None` for H.
        expand_v: V / K of the recurrent mixers; `None` for what the mixer publishes.
        num_householder: N of the product mixers.
        allow_neg_eigval: beta in (0, 2) in place of (0, 1) in the recurrent mixers; `None` for what
            the mixer publishes.
        use_output_gate: gate the recurrent mixers' output; `None` for what the mixer publishes.
        use_short_conv: convolve q, k and v (in PaTH, w) over a few tokens.
        conv_size: how many, in the recurrent mixers.
        qk_activation: of queries and keys in the recurrent mixers: "silu", "relu", "elu" or
            "identity".
        qk_norm: of the same: "l2", "sum" or "none".
        attention_heads: HQ of the attention layers; `None` for d_model / attention_head_dim.
        attention_key_heads: heads of keys and values, a divisor of HQ; `None` for HQ.
        attention_head_dim: size of a query; `None` for head_dim.
        attention_qk_norm: normalise queries and keys by their root mean square.
        attention_norm_eps: added to the mean square of queries and keys, and to the squared length
            of PaTH's reflectors.
        path_w_rank: rank of the projection to PaTH's reflectors.
        path_w_activation: of these, before they are normalised: "silu", "relu", "elu" or
            "identity".
        path_gate_scale: factor on the log gates of PaTH.
        window: tokens that a sliding window holds.
        rope_base: base of the rotary angles.
        mlp_width: hidden size of the SwiGLU; `None` for 8/3 · d_model rounded up to a multiple of
            256.
        norm_eps: added to the mean square in every RMSNorm.
        tie_embeddings: use the embeddings as the head's weight too.
        init_std: standard deviation of the initial weights; `None` for PyTorch's own rules.

    Examples:
        >>> config = CausalLMConfig.preset("10m", 256, pattern="delta_product,swa", window=128)
        >>> config.layer_names()[:3]
        ('delta_product', 'sliding_window_attention', 'delta_product')
        >>> CausalLMConfig.from_dict(config.to_dict()) == config
        True
    """

    vocab_size: int
    d_model: int = 256
    num_layers: int = 8
    pattern: str = "gated_delta_net"
    global_layers: tuple[int, ...] = ()
    num_heads: int | None = None
    head_dim: int = 64
    num_value_heads: int | None = None
    expand_v: float | None = None
    num_householder: int = 2
    allow_neg_eigval: bool | None = None
    use_output_gate: bool | None = None
    use_short_conv: bool = True
    conv_size: int = 4
    qk_activation: str = "silu"
    qk_norm: str = "l2"
    attention_heads: int | None = None
    attention_key_heads: int | None = None
    attention_head_dim: int | None = None
    attention_qk_norm: bool = False
    attention_norm_eps: float = 1e-6
    path_w_rank: int = 32
    path_w_activation: str = "silu"
    path_gate_scale: float = 1.0
    window: int = 2048
    rope_base: float = 10_000.0
    mlp_width: int | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float | None = 0.02

    def __post_init__(self) -> None:
        where = type(self).__name__
        object.__setattr__(self, "global_layers", tuple(self.global_layers))
        for name in ("vocab_size", "d_model", "num_layers", "head_dim", "window", "conv_size"):
            check_positive_int(where, name, getattr(self, name))
        check_positive_int(where, "num_householder", self.num_householder)
        check_positive_int(where, "path_w_rank", self.path_w_rank)
        for name in (
            "num_heads",
            "num_value_heads",
            "attention_heads",
            "attention_key_heads",
            "attention_head_dim",
            "mlp_width",
        ):
            if getattr(self, name) is not None:
                check_positive_int(where, name, getattr(self, name))
        for name in ("norm_eps", "attention_norm_eps", "rope_base", "path_gate_scale"):
            check_positive_float(where, name, getattr(self, name))
        for name in ("init_std", "expand_v"):
            if getattr(self, name) is not None:
                check_positive_float(where, name, getattr(self, name))
        for name in ("qk_activation", "path_w_activation"):
            check_choice(where, name, getattr(self, name), QK_ACTIVATIONS)
        check_choice(where, "qk_norm", self.qk_norm, QK_NORMS)
        if not isinstance(self.pattern, str):
            raise TypeError(
                f"{where}: `pattern` must be a string, got {self.pattern!r}; join names of mixers "
                "by commas"
            )
        for name in self._pattern():
            check_choice(where, "pattern", name, [*LAYERS, *ALIASES])
        for index in self.global_layers:
            if not isinstance(index, int):
                raise TypeError(
                    f"{where}: `global_layers` must be ints, got {index!r}; count layers from 0"
                )
            if not 0 <= index < self.num_layers:
                raise ValueError(
                    f"{where}: `global_layers` must be indices from 0 to {self.num_layers - 1}, "
                    f"got {index}; count from 0"
                )

    @classmethod
    def preset(cls, name: str, vocab_size: int, **options: Any) -> CausalLMConfig:
        """Return the config of a size in `PRESETS`.

        Args:
            name: "10m", "30m", "120m", "340m", "760m" or "1.3b".
            vocab_size: number of different tokens.
            **options: any other field; one that the preset sets too overrides it.

        Raises:
            ValueError: there is no such size, or an option is out of range.
            TypeError: an option is unknown or has the wrong type.
        """
        check_choice(cls.__name__, "preset", name, PRESETS)
        fields: dict[str, Any] = {**PRESETS[name], **options}
        return cls(vocab_size, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON."""
        fields = dataclasses.asdict(self)
        return {**fields, "global_layers": list(self.global_layers)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CausalLMConfig:
        """Return the config with the given fields, defaults for those left out.

        Raises:
            ValueError: a name is unknown, or a value is out of range.
            TypeError: a value has the wrong type, or a required one is missing.
        """
        return from_fields(cls, fields)

    def layer_names(self) -> tuple[str, ...]:
        """Return the mixer's name of every layer."""
        pattern = [ALIASES.get(name, name) for name in self._pattern()]
        names = [pattern[i % len(pattern)] for i in range(self.num_layers)]
        for index in self.global_layers:
            names[index] = "rotary_attention"
        return tuple(names)

    def _pattern(self) -> list[str]:
        return [name.strip() for name in self.pattern.split(",")]

    def build_block(
        self,
        name: str,
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Block:
        """Return a new block with the mixer `name`.

        Args:
            name: of a mixer, as in `pattern`.
            impl: the form of `delta_product` or `path_attention` that runs.
            device: of the parameters.
            dtype: of the parameters.

        Raises:
            ValueError: the mixer does not take an option's value.
        """
        shared: dict[str, Any] = {
            "norm_eps": self.norm_eps,
            "init_std": self.init_std,
            "num_layers": self.num_layers,
            "device": device,
            "dtype": dtype,
        }
        make = self._recurrent if name in MIXERS else self._attention
        return Block(make(name, impl, shared), mlp_width=self.mlp_width, **shared)

    def _recurrent(self, name: str, impl: str, shared: dict[str, Any]) -> DeltaProductMixer:
        mixer = MIXERS[name]
        num_heads = self.num_heads
        if num_heads is None:
            num_heads = max(1, round(mixer.KEY_SHARE * self.d_model / self.head_dim))
        options: dict[str, Any] = {
            "num_heads": num_heads,
            "head_dim": self.head_dim,
            "num_value_heads": self.num_value_heads,
            "use_short_conv": self.use_short_conv,
            "conv_size": self.conv_size,
            "qk_activation": self.qk_activation,
            "qk_norm": self.qk_norm,
            "impl": impl,
        }
        if name.endswith("product"):
            options["num_householder"] = self.num_householder
        for option in ("expand_v", "allow_neg_eigval", "use_output_gate"):
            if getattr(self, option) is not None:
                options[option] = getattr(self, option)
        return mixer(self.d_model, **options, **shared)

    def _attention(self, name: str, impl: str, shared: dict[str, Any]) -> SoftmaxAttention:
        head_dim = self.attention_head_dim or self.head_dim
        options: dict[str, Any] = {
            "num_heads": self.attention_heads or max(1, self.d_model // head_dim),
            "num_key_heads": self.attention_key_heads,
            "head_dim": head_dim,
            "qk_norm": self.attention_qk_norm,
        }
        shared = {**shared, "norm_eps": self.attention_norm_eps}
        if name == SLIDING_WINDOW:
            name = "rotary_attention"
            options["window"] = self.window
        if name.endswith("path_attention"):
            options |= {
                "use_short_conv": self.use_short_conv,
                "w_rank": self.path_w_rank,
                "w_activation": self.path_w_activation,
                "gate_scale": self.path_gate_scale,
                "impl": impl,
            }
        elif name == "rotary_attention":
            options["base"] = self.rope_base
        return ATTENTIONS[name](self.d_model, **options, **shared)
