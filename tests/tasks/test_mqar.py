"""MQAR: every key asked once with its value, ranges, the distribution of the gaps."""

import itertools

import pytest
import torch

from householder.train.tasks import IGNORE_INDEX, make_task


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("random_filler", [False, True])
@pytest.mark.parametrize(("num_pairs", "length"), [(1, 4), (4, 64), (8, 32), (64, 512)])
def test_each_key_is_asked_once_and_its_value_is_the_label(num_pairs, length, random_filler):
    task = make_task("mqar", num_pairs=num_pairs, random_filler=random_filler)
    tokens, labels = task.sample(20, length, rng())
    assert tokens.shape == labels.shape == (20, length)
    for row, row_labels in zip(tokens.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * num_pairs : 2], row[1 : 2 * num_pairs : 2]
        assert len(set(keys)) == len(set(values)) == num_pairs
        assert all(1 <= key < 4096 for key in keys)
        assert all(4096 <= value < 8192 for value in values)
        asked = [t for t, label in enumerate(row_labels) if label != IGNORE_INDEX]
        assert all(t >= 2 * num_pairs and t % 2 == 0 for t in asked)
        assert sorted(row[t] for t in asked) == sorted(keys)
        memory = dict(zip(keys, values, strict=True))
        assert all(row_labels[t] == memory[row[t]] for t in asked)
        others = [row[t] for t in range(2 * num_pairs, length) if t not in asked]
        if random_filler:
            assert all(0 <= token < 8192 for token in others)
            assert length <= 32 or len(set(others)) > len(others) / 2
        else:
            assert set(others) <= {0}


def gaps_of_keys(task, num, length, seed):
    """The slot g_i at which each key is asked, [num, N]."""
    tokens, labels = task.sample(num, length, rng(seed))
    N = task.num_pairs
    keys, rest = tokens[:, 0 : 2 * N : 2], tokens[:, 2 * N :: 2]
    asked = labels[:, 2 * N :: 2] != IGNORE_INDEX
    match = (keys[:, :, None] == rest[:, None, :]) & asked[:, None]
    assert (match.sum(-1) == 1).all()
    return match.long().argmax(dim=-1)


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law_drawn_without_replacement(power):
    # Two keys in six slots: the exact probability of every pair of slots, first key's first.
    task = make_task("mqar", num_pairs=2, power=power)
    gaps = gaps_of_keys(task, 30_000, 16, seed=1)
    p = torch.arange(1, 7, dtype=torch.float64) ** (power - 1)
    p /= p.sum()
    for first, second in itertools.product(range(6), repeat=2):
        exact = 0.0 if first == second else (p[first] * p[second] / (1 - p[first])).item()
        share = ((gaps[:, 0] == first) & (gaps[:, 1] == second)).double().mean().item()
        assert abs(share - exact) <= 5 * (exact / 30_000) ** 0.5


def test_small_power_asks_early():
    early = gaps_of_keys(make_task("mqar", num_pairs=4), 500, 128, seed=2).double().mean()
    uniform = gaps_of_keys(make_task("mqar", num_pairs=4, power=1.0), 500, 128, seed=2)
    assert early < 15
    assert abs(uniform.double().mean() - 29.5) < 2  # slots 0 … 59


def test_keys_and_values_are_uniform_and_in_uniform_order():
    # 3 of 4 keys: each of the 24 ordered selections equally likely.
    task = make_task("mqar", num_pairs=3, vocab_size=10)
    tokens, _ = task.sample(24_000, 12, rng(3))
    for column, offset, choices in ((0, 1, 4), (1, 5, 5)):
        drawn = tokens[:, column:6:2] - offset
        codes, counts = (drawn @ torch.tensor([25, 5, 1])).unique(return_counts=True)
        selections = choices * (choices - 1) * (choices - 2)
        assert len(codes) == selections
        expected = 24_000 / selections
        assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_seed_decides_everything():
    task = make_task("mqar", random_filler=True)
    first, again, other = (task.sample(4, 64, rng(seed)) for seed in (4, 4, 5))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.tokens, other.tokens)


def test_sizes_and_metric():
    task = make_task("mqar")
    assert (task.vocab_size, task.num_classes, task.metric) == (8192, 8192, "token")
    assert task.chance == 1 / 4096


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"vocab_size": 11}, "even"),
        ({"vocab_size": 10, "num_pairs": 5}, "from 1 to 4"),
        ({"num_pairs": 0}, "from 1 to 4095"),
        ({"power": 0.0}, "positive"),
    ],
)
def test_refuses_options_out_of_range(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_task("mqar", **options)


def test_refuses_lengths_that_do_not_fit():
    task = make_task("mqar", num_pairs=4)
    with pytest.raises(ValueError, match="even, got 17"):
        task.sample(1, 17, rng())
    with pytest.raises(ValueError, match="at least 16, got 14"):
        task.sample(1, 14, rng())
