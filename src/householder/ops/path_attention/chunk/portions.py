"""Brings the inputs of `path_attention` to rows of a few heads at a time, and results back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from householder.ops.path_attention.chunk.tree import Heads, chunk_tokens
from householder.ops.path_attention.inputs import Inputs

# Elements of one [tokens, K] tensor of the heads worked on together: on a CPU about ten such
# tensors share the caches; a GPU wants long batches.
PORTION_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


class Sequence(NamedTuple):
    """Where one sequence lies in `[B, T, …]`: tokens `start` … `stop` − 1 of a batch row."""

    row: int
    start: int
    stop: int


class Portion(NamedTuple):
    """Sequences of about one length, and some of their key heads, worked on together."""

    sequences: list[Sequence]
    heads: slice
    length: int  # to which the sequences are filled up

    def gather(self, x: Tensor, dtype: torch.dtype, per_key_head: int, first: int = 0) -> Tensor:
        """Bring `[B, T, H·n, D]` to rows `[sequences · heads, length · n, D]`, filled with zeros.

        n is `per_key_head`: the group for what query heads have, 1 for what key heads have. The
        tokens of `x` are those of the sequences from `first` on.
        """
        x = x.unflatten(2, (-1, per_key_head))[:, :, self.heads]
        heads, D = x.shape[2], x.shape[-1]
        rows = x.new_empty(len(self.sequences), heads, self.length, per_key_head, D, dtype=dtype)
        for target, (row, start, stop) in zip(rows, self.sequences, strict=True):
            target[:, :first] = 0
            target[:, first : stop - start] = x[row, start : stop - first].transpose(0, 1)
            target[:, stop - start :] = 0
        return rows.view(-1, self.length * per_key_head, D)

    def scatter(self, rows: Tensor, out: Tensor, per_key_head: int, first: int = 0) -> None:
        """Undo `gather`: put rows into `out [B, T, H·n, D]`."""
        out = out.unflatten(2, (-1, per_key_head))[:, :, self.heads]
        rows = rows.view(len(self.sequences), -1, self.length, per_key_head, out.shape[-1])
        for source, (row, start, stop) in zip(rows, self.sequences, strict=True):
            out[row, start : stop - first] = source[:, first : stop - start].transpose(0, 1)


def cut(x: Inputs) -> Iterator[Portion]:
    """Yield all sequences and heads, as many at a time as suit the caches."""
    B, T, H, K = x.k.shape
    if x.cu_seqlens is None:
        sequences = [Sequence(row, 0, T) for row in range(B)]
    else:
        bounds = pairwise(x.cu_seqlens.tolist())
        sequences = [Sequence(0, start, stop) for start, stop in bounds]
    # Sequences of equally many chunks go together. There are at most √(2T / C) such lengths.
    C = chunk_tokens(K)
    by_length: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        length = -(-(sequence.stop - sequence.start) // C) * C
        by_length.setdefault(length, []).append(sequence)
    by_length.pop(0, None)
    budget = PORTION_ELEMENTS["cuda" if x.q.is_cuda else "cpu"]
    for length, alike in by_length.items():
        size = max(1, budget // (length * x.group * max(K, x.v.shape[-1])))
        heads, together = min(size, H), max(1, size // H)
        for i in range(0, len(alike), together):
            for h in range(0, H, heads):
                some = slice(h, min(h + heads, H))
                yield Portion(alike[i : i + together], some, length)


def load(x: Inputs, portion: Portion) -> Heads:
    """Gather the inputs of a portion."""
    g, sinks = None, None
    if x.g is not None:
        g = portion.gather(x.g.unsqueeze(-1), torch.float64, x.group)
        g = g.view(-1, portion.length, x.group)
    if x.sinks is not None:
        sinks = x.sinks.to(x.dtype).unflatten(0, (-1, x.group))[portion.heads]
        sinks = sinks.repeat(len(portion.sequences), 1)
    return Heads(
        q=portion.gather(x.q, x.dtype, x.group, x.first_query).mul_(x.scale),
        k=portion.gather(x.k, x.dtype, 1),
        v=portion.gather(x.v, x.dtype, 1),
        w=portion.gather(x.w, x.dtype, 1),
        beta=portion.gather(x.beta.unsqueeze(-1), x.dtype, 1),
        g=g,
        sinks=sinks,
        window=x.window,
        first_query=x.first_query,
    )
