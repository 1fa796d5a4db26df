"""Tasks by name: the names, the options, the checks all tasks share."""

import pytest
import torch

from householder.train.tasks import Task, make_task, task_names

NUMBERS = {"<m>": "7", "<pairs>": "5", "<vocab>": "60"}


def concrete(name):
    for place, number in NUMBERS.items():
        name = name.replace(place, number)
    return name


CONCRETE = [concrete(name) for name in task_names()]


def test_names():
    assert task_names() == [
        "z<m>",
        "d<m>",
        "s3",
        "s4",
        "a5",
        "s5",
        "a5-cycles",
        "s5-swaps",
        "s5-3moves",
        "parity",
        "mod-arithmetic",
        "mod-arithmetic-brackets",
        "mqar",
        "flip-flop",
        "flip-flop-sparse",
        "flip-flop-dense",
        "mqar-<pairs>",
        "mqar-<pairs>-<vocab>",
    ]


@pytest.mark.parametrize("name", CONCRETE)
def test_every_name_makes_its_task(name):
    task = make_task(name)
    assert isinstance(task, Task)
    assert task.name == name
    tokens, labels = task.sample(
        3, 34 if "flip" in name or "mqar" in name else 33, torch.Generator().manual_seed(0)
    )
    assert tokens.shape == labels.shape
    assert tokens.max() < task.vocab_size
    assert labels.max() < task.num_classes
    assert name in repr(task)


@pytest.mark.parametrize("name", ["z<m>", "q5", "s7", "z", "S3", "d 5", ""])
def test_refuses_unknown_names(name):
    with pytest.raises(ValueError, match=r"make_task: `name` must be one of z<m>, d<m>, s3"):
        make_task(name)


def test_numbers_in_the_name_are_the_options_of_recall():
    published = make_task("mqar-64")
    assert (published.num_pairs, published.vocab_size) == (64, 8192)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    named = make_task("mqar-5-60", power=1.0).sample(3, 40, generators[0])
    plain = make_task("mqar", num_pairs=5, vocab_size=60, power=1.0).sample(3, 40, generators[1])
    assert torch.equal(named.tokens, plain.tokens)
    with pytest.raises(ValueError, match="`num_pairs` must be from 1 to 29"):
        make_task("mqar-64-60")


def test_refuses_unknown_options():
    with pytest.raises(TypeError, match=r"options of 'parity' are min_length, got power, size"):
        make_task("parity", size=3, power=1)
    with pytest.raises(TypeError, match=r"options of 's3' are none, got n"):
        make_task("s3", n=3)


@pytest.mark.parametrize("name", CONCRETE)
def test_refuses_wrong_arguments(name):
    task = make_task(name)
    generator = torch.Generator()
    with pytest.raises(ValueError, match="`num` must be at least 1, got 0"):
        task.sample(0, 64, generator)
    with pytest.raises(ValueError, match="`length` must be at least"):
        task.sample(2, 0, generator)
    with pytest.raises(TypeError, match=r"torch\.Generator, got int"):
        task.sample(2, 64, 0)
