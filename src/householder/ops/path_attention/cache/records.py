"""What is handed about between a `PathCache`, its `Store` and the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

BLOCK = 64  # tokens of the smallest block
MAX_NEW = 16  # tokens that the kernels take at once
# Query heads of a key head for which, on a GPU, sums are faster than the sixteen rows of a product.
MAX_SUMMED = 4


class Group(NamedTuple):
    """Neighbouring rows of the batch that stand at the same token and get equally many more."""

    rows: slice
    old: int  # tokens in blocks, a multiple of BLOCK
    recent: int  # tokens after them
    new: int

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield level and first token of each block, the newest first."""
        stop = self.old
        count, level = self.old // BLOCK, 0
        while count:
            if count % 2:
                stop -= BLOCK << level
                yield level, stop
            count, level = count // 2, level + 1


class Tokens(NamedTuple):
    """New tokens, `[B, T, …]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    g: Tensor | None

    def of(self, group: Group) -> Tokens:
        """Return those of a group."""
        here = group.rows, slice(0, group.new)
        q, k, v, w, beta = (x[here] for x in self[:5])
        return Tokens(q, k, v, w, beta, None if self.g is None else self.g[here])


class Options(NamedTuple):
    """How tokens attend."""

    scale: float
    sinks: Tensor | None
    window: int | None


class Held(NamedTuple):
    """The tensors of a store that the Triton kernels read and write."""

    keys: Tensor
    values: Tensor
    w: Tensor
    beta: Tensor
    g: Tensor | None
    tw: Tensor
    ty: Tensor
    paths: Tensor
    path_scales: Tensor | None
    block_decay: Tensor | None
    path_decays: Tensor | None
    ready: Tensor
