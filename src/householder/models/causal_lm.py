"""A causal language model of blocks whose mixers may differ from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from householder.models.causal_lm_config import SLIDING_WINDOW, CausalLMConfig
from householder.models.generation import generate
from householder.models.stack import BlockStack
from householder.nn import MIXERS
from householder.nn.initialization import init_weight
from householder.ops import linear_cross_entropy


class CausalLM(BlockStack):
    """Predict the next token: embedding, blocks of mixer and MLP, a final RMSNorm, a linear head.

    The logits at a position depend on the tokens up to and including it.

    Args:
        config: a `CausalLMConfig`, or its fields as `CausalLMConfig.to_dict` gives them.
        impl: the form of `delta_product` and `path_attention` that runs.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        checkpoint_activations: keep of each block its input alone, and run it again in the backward
            pass: memory for time. Off at first.
        recompute: on a GPU, make anew in the backward pass what is cheap: the recurrences' states,
            and in compiled blocks all but the results of matrix products, convolutions, recurrences
            and attention. On at first.

    Raises:
        ValueError: an option is out of range, or options do not fit together.

    Examples:
        >>> config = CausalLMConfig(256, d_model=32, num_layers=2, pattern="delta_product,rope",
        ...                         head_dim=16)
        >>> model = CausalLM(config)
        >>> tokens = torch.randint(256, (2, 9))
        >>> model(tokens).shape
        torch.Size([2, 9, 256])
        >>> model.loss(tokens[:, :-1], tokens[:, 1:]).dim()
        0

        One token at a time:

        >>> states, logits = model.init_state(batch_size=2), []
        >>> with torch.no_grad():
        ...     for token in tokens.unbind(1):
        ...         logits_t, states = model.step(token, states)
        ...         logits.append(logits_t)
        >>> torch.allclose(torch.stack(logits, dim=1), model(tokens), atol=1e-5)
        True
    """

    def __init__(
        self,
        config: CausalLMConfig | Mapping[str, Any],
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(config, CausalLMConfig):
            config = CausalLMConfig.from_dict(config)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            config.vocab_size,
            config.d_model,
            (config.build_block(name, impl=impl, **factory) for name in config.layer_names()),
            norm_eps=config.norm_eps,
            num_outputs=None if config.tie_embeddings else config.vocab_size,
            recompute=True,
            **factory,
        )
        self.config = config
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embeddings and the head anew; the blocks draw their own when they are made."""
        if self.config.init_std is not None:
            nn.init.normal_(self.embeddings.weight, std=self.config.init_std)
        if self.head is not None:
            init_weight(self.head.weight, self.config.init_std)

    def forward(
        self,
        tokens: Tensor,
        *,
        states: Sequence[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """Return the logits of the next token at every position.

        Args:
            tokens: int64 `[B, T]`; with `cu_seqlens`, `[1, T]` holding S sequences end to end.
            states: where the sequences continue from, one per layer; `None` for their beginning.
                Those of softmax attention are used up.
            cu_seqlens: int32 `[S + 1]`, where the packed sequences begin and end.
            mask: bool `[B, T]`, False for what fills rows up in front of shorter sequences; only
                where the sequences begin.
            return_states: also return the states after the last token.

        Returns:
            `logits [B, T, vocab_size]`, or `(logits, new_states)` with `return_states`.

        Raises:
            TypeError: `tokens` is not int64.
            ValueError: a shape or `cu_seqlens` does not fit.
        """
        hidden = self.hidden(
            tokens, states=states, cu_seqlens=cu_seqlens, mask=mask, return_states=return_states
        )
        if not return_states:
            return self.logits(hidden)
        hidden, new_states = hidden
        return self.logits(hidden), new_states

    def loss(self, tokens: Tensor, labels: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the mean cross entropy in nats, without ever holding all logits.

        Args:
            tokens: int64 `[B, T]`.
            labels: int64 `[B, T]`: what follows each token; −100 where nothing is asked.
            cu_seqlens: as in `forward`.

        Raises:
            TypeError: `tokens` is not int64.
            ValueError: a shape or `cu_seqlens` does not fit.
        """
        if labels.shape != tokens.shape:
            raise ValueError(
                f"CausalLM.loss: `labels` must be of the shape of tokens, {list(tokens.shape)}, "
                f"got {list(labels.shape)}; give each token the one that follows it"
            )
        return linear_cross_entropy(
            self.hidden(tokens, cu_seqlens=cu_seqlens), self.head_weight, labels
        )

    def step(self, tokens: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Return the logits after one more token of each sequence.

        Args:
            tokens: int64 `[B]`.
            states: after the tokens so far, one per layer. Those of softmax attention are used up.

        Returns:
            logits: `[B, vocab_size]`.
            new_states: after this token.

        Raises:
            TypeError: `tokens` is not int64.
            ValueError: a shape does not fit.
        """
        hidden, new_states = self.hidden_step(tokens, states)
        return self.logits(hidden), new_states

    def step_(self, tokens: Tensor, states: Sequence[Any]) -> Tensor:
        """Return the logits after one more token of each sequence, changing the states in place.

        Their memory stays where it is, so that a CUDA graph of the call can be replayed; `Decoder`
        does both.

        Args:
            tokens: int64 `[B]`.
            states: from `reserve`, one per layer, with room for another token.

        Returns:
            logits: `[B, vocab_size]`.

        Raises:
            TypeError: `tokens` is not int64.
            ValueError: a shape does not fit.
            NotImplementedError: gradients are on.
        """
        return self.logits(self.hidden_step_(tokens, states))

    def generate(
        self,
        tokens: Tensor,
        *,
        max_new_tokens: int,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_tokens: int | None = None,
        stop: int | None = None,
        generator: torch.Generator | None = None,
        graph: bool | None = None,
    ) -> Tensor:
        """Return the sequences with the tokens that the model draws behind them.

        On a GPU every token but the first is a replay of a CUDA graph; see `Decoder`, which
        gives the logits token by token.

        Args:
            tokens: the prompts, int64 `[B, T]`, at least one token each.
            max_new_tokens: how many to draw at most.
            mask: bool `[B, T]`, False for what fills rows up in front; None where nothing does.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: draw among the k likeliest; None among all.
            top_p: draw among the likeliest that together have this probability; None among all.
            num_tokens: how many of the vocabulary may be drawn, where the model's is padded; None
                for all.
            stop: a token that ends a sequence; what is behind it is filled up with it. None for
                none.
            generator: of the draws, on the model's device; None for PyTorch's own.
            graph: as in `Decoder`.

        Returns:
            int64 `[B, T + n]`, n = max_new_tokens, or less if all sequences end before.

        Raises:
            ValueError: a shape does not fit, or an option is out of range.
            TypeError: `tokens` is not int64.

        Examples:
            >>> model = CausalLM(CausalLMConfig(256, d_model=32, num_layers=2, head_dim=16))
            >>> prompt = torch.randint(256, (2, 5))
            >>> model.generate(prompt, max_new_tokens=4, temperature=0).shape
            torch.Size([2, 9])
        """
        return generate(
            self,
            tokens,
            max_new_tokens=max_new_tokens,
            mask=mask,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_tokens=num_tokens,
            stop=stop,
            generator=generator,
            graph=graph,
        )

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Return how many numbers the model has, with or without its embeddings."""
        skipped = 0 if embeddings else self.embeddings.weight.numel()
        return sum(p.numel() for p in self.parameters()) - skipped

    def flops_per_token(self, context: int) -> float:
        """Return the floating-point operations of the forward pass, per token.

        Two for each weight of a linear layer; of attention those of its two products with the half
        of the context that a token sees on average; of a recurrence those of its definition, two
        products with the state per reflection and one for the output. Forward and backward together
        are about three times as many.

        Args:
            context: tokens in a sequence.
        """
        total = 2.0 * sum(p.numel() for p in self.parameters() if p.dim() == 2)
        if self.head is not None:
            total -= 2.0 * self.embeddings.weight.numel()
        for name, layer in zip(self.config.layer_names(), self.blocks(), strict=True):
            mixer: Any = layer.mixer
            if name in MIXERS:
                state = mixer.num_value_heads * mixer.head_dim * mixer.value_head_dim
                total += 2.0 * state * (2 * mixer.num_householder + 1)
            else:
                seen = context / 2
                if name == SLIDING_WINDOW:
                    seen = min(seen, self.config.window)
                total += 4.0 * mixer.num_heads * mixer.head_dim * seen
        return total
