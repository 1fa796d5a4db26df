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
from householder.ops.path_attention.inputs import Inputs
from householder.ops.path_attention.triton import attend, config, gradients

# What copies of the queries may take together, unless one head needs more: on an H200, 131,072
# tokens of 16 heads of 128 in bfloat16 are four portions, 32,768 are one.
LEVEL_BYTES = 2**31


def heads_at_once(x: Inputs) -> int:
    """Return how many key heads go through the kernels together, a divisor of all."""
    B, T, H, K = x.k.shape
    of_a_head = config.num_levels(T) * B * T * x.group * K * x.q.element_size() if H else 0
    most = max(1, LEVEL_BYTES // max(1, of_a_head))
    return next((n for n in range(min(H, most), 0, -1) if H % n == 0), 0)


def portions(heads: int, x: Inputs) -> Iterator[tuple[slice, slice]]:
    """Yield the query heads and the key heads of one portion after the other."""
    for first in range(0, x.k.shape[2], heads):
        last = first + heads
        yield slice(first * x.group, last * x.group), slice(first, last)


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


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Do what `attend.forward` does."""
    x = Inputs(*inputs)
    heads = heads_at_once(x)
    if heads == x.k.shape[2]:
        return attend.forward(*inputs)
    results: list[Tensor] = []
    for here in portions(heads, x):
        parts = attend.forward(*pick(here, inputs))
        results = results or [y.new_empty(*x.q.shape[:3], *y.shape[3:]) for y in parts]
        for whole, part in zip(results, parts, strict=True):
            whole[:, :, here[0]].copy_(part)
        del parts, part
    o, lse = results
    return o, lse


def backward(
    do: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Do what `gradients.backward` does."""
    *given, o, lse = inputs
    x = Inputs(*given)
    heads = heads_at_once(x)
    if heads == x.k.shape[2]:
        return gradients.backward(do, *inputs)
    results = [None if y is None else contiguous_like(y) for y in x[:7]]
    for here in portions(heads, x):
        do_part, *saved = (y[:, :, here[0]] for y in (do, o, lse))
        parts = gradients.backward(do_part, *pick(here, x), *saved)
        for whole, part in zip(pick(here, results), parts, strict=True):
            if whole is not None:
                whole.copy_(part)
        del parts, part
    return tuple(results)  # type: ignore[return-value]
