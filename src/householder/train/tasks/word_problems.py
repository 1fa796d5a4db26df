"""The word problem of a finite group: say the running product after every element read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from householder.train.tasks.base import IGNORE_INDEX, Batch, Task
from householder.train.tasks.groups import (
    Group,
    alternating_group,
    num_moved,
    symmetric_group,
)


class WordProblem(Task):
    """Track the running product of a word over a finite group.

    The elements x_1, x_2, … are independent and uniform over `alphabet`; the label of position t is

        y_t = x_t · y_{t-1},   y_0 = identity,

    that is, x_1, …, x_t applied in this order (a · b applies b first). A sequence of `length` = T
    elements has L = T + 1 tokens: BOS, x_1, …, x_T. Token i is element i of the group, BOS is token
    |G|; the classes are the elements. BOS is not supervised, every other position is. Published
    metric: the fraction of sequences whose whole prefix is right, per length.

    Multiplying on the other side, y_t = y_{t-1} · x_t, is the same problem with every element
    renamed to its inverse, since (y_{t-1} · x_t)⁻¹ = x_t⁻¹ · y_{t-1}⁻¹.

    Args:
        group: the group.
        alphabet: numbers of the elements that words are made of; all of the group by default.
        name: name of the task; the group's in lower case by default.

    Raises:
        ValueError: `alphabet` is empty, repeats an element or names one that is not of the group.

    Examples:
        >>> from householder.train.tasks.groups import cyclic_group
        >>> task = WordProblem(cyclic_group(3))
        >>> batch = task.sample(2, 4, torch.Generator().manual_seed(0))
        >>> batch.tokens  # 3 is BOS
        tensor([[3, 2, 2, 1, 1],
                [3, 0, 0, 0, 1]])
        >>> batch.labels
        tensor([[-100,    2,    1,    2,    0],
                [-100,    0,    0,    0,    1]])

    References:
        The Illusion of State in State-Space Models (Merrill, Petty, Sabharwal, 2024),
        https://arxiv.org/abs/2404.08819;
        Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues (Grazzi, Siems, Zela,
        Franke, Hutter, Pontil, 2024), https://arxiv.org/abs/2411.12537;
        DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products (Siems,
        Carstensen, Zela, Hutter, Pontil, Grazzi, 2025), https://arxiv.org/abs/2502.10297.
    """

    metric = "prefix"

    def __init__(
        self, group: Group, *, alphabet: Sequence[int] | None = None, name: str | None = None
    ) -> None:
        self.group = group
        self.name = group.name.lower() if name is None else name
        self.alphabet = tuple(range(group.order) if alphabet is None else alphabet)
        distinct = set(self.alphabet)
        if (
            not distinct
            or len(distinct) != len(self.alphabet)
            or not distinct <= {*range(group.order)}
        ):
            raise ValueError(
                f"{self.name}: `alphabet` must be distinct numbers from 0 to {group.order - 1}, "
                f"got {self.alphabet}; name each allowed element of {group.name} once"
            )
        self.bos = group.order
        self.vocab_size = group.order + 1
        self.num_classes = group.order
        self.chance = 1 / group.order

    def _generate(self, num: int, length: int, generator: torch.Generator) -> Batch:
        device = generator.device
        # Time first: each step of the running product then reads and writes contiguous rows.
        words = torch.randint(len(self.alphabet), (length, num), generator=generator, device=device)
        if self.alphabet != tuple(range(self.group.order)):
            words = torch.tensor(self.alphabet, device=device)[words]
        tokens = torch.full((num, length + 1), self.bos, device=device)
        tokens[:, 1:] = words.T
        labels = torch.full_like(tokens, IGNORE_INDEX)
        labels[:, 1:] = self.group.running_product(words).T
        return Batch(tokens, labels)


def s5_moves(max_moved: int, name: str) -> WordProblem:
    """Return the word problem over S5 from the permutations that move at most `max_moved` points.

    Two gives the identity and the 10 swaps; three adds the 20 cycles of three points. The running
    products still range over all 120 elements.
    """
    group = symmetric_group(5)
    alphabet = [i for i, p in enumerate(group.elements) if num_moved(p) <= max_moved]
    return WordProblem(group, alphabet=alphabet, name=name)


def a5_cycles() -> WordProblem:
    """Return the word problem over A5 from (1 2 3), (1 2 4), (1 2 5) and their inverses.

    These six cycles of three points generate the group: the running products range over all 60
    elements.

    Examples:
        >>> task = a5_cycles()
        >>> [task.group.elements[i] for i in task.alphabet][:2]
        [(1, 2, 0, 3, 4), (2, 0, 1, 3, 4)]
    """
    group = alternating_group(5)
    cycles = []
    for last in (2, 3, 4):
        forward = {0: 1, 1: last, last: 0}
        cycle = tuple(forward.get(point, point) for point in range(5))
        cycles += [cycle, tuple(cycle.index(point) for point in range(5))]
    alphabet = [group.elements.index(cycle) for cycle in cycles]
    return WordProblem(group, alphabet=alphabet, name="a5-cycles")
