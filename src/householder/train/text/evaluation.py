"""How well a language model predicts text it has not seen, by the length of the context."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from householder.models import CausalLM
from householder.train.text.batches import pack, validation_windows

_TOKENS_AT_ONCE = 1 << 14
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Perplexity:
    """The mean loss on windows of some length.

    Attributes:
        context: T.
        loss: nats per token.
        tokens: how many were predicted.
    """

    context: int
    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def token_losses(
    model: CausalLM,
    windows: np.ndarray[Any, Any],
    *,
    separator: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the loss in nats of every token of some windows, float32 `[n, T]` on the CPU.

    Args:
        model: in any mode; it is put back into it.
        windows: `[n, T + 1]`, each token to be predicted from those before it in its window.
        separator: the token that begins a document, if documents shall not see one another.
        check: called between batches; it may raise.
    """
    device = model.head_weight.device
    count, length = windows.shape[0], windows.shape[1] - 1
    rows = max(1, _TOKENS_AT_ONCE // max(1, length))
    at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)  # tokens whose logits are held
    losses = torch.empty(count, length)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for first in range(0, count, rows):
                check()
                batch = pack(windows[first : first + rows], separator).to(device)
                hidden = model.hidden(batch.tokens, cu_seqlens=batch.cu_seqlens)
                hidden = hidden.flatten(0, 1)
                labels = batch.labels.flatten()
                parts = [
                    F.cross_entropy(model.logits(x).float(), y, reduction="none")
                    for x, y in zip(hidden.split(at_once), labels.split(at_once), strict=True)
                ]
                losses[first : first + rows] = torch.cat(parts).reshape(-1, length).cpu()
    finally:
        model.train(training)
    return losses


def circular_windows(tokens: Any, context: int, count: int) -> np.ndarray[Any, Any]:
    """Return windows that begin at equal distances around the circle of some tokens.

    The text goes on at its beginning where it ends. So every token is read at about
    count · context / n positions that lie evenly, n being the number of tokens, and the mean loss
    over positions a to b is one over the same text wherever b − a is a multiple of n / count: what
    differs between such means is what came before.

    Args:
        tokens: of the corpus; at least context + 1.
        context: T.
        count: how many windows.

    Returns:
        The tokens, `[count, context + 1]`.

    Examples:
        >>> circular_windows(np.arange(8), context=3, count=4)
        array([[0, 1, 2, 3],
               [2, 3, 4, 5],
               [4, 5, 6, 7],
               [6, 7, 0, 1]])
    """
    total = len(tokens)
    rows = []
    for i in range(count):
        begin = i * total // count
        end = begin + context + 1
        parts = [tokens[begin : min(end, total)], tokens[0 : max(0, end - total)]]
        rows.append(np.concatenate(parts))
    return np.stack(rows)


def spaced_windows(tokens: Any, context: int, count: int, *, distance: int) -> np.ndarray[Any, Any]:
    """Return windows that begin a distance apart around a circle of the first tokens.

    The circle is no longer than the text and no shorter than a window, which must not meet itself;
    the distance is then what comes of it. See `circular_windows` for what may be compared.

    Args:
        tokens: of the corpus; at least context + 1.
        context: T.
        count: how many windows.
        distance: from the beginning of one to that of the next, in tokens.

    Returns:
        The tokens, `[count, context + 1]`.
    """
    circle = max(context + 1, min(len(tokens), count * distance))
    return circular_windows(tokens[:circle], context, count)


def evaluate_text(
    model: CausalLM,
    tokens: Any,
    contexts: tuple[int, ...],
    *,
    max_tokens: int,
    separator: int | None,
    check: Callable[[], None] = lambda: None,
) -> list[Perplexity]:
    """Return the perplexity of some tokens in windows of each length.

    Args:
        model: the model.
        tokens: of the corpus, held out.
        contexts: lengths T; those longer than the text are left out.
        max_tokens: tokens to predict per length, but at least one window.
        separator: as in `token_losses`.
        check: as in `token_losses`.
    """
    results = []
    for context in contexts:
        windows = validation_windows(tokens, context, max_tokens)
        if len(windows):
            losses = token_losses(model, windows, separator=separator, check=check)
            results.append(Perplexity(context, losses.double().mean().item(), losses.numel()))
    return results
