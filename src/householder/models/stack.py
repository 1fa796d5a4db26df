"""What models of tokens share: embedding, blocks, a final norm, and the ways to run them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from householder.models._recompute import silence_advice
from householder.models.block import Block
from householder.nn import DeltaProductMixer
from householder.ops._checks import check_tensor


class BlockStack(nn.Module):
    """Turn tokens into vectors: embedding, blocks of mixer and MLP, a final RMSNorm.

    The vector at a position depends on the tokens up to and including it. What a head reads from it
    are the logits.

    Args:
        vocab_size: number of different tokens.
        d_model: size of the vectors.
        blocks: the blocks, made when they are asked for, after the embedding.
        norm_eps: added to the mean square in the final norm.
        num_outputs: logits of a head of its own; `None` for one that is the embedding, read the
            other way.
        recompute: what the attribute begins with.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        checkpoint_activations: keep of each block its input alone, and run it again in the backward
            pass: memory for time.
        recompute: on a GPU, make anew in the backward pass what is cheap: the recurrences' states,
            and in compiled blocks all but the results of matrix products, convolutions, recurrences
            and attention. Blocks that are run again as a whole keep that in between.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        blocks: Iterable[Block],
        *,
        norm_eps: float,
        num_outputs: int | None,
        recompute: bool = False,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, d_model, device=device, dtype=dtype)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(d_model, eps=norm_eps, device=device, dtype=dtype)
        self.head: nn.Linear | None = None
        if num_outputs is not None:
            self.head = nn.Linear(d_model, num_outputs, bias=False, device=device, dtype=dtype)
        self._checkpoint_activations = False
        self._recompute = recompute
        self._tell_blocks()

    @property
    def checkpoint_activations(self) -> bool:
        """Whether blocks are run again in the backward pass."""
        return self._checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self._checkpoint_activations = value
        self._tell_blocks()

    @property
    def recompute(self) -> bool:
        """Whether what is cheap is made anew in the backward pass."""
        return self._recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self._recompute = value
        self._tell_blocks()

    def _tell_blocks(self) -> None:
        # Nothing in a block that is run again needs a third run.
        recompute = self.recompute and not self.checkpoint_activations
        for block in self.blocks():
            block.recompute = recompute
            if isinstance(block.mixer, DeltaProductMixer):
                block.mixer.recompute = recompute

    @property
    def head_weight(self) -> Tensor:
        """The head's weight `[num_outputs, d_model]`: with tied embeddings, these."""
        return self.embeddings.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[..., num_outputs]` that the head reads from `hidden`."""
        return F.linear(hidden, self.head_weight)

    def init_state(self, batch_size: int) -> list[Any]:
        """Return the states before the first token, one per layer.

        Args:
            batch_size: B, sequences that advance together.
        """
        return [layer.init_state(batch_size) for layer in self.blocks()]

    def hidden(
        self,
        tokens: Tensor,
        *,
        states: Sequence[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        return_states: bool = False,
    ) -> Any:
        """Return what the head reads, `[B, T, d_model]`; the arguments are those of `forward`."""
        x = self._embed(tokens, "[B, T]", dim=2)
        new_states: list[Any] = []
        save_memory = self.checkpoint_activations and self.training and not return_states
        for layer, state in zip(self.blocks(), self._per_layer(states), strict=True):
            if save_memory:
                x = checkpoint(
                    layer, x, state=state, cu_seqlens=cu_seqlens, mask=mask, use_reentrant=False
                )
                continue
            x = layer(x, state=state, cu_seqlens=cu_seqlens, mask=mask, return_state=return_states)
            if return_states:
                x, new_state = x
                new_states.append(new_state)
        x = self._normalize(x)
        return (x, new_states) if return_states else x

    def hidden_step(self, tokens: Tensor, states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Return what the head reads after one more token `[B]`, `[B, d_model]`, and the states."""
        x = self._embed(tokens, "[B]", dim=1)
        new_states = []
        for layer, state in zip(self.blocks(), self._per_layer(states), strict=True):
            x, new_state = layer.step(x, state)
            new_states.append(new_state)
        return self._normalize(x), new_states

    def reserve(self, states: Sequence[Any], num_tokens: int) -> list[Any]:
        """Return states that `step_` can change in place, using these up.

        Args:
            states: after the tokens so far, one per layer.
            num_tokens: in all, that there must be room for.

        Raises:
            ValueError: there are more tokens already.
        """
        pairs = zip(self.blocks(), self._per_layer(states), strict=True)
        return [layer.mixer.reserve(state, num_tokens) for layer, state in pairs]

    def hidden_step_(self, tokens: Tensor, states: Sequence[Any]) -> Tensor:
        """Return what the head reads after one more token `[B]`, changing the states in place."""
        x = self._embed(tokens, "[B]", dim=1)
        for layer, state in zip(self.blocks(), self._per_layer(states), strict=True):
            x = layer.step_(x, state)
        return self._normalize(x)

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block by itself, in place.

        Blocks that are alike share one compilation, so that it takes as long for a model as for one
        of its layers; what a compiler gains is inside the blocks.

        Args:
            **options: those of `torch.compile`.
        """
        silence_advice()
        options = {"fullgraph": True, **options}
        for block in self.blocks():
            block.compile(**options)

    def blocks(self) -> Iterator[Block]:
        """Return the blocks in their order."""
        return cast("Iterator[Block]", iter(self.layers))

    def _normalize(self, x: Tensor) -> Tensor:
        # Under autocast x may be narrower than the weight, which nn.RMSNorm warns about.
        return self.norm(x.to(self.norm.weight.dtype))

    def _per_layer(self, states: Sequence[Any] | None) -> Sequence[Any]:
        num_layers = len(self.layers)
        if states is None:
            return [None] * num_layers
        if len(states) != num_layers:
            raise ValueError(
                f"{type(self).__name__}: `states` must have one entry per layer, {num_layers}, "
                f"got {len(states)}; use those of this model"
            )
        return states

    def _embed(self, tokens: Tensor, layout: str, dim: int) -> Tensor:
        where = type(self).__name__
        check_tensor(where, "tokens", tokens)
        if tokens.dtype != torch.int64:
            raise TypeError(
                f"{where}: `tokens` must be int64, got {tokens.dtype}; convert with .long()"
            )
        if tokens.dim() != dim:
            raise ValueError(
                f"{where}: `tokens` must be {layout}, got shape {list(tokens.shape)}; "
                "use forward for sequences and step for single tokens"
            )
        return self.embeddings(tokens)
