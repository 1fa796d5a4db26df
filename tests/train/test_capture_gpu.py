"""Optimizer steps replayed as CUDA graphs."""

import pytest
import torch

from householder.train import NonFiniteError, loop, train
from householder.train.capture import KEPT_GRAPHS
from householder.train.metrics import read_metrics
from householder.train.observer import Observer

from .conftest import assert_same_run, final_state, interrupt

pytestmark = pytest.mark.gpu

RUNS = {
    "fresh": {},
    # Ten sequences in batches of four: every third batch is smaller.
    "fixed": {"num_samples": 10, "steps": 14},
    # More lengths than graphs are kept.
    "growing": {"start_length": 2, "growth_steps": 6},
    "few supervised": {"task": "mqar-2-16", "length": 16, "eval_length": 16},
    "gated, bfloat16": {
        "mixer": "gated_delta_product",
        "use_short_conv": True,
        "num_layers": 2,
        "dtype": "bfloat16",
    },
    "path, bfloat16": {"mixer": "path_attention", "num_householder": 1, "dtype": "bfloat16"},
    "rotary": {"mixer": "rotary_attention", "num_householder": 1, "grad_clip": 0.0},
}


@pytest.fixture
def replayed(tiny):
    """Settings of a tiny run on the GPU whose steps are replayed."""

    def make(**settings):
        shape = {"d_model": 32, "num_heads": 2, "mlp_width": 32}
        return tiny(**{**shape, "device": "cuda", "cuda_graphs": True, **settings})

    return make


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_replayed_steps_learn_what_single_kernels_do(replayed, tmp_path, settings):
    config = replayed(**settings)
    assert KEPT_GRAPHS < 5, "the growing prefixes must outnumber the graphs"
    train(replayed(**settings, cuda_graphs=False), tmp_path / "eager")
    train(config, tmp_path / "replayed")
    eager, ours = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("eager", "replayed")
    )
    assert [r["step"] for r in ours] == [r["step"] for r in eager]
    # The learning rate is a float32 here and a float64 there.
    rounding = 2e-2 if config.dtype == "bfloat16" else 1e-4
    for one, other in zip(ours, eager, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=rounding)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=5 * rounding)
    assert abs(ours[0]["loss"] - ours[-1]["loss"]) > 1e-3, "nothing was learnt"


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_interrupted_and_resumed_is_uninterrupted(replayed, tmp_path, settings):
    config = replayed(**settings)
    whole = train(config, tmp_path / "whole")
    interrupt(config, tmp_path / "parts", 3)
    interrupt(config, tmp_path / "parts", 5, resume=True)
    parts = train(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert (parts.evaluation, parts.steps) == (whole.evaluation, whole.steps)


def test_the_optimizer_has_counted_every_step(replayed, tmp_path):
    config = replayed()
    train(config, tmp_path)
    _, optimizer, _ = final_state(tmp_path)
    steps = [value for name, value in optimizer.items() if name.startswith("step/")]
    assert steps
    assert all(value == config.steps for value in steps)


def test_a_loss_that_is_not_finite_is_found_at_its_step(replayed, tmp_path, monkeypatch):
    models = []
    build = loop.build_model
    monkeypatch.setattr(loop, "build_model", lambda *a: models.append(build(*a)) or models[0])

    class PoisonAfter(Observer):
        def stepped(self, config, step):
            if step == 4:
                torch.nn.init.constant_(models[0].embeddings.weight, float("nan"))

    with pytest.raises(NonFiniteError, match="not finite at step 5"):
        train(replayed(), tmp_path, observer=PoisonAfter())
