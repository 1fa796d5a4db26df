"""Flip-flop: what is written is read, how often what comes, the published variants."""

import pytest
import torch

from householder.train.tasks import IGNORE_INDEX, FlipFlop, make_task


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["flip-flop", "flip-flop-sparse", "flip-flop-dense"])
def test_every_read_is_the_bit_written_last(name):
    task = make_task(name)
    tokens, labels = task.sample(50, 64, rng())
    for row, row_labels in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert row[0] == task.write
        assert row[-2] == task.read
        memory = None
        for t in range(0, 64, 2):
            instruction, bit = row[t], row[t + 1]
            assert instruction in (task.write, task.read, task.ignore)
            assert bit in (0, 1)
            if instruction == task.write:
                memory = bit
            asked = instruction == task.read
            assert row_labels[t] == (memory if asked else IGNORE_INDEX)
            assert bit == memory or not asked
            assert row_labels[t + 1] == IGNORE_INDEX


@pytest.mark.parametrize(
    ("name", "p"), [("flip-flop", 0.8), ("flip-flop-sparse", 0.98), ("flip-flop-dense", 0.1)]
)
def test_instructions_and_bits_come_as_often_as_published(name, p):
    task = make_task(name)
    tokens, _ = task.sample(2000, 64, rng())
    free = tokens[:, 2:-2:2]
    for instruction, share in (
        (task.ignore, p),
        (task.write, (1 - p) / 2),
        (task.read, (1 - p) / 2),
    ):
        found = (free == instruction).double().mean().item()
        assert abs(found - share) < 5 * (share * (1 - share) / free.numel()) ** 0.5
    bits = tokens[:, 1::2][tokens[:, ::2] != task.read].double()
    assert abs(bits.mean().item() - 0.5) < 5 * 0.5 / bits.numel() ** 0.5


def test_text_and_wrong_arguments():
    task = FlipFlop()
    assert task.decode(torch.tensor([2, 1, 4, 0, 3, 1])) == "w1 i0 r1"
    with pytest.raises(ValueError, match=r"`length` must be even, got 7"):
        task.sample(1, 7, rng())
    with pytest.raises(ValueError, match=r"`p_ignore` must be from 0 to 1, got 1.5"):
        FlipFlop(p_ignore=1.5)
