"""A model that labels every token of a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from householder.models._fields import from_fields
from householder.models.block import Block
from householder.models.stack import BlockStack
from householder.nn import ATTENTIONS, MIXERS
from householder.nn._checks import (
    check_choice,
    check_positive_float,
    check_positive_int,
    default_head_dim,
)
from householder.nn.initialization import init_weight

# Fields that say how the delta rule runs, which softmax attention has no use for.
DELTA_RULE_FIELDS = (
    "num_value_heads",
    "expand_v",
    "num_householder",
    "allow_neg_eigval",
    "use_output_gate",
    "use_short_conv",
    "conv_size",
    "qk_activation",
    "qk_norm",
)


@dataclasses.dataclass(frozen=True)
class SequenceTaggerConfig:
    """Everything that determines the shape and the initialisation of a `SequenceTagger`.

    The defaults are those of the published state-tracking experiments at N = 1.

    Attributes:
        vocab_size: number of different tokens.
        num_classes: number of different labels.
        d_model: size of the residual stream.
        num_layers: number of blocks.
        mixer: a name in `householder.nn.MIXERS`, "delta_net", "gated_delta_net", "delta_product" or
            "gated_delta_product"; or one in `householder.nn.ATTENTIONS`, "path_attention",
            "forgetting_path_attention", "rotary_attention" or "forgetting_attention". An attention
            takes `num_heads` and `head_dim`, is otherwise as published, and refuses another value
            than the default for the options that follow here up to `qk_norm`.
        num_heads: H.
        head_dim: K; `None` for d_model / num_heads.
        num_value_heads: HV, a multiple of H; `None` for H.
        expand_v: V / K.
        num_householder: N, reflections per token; 1 for the two mixers named net.
        allow_neg_eigval: beta in (0, 2) in place of (0, 1).
        use_output_gate: gate the mixer's output; `None` for what the mixer publishes.
        use_short_conv: convolve q, k and v over a few tokens.
        conv_size: how many, the current one included.
        qk_activation: "silu", "relu", "elu" or "identity".
        qk_norm: "l2", "sum" or "none".
        mlp_width: hidden size of the SwiGLU; `None` for 8/3 · d_model rounded up to a multiple of
            256, 0 for blocks of the mixer alone.
        tie_embeddings: use the embeddings as the head's weight too; labels are tokens then.
        norm_eps: added to the mean square in every RMSNorm.
        init_std: standard deviation of the initial weights; `None` for PyTorch's own rules.

    Examples:
        >>> config = SequenceTaggerConfig(vocab_size=7, num_classes=6, num_householder=2)
        >>> SequenceTaggerConfig.from_dict(config.to_dict()) == config
        True
    """

    vocab_size: int
    num_classes: int
    d_model: int = 128
    num_layers: int = 1
    mixer: str = "delta_product"
    num_heads: int = 4
    head_dim: int | None = None
    num_value_heads: int | None = None
    expand_v: float = 1.0
    num_householder: int = 1
    allow_neg_eigval: bool = True
    use_output_gate: bool | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    qk_activation: str = "silu"
    qk_norm: str = "l2"
    mlp_width: int | None = None
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    init_std: float | None = 0.02

    def __post_init__(self) -> None:
        where = type(self).__name__
        for name in ("vocab_size", "num_classes", "d_model", "num_layers", "num_heads"):
            check_positive_int(where, name, getattr(self, name))
        if self.mlp_width != 0 and self.mlp_width is not None:
            check_positive_int(where, "mlp_width", self.mlp_width)
        if self.tie_embeddings and self.num_classes != self.vocab_size:
            raise ValueError(
                f"{where}: `tie_embeddings` needs a class for each of the {self.vocab_size} "
                f"tokens, got num_classes={self.num_classes}; leave it out"
            )
        check_positive_float(where, "norm_eps", self.norm_eps)
        if self.init_std is not None:
            check_positive_float(where, "init_std", self.init_std)
        check_choice(where, "mixer", self.mixer, [*MIXERS, *ATTENTIONS])
        if self.mixer in ATTENTIONS:
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.name in DELTA_RULE_FIELDS and value != field.default:
                    raise ValueError(
                        f"{where}: `{field.name}` must be left at {field.default!r} with mixer "
                        f"{self.mixer!r}, got {value!r}; it is an option of "
                        f"{', '.join(MIXERS)}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SequenceTaggerConfig:
        """Return the config with the given fields, defaults for those left out.

        Args:
            fields: values by name, as `to_dict` gives them.

        Raises:
            ValueError: a name is unknown, or a value is out of range.
            TypeError: a value has the wrong type, or a required one is missing.
        """
        return from_fields(cls, fields)

    def build_block(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Block:
        """Return a new block with these options.

        Args:
            device: of the parameters.
            dtype: of the parameters.

        Raises:
            ValueError: the mixer does not take an option's value.
        """
        head_dim = self.head_dim
        if head_dim is None:
            # Not left to the mixer: models that differ in the mixer alone keep the same heads.
            head_dim = default_head_dim(type(self).__name__, self.d_model, self.num_heads)
        shared: dict[str, Any] = {
            "norm_eps": self.norm_eps,
            "init_std": self.init_std,
            "num_layers": self.num_layers,
            "device": device,
            "dtype": dtype,
        }
        options: dict[str, Any] = {"num_heads": self.num_heads, "head_dim": head_dim}
        if self.mixer in ATTENTIONS:
            # Not `norm_eps`: there it would be added to the squared length of reflectors too.
            options.update((k, shared[k]) for k in shared if k != "norm_eps")
            attention = ATTENTIONS[self.mixer](self.d_model, **options)
            return Block(attention, mlp_width=self.mlp_width, **shared)
        options |= {
            "num_value_heads": self.num_value_heads,
            "expand_v": self.expand_v,
            "num_householder": self.num_householder,
            "allow_neg_eigval": self.allow_neg_eigval,
            "use_short_conv": self.use_short_conv,
            "conv_size": self.conv_size,
            "qk_activation": self.qk_activation,
            "qk_norm": self.qk_norm,
        }
        if self.use_output_gate is not None:
            options["use_output_gate"] = self.use_output_gate
        mixer = MIXERS[self.mixer](self.d_model, **options, **shared)
        return Block(mixer, mlp_width=self.mlp_width, **shared)


class SequenceTagger(BlockStack):
    """Label every token: embedding, blocks of mixer and MLP, a final RMSNorm, a linear head.

    The logits at a position depend on the tokens up to and including it.

    Args:
        vocab_size: number of different tokens.
        num_classes: number of different labels.
        device: of the parameters.
        dtype: of the parameters.
        **options: any other field of `SequenceTaggerConfig`.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        ValueError: an option is out of range.

    Examples:
        >>> model = SequenceTagger(7, 6, d_model=32, num_householder=2)
        >>> tokens = torch.randint(7, (2, 9))
        >>> model(tokens).shape
        torch.Size([2, 9, 6])
        >>> same = SequenceTagger.from_config(model.config)
        >>> _ = same.load_state_dict(model.state_dict())
        >>> torch.equal(same(tokens), model(tokens))
        True

    References:
        DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products (Siems,
        Carstensen, Zela, Hutter, Pontil, Grazzi, 2025), https://arxiv.org/abs/2502.10297
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        config = SequenceTaggerConfig(vocab_size, num_classes, **options)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        d_model = config.d_model
        super().__init__(
            vocab_size,
            d_model,
            (config.build_block(**factory) for _ in range(config.num_layers)),
            norm_eps=config.norm_eps,
            num_outputs=None if config.tie_embeddings else num_classes,
            **factory,
        )
        self.config = config
        if config.init_std is not None:
            nn.init.normal_(self.embeddings.weight, std=config.init_std)
        if self.head is not None:
            init_weight(self.head.weight, config.init_std)

    @classmethod
    def from_config(
        cls,
        config: SequenceTaggerConfig | Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SequenceTagger:
        """Return a new model with the given config.

        Args:
            config: a config, or its fields as `SequenceTaggerConfig.to_dict` gives them.
            device: of the parameters.
            dtype: of the parameters.
        """
        if not isinstance(config, SequenceTaggerConfig):
            config = SequenceTaggerConfig.from_dict(config)
        return cls(**config.to_dict(), device=device, dtype=dtype)

    def forward(
        self,
        tokens: Tensor,
        *,
        states: Sequence[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        return_states: bool = False,
    ) -> Tensor | tuple[Tensor, list[Any]]:
        """Label whole sequences, or continue them from states.

        Args:
            tokens: int64 `[B, T]`; with `cu_seqlens`, `[1, T]` holding S sequences end to end.
            states: where the sequences continue from, one per layer; `None` for their beginning. An
                attention's state is used up.
            cu_seqlens: int32 `[S + 1]`, where the packed sequences begin and end.
            return_states: also return the states after the last token.

        Returns:
            `logits [B, T, num_classes]`, or `(logits, new_states)` with `return_states`.

        Raises:
            TypeError: `tokens` is not int64.
            ValueError: a shape or `cu_seqlens` does not fit.
        """
        hidden = self.hidden(
            tokens, states=states, cu_seqlens=cu_seqlens, return_states=return_states
        )
        if not return_states:
            return self.logits(hidden)
        hidden, new_states = hidden
        return self.logits(hidden), new_states

    def step(self, tokens: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Label one more token of each sequence.

        Args:
            tokens: int64 `[B]`.
            states: after the tokens so far, one per layer. Those of the delta rule are not changed,
                those of attention are used up.

        Returns:
            logits: `[B, num_classes]`.
            new_states: after this token.

        Raises:
            TypeError: `tokens` is not int64.
            ValueError: a shape does not fit.
        """
        hidden, new_states = self.hidden_step(tokens, states)
        return self.logits(hidden), new_states
