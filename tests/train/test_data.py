import itertools

import pytest
import torch

from householder.train import TrainConfig, data
from householder.train.data import derive_seed, make_data, make_training_task
from householder.train.errors import ConfigError
from householder.train.optim import learning_rate, make_optimizer


def batches(config, steps):
    data = make_data(make_training_task(config), config, torch.device("cpu"))
    return [data.batch(step) for step in steps]


@pytest.mark.parametrize("settings", [{}, {"num_samples": 10}], ids=["fresh", "fixed"])
def test_a_batch_depends_on_seed_and_step_alone(tiny, settings):
    in_order = batches(tiny(**settings), range(8))
    for step in (7, 2, 5):
        (alone,) = batches(tiny(**settings), [step])
        assert torch.equal(alone.tokens, in_order[step].tokens)
        assert torch.equal(alone.labels, in_order[step].labels)
    for one, other in itertools.pairwise(in_order):
        assert one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)
    (other_seed,) = batches(tiny(**settings, seed=1), [0])
    assert not torch.equal(other_seed.tokens, in_order[0].tokens)


@pytest.mark.parametrize("settings", [{}, {"start_length": 2}], ids=["whole", "growing"])
def test_batches_drawn_ahead_are_those_drawn_one_by_one(tiny, settings, monkeypatch):
    config = tiny(**settings)
    one_by_one = batches(config, range(8))
    monkeypatch.setattr(data, "steps_ahead", lambda *_: 3)
    source = make_data(make_training_task(config), config, torch.device("cpu"))
    for step in (0, 1, 2, 3, 7, 4, 0):
        for x, y in zip(source.batch(step), one_by_one[step], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("batch_size", "length", "steps"), [(4, 8, 64), (512, 128, 16), (512, 1 << 20, 1)]
)
def test_a_gpu_gets_about_a_million_tokens_at_once(batch_size, length, steps):
    config = TrainConfig(batch_size=batch_size, length=length)
    assert data.steps_ahead(config, torch.device("cuda")) == steps
    assert data.steps_ahead(config, torch.device("cpu")) == 1


def test_an_epoch_sees_every_sample_once_in_a_new_order(tiny):
    config = tiny(num_samples=10, batch_size=4)
    first, second = batches(config, range(3)), batches(config, range(3, 6))
    assert [len(batch.tokens) for batch in first] == [4, 4, 2]
    one, two = (torch.cat([b.tokens for b in epoch]) for epoch in (first, second))
    assert sorted(one.tolist()) == sorted(two.tolist())
    assert not torch.equal(one, two)


def test_shorter_sequences_where_the_task_pads(tiny):
    config = tiny(task="parity", length=8, min_length=2, batch_size=64)
    (batch,) = batches(config, [0])
    answers = (batch.labels >= 0).int().argmax(dim=1) + 1
    assert (answers.min(), answers.max()) == (2, 8)


def test_prefixes_grow_to_the_training_length(tiny):
    whole = batches(tiny(length=12, num_samples=10), range(8))
    config = tiny(length=12, num_samples=10, start_length=3, growth_steps=4)
    grown = batches(config, range(8))
    assert [(b.labels[0] >= 0).sum().item() for b in grown] == [3, 4, 6, 8, 12, 12, 12, 12]
    for part, all_of_it in zip(grown, whole, strict=True):
        for x, y in zip(part, all_of_it, strict=True):
            assert torch.equal(x, y[:, : x.shape[1]])


def test_a_prefix_that_is_no_example_is_refused(tiny):
    with pytest.raises(ConfigError, match="parity"):
        make_training_task(tiny(task="parity", length=8, start_length=4))


def test_streams_are_unrelated():
    seeds = [
        derive_seed(seed, stream, index)
        for seed in range(10)
        for stream in ("batch", "epoch", "held-out")
        for index in range(100)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_learning_rate_rises_then_falls_to_its_minimum(tiny):
    config = tiny(lr=1.0, min_lr=0.1, warmup=4, steps=1000)
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert learning_rate(tiny(lr=1.0, warmup=4, schedule="constant"), 11) == 1.0


def test_a_stable_learning_rate_falls_linearly_over_the_last_steps():
    from householder.train.text import TextConfig

    config = TextConfig(lr=1.0, min_lr=0.2, warmup=2, steps=20, schedule="wsd", decay=0.2)
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:17] == [1.0] * 15
    assert rates[17:] == pytest.approx([0.8, 0.6, 0.4])  # and min_lr would be next


def test_only_matrices_are_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.RMSNorm(2), torch.nn.Linear(2, 2))
    model[2].weight._no_weight_decay = True
    from householder.train import TrainConfig

    decayed, spared = make_optimizer(model, TrainConfig(weight_decay=0.5)).param_groups
    assert decayed["weight_decay"] == 0.5
    assert decayed["params"] == [model[0].weight]
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) == 4
