"""Word problems: labels against a direct evaluation, layout, uniformity, alphabets."""

import pytest
import torch

from householder.train.tasks import IGNORE_INDEX, WordProblem, make_task
from householder.train.tasks.groups import num_moved, symmetric_group

NAMES = ["z2", "z7", "d5", "s3", "s4", "a5", "s5", "s5-swaps", "s5-3moves"]
ORDERS = {"z2": 2, "z7": 7, "d5": 10, "s3": 6, "s4": 24, "a5": 60, "s5": 120}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_running_products(name):
    task = make_task(name)
    tokens, labels = task.sample(5, 40, rng())
    elements = task.group.elements
    for row, row_labels in zip(tokens.tolist(), labels.tolist(), strict=True):
        state = elements[0]
        for x, y in zip(row[1:], row_labels[1:], strict=True):
            state = tuple(elements[x][p] for p in state)  # x after the state: x[state[p]]
            assert elements[y] == state


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    task = make_task(name)
    order = ORDERS[name.split("-")[0]]
    tokens, labels = task.sample(7, 20, rng())
    assert tokens.shape == labels.shape == (7, 21)
    assert tokens.dtype == labels.dtype == torch.int64
    assert (tokens[:, 0] == order).all()  # BOS
    assert (labels[:, 0] == IGNORE_INDEX).all()
    assert ((tokens[:, 1:] >= 0) & (tokens[:, 1:] < order)).all()
    assert ((labels[:, 1:] >= 0) & (labels[:, 1:] < order)).all()
    assert (task.vocab_size, task.num_classes) == (order + 1, order)
    assert task.metric == "prefix"
    assert task.chance == pytest.approx(1 / order)


def assert_uniform(values, size):
    """χ² of `size` equally likely values; 6 standard deviations, at a fixed seed."""
    counts = torch.bincount(values.flatten(), minlength=size).double()
    assert len(counts) == size
    expected = values.numel() / size
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - (size - 1)) < 6 * (2 * (size - 1)) ** 0.5


@pytest.mark.parametrize("name", ["z7", "s3", "a5", "s5"])
def test_elements_and_labels_are_uniform(name):
    task = make_task(name)
    tokens, labels = task.sample(4000, 12, rng(1))
    assert_uniform(tokens[:, 1:], task.num_classes)
    for t in (1, 2, 12):  # one position at a time: labels along a row are not independent draws
        assert_uniform(labels[:, t], task.num_classes)


def test_consecutive_elements_are_independent():
    tokens, _ = make_task("s3").sample(20_000, 2, rng(2))
    assert_uniform(6 * tokens[:, 1] + tokens[:, 2], 36)


@pytest.mark.parametrize(("name", "max_moved", "size"), [("s5-swaps", 2, 11), ("s5-3moves", 3, 31)])
def test_moves_are_all_permutations_that_move_few_points(name, max_moved, size):
    task = make_task(name)
    tokens, labels = task.sample(2000, 30, rng(3))
    used = tokens[:, 1:].unique().tolist()
    few = [i for i, p in enumerate(symmetric_group(5).elements) if num_moved(p) <= max_moved]
    assert used == few
    assert len(few) == size
    places = torch.searchsorted(torch.tensor(few), tokens[:, 1:].contiguous())
    assert_uniform(places, size)
    assert len(labels[:, 20:].unique()) == 120  # the products still fill S5


def test_a5_cycles_are_three_cycles_with_their_inverses():
    task = make_task("a5-cycles")
    tokens, labels = task.sample(2000, 30, rng(3))
    cycles = [task.group.elements[i] for i in tokens[:, 1:].unique().tolist()]
    assert len(cycles) == 6
    for p in cycles:
        moved = {point for point in range(5) if p[point] != point}
        assert moved in ({0, 1, 2}, {0, 1, 3}, {0, 1, 4})
        assert tuple(p.index(point) for point in range(5)) in cycles
    assert len(labels[:, 20:].unique()) == 60  # they generate A5


@pytest.mark.parametrize("name", ["s3", "s5-swaps"])
def test_seed_decides_everything(name):
    task = make_task(name)
    first, again, other = (task.sample(8, 30, rng(seed)) for seed in (4, 4, 5))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.tokens, other.tokens)
    generator = rng(4)
    task.sample(8, 30, generator)
    assert not torch.equal(task.sample(8, 30, generator).tokens, first.tokens)


@pytest.mark.parametrize("alphabet", [(), (0, 0), (6,), (-1, 2)])
def test_refuses_a_wrong_alphabet(alphabet):
    with pytest.raises(ValueError, match="alphabet"):
        WordProblem(symmetric_group(3), alphabet=alphabet)


def test_an_alphabet_in_any_order_is_the_same_task():
    task = WordProblem(symmetric_group(3), alphabet=[5, 4, 3, 2, 1, 0])
    tokens, labels = task.sample(20, 10, rng())
    assert torch.equal(labels[:, 1:].T, task.group.running_product(tokens[:, 1:].T))
