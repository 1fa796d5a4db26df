"""Parity and modular arithmetic against Python's own evaluation; layout, padding, chance rates."""

import itertools
from functools import cache

import pytest
import torch

from householder.train.tasks import IGNORE_INDEX, make_task
from householder.train.tasks.metrics import final_accuracy, scaled_accuracy

TASKS = ["parity", "mod-arithmetic", "mod-arithmetic-brackets"]
arithmetic = pytest.mark.parametrize("name", TASKS[1:])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def evaluate(text, modulus):
    """Python's arithmetic on the text up to "="."""
    expression, _, rest = text.partition("=")
    assert rest == ""
    return eval(expression.replace("−", "-").replace("×", "*")) % modulus


def answers(batch):
    """The one label of each row and the column where it stands."""
    supervised = batch.labels != IGNORE_INDEX
    assert (supervised.sum(dim=1) == 1).all()
    return batch.labels[supervised], supervised.nonzero()[:, 1]


@pytest.mark.parametrize("min_length", [None, 3])
def test_parity_counts_the_bits_before_the_answer(min_length):
    batch = make_task("parity", min_length=min_length).sample(500, 17, rng())
    labels, columns = answers(batch)
    for row, label, column in zip(batch.tokens.tolist(), labels, columns, strict=True):
        assert set(row[: column + 1]) <= {0, 1}
        assert set(row[column + 1 :]) <= {2}
        assert label == sum(row[: column + 1]) % 2
    sizes = (columns + 1).unique().tolist()
    assert sizes == ([17] if min_length is None else list(range(3, 18)))


@arithmetic
@pytest.mark.parametrize("modulus", [2, 5, 11])
@pytest.mark.parametrize("min_length", [None, 6])
def test_arithmetic_agrees_with_python(name, modulus, min_length):
    task = make_task(name, modulus=modulus, min_length=min_length)
    batch = task.sample(300, 41, rng())
    labels, columns = answers(batch)
    for row, label, column in zip(batch.tokens, labels.tolist(), columns.tolist(), strict=True):
        text = task.decode(row)
        assert text.endswith("=")
        assert row[column] == task.equals
        assert (row[column + 1 :] == task.pad).all()
        assert (row[:column] != task.pad).all()
        assert evaluate(text, modulus) == label


def test_flat_lines_alternate_uniform_digits_and_operators():
    task = make_task("mod-arithmetic")
    batch = task.sample(3000, 13, rng(1))
    assert batch.tokens.shape == (3000, 12)
    for column in range(12):
        kinds = batch.tokens[:, column].unique(return_counts=True)
        if column == 11:
            assert kinds[0].tolist() == [task.equals]
        else:
            expected = [0, 1, 2, 3, 4] if column % 2 == 0 else [5, 6, 7]
            assert kinds[0].tolist() == expected
            share = kinds[1] / 3000
            assert (share - 1 / len(expected)).abs().max() < 0.04


def test_flat_lengths_are_odd_and_uniform():
    task = make_task("mod-arithmetic", min_length=3)
    batch = task.sample(19_000, 40, rng(2))  # the published training range, 3 to 40
    assert batch.tokens.shape == (19_000, 39)
    _, columns = answers(batch)
    lengths, counts = (columns + 2).unique(return_counts=True)  # "=" and the answer included
    assert lengths.tolist() == list(range(3, 40, 2))
    assert ((counts - 1000).abs() < 6 * 1000**0.5).all()


def test_an_even_length_means_the_odd_one_below():
    task = make_task("mod-arithmetic")
    _, columns = answers(task.sample(10, 40, rng()))
    assert (columns == 39 - 2).all()


def test_the_shortest_line_is_a_digit():
    task = make_task("mod-arithmetic")
    batch = task.sample(20, 3, rng())
    assert torch.equal(batch.labels[:, 1], batch.tokens[:, 0])


def test_bracketed_lines_have_the_published_length():
    batch = make_task("mod-arithmetic-brackets", min_length=5).sample(9000, 40, rng(3))
    assert batch.tokens.shape == (9000, 38)
    _, columns = answers(batch)
    lengths, counts = (columns + 3).unique(return_counts=True)  # answer and end token included
    assert lengths.tolist() == list(range(5, 41))
    assert ((counts - 250).abs() < 6 * 250**0.5).all()


def test_short_brackets_are_the_four_published_forms():
    task = make_task("mod-arithmetic-brackets")
    forms = {5: "−d", 6: "(d)", 7: "(−d)"}
    for length, form in forms.items():
        texts = {task.decode(row) for row in task.sample(200, length, rng()).tokens}
        assert texts == {form.replace("d", str(d)) + "=" for d in range(5)}
    texts = {task.decode(row) for row in task.sample(3000, 8, rng()).tokens}
    pairs = itertools.product(range(5), "+−×", range(5))
    assert texts == {f"({a}{op}{b})=" for a, op, b in pairs}


def test_left_parts_of_brackets_have_uniform_length():
    # In 15 tokens the left part takes 1 … 11 of them; read its length back from the text.
    task = make_task("mod-arithmetic-brackets")
    counts = dict.fromkeys(range(1, 12), 0)
    for row in task.sample(5500, 18, rng(4)).tokens:
        inner = task.decode(row)[1:-2]
        depth, previous = 0, "("
        for place, symbol in enumerate(inner):
            depth += (symbol == "(") - (symbol == ")")
            binary = symbol in "+−×" and previous not in "(+−×" and place > 0
            if depth == 0 and binary:
                counts[place] += 1
                break
            previous = symbol
    assert sum(counts.values()) == 5500
    assert all(abs(count - 500) < 6 * 500**0.5 for count in counts.values())


@cache
def answer_distribution(size, multiplication):
    """Exact probabilities of the values 0 … 4 of a random bracketed expression of `size` tokens."""
    if size < 5:
        return (0.2,) * 5
    operators = [lambda a, b: a + b, lambda a, b: a - b]
    if multiplication:
        operators.append(lambda a, b: a * b)
    chances = [0.0] * 5
    for left in range(1, size - 3):
        p = answer_distribution(left, multiplication)
        q = answer_distribution(size - left - 3, multiplication)
        for a, b in itertools.product(range(5), repeat=2):
            for operator in operators:
                weight = p[a] * q[b] / (size - 4) / len(operators)
                chances[operator(a, b) % 5] += weight
    return tuple(chances)


@pytest.mark.parametrize("multiplication", [True, False])
@pytest.mark.parametrize("size", [5, 12, 60])
def test_bracketed_answers_have_the_exact_distribution(multiplication, size):
    task = make_task("mod-arithmetic-brackets", multiplication=multiplication)
    labels, _ = answers(task.sample(6000, size + 3, rng(5)))
    shares = torch.bincount(labels, minlength=5).double() / 6000
    exact = torch.tensor(answer_distribution(size, multiplication), dtype=torch.float64)
    assert (shares - exact).abs().max() < 5 * (0.25 / 6000) ** 0.5


def test_a_constant_answer_scores_as_documented():
    def constant_score(name, **options):
        task = make_task(name, min_length=40, **options)
        labels = task.sample(4000, 256, rng(6)).labels
        accuracy = final_accuracy(torch.zeros_like(labels), labels)
        return scaled_accuracy(accuracy, task.chance)

    assert constant_score("mod-arithmetic-brackets") == pytest.approx(0.13, abs=0.02)
    exact = [answer_distribution(size, True)[0] for size in range(37, 254, 8)]
    assert sum(exact) / len(exact) == pytest.approx(0.31, abs=0.01)
    assert constant_score("mod-arithmetic-brackets", multiplication=False) < 0.03
    assert abs(constant_score("mod-arithmetic")) < 0.03
    assert abs(constant_score("parity")) < 0.05


@pytest.mark.parametrize("name", TASKS)
def test_seed_decides_everything(name):
    task = make_task(name, min_length=9)
    first, again, other = (task.sample(50, 20, rng(seed)) for seed in (7, 7, 8))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("name", TASKS)
def test_tokens_and_labels_stay_in_range(name):
    task = make_task(name, min_length=5)
    batch = task.sample(400, 30, rng())
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.unique().tolist() == list(range(task.vocab_size))  # PAD is the last
    assert batch.labels.unique().tolist() == [IGNORE_INDEX, *range(task.num_classes)]
    assert task.metric == "final"
    assert task.chance == 1 / task.num_classes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("parity", {"min_length": 0}),
        ("mod-arithmetic", {"min_length": 2}),
        ("mod-arithmetic", {"modulus": 1}),
        ("mod-arithmetic-brackets", {"min_length": 4}),
        ("mod-arithmetic-brackets", {"modulus": 0}),
    ],
)
def test_refuses_options_out_of_range(name, options):
    with pytest.raises(ValueError, match="must be at least"):
        make_task(name, **options)


def test_refuses_a_length_below_the_shortest():
    with pytest.raises(ValueError, match="at least 12, got 11"):
        make_task("parity", min_length=12).sample(1, 11, rng())
