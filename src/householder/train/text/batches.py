"""Windows of a corpus as batches, each a pure function of the seed and the step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from householder.train.data import generator_for
from householder.train.errors import ConfigError


class TextBatch(NamedTuple):
    """Windows of text, end to end.

    Attributes:
        tokens: int64 `[1, B · T]`, or `[B, T]` where documents see one another.
        labels: int64 of the same shape: the token after each.
        cu_seqlens: int32 `[S + 1]`, where the documents' parts begin and end; `None` for `[B, T]`.
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None

    def to(self, device: torch.device) -> TextBatch:
        """Return the batch on a device, without waiting for the copy."""
        return TextBatch(
            *(None if x is None else x.to(device, non_blocking=True) for x in self)  # type: ignore[arg-type]
        )


class Windows:
    """The training data: windows of T tokens in an order that every epoch draws anew.

    An epoch begins its first window at a random one of the first T tokens, so that what is the
    first token of a window changes too.

    Args:
        tokens: of the corpus.
        context: T.
        seed: of the order.
        separator: the token that begins a document, if documents shall not see one another; `None`
            if they shall.

    Raises:
        ConfigError: there are too few tokens for one window.

    Examples:
        >>> windows = Windows(np.arange(100), context=10, seed=0, separator=None)
        >>> batch = windows.batch(step=3, batch_size=4)
        >>> batch.tokens.shape, bool((batch.labels == batch.tokens + 1).all())
        (torch.Size([4, 10]), True)
    """

    def __init__(self, tokens: Any, context: int, seed: int, separator: int | None) -> None:
        if len(tokens) < 2 * context:
            raise ConfigError(
                f"`context` must be at most half of the {len(tokens)} training tokens, got "
                f"{context}; give more text or a smaller --context"
            )
        self._tokens = tokens
        self._context = context
        self._seed = seed
        self._separator = separator
        # One less than fit: room for the random begin, and for the last window's last label.
        self.per_epoch = (len(tokens) - 1) // context - 1
        self._epoch = -1

    def batch(self, step: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> TextBatch:
        """Return a process's part of the windows of a step.

        Args:
            step: counted from 0.
            batch_size: B, windows of all processes together.
            rank: which process, of which each takes every `world_size`-th window.
            world_size: how many processes.
        """
        first = step * batch_size
        rows = [self._window(first + i) for i in range(rank, batch_size, world_size)]
        return pack(np.stack(rows), self._separator)

    def _window(self, number: int) -> np.ndarray[Any, Any]:
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            generator = generator_for(self._seed, "epoch", epoch)
            self._order = torch.randperm(self.per_epoch, generator=generator)
            self._begin = int(torch.randint(self._context, (), generator=generator))
            self._epoch = epoch
        begin = self._begin + int(self._order[index]) * self._context
        return np.asarray(self._tokens[begin : begin + self._context + 1])


def validation_windows(tokens: Any, context: int, max_tokens: int) -> np.ndarray[Any, Any]:
    """Return the first windows of some tokens, `[n, context + 1]`; fewer or none if there are not.

    Args:
        tokens: of the corpus.
        context: T.
        max_tokens: how many tokens to predict at most, but at least one window.
    """
    count = min((len(tokens) - 1) // context, max(1, max_tokens // context))
    rows = [tokens[i * context : (i + 1) * context + 1] for i in range(count)]
    return np.stack(rows) if rows else np.empty((0, context + 1), dtype=np.int64)


def pack(windows: np.ndarray[Any, Any], separator: int | None) -> TextBatch:
    """Return windows `[B, T + 1]` as a batch, cut at every separator if there is one.

    Examples:
        >>> batch = pack(np.array([[9, 1, 2, 9], [3, 9, 4, 5]]), separator=9)
        >>> batch.tokens, batch.labels
        (tensor([[9, 1, 2, 3, 9, 4]]), tensor([[1, 2, 9, 9, 4, 5]]))
        >>> batch.cu_seqlens
        tensor([0, 3, 4, 6], dtype=torch.int32)
    """
    numbers = torch.from_numpy(windows.astype(np.int64))
    tokens, labels = numbers[:, :-1], numbers[:, 1:]
    if separator is None:
        return TextBatch(tokens.contiguous(), labels.contiguous(), None)
    begins = tokens == separator
    begins[:, 0] = True
    bounds = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([tokens.numel()])])
    return TextBatch(tokens.reshape(1, -1), labels.reshape(1, -1), bounds.to(torch.int32))
