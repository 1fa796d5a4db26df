import io
import itertools

import pytest
from rich.console import Console
from torch import nn

from householder.recipes import EXPERIMENTS
from householder.recipes.state_tracking import published, published_beside_measured, settings
from householder.train import Comparison, ConfigError, Evaluation, TrainConfig, TrainResult


@pytest.mark.parametrize(
    ("task", "size"),
    [
        *itertools.product(("s3", "s4", "a5", "s5"), ("gpu",)),
        *itertools.product(("s3", "s4", "a5"), ("cpu",)),
    ],
)
def test_settings_contrast_enough_reflections_with_one_less(task, size):
    comparison = Comparison.from_settings(settings(task, size))
    assert [published(config).split(";")[0] for config in comparison.configs] == ["fails", "solved"]
    for config in comparison.configs:
        assert config.allow_neg_eigval
        assert config.num_layers == 1
        assert config.eval_length == 4 * config.length


def test_gpu_size_is_that_of_the_published_code():
    config = Comparison.from_settings(settings("s3", "gpu")).configs[0]
    assert (config.length, config.eval_length) == (128, 512)
    assert (config.d_model, config.num_heads, config.head_dim, config.mlp_width) == (
        128,
        8,
        32,
        512,
    )
    # No more words, and none seen more often, than in the published 100 epochs.
    assert config.num_samples == 100_000
    assert config.steps * config.batch_size <= 100 * config.num_samples
    assert (config.schedule, config.use_short_conv, config.mixer) == (
        "cosine",
        False,
        "delta_product",
    )
    # Training ends at the full length.
    assert config.growth_steps <= config.steps / 2


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({"task": "s3", "num_householder": 1}, "fails"),
        ({"task": "s3", "num_householder": 2}, "solved"),
        ({"task": "s3", "num_householder": 2, "allow_neg_eigval": False}, "fails"),
        ({"task": "a5", "num_householder": 2}, "solved"),
        ({"task": "s5", "num_householder": 3}, "fails; ≈0% at 50"),
        ({"task": "s5", "num_householder": 4}, "solved; ≈100% at 190, ≈50% at 330, ≈0% at 512"),
        ({"task": "s4", "num_householder": 1, "num_layers": 6}, "solved"),
        ({"task": "s4", "num_householder": 1, "num_layers": 5}, "fails"),
        ({"task": "s5", "num_householder": 1, "num_layers": 10}, "fails"),
        ({"task": "s4", "num_householder": 2, "num_layers": 2}, "not published"),
        ({"task": "z7", "num_householder": 2}, "not published"),
    ],
)
def test_published_verdicts(options, verdict):
    assert published(TrainConfig(**options)) == verdict


def test_unknown_task_and_size_are_refused():
    with pytest.raises(ConfigError, match=r"`task` must be one of s3, s4, a5, s5, got 'z7'"):
        settings("z7", "cpu")
    with pytest.raises(ConfigError, match=r"`size` must be one of cpu, gpu, got 'tpu'"):
        settings("s3", "tpu")
    with pytest.raises(ConfigError, match=r"`size` must be gpu for s5"):
        settings("s5", "cpu")


def test_the_table_says_where_published_and_measured_disagree():
    def result(n, accuracy):
        evaluation = Evaluation("prefix", (32, 128), accuracy, 10)
        config = TrainConfig(num_householder=n)
        return TrainResult(config, nn.Identity(), evaluation, 1, 1, 1.0)

    def last_column(results):
        console = Console(width=200, file=io.StringIO())
        console.print(published_beside_measured(results))
        lines = [x for x in console.file.getvalue().splitlines() if x.startswith("│")]
        return [line.split("│")[-2].strip() for line in lines]

    assert last_column([result(1, (0.0, 0.0)), result(2, (1.0, 0.9))]) == ["yes", "yes"]
    assert last_column([result(1, (1.0, 0.0)), result(2, (0.5, 0.0))]) == ["no", "no"]


def test_every_experiment_says_where_it_was_published():
    for experiment in EXPERIMENTS:
        assert "https://" in experiment.where
        assert experiment.command.startswith(f"householder reproduce {experiment.name}")
