"""Multi-query associative recall (MQAR)."""

from __future__ import annotations

import torch
from torch import Tensor

from householder.train.tasks.base import IGNORE_INDEX, Batch, Task


class MultiQueryAssociativeRecall(Task):
    """Recall the value of every key of a list of key-value pairs when the key comes up again.

    A sequence of `length` = L tokens begins with the pairs k_1 v_1 … k_N v_N. After this prefix of
    2N tokens each key appears once more, at offset 2·g_i from the end of the prefix, and its label
    there is v_i; nothing else is supervised. Keys are distinct and uniform from 1 … V/2 − 1, values
    distinct and uniform from V/2 … V − 1. The slots g_i are drawn one after the other without
    replacement from 0 … (L − 2N)/2 − 1 with p(g) ∝ (g + 1)^(power − 1): a small `power` puts the
    queries early, and those of the first keys the earliest; 1 is uniform. Published metric:
    accuracy over the queries.

    Args:
        num_pairs: N. Published are (L, N) = (64, 4), (128, 8), (256, 16), (512, 64).
        vocab_size: V, even. Token 0 fills the places between queries.
        power: the exponent a of the gap distribution, > 0.
        random_filler: fill the places between queries with uniform tokens of the whole vocabulary
            instead of 0.

    Raises:
        ValueError: an argument is out of its range, or (in `sample`) `length` is odd or below 4N.

    Examples:
        >>> task = MultiQueryAssociativeRecall(num_pairs=2, vocab_size=12)
        >>> tokens, labels = task.sample(1, 12, torch.Generator().manual_seed(1))
        >>> tokens  # the pairs 2 → 9 and 5 → 7, then the queries 5 and 2
        tensor([[2, 9, 5, 7, 5, 0, 2, 0, 0, 0, 0, 0]])
        >>> labels
        tensor([[-100, -100, -100, -100,    7, -100,    9, -100, -100, -100, -100, -100]])

    References:
        Zoology: Measuring and Improving Recall in Efficient Language Models (Arora, Eyuboglu,
        Timalsina, Johnson, Poli, Zou, Rudra, Ré, 2023), https://arxiv.org/abs/2312.04927;
        Parallelizing Linear Transformers with the Delta Rule over Sequence Length (Yang, Wang,
        Zhang, Shen, Kim, 2024), https://arxiv.org/abs/2406.06484.
    """

    name = "mqar"
    metric = "token"

    def __init__(
        self,
        *,
        num_pairs: int = 8,
        vocab_size: int = 8192,
        power: float = 0.01,
        random_filler: bool = False,
    ) -> None:
        if vocab_size < 4 or vocab_size % 2:
            raise ValueError(
                f"mqar: `vocab_size` must be even and at least 4, got {vocab_size}; half of it are "
                "keys, half values; the published one is 8192"
            )
        if not 1 <= num_pairs <= vocab_size // 2 - 1:
            raise ValueError(
                f"mqar: `num_pairs` must be from 1 to {vocab_size // 2 - 1}, the number of keys, "
                f"got {num_pairs}; take fewer pairs or a larger vocabulary"
            )
        if not power > 0:
            raise ValueError(
                f"mqar: `power` must be positive, got {power}; the published one is 0.01"
            )
        self.num_pairs = num_pairs
        self.vocab_size = vocab_size
        self.power = power
        self.random_filler = random_filler
        self.num_classes = vocab_size
        self.chance = 1 / (vocab_size // 2)
        self.min_length = 4 * num_pairs
        self.num_supervised = num_pairs

    def _generate(self, num: int, length: int, generator: torch.Generator) -> Batch:
        if length % 2:
            raise ValueError(
                f"mqar: `length` must be even, got {length}; pairs and queries take two places each"
            )
        device = generator.device
        half, N = self.vocab_size // 2, self.num_pairs
        keys = 1 + _draw_distinct(half - 1, N, num, generator)
        values = half + _draw_distinct(half, N, num, generator)

        tokens = torch.zeros(num, length, dtype=torch.int64, device=device)
        if self.random_filler:
            tokens.random_(self.vocab_size, generator=generator)
        tokens[:, 0 : 2 * N : 2] = keys
        tokens[:, 1 : 2 * N : 2] = values
        queries = 2 * N + 2 * self._draw_gaps((length - 2 * N) // 2, num, generator)
        tokens.scatter_(1, queries, keys)
        labels = torch.full_like(tokens, IGNORE_INDEX).scatter_(1, queries, values)
        return Batch(tokens, labels)

    def _draw_gaps(self, space: int, num: int, generator: torch.Generator) -> Tensor:
        """Draw N of `space` slots per row, one after the other by p(g), without replacement.

        The slots that finish first in a race of exponential clocks with rates p(g) are exactly such
        a sequence of draws, in the order in which they finish.
        """
        slots = torch.arange(1, space + 1, dtype=torch.float64, device=generator.device)
        clocks = torch.empty(num, space, dtype=torch.float64, device=generator.device)
        clocks.exponential_(generator=generator).mul_(slots ** (1 - self.power))
        return clocks.topk(self.num_pairs, largest=False, sorted=True).indices


def _draw_distinct(choices: int, size: int, num: int, generator: torch.Generator) -> Tensor:
    """Draw `size` distinct numbers of 0 … choices − 1 for each of `num` rows, in uniform order.

    Floyd's algorithm: its cost grows with size², not with the number of choices, so no row needs a
    permutation of the whole vocabulary.
    """
    device = generator.device
    drawn = torch.empty(num, size, dtype=torch.int64, device=device)
    for i in range(size):
        newest = choices - size + i  # this step's draw is from 0 … newest
        candidate = torch.randint(newest + 1, (num,), generator=generator, device=device)
        taken = (drawn[:, :i] == candidate[:, None]).any(dim=1)
        drawn[:, i] = candidate.where(~taken, newest)
    # The set is uniform by now, its order is not.
    order = torch.rand(num, size, generator=generator, device=device).argsort(dim=1)
    return drawn.gather(1, order)
