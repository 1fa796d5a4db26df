"""A text run: learns, resumes to the same bits, refuses what does not fit."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from householder.models import CausalLM, load_causal_lm
from householder.train import CheckpointError, ConfigError, Interrupted, NonFiniteError, OutputError
from householder.train.interrupt import StopRequest
from householder.train.metrics import read_metrics
from householder.train.settings import to_toml
from householder.train.text.config import TextConfig
from householder.train.text.evaluation import evaluate_text, token_losses
from householder.train.text.folder import run_text
from householder.train.text.observer import TextDisplay, TextObserver
from householder.train.text.processes import join_processes

from .conftest import TINY


def train(texts: Path, folder: Path, *, resume=False, overwrite=False, **settings: Any):
    observer, stop = settings.pop("observer", None), settings.pop("stop", None)
    with join_processes(settings.get("device", TINY["device"])) as processes:
        return run_text(
            {**TINY, "text": [str(texts)], **settings},
            folder,
            processes,
            resume=resume,
            overwrite=overwrite,
            observer=observer,
            stop=stop,
        )


def timeless(folder: Path) -> list[dict[str, Any]]:
    records = read_metrics(folder / "metrics.jsonl")
    assert records
    timings = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in timings} for r in records]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_causal_lm(folder / "model").state_dict()


def assert_same_run(folder: Path, other: Path) -> None:
    assert timeless(folder) == timeless(other)
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


class StopAt(TextObserver):
    def __init__(self, step: int) -> None:
        self.step, self.request = step, StopRequest()

    def stepped(self, step: int) -> None:
        if step == self.step:
            self.request.signum = signal.SIGTERM


def test_run_learns_and_leaves_what_it_says(texts, tmp_path):
    result = train(texts, tmp_path / "out", steps=60, lr=3e-3, eval_interval=30, log_interval=10)
    losses = [r["loss"] for r in timeless(tmp_path / "out") if "loss" in r]
    assert losses[-1] < 0.8 * losses[0]
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["context"] for row in summary["perplexity"]] == [4, 16, 64]
    assert summary["tokens"] == 60 * 4 * 16
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.toml",
        "corpus",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "results.json",
    }
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) == 2
    loaded = load_causal_lm(tmp_path / "out" / "model")
    tokens = torch.randint(256, (1, 9))
    torch.testing.assert_close(loaded(tokens), result.model.eval()(tokens))


def test_transformers_continues_texts_with_what_a_run_leaves(texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("householder.hf.modeling")
    train(texts, tmp_path / "out", steps=2)
    model = str(tmp_path / "out" / "model")
    made = transformers.pipeline("text-generation", model=model, device="cpu")
    options = {"max_new_tokens": 5, "do_sample": False}
    together = made(["A state.", "B"], batch_size=2, **options)
    alone = [made(text, **options) for text in ("A state.", "B")]
    assert together == alone
    assert made.tokenizer("B")["input_ids"] == [256, 66]
    assert made.model.generation_config.eos_token_id == 256


def test_stopped_and_resumed_run_is_the_whole_run(texts, tmp_path):
    train(texts, tmp_path / "whole")
    observer = StopAt(5)
    with pytest.raises(Interrupted, match="SIGTERM at step 5; saved; continue with --resume"):
        train(texts, tmp_path / "parts", observer=observer, stop=observer.request)
    train(texts, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_parts_of_a_step_add_up(texts, tmp_path):
    train(texts, tmp_path / "whole", pattern="delta", separate_documents=False)
    train(texts, tmp_path / "parts", pattern="delta", separate_documents=False, accumulate=4)
    records = (timeless(tmp_path / name) for name in ("whole", "parts"))
    for whole, parts in zip(*records, strict=True):
        for name in whole:
            assert math.isclose(whole[name], parts[name], rel_tol=1e-4), name


def test_checkpointed_and_half_precision_runs_go_on(texts, tmp_path):
    train(texts, tmp_path / "plain", steps=3)
    train(texts, tmp_path / "saved", steps=3, checkpoint_activations=True)
    assert [r["loss"] for r in timeless(tmp_path / "plain") if "loss" in r] == pytest.approx(
        [r["loss"] for r in timeless(tmp_path / "saved") if "loss" in r], rel=1e-6
    )
    half = train(texts, tmp_path / "half", steps=3, dtype="bfloat16", schedule="wsd")
    assert all(math.isfinite(r.loss) for r in half.perplexities)


# Dynamo looks at the gradients of its inputs, which are no leaves here, behind a filter of its own.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_run_has_the_losses_of_a_plain_one(texts, tmp_path, monkeypatch):
    compile_blocks, compiled = CausalLM.compile_blocks, []

    def without_code_generation(self, **options):
        compiled.append(self)
        compile_blocks(self, backend="aot_eager", **options)

    monkeypatch.setattr(CausalLM, "compile_blocks", without_code_generation)
    for name, settings in (("plain", {}), ("compiled", {"compile": True, "recompute": False})):
        train(texts, tmp_path / name, steps=4, pattern="gated_delta_net", **settings)
    assert [model.recompute for model in compiled] == [False]
    losses = [
        [r["loss"] for r in timeless(tmp_path / name) if "loss" in r]
        for name in ("plain", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


REPLAYED: dict[str, Any] = {
    "device": "cuda",
    "separate_documents": False,
    "cuda_graphs": True,
    "d_model": 32,
    "head_dim": 16,
    "mlp_width": 32,
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [{}, {"pattern": "gated_delta_net,rope", "dtype": "bfloat16"}, {"pattern": "path_fox"}],
    ids=["product and path", "gated and rotary", "path_fox"],
)
def test_replayed_run_has_the_losses_of_a_plain_one_and_resumes(texts, tmp_path, settings):
    chosen = {**REPLAYED, **settings}
    train(texts, tmp_path / "plain", **{**chosen, "cuda_graphs": False})
    train(texts, tmp_path / "whole", **chosen)
    observer = StopAt(5)
    with pytest.raises(Interrupted, match="SIGTERM at step 5"):
        train(texts, tmp_path / "parts", observer=observer, stop=observer.request, **chosen)
    train(texts, tmp_path / "parts", resume=True, **chosen)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    whole, plain = (
        [r["loss"] for r in timeless(tmp_path / name) if "loss" in r] for name in ("whole", "plain")
    )
    assert whole == pytest.approx(plain, rel=1e-2 if "dtype" in settings else 1e-4)
    # What a replayed run has saved, a plain one takes up, and the other way round.
    for name, cuda_graphs in (("whole", False), ("plain", True)):
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000008")
        train(texts, tmp_path / name, resume=True, **{**chosen, "cuda_graphs": cuda_graphs})
        last = [r["loss"] for r in timeless(tmp_path / name) if "loss" in r][-1]
        assert last == pytest.approx(plain[-1], rel=1e-2)


def test_perplexity_is_that_of_the_logits(texts, tmp_path):
    result = train(texts, tmp_path / "out", steps=1)
    model = result.model.eval()
    windows = torch.randint(256, (3, 9)).numpy()
    losses = token_losses(model, windows)
    tokens = torch.from_numpy(windows)
    logp = model(tokens[:, :-1]).log_softmax(-1)
    torch.testing.assert_close(losses, -logp.gather(-1, tokens[:, 1:, None]).squeeze(-1).detach())
    (one,) = evaluate_text(model, windows[0], (8,), max_tokens=8, separator=None)
    assert one.loss == pytest.approx(losses[0].mean().item(), rel=1e-5)


def test_documents_do_not_see_one_another_in_evaluation(texts, tmp_path):
    model = train(texts, tmp_path / "out", steps=1).model
    windows = torch.randint(256, (1, 9))
    windows[0, 5] = 256
    changed = windows.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 256
    a, b = (token_losses(model, x.numpy(), separator=256) for x in (windows, changed))
    assert torch.equal(a[0, 5:], b[0, 5:])
    a, b = (token_losses(model, x.numpy()) for x in (windows, changed))
    assert not torch.equal(a[0, 5:], b[0, 5:])


def test_occupied_folders_are_kept(texts, tmp_path):
    train(texts, tmp_path / "out", steps=1)
    with pytest.raises(OutputError, match="occupied; continue with --resume"):
        train(texts, tmp_path / "out", steps=1)
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"nothing is deleted, because thesis.tex is not"):
        train(texts, tmp_path / "out", steps=1, overwrite=True)
    (tmp_path / "out" / "thesis.tex").unlink()
    train(texts, tmp_path / "out", steps=2, overwrite=True)
    assert timeless(tmp_path / "out")[-1]["step"] == 2


def test_what_fails_before_it_has_anything_leaves_a_free_folder(texts, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no files in"):
        train(tmp_path / "empty", tmp_path / "out")
    stop = StopRequest()
    stop.signum = signal.SIGTERM
    with pytest.raises(Interrupted, match=r"SIGTERM after \d+ tokens of the text"):
        train(texts, tmp_path / "out", stop=stop)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.toml"]
    train(texts, tmp_path / "out", steps=1)


def test_text_too_short_for_a_window_leaves_a_free_folder(texts, tmp_path):
    with pytest.raises(ConfigError, match="`context` must be at most half of the"):
        train(texts, tmp_path / "out", context=4000)
    train(texts, tmp_path / "out", steps=1)


def test_a_dataset_without_the_library_is_refused_first(tmp_path, monkeypatch):
    from householder.train.text import corpus

    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"`dataset` a/b: .* pip install datasets"):
        train(tmp_path, tmp_path / "out", text=[], dataset="a/b")
    assert not (tmp_path / "out").exists()


class StopAtEvaluation(StopAt):
    def logged(self, record: dict[str, Any]) -> None:
        if "loss" in record and record["step"] == self.step:  # what comes next at that step
            self.request.signum = signal.SIGTERM


@pytest.mark.parametrize("step", [6, 8])
def test_a_signal_ends_an_evaluation_and_resuming_makes_it_good(texts, tmp_path, step):
    train(texts, tmp_path / "whole")
    observer = StopAtEvaluation(step)
    with pytest.raises(Interrupted, match=f"SIGTERM at step {step}; saved") as raised:
        train(texts, tmp_path / "out", observer=observer, stop=observer.request)
    assert raised.value.signum == signal.SIGTERM
    assert not any("validation_loss" in r and r["step"] == step for r in timeless(tmp_path / "out"))
    assert not (tmp_path / "out" / "results.json").exists()
    train(texts, tmp_path / "out", resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    found, expected = (
        json.loads((tmp_path / name / "results.json").read_text())["perplexity"]
        for name in ("out", "whole")
    )
    assert found == expected


def test_resume_refuses_other_settings_text_and_folders(texts, tmp_path):
    with pytest.raises(OutputError, match="nothing to resume"):
        train(texts, tmp_path / "none", resume=True)
    train(texts, tmp_path / "out", steps=3)
    with pytest.raises(CheckpointError, match=r"lr=0\.001 there, 0.5 requested"):
        train(texts, tmp_path / "out", steps=3, resume=True, lr=0.5)
    with pytest.raises(CheckpointError, match="text="):
        train(texts / "a.txt", tmp_path / "out", steps=3, resume=True)


def test_damaged_checkpoint_is_refused(texts, tmp_path):
    train(texts, tmp_path / "out", steps=3)
    (file,) = (tmp_path / "out" / "checkpoints" / "step-00000003").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="distcp is damaged"):
        train(texts, tmp_path / "out", steps=3, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(texts, tmp_path):
    with pytest.raises(NonFiniteError, match=r"not finite at step \d"):
        train(texts, tmp_path / "out", lr=1e30, min_lr=0.0, grad_clip=0.0, warmup=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "mamba"}, "`pattern` must be one of"),
        ({"accumulate": 3}, "`accumulate` must divide batch_size=4, got 3"),
        ({"cuda_graphs": True}, "separate_documents=True, accumulate=1"),
        (
            {"cuda_graphs": True, "separate_documents": False, "accumulate": 2},
            "separate_documents=False, accumulate=2",
        ),
        ({"min_lr": 1.0}, "`min_lr` must be at most lr=0.001, got 1.0"),
        ({"eval_contexts": "64,x"}, "`eval_contexts` must be numbers"),
        ({"global_layers": "2"}, "`global_layers` must be indices from 0 to 1"),
        ({"pattern": "rope", "head_dim": 5}, "`head_dim` must be even, got 5"),
        (
            {"pattern": "delta,rope", "num_householder": 3},
            "of delta_product, gated_delta_product, and no layer of 'delta,rope' is one, got 3",
        ),
        ({"window": 8}, "`window` is a setting of sliding_window_attention"),
        ({"pattern": "path", "num_heads": 2}, "`num_heads` is a setting of delta_net, "),
        ({"pattern": "rope", "allow_neg_eigval": False}, "`allow_neg_eigval` is a setting of"),
        ({"task": "s3"}, "unknown setting `task`"),
        ({"dataset": "a/b"}, "one of them; got text, dataset"),
        ({"text": []}, "one of them; got neither"),
    ],
)
def test_settings_that_cannot_be_are_refused(texts, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        train(texts, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_config_gives_a_padded_vocabulary_and_lengths():
    config = TextConfig(context=100, eval_contexts="7, 9")
    assert config.model_config(257).vocab_size == 320
    assert config.lengths() == (7, 9)
    assert TextConfig(context=100).lengths() == (25, 100, 400)


def command(texts: Path, folder: Path, *options: str) -> list[str]:
    config = folder.parent / "settings.toml"
    config.write_text(to_toml({**TINY, "text": [str(texts)]}))
    return ["-m", "householder", "train", "--config", str(config), "--out", str(folder), *options]


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(texts, tmp_path):
    train(texts, tmp_path / "whole", steps=40)
    words = [sys.executable, *command(texts, tmp_path / "killed", "--steps", "40")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "killed" / "checkpoints" / "step-00000006").exists():
            process.kill()
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*words, "--resume"], check=True, capture_output=True, timeout=120)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_resumes_them(texts, tmp_path):
    train(texts, tmp_path / "one")
    for name, options in (("two", ()), ("begun", ("--checkpoint-interval", "4"))):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [*launch, "--nproc-per-node", "2", *command(texts, tmp_path / name, *options)]
        subprocess.run(
            words,
            check=True,
            capture_output=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def losses(folder: Path) -> list[float]:
        return [r["loss"] for r in timeless(folder) if "loss" in r]

    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    # What two processes saved at step 4, one continues.
    steps = sorted(p.name for p in (tmp_path / "begun" / "checkpoints").iterdir())
    assert steps == ["step-00000004", "step-00000008"]
    for file in (tmp_path / "begun" / "checkpoints" / steps[1]).iterdir():
        file.unlink()
    (tmp_path / "begun" / "checkpoints" / steps[1]).rmdir()
    train(texts, tmp_path / "begun", resume=True, checkpoint_interval=4)
    assert losses(tmp_path / "begun") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


# Dynamo looks at every tensor's gradient, also where there is none to look at.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_learn_the_same(texts, tmp_path, monkeypatch):
    compile_, compiled = torch.nn.Module.compile, []

    def by_dynamo_alone(module, **options):
        compiled.append(type(module).__name__)
        compile_(module, **{**options, "backend": "eager", "fullgraph": True})

    # The compiler behind it takes a minute, and is PyTorch's affair.
    monkeypatch.setattr(torch.nn.Module, "compile", by_dynamo_alone)
    plain = train(texts, tmp_path / "plain", steps=3, separate_documents=False)
    found = train(texts, tmp_path / "compiled", steps=3, separate_documents=False, compile=True)
    assert compiled == ["Block", "Block"]
    assert_same_run(tmp_path / "plain", tmp_path / "compiled")
    assert found.perplexities == plain.perplexities


def test_a_full_disk_is_told_and_costs_nothing_that_was_saved(texts, tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    train(texts, tmp_path / "whole")
    save, saved = dcp.save, []

    def full(*args, **options):
        saved.append(options["checkpoint_id"])
        if len(saved) == 2:
            (options["checkpoint_id"] / "part").parent.mkdir(exist_ok=True)
            (options["checkpoint_id"] / "part").write_text("some of it")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos\nmore")
        save(*args, **options)

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(OutputError, match=r"step-00000006: .* unexpected pos; make room") as raised:
        train(texts, tmp_path / "out")
    assert "more" not in str(raised.value)
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000003"]
    train(texts, tmp_path / "out", resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_utilisation_is_that_of_the_peak_that_is_given(texts, tmp_path):
    result = train(texts, tmp_path / "out", steps=4, peak_tflops=2.5)
    logged = [r for r in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in logged] == [1, 2, 4]
    flops = 3 * result.model.flops_per_token(TINY["context"])
    for record in logged:
        expected = record["tokens_per_second"] * flops / 2.5e12
        assert record["mfu"] == pytest.approx(expected, rel=1e-3)


def test_without_a_terminal_lines_tell_loss_speed_and_the_time_left(texts, tmp_path):
    page = io.StringIO()
    with TextDisplay(Console(file=page, width=200)) as display:
        train(texts, tmp_path / "out", observer=display, prompt="The", peak_tflops=1.0)
    lines = page.getvalue().splitlines()
    assert lines[0].startswith("not text, left out: ")
    assert re.match(r"delta_product,path: [\d.]+k parameters, \d+ tokens of text, 4 × 16", lines[1])
    pattern = r"1/8  loss \d\.\d{4}  [\d.]+k? tokens/s  MFU [\d.]+%  \d:\d\d:\d\d left"
    assert re.fullmatch(pattern, lines[2]), lines[2]
    assert any(re.match(r"step 3: validation loss \d\.\d{4}, perplexity", line) for line in lines)
    assert any(line.startswith("sample at step 3: 'The") for line in lines)
    steps = [line for line in lines if "/8  loss" in line]
    assert [line.split("/")[0] for line in steps] == ["1", "2", "4", "6", "8"]
    assert "left" not in steps[-1]


def test_a_viewer_gets_every_number(texts, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observer = StopAt(5)
    with pytest.raises(Interrupted):
        train(texts, tmp_path / "out", tensorboard=True, observer=observer, stop=observer.request)
    # A kill at step 5: what was written since the checkpoint of step 3 is dropped.
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000005")
    train(texts, tmp_path / "out", tensorboard=True, resume=True)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    for record in read_metrics(tmp_path / "out" / "metrics.jsonl"):
        for name in record.keys() - {"step"}:
            found = {e.step: e.value for e in events.Scalars(name)}
            assert len(found) == len(events.Scalars(name))
            assert found[record["step"]] == pytest.approx(record[name], rel=1e-4), name


def test_viewers_that_are_not_installed_are_refused_first(texts, tmp_path, monkeypatch):
    from householder.train.text import trackers

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"`wandb` must be installed .* pip install wandb"):
        train(texts, tmp_path / "out", wandb=True)
    assert not (tmp_path / "out").exists()
