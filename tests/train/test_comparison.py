import csv
import dataclasses
import json
import os

import pytest

from householder.train import CheckpointError, Comparison, ConfigError, OutputError, run_comparison
from householder.train.comparison import open_folder, stored_settings
from householder.train.config import run_titles

from .conftest import assert_same_run, interrupt, results


@pytest.fixture
def pair(tiny):
    return Comparison((tiny(num_householder=1), tiny(num_householder=2)))


def test_results_are_written_as_numbers_table_and_picture(pair, tmp_path):
    done = run_comparison(pair, tmp_path / "out")
    summary = results(tmp_path / "out")
    assert [run["name"] for run in summary] == ["s3-N1", "s3-N2"]
    for run, result in zip(summary, done, strict=True):
        assert tuple(run["evaluation"]["accuracy"]) == result.evaluation.accuracy
        assert run["steps"] == 12
        assert run["num_parameters"] == sum(p.numel() for p in result.model.parameters())
    with open(tmp_path / "out" / "accuracy.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["length", "s3-N1", "s3-N2"]
    assert [int(row[0]) for row in rows[1:]] == list(range(1, 13))
    assert [float(row[2]) for row in rows[1:]] == list(done[1].evaluation.accuracy)
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_stored_settings_make_the_same_comparison(pair, tmp_path):
    open_folder(pair, tmp_path / "out")
    assert Comparison.from_settings(stored_settings(tmp_path / "out")) == pair


def test_runs_may_differ_in_mixer_and_depth(tmp_path):
    tiny = {"task": "z2", "length": 3, "d_model": 8, "num_heads": 2, "mlp_width": 8, "steps": 2}
    tiny |= {"batch_size": 4, "eval_samples": 4, "device": "cpu", "threads": 1}
    lists = {"mixer": ["path_attention", "forgetting_attention"], "num_layers": [1, 2]}
    comparison = Comparison.from_settings({**tiny, **lists})
    assert comparison.settings().items() >= {**tiny, **lists, "num_householder": [1]}.items()
    done = run_comparison(comparison, tmp_path)
    names = [f"z2-{m}-attention{depth}" for m in ("path", "forgetting") for depth in ("", "-L2")]
    assert [result.config.name for result in done] == names
    assert Comparison.from_settings(stored_settings(tmp_path)) == comparison
    again = run_comparison(comparison, tmp_path, resume=True)
    assert [r.evaluation for r in again] == [r.evaluation for r in done]
    other = Comparison.from_settings({**tiny, **lists, "num_layers": [1, 3]})
    with pytest.raises(CheckpointError, match=r"num_layers=\[1, 2\] there, \[1, 3\] requested"):
        open_folder(other, tmp_path, resume=True)


def test_resume_after_the_second_run_was_interrupted(pair, tmp_path):
    whole = run_comparison(pair, tmp_path / "whole")
    out = tmp_path / "out"
    open_folder(pair, out)
    run_comparison(Comparison(pair.configs[:1]), tmp_path / "first")
    os.rename(tmp_path / "first" / "s3-N1", out / "s3-N1")
    interrupt(pair.configs[1], out / "s3-N2", 7)
    resumed = run_comparison(pair, out, resume=True)
    assert [r.evaluation for r in resumed] == [r.evaluation for r in whole]
    for name in ("s3-N1", "s3-N2"):
        assert_same_run(out / name, tmp_path / "whole" / name)
    assert results(out) == results(tmp_path / "whole")


def test_occupied_folder_is_refused_and_left_alone(pair, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="occupied; continue with --resume, replace it with"):
        open_folder(pair, tmp_path)
    with pytest.raises(OutputError, match=r"nothing is deleted, because no config.toml"):
        open_folder(pair, tmp_path, overwrite=True)
    # Others have a config.toml too.
    (tmp_path / "config.toml").write_text("steps = 3\n")
    with pytest.raises(OutputError, match=r"nothing is deleted, because no config.toml"):
        open_folder(pair, tmp_path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.toml", "thesis.txt"]


def test_overwrite_deletes_nothing_that_is_not_ours(pair, tmp_path):
    run_comparison(pair, tmp_path / "out")
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "thesis.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="notes is not householder's"):
        open_folder(pair, tmp_path / "out", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_replaces_an_earlier_comparison(pair, tmp_path):
    out = tmp_path / "out"
    run_comparison(pair, out)
    open_folder(pair, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["config.toml"]
    with pytest.raises(ConfigError, match="give one"):
        open_folder(pair, out, overwrite=True, resume=True)


def test_unwritable_folder_is_refused(pair, tmp_path):
    # Below a file no folder can be made, not even by root.
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/out: cannot write the output folder"):
        open_folder(pair, tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="must be a folder, is a file"):
        open_folder(pair, tmp_path / "file")


def test_nothing_to_resume_is_said(pair, tmp_path):
    with pytest.raises(OutputError, match="nothing to resume"):
        run_comparison(pair, tmp_path, resume=True)


def test_resume_with_other_runs_is_refused(pair, tiny, tmp_path):
    open_folder(pair, tmp_path / "out")
    other = Comparison((tiny(num_householder=3),))
    with pytest.raises(CheckpointError, match=r"num_householder=\[1, 2\] there, \[3\] requested"):
        open_folder(other, tmp_path / "out", resume=True)


def test_resume_with_other_settings_is_refused_before_the_first_checkpoint(pair, tmp_path):
    open_folder(pair, tmp_path / "out")
    other = Comparison(tuple(dataclasses.replace(c, lr=0.5) for c in pair.configs))
    with pytest.raises(CheckpointError, match=r"lr=0.002 there, 0.5 requested"):
        open_folder(other, tmp_path / "out", resume=True)


def test_the_config_file_is_complete_or_absent(pair, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        open_folder(pair, tmp_path / "out")
    monkeypatch.undo()
    open_folder(pair, tmp_path / "out")  # what the death left behind does not occupy the folder
    assert json.loads(json.dumps(stored_settings(tmp_path / "out")))["steps"] == 12


def test_beside_others_a_mixer_has_only_what_it_takes(tmp_path):
    settings = {
        "mixer": ["rotary_attention", "delta_net", "delta_product"],
        "num_householder": [2, 3],
        "allow_neg_eigval": False,
        "use_short_conv": True,
    }
    comparison = Comparison.from_settings(settings)
    assert [(c.mixer, c.num_householder) for c in comparison.configs] == [
        ("rotary_attention", 1),
        ("delta_net", 1),
        ("delta_product", 2),
        ("delta_product", 3),
    ]
    assert [c.allow_neg_eigval for c in comparison.configs] == [True, False, False, False]
    assert [c.use_short_conv for c in comparison.configs] == [False, True, True, True]
    assert run_titles(comparison.configs) == [
        "RoPE",
        "DeltaNet",
        "DeltaProduct, N = 2",
        "DeltaProduct, N = 3",
    ]
    assert Comparison.from_settings(comparison.settings()) == comparison
    open_folder(comparison, tmp_path / "out")
    open_folder(comparison, tmp_path / "out", resume=True)
    other = Comparison.from_settings({**settings, "use_short_conv": False})
    with pytest.raises(CheckpointError, match="use_short_conv=True there, False requested"):
        open_folder(other, tmp_path / "out", resume=True)
    # Alone it is told that it takes no more.
    with pytest.raises(ConfigError, match="`num_householder` must be 1 with mixer=delta_net"):
        Comparison.from_settings({"mixer": ["delta_net"], "num_householder": [2]})
