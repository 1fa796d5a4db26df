"""Formal-language tasks with one answer at the end: parity and modular arithmetic.

What a model is given is a line of text up to the point where it must answer; the answer itself is
only a label, so it stands at the last token of the question. Lines may differ in length (the
`min_length` option, as in the published training); shorter ones are filled up with PAD tokens at
the end, which are not supervised and come too late for a causal model to see before it answers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from householder.train.tasks.base import IGNORE_INDEX, Batch, Task


class Parity(Task):
    """Say at the end of a string of random bits whether the number of ones is odd.

    `length` is the number of bits, and L = `length`. Tokens are 0, 1 and PAD = 2; the label, 0 for
    even and 1 for odd, stands at the last bit and only there. Published metric: scaled accuracy
    with r = 1/2. For parity supervised at every position, take the word problem over Z_2.

    Args:
        min_length: with it, each sequence has a number of bits uniform from `min_length` to
            `length`; without, exactly `length`.

    Raises:
        ValueError: `min_length` is below 1.

    Examples:
        >>> batch = Parity().sample(3, 4, torch.Generator().manual_seed(0))
        >>> bool((batch.labels[:, -1] == batch.tokens.sum(dim=1) % 2).all())
        True
        >>> batch.labels[:, :-1].unique()
        tensor([-100])

    References:
        Neural Networks and the Chomsky Hierarchy (Delétang et al., 2022),
        https://arxiv.org/abs/2207.02098;
        Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues (Grazzi, Siems, Zela,
        Franke, Hutter, Pontil, 2024), https://arxiv.org/abs/2411.12537.
    """

    name = "parity"
    metric = "final"
    vocab_size = 3
    num_classes = 2
    chance = 1 / 2
    pad = 2

    def __init__(self, *, min_length: int | None = None) -> None:
        self.min_length, self._varied = _length_range(self.name, min_length, self.min_length)

    def _generate(self, num: int, length: int, generator: torch.Generator) -> Batch:
        shortest = self.min_length if self._varied else length
        sizes = _integers(shortest, length, (num,), generator)
        bits = _integers(0, 1, (num, length), generator)
        bits = bits.where(_before(sizes, length), 0)
        return _ask(bits, sizes, bits.sum(dim=1) % 2, self.pad)


class _Arithmetic(Task):
    """What tasks share that evaluate an expression modulo m: tokens 0 … m−1, then marks, then PAD.

    Args:
        marks: a character for each token that is neither a digit nor PAD.
        modulus: m.
        min_length: with it, lengths vary from there on.
    """

    metric = "final"

    def __init__(self, marks: str, modulus: int, min_length: int | None) -> None:
        self.modulus = _check_modulus(self.name, modulus)
        self.min_length, self._varied = _length_range(self.name, min_length, self.min_length)
        self._symbols = [*map(str, range(modulus)), *marks, ""]
        self.vocab_size = len(self._symbols)
        self.num_classes = modulus
        self.chance = 1 / modulus

    def decode(self, tokens: Tensor) -> str:
        """Write one sequence of tokens `[L]` as text, PAD left out."""
        return "".join(self._symbols[i] for i in tokens.tolist())


class ModularArithmetic(_Arithmetic):
    """Evaluate a flat expression of digits, +, − and × modulo m; × binds tighter.

    `length` counts the published line, for example 3×2−4= and its answer 2: D digits alternating
    with D − 1 operators, "=" and the answer, 2D + 1 in all, so an even `length` means the odd one
    below it. The question without its answer is the input, L = `length` − 1; the answer is the
    label at "=". Digits and operators are uniform. Tokens: 0 … m−1, then +, −, ×, = and PAD.
    Published metric: scaled accuracy with r = 1/m.

    Args:
        modulus: m, published with 5.
        min_length: with it, each line has an odd length uniform from `min_length` to `length`;
            without, all have `length`.

    Raises:
        ValueError: `modulus` is below 2 or `min_length` below 3.

    Examples:
        >>> task = ModularArithmetic()
        >>> batch = task.sample(2, 9, torch.Generator().manual_seed(1))
        >>> [task.decode(row) for row in batch.tokens]
        ['4+3−3×3=', '1+1+4+2=']
        >>> batch.labels[:, -1].tolist()
        [3, 3]

    References:
        Neural Networks and the Chomsky Hierarchy (Delétang et al., 2022),
        https://arxiv.org/abs/2207.02098;
        xLSTM: Extended Long Short-Term Memory (Beck et al., 2024),
            https://arxiv.org/abs/2405.04517;
        Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues (Grazzi, Siems, Zela,
        Franke, Hutter, Pontil, 2024), https://arxiv.org/abs/2411.12537.
    """

    name = "mod-arithmetic"
    min_length = 3

    def __init__(self, *, modulus: int = 5, min_length: int | None = None) -> None:
        super().__init__("+−×=", modulus, min_length)
        self.plus, self.minus, self.times, self.equals, self.pad = range(modulus, modulus + 5)

    def _generate(self, num: int, length: int, generator: torch.Generator) -> Batch:
        most = (length - 1) // 2
        fewest = self.min_length // 2 if self._varied else most
        num_digits = _integers(fewest, most, (num,), generator)
        digits = _integers(0, self.modulus - 1, (num, most), generator)
        operators = _integers(self.plus, self.times, (num, most), generator)
        # What stands before "=" decides the answer; multiplying by 1 to the end keeps it.
        used = _before(num_digits, most)
        digits = digits.where(used, 1)
        operators[:, 1:] = operators[:, 1:].where(used[:, 1:], self.times)
        answers = self._evaluate(digits, operators[:, 1:])

        tokens = torch.full((num, length - 1), self.pad, device=generator.device)
        tokens[:, 0 : 2 * most : 2] = digits
        tokens[:, 1 : 2 * most - 1 : 2] = operators[:, 1:]
        tokens.scatter_(1, 2 * num_digits[:, None] - 1, self.equals)
        return _ask(tokens, 2 * num_digits, answers, self.pad)

    def _evaluate(self, digits: Tensor, operators: Tensor) -> Tensor:
        """Evaluate digits `[B, D]` joined by operators `[B, D − 1]`, all rows together."""
        finished = torch.zeros_like(digits[:, 0])  # the terms before the current one
        term = digits[:, 0]  # the current product, with its sign
        for digit, operator in zip(digits[:, 1:].T, operators.T, strict=True):
            times = operator == self.times
            finished = (finished + term.where(~times, 0)) % self.modulus
            factor = term.where(times, 1 - 2 * (operator == self.minus).long())
            term = factor * digit % self.modulus
        return (finished + term) % self.modulus


class BracketedArithmetic(_Arithmetic):
    """Evaluate a bracketed expression of digits, +, − and × modulo m.

    An expression of n ≥ 5 tokens is "(L op R)" with the length of L uniform from 1 to n − 4, R of
    the rest, and a uniform operator; shorter ones are a, −a, (a), (−a) with a uniform digit.
    `length` counts the published line: the expression, "=", the answer and one end token, n + 3 in
    all. The expression and "=" are the input, L = `length` − 2; the answer is the label at "=".
    Tokens: 0 … m−1, then +, −, ×, (, ), = and PAD. Published metric: scaled accuracy with r = 1/m.

    With × the answers are not uniform: in long lines 0 comes up about 31% of the time, and a
    constant answer already scores 0.13 at m = 5. Without × a constant answer scores 0.

    Args:
        modulus: m, published with 5.
        multiplication: whether × is among the operators; both are published.
        min_length: with it, each line has a length uniform from `min_length` to `length`; without,
            all have `length`.

    Raises:
        ValueError: `modulus` is below 2 or `min_length` below 5.

    Examples:
        >>> task = BracketedArithmetic()
        >>> batch = task.sample(2, 14, torch.Generator().manual_seed(3))
        >>> [task.decode(row) for row in batch.tokens]
        ['((0)×(0−2))=', '((−4)−(−0))=']
        >>> batch.labels[:, -1].tolist()
        [0, 1]

    References:
        Neural Networks and the Chomsky Hierarchy (Delétang et al., 2022),
        https://arxiv.org/abs/2207.02098;
        Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues (Grazzi, Siems, Zela,
        Franke, Hutter, Pontil, 2024), https://arxiv.org/abs/2411.12537.
    """

    name = "mod-arithmetic-brackets"
    min_length = 5

    def __init__(
        self, *, modulus: int = 5, multiplication: bool = True, min_length: int | None = None
    ) -> None:
        super().__init__("+−×()=", modulus, min_length)
        self.multiplication = multiplication
        self.plus, self.minus, self.times = range(modulus, modulus + 3)
        self.open, self.close, self.equals, self.pad = range(modulus + 3, modulus + 7)

    def _generate(self, num: int, length: int, generator: torch.Generator) -> Batch:
        longest = length - 3
        shortest = self.min_length - 3 if self._varied else longest
        sizes = _integers(shortest, longest, (num,), generator)
        # An expression takes fewer random numbers than it has tokens.
        draws = torch.rand(
            num, longest, dtype=torch.float64, generator=generator, device=generator.device
        )
        rows: list[list[int]] = []
        answers: list[int] = []
        for size, row_draws in zip(sizes.tolist(), draws.tolist(), strict=True):
            row: list[int] = []
            answers.append(self._write_expression(size, iter(row_draws), row))
            rows.append([*row, self.equals, *[self.pad] * (longest - size)])
        device = generator.device
        return _ask(
            torch.tensor(rows, device=device),
            sizes + 1,
            torch.tensor(answers, device=device),
            self.pad,
        )

    def _write_expression(self, size: int, draws: Iterator[float], row: list[int]) -> int:
        """Append a random expression of `size` tokens to `row` and return its value."""
        if size < 5:
            digit = int(next(draws) * self.modulus)
            signed = [digit] if size % 2 else [self.minus, digit]
            row.extend(signed if size < 3 else [self.open, *signed, self.close])
            return digit if size % 2 else -digit % self.modulus
        left_size = 1 + int(next(draws) * (size - 4))
        operator = self.plus + int(next(draws) * (3 if self.multiplication else 2))
        row.append(self.open)
        left = self._write_expression(left_size, draws, row)
        row.append(operator)
        right = self._write_expression(size - left_size - 3, draws, row)
        row.append(self.close)
        if operator == self.times:
            return left * right % self.modulus
        return (left + right if operator == self.plus else left - right) % self.modulus


def _ask(tokens: Tensor, sizes: Tensor, answers: Tensor, pad: int) -> Batch:
    """Pad rows after their first `sizes` tokens and label the last of those with the answer."""
    tokens = tokens.where(_before(sizes, tokens.shape[1]), pad)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels.scatter_(1, sizes[:, None] - 1, answers[:, None])
    return Batch(tokens, labels)


def _before(sizes: Tensor, length: int) -> Tensor:
    """Return the mask `[B, length]` of the first `sizes [B]` positions of each row."""
    return torch.arange(length, device=sizes.device) < sizes[:, None]


def _integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw uniform integers, both ends included."""
    return torch.randint(low, high + 1, shape, generator=generator, device=generator.device)


def _length_range(name: str, min_length: int | None, floor: int) -> tuple[int, bool]:
    """Return the smallest length a task takes, and whether its lengths vary from there."""
    if min_length is None:
        return floor, False
    if min_length < floor:
        raise ValueError(
            f"{name}: `min_length` must be at least {floor}, got {min_length}; "
            "raise it or leave it out"
        )
    return min_length, True


def _check_modulus(name: str, modulus: int) -> int:
    if modulus < 2:
        raise ValueError(
            f"{name}: `modulus` must be at least 2, got {modulus}; the published one is 5"
        )
    return modulus
