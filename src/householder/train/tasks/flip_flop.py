"""Flip-flop language modelling: remember the bit written last among bits to be ignored."""

from __future__ import annotations

import torch
from torch import Tensor

from householder.train.tasks.base import IGNORE_INDEX, Batch, Task


class FlipFlop(Task):
    """Say at every read the bit that was written last.

    A sequence of `length` = L tokens is L/2 pairs of an instruction and a bit: "w b" writes b,
    "i b" is to be ignored, and "r b" reads, where b is the bit written last. The first instruction
    is w and the last one r; the others are independent, i with probability `p_ignore`, w and r
    equally often else. Written and ignored bits are uniform. The label of an r is the bit that
    follows, and nothing else is supervised: everything else is random or known. Tokens 0 and 1 are
    the bits, 2, 3, 4 stand for w, r, i. Published metric: errors over the reads.

    Args:
        p_ignore: p of the published FFL(p), from 0 to 1: 0.8 to train on and to test, 0.98 (sparse)
            and 0.1 (dense) to test alone.
        name: name of the task.

    Raises:
        ValueError: `p_ignore` is no probability, or (in `sample`) `length` is odd.

    Examples:
        >>> task = FlipFlop()
        >>> tokens, labels = task.sample(1, 12, torch.Generator().manual_seed(8))
        >>> task.decode(tokens[0])
        'w0 w1 r1 i1 i0 r1'
        >>> labels
        tensor([[-100, -100, -100, -100,    1, -100, -100, -100, -100, -100,    1, -100]])

    References:
        Exposing Attention Glitches with Flip-Flop Language Modeling (Liu, Ash, Goel, Krishnamurthy,
        Zhang, 2023), https://arxiv.org/abs/2306.00946
    """

    metric = "token"
    vocab_size = 5
    num_classes = 2
    chance = 1 / 2
    min_length = 4
    symbols = "01wri"
    write, read, ignore = 2, 3, 4

    def __init__(self, *, p_ignore: float = 0.8, name: str = "flip-flop") -> None:
        if not 0 <= p_ignore <= 1:
            raise ValueError(
                f"flip-flop: `p_ignore` must be from 0 to 1, got {p_ignore}; the published ones "
                "are 0.8, 0.98 and 0.1"
            )
        self.p_ignore = p_ignore
        self.name = name

    def _generate(self, num: int, length: int, generator: torch.Generator) -> Batch:
        if length % 2:
            raise ValueError(
                f"{self.name}: `length` must be even, got {length}; an instruction and a bit take "
                "two places"
            )
        device, pairs = generator.device, length // 2
        u = torch.rand(num, pairs, generator=generator, device=device)
        instructions = torch.full((num, pairs), self.ignore, device=device)
        instructions[u >= self.p_ignore] = self.write
        instructions[u >= (1 + self.p_ignore) / 2] = self.read
        instructions[:, 0], instructions[:, -1] = self.write, self.read

        bits = torch.randint(2, (num, pairs), generator=generator, device=device)
        reads = instructions == self.read
        places = torch.arange(pairs, device=device)
        written = torch.where(instructions == self.write, places, 0).cummax(dim=1).values
        bits = torch.where(reads, bits.gather(1, written), bits)

        tokens = torch.stack([instructions, bits], dim=2).flatten(1)
        answers = torch.where(reads, bits, IGNORE_INDEX)
        labels = torch.stack([answers, torch.full_like(answers, IGNORE_INDEX)], dim=2).flatten(1)
        return Batch(tokens, labels)

    def decode(self, tokens: Tensor) -> str:
        """Write a sequence `[L]` as text."""
        text = "".join(self.symbols[token] for token in tokens.tolist())
        return " ".join(text[i : i + 2] for i in range(0, len(text), 2))
