"""Loss by position beyond the training length: settings, evaluation, files, resume, the command."""

from __future__ import annotations

import csv
import dataclasses
import io
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from householder.models import load_causal_lm
from householder.recipes import length_extrapolation as recipe
from householder.train import CheckpointError, ConfigError, Interrupted, OutputError
from householder.train.interrupt import StopRequest
from householder.train.text.corpus import open_corpus
from householder.train.text.evaluation import circular_windows, spaced_windows, token_losses
from householder.train.text.observer import TextObserver
from householder.train.text.plot import LEAST_GROWTH, losses_figure
from householder.train.text.processes import Processes, join_processes

TINY = {
    **recipe.settings("cpu"),
    "mixer": ["delta", "delta_product", "rope"],
    "context": 16,
    "d_model": 16,
    "head_dim": 8,
    "num_layers": 1,
    "mlp_width": 16,
    "validation": 0.3,
    "steps": 3,
    "batch_size": 2,
    "warmup": 1,
    "log_interval": 1,
    "eval_tokens": 32,
    "eval_length": 64,
    "eval_windows": 5,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        (folder / f"{i}.py").write_text(f"def function_{i}(x):\n    return x + {i}\n" * 5)
    return str(folder)


@pytest.fixture(scope="module")
def make(text):
    def make(**settings):
        return recipe.Extrapolation.from_settings({**TINY, "text": [text], **settings})

    return make


def run(extrapolation, folder, *, observer=None, **options):
    with join_processes("cpu") as processes:
        return recipe.run(
            extrapolation,
            folder,
            processes,
            observe=lambda config: nullcontext(observer or TextObserver()),
            **options,
        )


@pytest.fixture(scope="module")
def done(make, tmp_path_factory):
    """A whole run: its folder and what it found."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("done") / "out"
    return folder, run(make(), folder)


def test_settings():
    extrapolation = recipe.Extrapolation.from_settings(recipe.settings("gpu"))
    assert [recipe.run_title(config) for config in extrapolation.models.configs] == [
        "DeltaNet",
        "DeltaProduct, N = 2",
        "DeltaProduct, N = 3",
        "Gated DeltaNet",
        "PaTH",
        "PaTH-FoX",
        "RoPE",
    ]
    assert {config.context for config in extrapolation.models.configs} == {2048}
    # Documents see one another, as they do in the evaluation.
    assert not any(config.separate_documents for config in extrapolation.models.configs)
    assert recipe.Extrapolation.from_settings(extrapolation.settings()) == extrapolation
    with pytest.raises(ConfigError, match=r"`size` must be one of cpu, gpu, got 'tpu'"):
        recipe.settings("tpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixer": ["mamba"]}, "`mixer` must be one of delta_net"),
        ({"mixer": ["delta", "delta_net"]}, "different ones"),
        ({"num_householder": [2, 2]}, "different ones"),
        ({"pattern": "delta"}, "pattern"),
        ({"eval_windows": 0}, "`eval_windows` must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_the_losses_are_the_models_on_held_out_windows(done):
    folder, found = done
    assert [recipe.run_name(r.config) for r in found] == [
        "delta-net",
        "delta-product-N2",
        "delta-product-N3",
        "rotary-attention",
    ]
    held_out = open_corpus(folder / "corpus").validation
    # Five of them half a context apart would make a shorter circle than a sequence.
    windows = circular_windows(held_out[:65], 64, 5)
    model = load_causal_lm(folder / "delta-product-N3" / "model")
    expected = token_losses(model, windows).double().mean(0)
    np.testing.assert_allclose(found[2].losses, expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(found[2].at_end, expected[-8:].mean(), rtol=1e-5)
    np.testing.assert_allclose(found[2].at_training_length, expected[8:16].mean(), rtol=1e-5)


def test_windows_lie_evenly_on_a_circle():
    tokens = np.arange(12)
    windows = circular_windows(tokens, context=9, count=4)
    assert (windows == (np.arange(10) + 3 * np.arange(4)[:, None]) % 12).all()
    # Over three positions, the distance of the windows, each token is met once.
    for first in (0, 3, 6):
        assert sorted(windows[:, first : first + 3].ravel()) == list(range(12))


def test_early_and_late_positions_are_measured_on_the_same_text():
    windows = spaced_windows(np.arange(1000), 64, 10, distance=8)
    assert windows.shape == (10, 65)
    for first in range(0, 64, 8):
        assert sorted(windows[:, first : first + 8].ravel()) == list(range(80))
    few = spaced_windows(np.arange(70), 64, 10, distance=8)
    assert few.max() == 69


def figure_of(found):
    losses = {recipe.run_title(run.config): run.losses for run in found}
    return losses_figure(losses, found[0].config.context)


def test_files_table_and_picture(done):
    folder, found = done
    with open(folder / "losses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["first_position"], rows[-1]["last_position"]) == ("1", "64")
    column = [float(row["rotary-attention"]) for row in rows]
    np.testing.assert_allclose(column, found[3].losses, atol=1e-5)
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    exploded = dataclasses.replace(found[3], losses=found[3].losses * np.linspace(1, 50, 64))
    figure = figure_of([*found[:3], exploded])
    loss, growth = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert loss[3] == f"RoPE  ({exploded.at_end:.2f})"
    assert growth[3] == f"RoPE  ({exploded.at_end - exploded.at_training_length:+.3f})"
    assert len(loss) == len(growth) == 4
    # What is published is a circle in the colour of its curve.
    losses = {recipe.run_title(run.config): run.losses for run in found}
    drawn = losses_figure(losses, found[0].config.context, {"DeltaNet": 0.34, "Another": 9.0})
    curve, circle = drawn.axes[1].lines[0], drawn.axes[1].lines[4]
    assert circle.get_ydata() == [0.34]
    assert circle.get_markeredgecolor() == curve.get_color()
    assert drawn.axes[1].get_legend() is not None
    assert figure.axes[1].get_legend() is None
    # Where nothing grows there is a picture all the same.
    still = [dataclasses.replace(run, losses=np.ones(64, np.float32)) for run in found]
    assert figure_of(still).axes[1].get_ylim()[0] == LEAST_GROWTH
    console = Console(width=200, file=io.StringIO())
    console.print(recipe.published_beside_measured(found))
    text = console.file.getvalue()
    assert "explodes" in text
    assert "2.95 → 2.97" in text
    assert f"{found[2].at_training_length:.3f} → {found[2].at_end:.3f}" in text


class StopAt(TextObserver):
    """Ask to stop at a step of a model."""

    def __init__(self, pattern, step):
        self.pattern, self.step, self.request, self.here = pattern, step, StopRequest(), False

    def started(self, config, step, num_parameters, tokens):
        self.here = config.pattern == self.pattern

    def stepped(self, step):
        if self.here and step == self.step:
            self.request.signum = signal.SIGTERM


def test_a_stopped_run_resumes_to_the_same_numbers(make, done, tmp_path):
    _, whole = done
    observer = StopAt("delta_product", 2)
    with pytest.raises(Interrupted, match="step 2"):
        run(make(), tmp_path / "out", observer=observer, stop=observer.request)
    first = tmp_path / "out" / "delta-net" / "losses.npy"
    before = first.stat().st_mtime_ns
    resumed = run(make(), tmp_path / "out", resume=True)
    assert first.stat().st_mtime_ns == before
    for one, other in zip(whole, resumed, strict=True):
        assert (one.losses == other.losses).all()
        assert one.tokens == other.tokens == 3 * 2 * 16


def test_folders_are_refused_or_replaced(make, tmp_path):
    extrapolation = make(mixer=["rope"])
    out = tmp_path / "out"
    run(extrapolation, out)
    with pytest.raises(OutputError, match="occupied; continue with --resume"):
        run(extrapolation, out)
    with pytest.raises(CheckpointError, match=r"lr=0\.002 there, 0\.5 requested"):
        run(make(mixer=["rope"], lr=0.5), out, resume=True)
    with pytest.raises(CheckpointError, match="mixer"):
        run(make(mixer=["path"]), out, resume=True)
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"thesis\.txt is not householder's"):
        run(extrapolation, out, overwrite=True)
    (out / "thesis.txt").unlink()
    run(make(mixer=["delta"]), out, overwrite=True)
    assert not (out / "rotary-attention").exists()
    with pytest.raises(OutputError, match="nothing to resume"):
        run(extrapolation, tmp_path / "absent", resume=True)


def test_too_little_text_and_several_processes_are_refused(make, tmp_path):
    with pytest.raises(ConfigError, match="needs 5001 held-out tokens"):
        run(make(eval_length=5000), tmp_path / "out")
    two = Processes(0, 2, "cpu")
    with pytest.raises(ConfigError, match="one process"):
        recipe.run(make(), tmp_path / "two", two, observe=lambda config: nullcontext())


def test_files_that_are_no_text_are_named(make, text, tmp_path):
    files = []

    class Skipping(TextObserver):
        def skipped(self, file):
            files.append(file)

    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    run(
        make(text=[text, str(tmp_path / "picture.png")], mixer=["rope"], steps=1),
        tmp_path / "out",
        observer=Skipping(),
    )
    assert files == [str(tmp_path / "picture.png")]


def test_the_command_takes_its_flags(text, tmp_path, capsys, monkeypatch):
    from householder.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    settings = {k.replace("_", "-"): v for k, v in TINY.items() if type(v) in (int, float, str)}
    words = ["reproduce", "length-extrapolation", "--out", str(out), "--text", text]
    words += ["--mixer", "delta_product,path_fox", "--num-householder", "2", "--seed", "1"]
    words += ["--no-separate-documents"]
    words += [part for k, v in settings.items() for part in (f"--{k}", str(v))]
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit) as exit_:
            main([*words, *more])
        captured = capsys.readouterr()
        assert (exit_.value.code, captured.err) == (0, "")
        assert "DeltaProduct, N = 2" in captured.out
    # What is stored resumes without its flags.
    with pytest.raises(SystemExit) as exit_:
        main(["reproduce", "length-extrapolation", "--out", str(out), "--resume"])
    assert exit_.value.code == 0
    assert recipe.stored_settings(out)["text"] == [str(Path(text))]
    with pytest.raises(SystemExit) as exit_:
        main(["reproduce", "length-extrapolation", "--out", str(out), "--pattern", "delta"])
    assert exit_.value.code == 2
