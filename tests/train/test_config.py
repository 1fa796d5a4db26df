import dataclasses
from pathlib import Path

import pytest
import torch

from householder.train import ConfigError, TrainConfig
from householder.train.build import build_model
from householder.train.comparison import Comparison
from householder.train.data import make_training_task
from householder.train.settings import differences, field_types, read_toml, to_toml

KNOWN = field_types(TrainConfig)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"lr": 0}, "`lr` must be above 0, got 0.0"),
        ({"lr": float("nan")}, "`lr` must be finite"),
        ({"lr": "fast"}, "`lr` must be of type float, got 'fast' of type str"),
        ({"steps": 2.5}, "`steps` must be of type int"),
        ({"steps": True}, "`steps` must be of type int, got True of type bool"),
        ({"use_short_conv": 1}, "`use_short_conv` must be of type bool"),
        ({"beta2": 1.0}, "`beta2` must be below 1"),
        ({"mixer": "attention"}, "`mixer` must be one of .*delta_product.*, got 'attention'"),
        ({"d_model": 10, "num_heads": 4}, "`d_model` must be a multiple of num_heads=4, got 10"),
        ({"length": 8, "eval_length": 4}, "`eval_length` must be at least length=8, got 4"),
        ({"length": 8, "min_length": 9}, "`min_length` must be at most length=8, got 9"),
        ({"length": 8, "start_length": 9}, "`start_length` must be at most length=8, got 9"),
        ({"growth_steps": 9}, "`growth_steps` needs `start_length`"),
        ({"start_length": 9, "compile": True}, "`compile` must be left out with `start_length`"),
        ({"mixer": "delta_net", "num_householder": 2}, "must be 1 with mixer=delta_net, got 2"),
        ({"epochs": 3}, "`epochs` needs `num_samples`"),
        ({"epochs": 3, "num_samples": 10, "batch_size": 4, "steps": 8}, "contradict"),
        ({"stop_when_solved": 1}, "give `eval_interval` too"),
        ({"solved_accuracy": 1.5}, "at most 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_defaults_that_depend_on_others_are_filled_in():
    config = TrainConfig(length=10, d_model=32, num_heads=4)
    assert (config.eval_length, config.head_dim) == (40, 8)
    assert TrainConfig(num_samples=10, batch_size=4, epochs=3).steps == 9  # 4 + 4 + 2 per epoch


def test_toml_gives_back_the_same_settings(tmp_path):
    config = TrainConfig(lr=1e-7, num_samples=5, epochs=2, use_short_conv=True, min_length=3)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config.to_dict()))
    assert TrainConfig(**read_toml(path, KNOWN)) == config


@pytest.mark.parametrize("text", ["a\nb\t", '"\\', "né 🏠", "\x7f\x00", "[x] # y"])
def test_any_text_survives_toml(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_text(to_toml({"prompt": text, "names": [text]}), encoding="utf-8")
    assert read_toml(path, ["prompt", "names"]) == {"prompt": text, "names": [text]}


def test_toml_takes_dashes_and_underscores(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("num-householder = [1, 3]\nbatch_size = 7\n")
    assert read_toml(path, KNOWN) == {"num_householder": [1, 3], "batch_size": 7}
    path.write_text("batch-size = 7\nbatch_size = 7\n")
    with pytest.raises(ConfigError, match="given twice"):
        read_toml(path, KNOWN)


def test_unknown_key_names_the_near_match(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("bach-size = 4\n")
    with pytest.raises(ConfigError, match="unknown setting `bach_size`; did you mean `batch_size`"):
        read_toml(path, KNOWN)


@pytest.mark.parametrize("text", ["steps 3", b"\xff\xfe".decode("latin-1") + "="])
def test_a_file_that_is_not_toml_is_refused(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"must be TOML, is not: .*; write one"):
        read_toml(path, KNOWN)


def test_a_missing_config_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config file cannot be read: .*; give a TOML"):
        read_toml(tmp_path / "absent.toml", KNOWN)


def test_differences_leave_out_what_may_change():
    stored = TrainConfig(checkpoint_interval=5, threads=1, steps=7)
    requested = dataclasses.replace(stored, checkpoint_interval=9, threads=2, steps=8)
    assert differences(stored, requested) == {"steps": (7, 8)}


def test_comparison_gives_back_the_same_settings():
    comparison = Comparison.from_settings({"num_householder": [3, 1], "steps": 5})
    assert [config.name for config in comparison.configs] == ["s3-N3", "s3-N1"]
    assert Comparison.from_settings(comparison.settings()) == comparison


@pytest.mark.parametrize("numbers", [[], [2, 2]])
def test_comparison_needs_different_numbers(numbers):
    with pytest.raises(ConfigError, match="must list different numbers"):
        Comparison.from_settings({"num_householder": numbers})


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path):
    comparison = Comparison.from_settings(read_toml(path, KNOWN))
    for config in comparison.configs:
        task = make_training_task(config)
        build_model(config, task)(task.sample(2, config.length, torch.Generator()).tokens)


def test_the_main_job_is_spelled_out_in_an_example():
    (path,) = (path for path in EXAMPLES if path.name == "s3.toml")
    assert Comparison.from_settings(read_toml(path, KNOWN)) == Comparison.from_settings({})
