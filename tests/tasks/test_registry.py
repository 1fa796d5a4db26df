"""Tasks by name: the names, the options, the checks all tasks share."""

import pytest
import torch

from householder.train.tasks import Task, make_task, task_names

CONCRETE = [name.replace("<m>", "7") for name in task_names()]


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
    ]


@pytest.mark.parametrize("name", CONCRETE)
def test_every_name_makes_its_task(name):
    task = make_task(name)
    assert isinstance(task, Task)
    assert task.name == name
    tokens, labels = task.sample(
        3, 34 if "flip" in name or name == "mqar" else 33, torch.Generator().manual_seed(0)
    )
    assert tokens.shape == labels.shape
    assert tokens.max() < task.vocab_size
    assert labels.max() < task.num_classes
    assert name in repr(task)


@pytest.mark.parametrize("name", ["z<m>", "q5", "s7", "z", "S3", "d 5", ""])
def test_refuses_unknown_names(name):
    with pytest.raises(ValueError, match=r"make_task: `name` must be one of z<m>, d<m>, s3"):
        make_task(name)


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
