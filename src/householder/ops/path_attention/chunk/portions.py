"""Brings the inputs of `path_attention` to rows of a few heads at a time, and results back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from householder.ops.path_attention.chunk.tree import Heads, chunk_tokens
from householder.ops.wy import compute_dtype

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
    group: int

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


class Problem(NamedTuple):
    """The op's inputs, each `[B, T, heads, D]`; q may be that of the last tokens only."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    g: Tensor | None
    sinks: Tensor | None
    scale: float
    window: int | None
    cu_seqlens: Tensor | None
    dtype: torch.dtype

    @property
    def group(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    @property
    def first_query(self) -> int:
        """The first token that has a query."""
        return self.k.shape[1] - self.q.shape[1]

    def portions(self) -> Iterator[Portion]:
        """Yield all sequences and heads, as many at a time as suit the caches."""
        B, T, H, K = self.k.shape
        if self.cu_seqlens is None:
            sequences = [Sequence(row, 0, T) for row in range(B)]
        else:
            bounds = pairwise(self.cu_seqlens.tolist())
            sequences = [Sequence(0, start, stop) for start, stop in bounds]
        # Sequences of equally many chunks go together. There are at most √(2T / C) such lengths.
        C = chunk_tokens(K)
        by_length: dict[int, list[Sequence]] = {}
        for sequence in sequences:
            length = -(-(sequence.stop - sequence.start) // C) * C
            by_length.setdefault(length, []).append(sequence)
        by_length.pop(0, None)
        budget = PORTION_ELEMENTS["cuda" if self.q.is_cuda else "cpu"]
        for length, alike in by_length.items():
            size = max(1, budget // (length * self.group * max(K, self.v.shape[-1])))
            heads, together = min(size, H), max(1, size // H)
            for i in range(0, len(alike), together):
                for h in range(0, H, heads):
                    some = slice(h, min(h + heads, H))
                    yield Portion(alike[i : i + together], some, length, self.group)

    def load(self, portion: Portion) -> Heads:
        """Gather the inputs of a portion."""
        g, sinks = None, None
        if self.g is not None:
            g = portion.gather(self.g, torch.float64, self.group)
            g = g.view(-1, portion.length, self.group)
        if self.sinks is not None:
            sinks = self.sinks.to(self.dtype).unflatten(0, (-1, self.group))[portion.heads]
            sinks = sinks.repeat(len(portion.sequences), 1)
        return Heads(
            q=portion.gather(self.q, self.dtype, self.group, self.first_query).mul_(self.scale),
            k=portion.gather(self.k, self.dtype, 1),
            v=portion.gather(self.v, self.dtype, 1),
            w=portion.gather(self.w, self.dtype, 1),
            beta=portion.gather(self.beta, self.dtype, 1),
            g=g,
            sinks=sinks,
            window=self.window,
            first_query=self.first_query,
        )


def make_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> Problem:
    """Bring the inputs to one form."""
    dtype = compute_dtype(q, k, v, w, beta)
    g = None if g is None else g.unsqueeze(-1)
    return Problem(q, k, v, w, beta.unsqueeze(-1), g, sinks, scale, window, cu_seqlens, dtype)
