import pytest
import torch
from torch import nn

from householder.train import CheckpointError, ConfigError, Evaluation, NonFiniteError, loop, train
from householder.train import checkpoint as ckpt
from householder.train.build import build_model
from householder.train.data import derive_seed, make_training_task
from householder.train.metrics import read_metrics
from householder.train.observer import Observer
from householder.train.optim import as_made, make_optimizer, make_recordable

from .conftest import assert_same_run, final_state, interrupt, timeless_metrics


def test_same_seed_same_bits(tiny, tmp_path):
    torch.manual_seed(1)
    one = train(tiny(), tmp_path / "one")
    torch.manual_seed(2)
    two = train(tiny(), tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert one.evaluation == two.evaluation


def test_another_seed_gives_other_weights(tiny, tmp_path):
    train(tiny(), tmp_path / "one")
    train(tiny(seed=1), tmp_path / "two")
    one, two = (final_state(tmp_path / name)[0] for name in ("one", "two"))
    assert not torch.equal(one["head.weight"], two["head.weight"])
    assert timeless_metrics(tmp_path / "one") != timeless_metrics(tmp_path / "two")


def test_training_leaves_the_global_state_alone(tiny, tmp_path):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(tiny(threads=threads + 1), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_samples": 10, "steps": 14},
        {"eval_interval": 2, "stop_when_solved": 3, "solved_accuracy": 1e-9, "task": "z2"},
        {"mixer": "gated_delta_product", "use_short_conv": True, "num_layers": 2},
        {"dtype": "bfloat16"},
    ],
    ids=["fresh", "fixed", "early stop", "gated", "bfloat16"],
)
def test_interrupted_and_resumed_is_uninterrupted(tiny, tmp_path, settings):
    config = tiny(**settings)
    whole = train(config, tmp_path / "whole")
    interrupt(config, tmp_path / "parts", 3)
    interrupt(config, tmp_path / "parts", 5, resume=True)
    parts = train(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert (parts.evaluation, parts.steps) == (whole.evaluation, whole.steps)


def test_death_between_checkpoints_repeats_the_lost_steps(tiny, tmp_path):
    class DieAt(Observer):
        def stepped(self, config, step):
            if step == 11:
                raise KeyboardInterrupt

    train(tiny(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "parts", observer=DieAt())
    path = tmp_path / "parts" / "metrics.jsonl"
    # Step 9 was logged after the checkpoint of step 8; a kill can cut the next line short.
    assert [r["step"] for r in read_metrics(path)] == [3, 6, 9]
    with open(path, "a") as file:
        file.write('{"step": 1')
    train(tiny(), tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_before_the_first_checkpoint_starts_anew(tiny, tmp_path):
    train(tiny(), tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    train(tiny(), tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_of_a_finished_run_only_evaluates(tiny, tmp_path):
    first = train(tiny(), tmp_path)
    before = ckpt.latest(tmp_path / "checkpoints").stat().st_mtime_ns
    second = train(tiny(), tmp_path, resume=True)
    assert second.evaluation == first.evaluation
    assert ckpt.latest(tmp_path / "checkpoints").stat().st_mtime_ns == before


def test_checkpoint_of_other_settings_is_refused(tiny, tmp_path):
    train(tiny(), tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit.*length=6 there, 5 requested"):
        train(tiny(length=5), tmp_path, resume=True)
    # The weights do not depend on how often they are saved.
    train(tiny(checkpoint_interval=1), tmp_path, resume=True)


def test_damaged_checkpoint_is_refused(tiny, tmp_path):
    train(tiny(), tmp_path)
    path = ckpt.latest(tmp_path / "checkpoints") / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors is damaged.*from step 8"):
        train(tiny(), tmp_path, resume=True)
    # What the message advises works, and gives the same end.
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    train(tiny(), tmp_path, resume=True)
    train(tiny(), tmp_path / "whole")
    assert_same_run(tmp_path, tmp_path / "whole")


class BadAt(nn.Module):
    """A model whose logits (or their gradient) turn to NaN in one training step."""

    def __init__(self, model, step, where):
        super().__init__()
        self.model, self.step, self.where, self.calls = model, step, where, 0

    def forward(self, tokens):
        logits = self.model(tokens)
        self.calls += self.training
        if self.calls == self.step and self.where == "loss":
            return logits * float("nan")
        if self.calls == self.step:
            logits.register_hook(lambda gradient: gradient * float("inf"))
        return logits


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_with_the_step_and_keeps_the_last_good(tiny, tmp_path, monkeypatch, where):
    build = loop.build_model
    monkeypatch.setattr(loop, "build_model", lambda *a: BadAt(build(*a), 7, where))
    config = tiny(checkpoint_interval=2)
    with pytest.raises(NonFiniteError, match=r"not finite at step 7; kept .*step-00000006") as info:
        train(config, tmp_path)
    assert info.value.step == 7
    assert ckpt.steps(tmp_path / "checkpoints") == [4, 6]
    model = ckpt.load(ckpt.latest(tmp_path / "checkpoints")).model
    assert all(tensor.isfinite().all() for tensor in model.values())


def test_stops_early_once_solved(tiny, tmp_path):
    config = tiny(eval_interval=2, stop_when_solved=2, solved_accuracy=1e-9, task="z2", length=1)
    result = train(config, tmp_path)
    assert result.steps == 4
    assert final_state(tmp_path)[2]["step"] == 4
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [2, 3, 4]


def test_solved_once_is_not_solved_in_a_row(tiny, tmp_path, monkeypatch):
    accuracies = iter([1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])

    def evaluate(model, config, device, **_):
        return Evaluation("prefix", (config.length,), (next(accuracies),), 1)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    result = train(tiny(eval_interval=1, stop_when_solved=2, solved_accuracy=0.9), tmp_path)
    assert result.steps == 4


def test_gradients_are_clipped_and_logged_as_they_were(tiny, tmp_path):
    norms, moved = {}, {}
    for limit in (0.0, 1e-12):  # 0: no limit; below Adam's eps nothing moves
        config = tiny(grad_clip=limit, steps=1, warmup=0, weight_decay=0.0, lr=1e-2, log_interval=1)
        folder = tmp_path / str(limit)
        after = train(config, folder).model.state_dict()
        torch.manual_seed(derive_seed(config.seed, "model"))
        before = build_model(config, make_training_task(config)).state_dict()
        moved[limit] = max(float((after[k] - before[k]).abs().max()) for k in before)
        (record,) = read_metrics(folder / "metrics.jsonl")
        norms[limit] = record["grad_norm"]
    assert norms[0.0] == norms[1e-12] > 0.01
    assert moved[0.0] > 5e-3
    assert moved[1e-12] < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "s99x"}, "`name` must be one of"),
        ({"min_length": 2}, "min_length"),
        ({"device": "abacus"}, "`device` must be auto, cpu, cuda"),
        ({"device": "cuda:99"}, "`device` is 'cuda:99', but PyTorch sees"),
    ],
)
def test_settings_that_only_the_run_can_refuse(tiny, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny(**settings), tmp_path / "out")


def test_metrics_say_what_happened(tiny, tmp_path):
    train(tiny(), tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [3, 6, 9, 12]
    for record in records:
        assert record["loss"] > 0
        assert 0 <= record["accuracy"] <= record["token_accuracy"] <= 1
        assert record["tokens_per_second"] > 0
    assert records[-1]["lr"] < records[0]["lr"]


def test_training_reduces_the_loss(tiny, tmp_path):
    train(tiny(task="z2", steps=150, lr=1e-2, batch_size=16, d_model=16), tmp_path)
    losses = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 10


def test_few_supervised_tokens_give_the_loss_of_all_logits(tiny, tmp_path, monkeypatch):
    config = tiny(task="mqar-2-12", length=16, eval_length=16, steps=3, log_interval=1)
    train(config, tmp_path / "few")
    whole = []
    predict = loop._Run._predict

    def on_all(run, batch):
        run.task.num_supervised = None
        logits, labels = predict(run, batch)
        whole.append(labels.shape)
        return logits, labels

    monkeypatch.setattr(loop._Run, "_predict", on_all)
    train(config, tmp_path / "all")
    assert whole == [(4, 16)] * 3
    few, everything = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("few", "all"))
    for one, other in zip(few, everything, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["accuracy"] == other["accuracy"]


def test_replayed_steps_are_for_a_gpu(tiny, tmp_path):
    train(tiny(), tmp_path / "one")
    train(tiny(cuda_graphs=True), tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_recordable_optimizer_takes_the_steps_of_another(tiny):
    def steps(recordable):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = make_optimizer(model, tiny())
        for lr in (0.5, 0.25):
            if recordable:
                make_recordable(optimizer, torch.tensor(lr))  # the second time moments are there
                for group in optimizer.param_groups:
                    group["capturable"] = False  # which a CPU refuses
            else:
                for group in optimizer.param_groups:
                    group["lr"] = lr
            model(torch.ones(3)).square().sum().backward()
            optimizer.step()
        return ckpt.optimizer_tensors(model, optimizer), model.state_dict()

    for ours, plain in zip(steps(True), steps(False), strict=True):
        assert ours.keys() == plain.keys()
        for name, value in ours.items():
            assert value.dtype == plain[name].dtype
            assert torch.equal(value, plain[name]), name


def test_an_optimizer_is_as_made_while_it_is_saved(tiny):
    optimizer = make_optimizer(nn.Linear(3, 2), tiny())
    options = [dict(group, params=None) for group in optimizer.param_groups]
    rate = torch.tensor(0.5)
    make_recordable(optimizer, rate)
    with as_made(optimizer, lr=options[0]["lr"]):
        assert [dict(group, params=None) for group in optimizer.param_groups] == options
    assert all(group["lr"] is rate and group["capturable"] for group in optimizer.param_groups)
