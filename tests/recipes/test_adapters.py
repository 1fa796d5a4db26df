import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from householder.cli import main
from householder.recipes import _adapters_data, _adapters_report
from householder.recipes import adapters as recipe
from householder.recipes.adapters import Images, Outcome, Settings, Variant
from householder.train.errors import ConfigError, Interrupted, OutputError
from householder.train.interrupt import StopRequest

pytest.importorskip("sklearn")

TINY = Settings(
    pretrain_steps=4, steps=3, seeds=2, batch_size=8, shots=3, learning_rates=(1e-3, 1e-2)
)
FEW = (Variant("probe"), Variant("hra", 2), Variant("hta", 1), Variant("full"))


@pytest.fixture(autouse=True)
def fewer_digits(monkeypatch):
    """Leave out three quarters of the digits: most of the time goes into testing on them."""
    images = _adapters_data._digits()
    few = images[torch.arange(0, len(images), 4)]
    monkeypatch.setattr(_adapters_data, "_digits", lambda: few)


@pytest.fixture
def quiet():
    return lambda line: None


def test_run_writes_and_resumes(tmp_path, quiet):
    lines = []
    stop = StopRequest()

    def say(line):
        lines.append(line)
        if "HRA" in line:
            stop.signum = 2

    with pytest.raises(Interrupted, match="continue with --resume"):
        recipe.run(TINY, tmp_path, say=say, stop=stop, variants=FEW)
    half = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(r["kind"], r["size"]) for r in half] == [("probe", 0), ("hra", 2)]
    outcomes = recipe.run(TINY, tmp_path, resume=True, say=quiet, variants=FEW)
    assert [o.variant for o in outcomes] == list(FEW)
    assert json.loads((tmp_path / "results.json").read_text())["runs"][:2] == half
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    # The same images and first weights for the same seeds: resumed or not, it is the same result.
    whole = recipe.run(TINY, tmp_path / "whole", say=quiet, variants=FEW)
    assert [o.accuracies for o in whole] == [o.accuracies for o in outcomes]
    for o, trained in zip(whole, (325, 325 + 16 * 2 * 64, 325 + 16 * 5 * 64, None), strict=True):
        assert len(o.accuracies) == 2
        assert all(0 <= a <= 1 for a in o.accuracies)
        assert trained in (None, o.num_parameters)
    with pytest.raises(OutputError, match="occupied"):
        recipe.run(TINY, tmp_path, say=quiet, variants=FEW)
    other = dataclasses.replace(TINY, shots=4)
    with pytest.raises(OutputError, match="other settings"):
        recipe.run(other, tmp_path, resume=True, say=quiet, variants=FEW)
    with pytest.raises(OutputError, match="nothing to resume"):
        recipe.run(TINY, tmp_path / "none", resume=True, say=quiet)


def test_a_run_that_is_stopped_in_pretraining_is_resumed(tmp_path, quiet):
    stop = StopRequest()
    stop.signum = 2
    with pytest.raises(Interrupted, match="continue with --resume"):
        recipe.run(TINY, tmp_path, say=quiet, stop=stop, variants=FEW[:1])
    (outcome,) = recipe.run(TINY, tmp_path, resume=True, say=quiet, variants=FEW[:1])
    assert outcome.variant == FEW[0]


def test_lora_is_left_out_where_peft_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "find_spec", lambda name: None)
    lines = []
    variants = [Variant("lora", 1), Variant("probe")]
    (outcome,) = recipe.run(TINY, tmp_path, say=lines.append, variants=variants)
    assert outcome.variant == variants[1]
    assert "[1/2] LoRA (peft), r = 1: left out: pip install peft" in lines


def test_memory_counts_what_is_kept_once():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    images = Images(torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1]))
    counted = recipe.step_bytes(model, list(model.parameters()), images)
    # The input of the linear layer; log-probabilities, labels and a scalar of the loss; and three
    # copies of fifteen numbers trained.
    kept = 4 * (5 * 4) + 4 * (5 * 3) + 8 * 5 + 4
    assert counted == kept + 3 * 4 * 15


def test_splits_share_no_image_and_differ_by_seed():
    labels = torch.arange(4).repeat_interleave(10)
    images = Images(torch.arange(40.0).reshape(40, 1, 1, 1), labels)
    parts = recipe.split(images, 3, seed=1)
    assert [len(p) for p in parts] == [12, 12, 16]
    assert parts[0].labels.bincount().tolist() == [3, 3, 3, 3]
    pixels = torch.cat([p.pixels.flatten() for p in parts])
    assert sorted(pixels.tolist()) == list(range(40))
    assert not torch.equal(parts[0].pixels, recipe.split(images, 3, seed=2)[0].pixels)


def test_published_stands_beside_what_was_published():
    published = _adapters_report._published
    assert published("hta", 1) == (74.7, 90.6)
    assert published("hta", 0) == (72.0, None)
    assert published("full", 0) == (65.6, 88.5)
    for unpublished in (("hra", 8), ("two-sided", 2), ("hta", 4)):
        assert published(*unpublished) == (None, None)
    outcome = Outcome("hta", 1, 5445, 325, (0.5, 0.7), 1e-3, 0.01, 2048)
    written = io.StringIO()
    Console(width=160, file=written).print(recipe.results_table([outcome], Settings()))
    text = written.getvalue()
    for word in ("HTA, D′ = 1", "5,445", "60.0%", "14.1%", "74.7", "other data and another model"):
        assert word in text, word


def test_a_folder_of_images(tmp_path, quiet):
    np = pytest.importorskip("numpy")
    Image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for label in range(4):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i in range(5):
            pixels = generator.integers(0, 60, (16, 12, 3)) + 60 * label
            path = tmp_path / "images" / str(label) / f"{i}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    settings = dataclasses.replace(TINY, images=str(tmp_path / "images"), image_size=16, shots=2)
    (outcome,) = recipe.run(settings, tmp_path / "out", say=quiet, variants=[Variant("hra", 2)])
    assert outcome.head_parameters == 2 * 64 + 2
    _adapters_report.plot([dataclasses.replace(outcome, kind="probe", size=0)], settings)
    with pytest.raises(ConfigError, match="at least 7 images"):
        recipe.load_halves(dataclasses.replace(settings, shots=3))


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(recipe, "VARIANTS", FEW[:2])
    words = ["reproduce", "adapters", "--shots", "3", "--steps", "2", "--pretrain-steps", "2"]
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--seeds", "1"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    for word in ("linear probe", "HRA, N = 2", "VTAB-1k", "householder-adapters/accuracy.png"):
        assert word in out, word
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--resume", "--overwrite"])
    assert exit_.value.code == 2
