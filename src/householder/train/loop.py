"""The training loop: one model, one task, one folder.

A run is determined by its settings: batch i is a function of (seed, i), the first weights of the
seed, and the rest is arithmetic. Hence the same settings give the same weights bit for bit on the
same machine, and so does a run that was killed at any moment and resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from householder.models import SequenceTagger
from householder.train import checkpoint as ckpt
from householder.train.build import build_model, cpu_threads, resolve_device
from householder.train.capture import CapturedSteps
from householder.train.config import TrainConfig
from householder.train.data import (
    FixedData,
    FreshData,
    GrowingPrefixes,
    derive_seed,
    make_data,
    make_training_task,
    training_length,
)
from householder.train.errors import Interrupted
from householder.train.evaluation import Evaluation, accuracy, autocast, evaluate
from householder.train.interrupt import StopRequest
from householder.train.metrics import MetricsWriter
from householder.train.observer import Observer
from householder.train.optim import learning_rate, make_optimizer
from householder.train.step_state import StepState
from householder.train.tasks import IGNORE_INDEX, Batch, Task
from householder.train.tasks.metrics import token_accuracy


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        config: the run's settings.
        model: the trained model.
        evaluation: accuracy by length on held-out sequences.
        steps: optimizer steps done; fewer than asked when it stopped early because it was solved.
        num_parameters: how many numbers were trained.
        seconds: time spent training, over all resumes, without evaluations.
    """

    config: TrainConfig
    model: nn.Module
    evaluation: Evaluation
    steps: int
    num_parameters: int
    seconds: float


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    stop: StopRequest | None = None,
) -> TrainResult:
    """Train one model, then evaluate it.

    The folder receives `metrics.jsonl` and `checkpoints/`. PyTorch's global generators and number
    of threads are set for the time of the run and put back afterwards.

    Args:
        config: all settings of the run.
        folder: where to write; made when missing.
        resume: continue from the newest checkpoint in the folder, or from the start when the run
            was killed before the first one.
        observer: told of every step; shows progress.
        stop: looked at after every step; when a signal has come, the run is saved and stopped.

    Returns:
        The trained model and its evaluation.

    Raises:
        ConfigError: the task or the model cannot be made with these settings.
        CheckpointError: the checkpoint is damaged or does not fit the settings.
        NonFiniteError: the loss or the gradient is not finite; the last good checkpoint remains.
        Interrupted: a signal came; a checkpoint was written first.
        OSError: the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> config = TrainConfig(task="z2", length=4, d_model=8, num_heads=2, steps=2, batch_size=4)
        >>> result = train(config, Path(tempfile.mkdtemp()))
        >>> result.steps, len(result.evaluation.accuracy)
        (2, 16)
    """
    device = resolve_device(config.device)
    observer, stop = observer or Observer(), stop or StopRequest()
    with global_state(config.seed, device, cpu_threads(config)):
        run = _Run.prepare(config, folder, device, observer, stop)
        if resume:
            run.restore()
        observer.started(config, run.step, run.num_parameters)
        with MetricsWriter(folder / "metrics.jsonl", after_step=run.step) as metrics:
            run.train(metrics)
        observer.evaluating(config)
        evaluation = evaluate(run.model, config, device, check=run.raise_if_stopped)
    observer.finished(config, evaluation)
    return TrainResult(config, run.model, evaluation, run.step, run.num_parameters, run.seconds)


@contextmanager
def global_state(seed: int, device: torch.device, threads: int) -> Iterator[None]:
    """Seed the global generators and set the number of CPU threads; put both back at the end.

    Args:
        seed: the run's.
        device: whose generator is seeded beside the CPU's.
        threads: how many.
    """
    threads_before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "model"))
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)


class Stopwatch:
    """Measure the time of training without that of evaluations and checkpoints."""

    def __init__(self) -> None:
        self.tokens = 0
        self._since = 0.0

    def start(self) -> None:
        """Begin the first lap."""
        self.tokens, self._since = 0, time.perf_counter()

    def lap(self) -> tuple[float, int]:
        """Return the seconds and tokens since the last lap, and start the next."""
        lap = time.perf_counter() - self._since, self.tokens
        self.start()
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begun


class _Step(NamedTuple):
    """What an optimizer step leaves on the device.

    Attributes:
        loss: of the batch, before the step.
        grad_norm: of all gradients, before they were clipped.
        logits: `[B, L, num_classes]`, of the supervised tokens.
        labels: int64 `[B, L]`.
    """

    loss: Tensor
    grad_norm: Tensor
    logits: Tensor
    labels: Tensor


@dataclass
class _Run:
    """The moving parts of a run, and how far it has come."""

    config: TrainConfig
    folder: Path
    device: torch.device
    observer: Observer
    stop: StopRequest
    task: Task
    model: SequenceTagger
    optimizer: torch.optim.AdamW
    data: FreshData | FixedData | GrowingPrefixes
    state: StepState
    step: int = 0
    solved_in_a_row: int = 0
    seconds: float = 0.0
    watch: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def prepare(
        cls,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
        observer: Observer,
        stop: StopRequest,
    ) -> _Run:
        task = make_training_task(config)
        model = build_model(config, task).to(device)
        if config.compile:
            model.compile_blocks(dynamic=False)
        optimizer = make_optimizer(model, config)
        data = make_data(task, config, device)
        folder.mkdir(parents=True, exist_ok=True)
        state = StepState.of(optimizer, device, replayed=config.cuda_graphs)
        return cls(config, folder, device, observer, stop, task, model, optimizer, data, state)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def finished(self) -> bool:
        assert self.config.steps is not None
        enough = self.config.stop_when_solved
        return self.step >= self.config.steps or 0 < enough <= self.solved_in_a_row

    def train(self, metrics: MetricsWriter) -> None:
        """Step until the end, a signal, or a loss that is not finite."""
        config = self.config
        self.model.train()
        take_step = self._make_step()
        self.watch.start()
        while not self.finished:
            batch = self.data.batch(self.step)
            self.state.set_learning_rate(learning_rate(config, self.step))
            result = take_step(batch)
            self.step += 1
            self.watch.tokens += batch.tokens.numel()
            self.observer.stepped(config, self.step)

            due = {
                "log": self.step % config.log_interval == 0 or self.step == config.steps,
                "evaluate": config.eval_interval > 0 and self.step % config.eval_interval == 0,
                "save": self.step % config.checkpoint_interval == 0 or self.step == config.steps,
            }
            stopping = self.stop.signum is not None
            if stopping or any(due.values()) or self.device.type == "cpu":
                self._raise_if_not_finite()
            if due["log"]:
                self._log(metrics, result)
            if due["evaluate"]:
                self._evaluate(metrics)
            if due["save"] or stopping or self.finished:
                self._save(metrics)
            self.raise_if_stopped()

    def _make_step(self) -> Callable[[Batch], _Step]:
        """Return what takes an optimizer step on a batch."""
        self.state.prepare(self.step)
        if not self.state.recorded:
            return self._update
        return CapturedSteps(self._update, self._warm_up, self.device)

    def _update(self, batch: Batch) -> _Step:
        """Take one optimizer step, without a word from the device."""
        self.optimizer.zero_grad()
        loss, logits, labels = self._loss(batch)
        loss.backward()
        # An infinite limit clips nothing and still gives the norm.
        limit = self.config.grad_clip or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.state.count(loss, grad_norm)
        return _Step(loss.detach(), grad_norm, logits.detach(), labels)

    def _warm_up(self, batch: Batch) -> None:
        """Run forward and backward for nothing."""
        loss, _, _ = self._loss(batch)
        loss.backward()
        self.optimizer.zero_grad()

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, and the logits and labels it is of."""
        with autocast(self.config, self.device):
            logits, labels = self._predict(batch)
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX
        )
        return loss, logits, labels

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits and labels, of the supervised tokens alone where they are few."""
        count = self.task.num_supervised
        if count is None:
            return self.model(batch.tokens), batch.labels
        # As many in each row, so that nothing waits for the device to count them.
        supervised = (batch.labels != IGNORE_INDEX).byte()
        places = supervised.topk(count, dim=1, sorted=False).indices
        hidden = self.model.hidden(batch.tokens).take_along_dim(places[..., None], dim=1)
        return self.model.logits(hidden), batch.labels.gather(1, places)

    def _log(self, metrics: MetricsWriter, result: _Step) -> None:
        seconds, tokens = self.watch.lap()
        self.seconds += seconds
        predictions = result.logits.argmax(dim=-1)
        record = {
            "step": self.step,
            "length": training_length(self.config, self.step - 1),
            "loss": result.loss.item(),
            "accuracy": accuracy(self.task, predictions, result.labels),
            "token_accuracy": token_accuracy(predictions, result.labels),
            "grad_norm": result.grad_norm.item(),
            "lr": learning_rate(self.config, self.step - 1),
            "tokens_per_second": tokens / seconds,
            "seconds": self.seconds,
        }
        metrics.write(record)
        self.observer.logged(self.config, record)

    def _evaluate(self, metrics: MetricsWriter) -> None:
        with self.watch.paused():
            config = self.config
            evaluation = evaluate(self.model, config, self.device)
            solved = evaluation.at(config.length) >= config.solved_accuracy
            self.solved_in_a_row = self.solved_in_a_row + 1 if solved else 0
            record = {
                "step": self.step,
                "held_out_accuracy": evaluation.at(config.length),
                "extrapolated_accuracy": evaluation.accuracy[-1],
            }
            metrics.write(record)
            self.observer.logged(config, record)

    def _save(self, metrics: MetricsWriter) -> None:
        with self.watch.paused():
            metrics.sync()
            state = {
                "config": self.config.to_dict(),
                "solved_in_a_row": self.solved_in_a_row,
                "seconds": self.seconds,
                "random": ckpt.random_state(self.device),
                "torch": torch.__version__,
            }
            content = ckpt.Checkpoint(
                self.step,
                self.model.state_dict(),
                ckpt.optimizer_tensors(self.model, self.optimizer),
                state,
            )
            ckpt.save(self.checkpoints, content, keep=self.config.keep_checkpoints)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one.

        Raises:
            CheckpointError: it is damaged or of other settings.
        """
        path = ckpt.latest(self.checkpoints)
        if path is None:
            return
        checkpoint = ckpt.load(path)
        state = checkpoint.state
        ckpt.check_settings(path, state["config"], self.config)
        ckpt.restore_model(self.model, checkpoint.model)
        ckpt.restore_optimizer(self.model, self.optimizer, checkpoint.optimizer)
        ckpt.restore_random_state(state["random"], self.device)
        self.step = checkpoint.step
        self.solved_in_a_row, self.seconds = state["solved_in_a_row"], state["seconds"]

    def _raise_if_not_finite(self) -> None:
        if bad_step := int(self.state.bad_step):
            raise ckpt.not_finite(self.config.name, bad_step, self.checkpoints)

    def raise_if_stopped(self) -> None:
        """Raise `Interrupted` when a signal has come; by then the run is saved."""
        if self.stop.signum is not None:
            raise Interrupted(
                f"{self.config.name}: {self.stop.name} at step {self.step}; saved; "
                "continue with --resume",
                self.stop.signum,
            )
