"""The cache of our language models in transformers: one state per layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from householder.models import CausalLM
from householder.nn import KeyValueState, MixerState, PaTHState

MAX_ROLLBACK = 32
"""How many tokens, guessed by an assistant, can be taken back after they were read together."""


class HouseholderCache(Cache):
    """What the layers of a model remember of the tokens so far.

    Recurrent states cannot forget a token. Where some tokens were read together and the last of
    them are taken back (`crop`), the states from before are put back, and those of the tokens that
    stay are read again in front of the next ones.

    Args:
        model: whose layers they are.

    Attributes:
        states: one per layer; `None` before the first token.
        seen: how many tokens have been read, those that fill rows up included.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__(layers=[])
        self.states: list[Any] | None = None
        self.seen = 0
        self._model = model
        # To take tokens back: the states before the last call, what it read, and what of it has to
        # be read again.
        self._before: list[Any] | None = None
        self._read: tuple[Tensor, Tensor | None] | None = None
        self._unread: tuple[Tensor, Tensor | None] | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens have been read, those that fill rows up included."""
        return self.seen

    @property
    def is_compileable(self) -> bool:
        """Whether generation may compile the model with it: states change their shapes."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return True

    @property
    def batch_size(self) -> int:
        """Return how many sequences advance together."""
        return 0 if self.states is None else _batch_size(self.states[0])

    def activate_past_recording(self) -> None:
        """Nothing: what `crop` needs is kept in any case."""

    def take(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """Return what the model has to read to know these tokens, and how many come before them.

        Args:
            tokens: the new ones, `[B, T]`.
            mask: of their rows, as in `CausalLM.forward`.
        """
        extra = 0
        self.seen += tokens.shape[1]
        if self._unread is not None:
            before, mask_before = self._unread
            extra = before.shape[1]
            tokens = torch.cat([before, tokens], dim=1)
            if mask_before is not None:
                mask = torch.cat([mask_before, mask_before.new_ones(tokens.shape)], dim=1)
                mask = mask[:, : tokens.shape[1]]
            self._unread = None
        if self.states is None:
            self.states = self._model.init_state(tokens.shape[0])
        beginning = self.seen == tokens.shape[1]
        if tokens.shape[1] == 1 or not (beginning or tokens.shape[1] <= MAX_ROLLBACK):
            self._before, self._read = None, None
        else:
            self._before = None if beginning else list(self.states)
            self._read = tokens, mask
        return tokens, mask, extra

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: how many, as a negative number; at most those of the last call.

        Raises:
            ValueError: the number is positive.
            RuntimeError: so many tokens were not read together.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"HouseholderCache.crop: `tokens_to_remove` must be negative or 0, got "
                f"{tokens_to_remove}; give -n to forget n tokens"
            )
        if tokens_to_remove == 0:
            self._before, self._read = None, None
            return
        removed = -tokens_to_remove
        if self._read is None or removed > self._read[0].shape[1]:
            count = 0 if self._read is None else self._read[0].shape[1]
            raise RuntimeError(
                f"HouseholderCache.crop: can forget the {count} tokens that were read together "
                f"last, got {removed}; begin anew with an empty cache"
            )
        tokens, mask = self._read
        read = tokens.shape[1]
        self.states = None if self._before is None else _rolled(self._before, read)
        kept = read - removed
        self._unread = None
        if kept:
            self._unread = tokens[:, :kept], None if mask is None else mask[:, :kept]
        self.seen -= removed
        self._before, self._read = None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i go on from what sequence `beam_idx[i]` was."""
        rows = beam_idx.long()  # beam search counts in int32
        self._change(lambda x: x.index_select(0, rows.to(x.device)), rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on from every sequence `repeats` times."""
        rows = torch.arange(self.batch_size).repeat_interleave(repeats)
        self.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on from some of the sequences alone."""
        self.reorder_cache(indices)

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.seen = None, 0
        self._before = self._read = self._unread = None

    def _change(self, change: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        if self.states is not None:
            self.states = [_selected(state, change, rows) for state in self.states]
        for name in ("_read", "_unread"):
            pair = getattr(self, name)
            if pair is not None:
                tokens, mask = pair
                setattr(self, name, (change(tokens), None if mask is None else change(mask)))
        self._before = None
        self._read = None


def _batch_size(state: Any) -> int:
    if isinstance(state, PaTHState):
        return state.cache.batch_size
    return int(state[0].shape[0])


def _selected(state: Any, change: Callable[[Tensor], Tensor], rows: Tensor) -> Any:
    if isinstance(state, MixerState):
        convs: Any = None if state.conv is None else tuple(change(x) for x in state.conv)
        return MixerState(change(state.matrix), convs)
    if isinstance(state, KeyValueState):
        return KeyValueState(*(None if x is None else change(x) for x in state))  # type: ignore[arg-type]
    conv = None if state.conv is None else change(state.conv)
    return PaTHState(state.cache.select(rows), conv)


def _rolled(states: list[Any], num_tokens: int) -> list[Any]:
    """Return states from before the last call; a PaTH state was used up by it, and goes back."""
    for state in states:
        if isinstance(state, PaTHState):
            state.cache.rollback(num_tokens)
    return states
