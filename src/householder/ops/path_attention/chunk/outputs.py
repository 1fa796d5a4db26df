"""The outputs of `path_attention`, up the tree of blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from householder.ops._dispatch import without_autocast
from householder.ops.path_attention.chunk.portions import cut, load
from householder.ops.path_attention.chunk.tree import (
    Heads,
    chunk_tokens,
    diagonal,
    join,
    levels,
    make_chunks,
    make_decay,
    rectangle,
    tiles,
)
from householder.ops.path_attention.inputs import Inputs


class Softmax(NamedTuple):
    """A softmax on its way: rows that have seen some of their keys."""

    o: Tensor  # [b, rows, V]: values, weighted by exp(logit − top)
    top: Tensor  # [b, rows, 1]: the largest logit so far
    total: Tensor  # [b, rows, 1]: the sum of exp(logit − top)

    def rows(self, rows: slice) -> Softmax:
        """Return a view of some rows."""
        return Softmax(*(x[:, rows] for x in self))

    def add_(self, logits: Tensor, v: Tensor, shift: Tensor | float = 0.0) -> None:
        """Take in more keys, in place: `logits [b, rows, n]` plus `shift`, `v [b, n, V]`.

        The logits are used up.
        """
        top = torch.maximum(self.top, logits.amax(-1, keepdim=True) + shift)
        weights = logits.sub_(top - shift).exp_()
        rescale = (self.top - top).exp_()
        self.total.mul_(rescale).add_(weights.sum(-1, keepdim=True))
        self.o.mul_(rescale).add_(weights @ v)
        self.top.copy_(top)

    def end_(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return o, normalised in place, and log Σ exp(logits), with `sinks [b, G]` if given."""
        lse = self.total.log().add_(self.top)
        if sinks is not None:
            b, G = sinks.shape
            lse = torch.logaddexp(lse.view(b, -1, G), sinks[:, None]).view_as(lse)
        return self.o.mul_((self.top - lse).exp_()), lse


def climb(x: Heads, to_start: bool = False) -> tuple[Softmax, Tensor]:
    """Let all queries see all keys of their sequences.

    Returns:
        The softmax, and with `to_start` the queries brought to the start of the sequence
        `[b, L·G, K]` (without it, to the start of some block).
    """
    b, L, K = x.k.shape
    C, G = chunk_tokens(K), x.group
    chunks = make_chunks(x)
    logits = diagonal(chunks, x)
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()
    softmax = Softmax(
        o=(weights @ x.v.view(-1, C, x.v.shape[-1])).view(b, L * G, -1),
        top=top.view(b, L * G, 1),
        total=weights.sum(-1, keepdim=True).view(b, L * G, 1),
    )

    q, k = chunks.queries_at_start().view_as(x.q), chunks.keys_at_end().view_as(x.k)
    f = chunks.products().view(b, -1, K, K)
    for pairs in levels(L, C, x.first_query):
        for pair in pairs:
            if not pair.has_queries(x.first_query):
                continue
            q_right = pair.split(q, G)[1].flatten(0, 1)
            k_left, v_left = (pair.split(y)[0].flatten(0, 1) for y in (k, x.v))
            carried = [pair.split(y, G)[1] for y in softmax]
            right = Softmax(*(y.clone().flatten(0, 1) for y in carried))
            decay = make_decay(pair, x)
            for tile in tiles(pair, x):
                rows = slice(tile.rows.start * G, tile.rows.stop * G)
                logits = rectangle(tile, x, q_right, k_left, decay)
                shift = 0.0 if decay is None else decay.rows[:, rows]
                right.rows(rows).add_(logits, v_left[:, tile.columns], shift)
            for target, y in zip(carried, right, strict=True):
                target.copy_(y.view_as(target))
        if to_start or 2 * pairs[0].left < L:
            f = join(pairs, x, q, k, f)
    return softmax, q


def attend(x: Heads) -> tuple[Tensor, Tensor]:
    """Return `o [b, L·G, V]` and the logarithms of the softmax's denominators `[b, L·G, 1]`."""
    softmax, _ = climb(x)
    return softmax.end_(x.sinks)


@without_autocast
def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Attend; `inputs` are those of `Inputs`.

    Returns:
        o `[B, T, HQ, V]` and the logarithms of the softmax's denominators `[B, T, HQ]`, both in the
        dtype of the computation: `backward` subtracts what o says from the gradient, and o rounded
        to half precision would say it less exactly.
    """
    x = Inputs(*inputs)
    B, T, HQ, _ = x.q.shape
    o = x.v.new_empty(B, T, HQ, x.v.shape[-1], dtype=x.dtype)
    lse = x.v.new_empty(B, T, HQ, 1, dtype=x.dtype)
    for portion in cut(x):
        o_rows, lse_rows = attend(load(x, portion))
        portion.scatter(o_rows, o, x.group, x.first_query)
        portion.scatter(lse_rows, lse, x.group, x.first_query)
    return o, lse.squeeze(-1)
