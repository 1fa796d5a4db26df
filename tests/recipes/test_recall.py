"""Recall at several widths: settings, files, table; the command with its flags."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from householder.recipes import recall
from householder.train import Comparison, ConfigError, run_comparison

TINY = {
    "task": "mqar-2-12",
    "length": 8,
    "eval_length": 16,
    "num_samples": None,
    "num_layers": 1,
    "num_heads": 2,
    "steps": 2,
    "batch_size": 2,
    "eval_samples": 4,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
}


def test_settings_are_the_published_task():
    settings = recall.settings("gpu", 64)
    configs = Comparison.from_settings(settings).configs
    assert [c.mixer for c in configs] == settings["mixer"]
    assert {c.mixer: c.num_householder for c in configs}["delta_product"] == 2
    for config in configs:
        assert (config.task, config.length, config.num_samples) == ("mqar-64", 512, 100_000)
        assert (config.num_layers, config.num_heads, config.batch_size) == (2, 2, 128)
        assert (config.d_model, config.mlp_width, config.tie_embeddings) == (64, 0, True)
    # β in (0, 1), and no convolutions; attentions know of neither.
    assert [c.allow_neg_eigval for c in configs] == [False, False, False, True, True]
    with pytest.raises(ConfigError, match=r"`size` must be one of cpu, gpu, got 'tpu'"):
        recall.settings("tpu", 64)


def test_a_width_has_the_learning_rate_of_the_nearest():
    rates = {64: 1e-3, 128: 1e-3, 256: 4.6e-4}
    assert recall.widths("gpu") == list(rates)
    for width, nearest in {16: 64, 64: 64, 90: 64, 100: 128, 200: 256, 1024: 256}.items():
        chosen = recall.settings("gpu", width)
        assert (chosen["d_model"], chosen["lr"]) == (width, rates[nearest]), width


def test_files_and_table_hold_every_width(tmp_path):
    mixers = ["delta_net", "delta_product", "rotary_attention"]
    for width in (16, 8):
        comparison = Comparison.from_settings({**TINY, "mixer": mixers, "d_model": width})
        results = run_comparison(comparison, tmp_path / f"d{width}")
        if width == 8:
            narrow = results
    found = recall.read_results(tmp_path)
    assert [run.config.d_model for run in found] == [8, 8, 8, 16, 16, 16]
    assert [run.at_training_length for run in found[:3]] == [r.evaluation.at(8) for r in narrow]
    recall.write_recall(found, tmp_path)
    with open(tmp_path / "recall.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first = [row for row in rows if row["d_model"] == "8" and row["mixer"] == "delta_net"]
    assert [int(row["length"]) for row in first] == list(narrow[0].evaluation.lengths)
    assert [float(row["accuracy"]) for row in first] == list(narrow[0].evaluation.accuracy)
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=160, file=io.StringIO())
    console.print(recall.published_beside_measured(found))
    text = console.file.getvalue()
    for part in ("d = 8", "d = 16", "DeltaNet", "N = 1", "RoPE", "2 pairs"):
        assert part in text, part
    assert f"≈100 / {100 * found[0].at_training_length:.1f}" in text


WORDS = (
    *("--task", "mqar-2-12", "--length", "8", "--eval-length", "8", "--num-heads", "2"),
    *("--num-layers", "1", "--steps", "2", "--batch-size", "2"),
    *("--eval-samples", "4", "--device", "cpu", "--threads", "1"),
)


def run(capsys, *words):
    from householder.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(["reproduce", "recall", *words, *WORDS])
    assert (exit_.value.code, capsys.readouterr().err) == (0, "")


def test_the_command_takes_its_flags_and_resumes(tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--mixer", "delta_net"]
    for width, more in (("8", []), ("16", []), ("16", ["--resume"])):
        run(capsys, *words, "--d-model", width, *more)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["d16", "d8", "recall.csv", "recall.png"]
    with open(tmp_path / "out" / "recall.csv", newline="") as file:
        assert [row["d_model"] for row in csv.DictReader(file)] == ["8", "16"]


def test_the_command_takes_a_mixer_that_takes_none_of_the_chosen_options(tmp_path, capsys):
    run(capsys, "--out", str(tmp_path / "out"), "--mixer", "rotary_attention", "--d-model", "8")
    (found,) = recall.read_results(tmp_path / "out")
    assert (found.config.mixer, found.config.num_householder) == ("rotary_attention", 1)
