"""Heads by portions, where what is kept of all of them at once would take too much memory.

The tree keeps a copy of the queries for every level, log₂(T / 64) of them, and the gradient several
times that. Heads have nothing to do with one another, and a few of so long a sequence keep a GPU
busy. So memory grows like T, not like T log T, and no bit depends on the portions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from householder.ops._dispatch import contiguous_like
from householder.ops.path_attention.triton import attend, config, gradients

# What copies of the queries may take together, unless one head needs more: on an H200, 131,072
# tokens of 16 heads of 128 in bfloat16 are four portions, 32,768 are one.
LEVEL_BYTES = 2**31


def heads_at_once(q: Tensor, k: Tensor) -> int:
    """Return how many key heads go through the kernels together, a divisor of all."""
    B, T, H, K = k.shape
    of_a_head = config.num_levels(T) * B * T * (q.shape[2] // H) * K * q.element_size()
    most = max(1, LEVEL_BYTES // max(1, of_a_head))
    return next(n for n in range(min(H, most), 0, -1) if H % n == 0)


def portions(heads: int, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the query heads and the key heads of one portion after the other."""
    H, group = k.shape[2], q.shape[2] // k.shape[2]
    for first in range(0, H, heads):
        yield slice(first * group, (first + heads) * group), slice(first, first + heads)


def pick(here: tuple[slice, slice], inputs: Sequence[Any]) -> list[Any]:
    """Return views of a portion's heads of q, k, v, w, beta, g and sinks, and what follows them."""
    of_queries, of_keys = here
    q, k, v, w, beta, g, sinks, *others = inputs
    return [
        q[:, :, of_queries],
        *(x[:, :, of_keys] for x in (k, v, w, beta)),
        None if g is None else g[:, :, of_queries],
        None if sinks is None else sinks[of_queries],
        *others,
    ]


def forward(
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
) -> tuple[Tensor, Tensor]:
    """Do what `attend.forward` does."""
    inputs = q, k, v, w, beta, g, sinks, scale, window, cu_seqlens
    heads = heads_at_once(q, k)
    if heads == k.shape[2]:
        return attend.forward(*inputs)
    results: list[Tensor] = []
    for here in portions(heads, q, k):
        parts = attend.forward(*pick(here, inputs))
        results = results or [x.new_empty(*q.shape[:3], *x.shape[3:]) for x in parts]
        for whole, part in zip(results, parts, strict=True):
            whole[:, :, here[0]].copy_(part)
        del parts, part
    o, lse = results
    return o, lse


def backward(
    do: Tensor,
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
    o: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Do what `gradients.backward` does."""
    inputs = q, k, v, w, beta, g, sinks, scale, window, cu_seqlens
    heads = heads_at_once(q, k)
    if heads == k.shape[2]:
        return gradients.backward(do, *inputs, o, lse)
    results = [None if x is None else contiguous_like(x) for x in inputs[:7]]
    for here in portions(heads, q, k):
        do_part, *saved = (x[:, :, here[0]] for x in (do, o, lse))
        arguments = do_part, *pick(here, inputs), *saved
        parts = gradients.backward(*arguments)
        for whole, part in zip(pick(here, results), parts, strict=True):
            if whole is not None:
                whole.copy_(part)
        del parts, part
    return tuple(results)  # type: ignore[return-value]
