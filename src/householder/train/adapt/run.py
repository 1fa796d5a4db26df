"""The run of `householder adapt`: train an adapter, evaluate, save, merge.

<out>/config.toml       the settings
<out>/metrics.jsonl     loss and speed by step
<out>/checkpoints/      what a resumed run starts from
<out>/adapter/          the adapter
<out>/merged/           the base model with the adapter in its weights
<out>/results.json      evaluation, parameters, time

As in `householder train`, batch i is a function of (seed, i), so that a resumed run ends with the
bits of one that was never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from householder.adapters import orthogonality_penalty
from householder.storage import write_atomically
from householder.train import checkpoint as ckpt
from householder.train.adapt.base import Base, load_base, logits_of
from householder.train.adapt.config import AdaptConfig
from householder.train.adapt.data import AdaptBatch
from householder.train.adapt.methods import Method, freeze_statistics, make_method
from householder.train.build import resolve_device
from householder.train.data import derive_seed
from householder.train.errors import CheckpointError, Interrupted
from householder.train.interrupt import StopRequest
from householder.train.metrics import MetricsWriter
from householder.train.optim import learning_rate
from householder.train.output_folder import OutputFolder
from householder.train.settings import differences, field_types, read_toml

HEADER = "# Written by householder adapt: the settings of the run in this folder.\n"
OURS = ("metrics.jsonl", "checkpoints", "adapter", "merged", "results.json")


@dataclass(frozen=True)
class Score:
    """How a model does on the evaluation data.

    Attributes:
        loss: mean cross-entropy in nats.
        accuracy: part of labels predicted right.
    """

    loss: float
    accuracy: float


@dataclass(frozen=True)
class AdaptResult:
    """What a finished run leaves.

    Attributes:
        config: its settings.
        before: the base model's score, with its new classifier untrained.
        after: the adapted model's.
        num_parameters: numbers trained.
        base_parameters: numbers of the base model.
        seconds: time spent training, over all resumes.
        merge_error: largest relative difference of the merged model's logits on one batch, or None.
    """

    config: AdaptConfig
    before: Score
    after: Score
    num_parameters: int
    base_parameters: int
    seconds: float
    merge_error: float | None


class AdaptObserver:
    """Watch a run; the methods do nothing here and are overridden as needed."""

    def started(self, config: AdaptConfig, step: int, trained: int, total: int) -> None:
        """Note that training begins, with so many numbers trained of so many."""

    def stepped(self, step: int) -> None:
        """Note that so many steps are done."""

    def logged(self, record: dict[str, Any]) -> None:
        """Note a new line of the metrics."""

    def said(self, what: str) -> None:
        """Note what is being done beside training."""


def run_adapt(
    config: AdaptConfig,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observer: AdaptObserver | None = None,
    stop: StopRequest | None = None,
) -> AdaptResult:
    """Train an adapter, evaluate it, save it and merge it.

    Args:
        config: all settings.
        folder: where to write; made when missing.
        resume: continue from the newest checkpoint there.
        overwrite: delete what the folder holds from an earlier run.
        observer: told of every step.
        stop: looked at after every step; when a signal has come, the run is saved and stopped.

    Returns:
        The result, which `results.json` holds too.

    Raises:
        ConfigError: the settings do not fit the model or the data, or a package is missing.
        OutputError: the folder is occupied, cannot be written, or holds nothing to resume.
        CheckpointError: the checkpoint is damaged or of other settings.
        NonFiniteError: the loss is not finite; the last good checkpoint remains.
        Interrupted: a signal came; a checkpoint was written first.
    """
    device = resolve_device(config.device)
    observer, stop = observer or AdaptObserver(), stop or StopRequest()
    if not resume and not overwrite:
        _output(folder).require_free()  # sooner than a large model takes to load
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(config.seed, "model"))
        observer.said(f"loading {config.model}")
        # Before the folder is touched: most of what can be wrong is wrong here.
        base = load_base(config)
        total = sum(p.numel() for p in base.model.parameters())
        method = make_method(
            config.kind,
            base.model.to(device, getattr(torch, config.dtype)),
            rank=config.rank,
            targets=_words(config.targets),
            head=base.head,
        )
        if config.checkpointing:
            base.checkpointing(base.model)
        open_folder(config, folder, resume=resume, overwrite=overwrite)
        run = _Run(config, folder, device, base, method, observer, stop)
        before = run.start(resume)
        observer.started(config, run.step, method.num_parameters(), total)
        with MetricsWriter(folder / "metrics.jsonl", after_step=run.step) as metrics:
            run.train(metrics)
        observer.said("evaluating")
        after = run.evaluate()
        count = method.num_parameters()
        error = run.write(observer)
    result = AdaptResult(config, before, after, count, total, run.seconds, error)
    summary = dataclasses.asdict(result) | {"config": config.to_dict()}
    write_atomically(folder / "results.json", json.dumps(summary, indent=1) + "\n")
    return result


def _words(targets: str | None) -> list[str] | None:
    """Return names between commas, which may have spaces beside them."""
    return None if targets is None else [word.strip() for word in targets.split(",")]


def adapt_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that a folder holds.

    Raises:
        OutputError: it holds none.
        ConfigError: its config file is damaged.
    """
    return read_toml(_output(folder).require_config(), field_types(AdaptConfig))


def open_folder(config: AdaptConfig, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the output folder ready, or say why it cannot be.

    Raises:
        OutputError: it is occupied, cannot be written, or holds nothing to resume.
        CheckpointError: the run it holds is another.
    """
    output = _output(folder)

    def check_same() -> None:
        stored = AdaptConfig.from_settings(adapt_settings(folder))
        output.require_same(differences(stored, config))

    output.open(config.to_dict(), resume=resume, overwrite=overwrite, check_same=check_same)


def _output(folder: Path) -> OutputFolder:
    return OutputFolder(folder, HEADER, lambda path: path.name in OURS)


def make_optimizer(trainable: dict[str, nn.Parameter], config: AdaptConfig) -> torch.optim.AdamW:
    """Make AdamW, with weight decay on matrices but not on reflectors, whose length is free."""
    decayed = {n for n, p in trainable.items() if p.dim() >= 2 and not n.endswith("reflectors")}
    groups = [
        {
            "params": [p for n, p in trainable.items() if n in decayed],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for n, p in trainable.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, fused=True)


def mean_loss(model: nn.Module, batch: AdaptBatch) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of a batch, and the logits in float32."""
    logits = logits_of(model, batch.inputs).float()
    return F.cross_entropy(logits.flatten(0, -2), batch.labels.flatten()), logits


class _Run:
    """The moving parts of a run, and how far it has come."""

    def __init__(
        self,
        config: AdaptConfig,
        folder: Path,
        device: torch.device,
        base: Base,
        method: Method,
        observer: AdaptObserver,
        stop: StopRequest,
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.base, self.method, self.observer, self.stop = base, method, observer, stop
        self.dtype = getattr(torch, config.dtype)
        self.trainable = method.trainable()
        self.optimizer = make_optimizer(self.trainable, config)
        self.step, self.seconds = 0, 0.0
        self.before = Score(float("nan"), float("nan"))

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def start(self, resume: bool) -> Score:
        """Evaluate the untrained model, or go where the newest checkpoint was."""
        path = ckpt.latest(self.checkpoints) if resume else None
        if path is None:
            self.observer.said("evaluating the base model")
            self.before = self.evaluate()
            return self.before
        checkpoint = ckpt.load(path)
        for name in sorted(self.trainable.keys() | checkpoint.model.keys()):
            needed, given = self.trainable.get(name), checkpoint.model.get(name)
            if needed is None or given is None or needed.shape != given.shape:
                sizes = ("absent" if t is None else str(list(t.shape)) for t in (needed, given))
                raise CheckpointError(
                    "{}: does not fit the model: {} must be {}, is {}; start again with "
                    "--overwrite".format(path, name, *sizes)
                )
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(checkpoint.model[name])
        ckpt.restore_optimizer(self.method.model, self.optimizer, checkpoint.optimizer)
        ckpt.restore_random_state(checkpoint.state["random"], self.device)
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self.before = Score(**checkpoint.state["before"])
        return self.before

    def train(self, metrics: MetricsWriter) -> None:
        """Take the remaining steps."""
        config = self.config
        freeze_statistics(self.method.model)
        since, done = time.perf_counter(), 0
        while self.step < config.steps:
            loss, norm = self._update()
            self.step, done = self.step + 1, done + 1
            self.observer.stepped(self.step)
            finished, stopping = self.step == config.steps, self.stop.signum is not None
            if self.step % config.log_interval == 0 or finished or stopping:
                value = loss.item()
                self._check_finite(value, norm.item())
                lap = time.perf_counter() - since
                self.seconds += lap
                record = {
                    "step": self.step,
                    "loss": value,
                    "grad_norm": norm.item(),
                    "lr": learning_rate(config, self.step - 1),
                    "examples_per_second": done * config.batch_size / lap,
                    "seconds": self.seconds,
                }
                since, done = time.perf_counter(), 0
                metrics.write(record)
                self.observer.logged(record)
            if self.step % config.checkpoint_interval == 0 or finished or stopping:
                begun = time.perf_counter()
                metrics.sync()
                self._save()
                since += time.perf_counter() - begun
            if stopping:
                assert self.stop.signum is not None
                raise Interrupted(
                    f"adapt: {self.stop.name} at step {self.step}; saved; continue with --resume",
                    self.stop.signum,
                )

    def _update(self) -> tuple[Tensor, Tensor]:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        batch = self.base.data.batch(config.seed, self.step, config.batch_size)
        loss, _ = mean_loss(self.method.model, batch.to(self.device, self.dtype))
        total = loss
        if config.orthogonality:
            total = loss + config.orthogonality * orthogonality_penalty(self.method.model)
        self.optimizer.zero_grad()
        total.backward()
        limit = config.grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(list(self.trainable.values()), limit)
        self.optimizer.step()
        return loss.detach(), norm

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        raise ckpt.not_finite("adapt", self.step, self.checkpoints)

    def _save(self) -> None:
        state = {
            "seconds": self.seconds,
            "before": dataclasses.asdict(self.before),
            "random": ckpt.random_state(self.device),
            "torch": torch.__version__,
        }
        optimizer = ckpt.optimizer_tensors(self.method.model, self.optimizer)
        trained: dict[str, Tensor] = dict(self.trainable)
        ckpt.save(self.checkpoints, ckpt.Checkpoint(self.step, trained, optimizer, state))

    @torch.no_grad()
    def evaluate(self) -> Score:
        """Return the present score on the evaluation data."""
        self.method.model.eval()
        loss, right, count = 0.0, 0, 0
        for batch in self.base.data.evaluation(self.config.batch_size):
            batch = batch.to(self.device, self.dtype)
            mean, logits = mean_loss(self.method.model, batch)
            loss += mean.item() * batch.labels.numel()
            right += int((logits.argmax(-1) == batch.labels).sum())
            count += batch.labels.numel()
            if self.stop.signum is not None:
                raise Interrupted(
                    f"adapt: {self.stop.name} while evaluating; continue with --resume",
                    self.stop.signum,
                )
        return Score(loss / count, right / count)

    @torch.no_grad()
    def write(self, observer: AdaptObserver) -> float | None:
        """Save the adapter, and the merged model if asked; return how far merging moved it."""
        self.method.save(self.folder / "adapter")
        if not self.config.merge:
            return None
        observer.said("merging")
        self.method.model.eval()
        batch = next(self.base.data.evaluation(self.config.batch_size))
        inputs = batch.to(self.device, self.dtype).inputs
        apart = logits_of(self.method.model, inputs).float()
        merged = self.method.merged()
        change = logits_of(merged, inputs).float() - apart
        target = self.folder / "merged"
        shutil.rmtree(target, ignore_errors=True)
        temporary = target.with_name(".merged.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        self.base.save(merged, temporary)
        temporary.rename(target)
        return float(change.norm() / apart.norm())
