"""Train a causal language model on text: one model, one corpus, one folder.

<out>/config.toml       the settings
<out>/corpus/           the text as tokens
<out>/metrics.jsonl     one line per `log_interval` steps and per evaluation
<out>/checkpoints/      to continue from
<out>/model/            the trained model, for `load_causal_lm` and `householder generate`
<out>/results.json      perplexity by context length, cost, settings

A run is determined by its settings and its text: the windows of step i are a function of (seed, i),
the first weights of the seed. A run that was killed and resumed gives the weights of one that was
not.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from householder.models import CausalLM
from householder.storage import write_atomically
from householder.train import checkpoint as ckpt
from householder.train.capture import CapturedSteps
from householder.train.errors import CheckpointError, ConfigError, Interrupted
from householder.train.evaluation import not_compiled
from householder.train.interrupt import StopRequest
from householder.train.loop import Stopwatch, global_state
from householder.train.metrics import MetricsWriter, NoMetrics
from householder.train.optim import as_made, learning_rate, make_optimizer
from householder.train.step_state import StepState
from householder.train.tasks import Batch
from householder.train.text import checkpoint as text_ckpt
from householder.train.text.batches import TextBatch, Windows
from householder.train.text.config import TextConfig
from householder.train.text.corpus import Corpus, open_corpus
from householder.train.text.evaluation import Perplexity, evaluate_text
from householder.train.text.export import write_model
from householder.train.text.generation import sample_tokens
from householder.train.text.observer import TextObserver
from householder.train.text.processes import Processes
from householder.train.text.tokenizer import Tokenizer, make_tokenizer
from householder.train.text.trackers import Trackers

Loss: TypeAlias = Callable[..., Tensor]
"""`CausalLM.loss`, compiled or not."""


@dataclass(frozen=True)
class TextResult:
    """What a finished run leaves.

    Attributes:
        config: the run's settings.
        model: the trained model; in a run of several processes its parts.
        perplexities: on held-out text, by context length.
        steps: optimizer steps done.
        seconds: time spent training, over all resumes, without evaluations.
    """

    config: TextConfig
    model: CausalLM
    perplexities: list[Perplexity]
    steps: int
    seconds: float


def train_text(
    config: TextConfig,
    folder: Path,
    processes: Processes,
    *,
    resume: bool = False,
    observer: TextObserver | None = None,
    stop: StopRequest | None = None,
    corpus: Path | None = None,
) -> TextResult:
    """Train a model on a corpus, evaluate it and write it out.

    Args:
        config: all settings of the run.
        folder: of the run, the same for all processes.
        processes: of the run, from `join_processes`.
        resume: continue from the newest checkpoint, or from the start when there is none.
        observer: told of every step; used in the first process alone.
        stop: looked at after every step and in evaluations; when a signal has come to any process,
            the run is saved and stopped.
        corpus: folder of the tokens; `None` for `folder/corpus`.

    Returns:
        The trained model and its evaluation.

    Raises:
        ConfigError: the corpus or the model cannot be had with these settings.
        CheckpointError: the checkpoint is damaged or does not fit the settings.
        NonFiniteError: the loss or the gradient is not finite; the last good checkpoint remains.
        Interrupted: a signal came; a checkpoint was written first.
        OutputError: the disk is full; the last checkpoint remains.
        OSError: the folder cannot be written.
    """
    observer = observer if observer is not None and processes.first else TextObserver()
    threads = config.threads or torch.get_num_threads()
    with global_state(config.seed, processes.device, threads):
        tokens = corpus or folder / "corpus"
        run = _Run.prepare(config, folder, tokens, processes, observer, stop or StopRequest())
        if resume:
            run.restore()
        observer.started(config, run.step, run.num_parameters, len(run.corpus.train))
        trackers = Trackers(config, folder, after_step=run.step, enabled=processes.first)
        path = folder / "metrics.jsonl"
        writer = MetricsWriter(path, after_step=run.step) if processes.first else NoMetrics()
        try:
            with writer as metrics:
                run.train(metrics, trackers)
        finally:
            trackers.close()
        return run.finish()


class _Step(NamedTuple):
    """What an optimizer step leaves on the device: the loss before it and the gradient's norm."""

    loss: Tensor
    grad_norm: Tensor


@dataclass
class _Run:
    """The moving parts of a run, and how far it has come."""

    config: TextConfig
    folder: Path
    processes: Processes
    observer: TextObserver
    stop: StopRequest
    tokenizer: Tokenizer
    corpus: Corpus
    windows: Windows
    model: CausalLM
    optimizer: torch.optim.AdamW
    num_parameters: int
    flops_per_token: float
    state: StepState
    step: int = 0
    seconds: float = 0.0
    # A signal came before the evaluation that is due at this step was done.
    unevaluated: bool = False
    watch: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def prepare(
        cls,
        config: TextConfig,
        folder: Path,
        tokens: Path,
        processes: Processes,
        observer: TextObserver,
        stop: StopRequest,
    ) -> _Run:
        if config.batch_size % (config.accumulate * processes.world_size):
            raise ConfigError(
                f"`batch_size` must be a multiple of accumulate={config.accumulate} times the "
                f"{processes.world_size} processes, got {config.batch_size}; every part of a step "
                "has as many windows"
            )
        if config.cuda_graphs and processes.several:
            raise ConfigError(
                "`cuda_graphs` must be left out with torchrun, got several processes; steps are "
                "recorded in one process alone"
            )
        tokenizer = make_tokenizer(config.tokenizer)
        corpus = open_corpus(tokens)
        if corpus.summary["tokenizer"] != tokenizer.identity:
            raise ConfigError(
                f"`tokenizer` must be the one that {tokens} was made with, "
                f"{config.tokenizer} is another; delete that folder to have it made again"
            )
        separator = corpus.separator if config.separate_documents else None
        windows = Windows(corpus.train, config.context, config.seed, separator)
        model = config.make_model(tokenizer.vocab_size)
        model.to(processes.device).train()
        model.recompute = config.recompute
        model.checkpoint_activations = config.checkpoint_activations
        num_parameters, flops = model.num_parameters(), model.flops_per_token(config.context)
        if config.compile and not processes.several:
            model.compile_blocks(fullgraph=False)  # some read the bounds of packed documents
        processes.shard(model)
        optimizer = make_optimizer(model, config)
        state = StepState.of(optimizer, processes.device, replayed=config.cuda_graphs)
        return cls(
            config,
            folder,
            processes,
            observer,
            stop,
            tokenizer,
            corpus,
            windows,
            model,
            optimizer,
            num_parameters,
            3 * flops,
            state,
        )

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def separator(self) -> int | None:
        return self.corpus.separator if self.config.separate_documents else None

    def train(self, metrics: MetricsWriter, trackers: Trackers) -> None:
        """Step until the end, a signal, or a loss that is not finite."""
        config = self.config
        loss_of = self.model.loss
        if config.compile and self.processes.several:
            loss_of = torch.compile(loss_of)  # around what gathers the parameters
        take_step = self._make_step(loss_of)
        self.watch.start()
        if self.unevaluated:
            self._evaluate(metrics, trackers)
        while self.step < config.steps:
            self.state.set_learning_rate(learning_rate(config, self.step))
            loss, grad_norm = take_step()
            self.step += 1
            self.watch.tokens += config.batch_size * config.context
            self.observer.stepped(self.step)

            last = self.step == config.steps
            every = config.eval_interval
            # The first step too: whoever waits for slow ones wants to know how long they take.
            due_log = self.step == 1 or self.step % config.log_interval == 0 or last
            due_evaluation = every > 0 and self.step % every == 0 and not last
            due_save = self.step % config.checkpoint_interval == 0 or last
            stopping = self.processes.any(self.stop.signum is not None)
            if stopping or due_log or due_evaluation or due_save:
                self._raise_if_not_finite()
            if due_log:
                self._log(metrics, trackers, loss, grad_norm)
            if due_evaluation:
                self._evaluate(metrics, trackers)
            if due_save or stopping:
                self._save(metrics)
            if stopping:
                self._raise_stopped()

    def _make_step(self, loss_of: Loss) -> Callable[[], _Step]:
        """Return what takes the next optimizer step."""
        self.state.prepare(self.step)
        if not self.state.recorded:
            return lambda: self._update(loss_of, self._parts())

        def update(batch: Batch) -> _Step:
            return self._update(loss_of, [TextBatch(*batch, None)])

        def warm_up(batch: Batch) -> None:
            with self._autocast():
                loss = loss_of(*batch)
            loss.backward()
            self.optimizer.zero_grad()

        captured = CapturedSteps(update, warm_up, self.processes.device)

        def take_step() -> _Step:
            (part,) = self._parts()
            return captured(Batch(part.tokens, part.labels))

        return take_step

    def _update(self, loss_of: Loss, parts: Iterable[TextBatch]) -> _Step:
        """Take one optimizer step, without a word from the device."""
        config = self.config
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.processes.device)
        for batch in parts:
            with self._autocast():
                loss = loss_of(batch.tokens, batch.labels, cu_seqlens=batch.cu_seqlens)
            (loss / config.accumulate).backward()
            total += loss.detach() / config.accumulate
        # An infinite limit clips nothing and still gives the norm.
        limit = config.grad_clip or float("inf")
        norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        total = self.processes.mean(total)
        self.state.count(total, norm)
        return _Step(total, norm)

    def _parts(self) -> Iterable[TextBatch]:
        """Yield this process's part of each part of the step's windows."""
        config, processes = self.config, self.processes
        size = config.batch_size // config.accumulate
        for part in range(config.accumulate):
            yield self.windows.batch(
                self.step * config.accumulate + part,
                size,
                rank=processes.rank,
                world_size=processes.world_size,
            ).to(processes.device)

    def _autocast(self) -> torch.autocast:
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=enabled)

    def _log(
        self, metrics: MetricsWriter, trackers: Trackers, loss: Tensor, grad_norm: Tensor
    ) -> None:
        seconds, tokens = self.watch.lap()
        self.seconds += seconds
        record = {
            "step": self.step,
            "loss": loss.item(),
            "grad_norm": grad_norm.item(),
            "lr": learning_rate(self.config, self.step - 1),
            "tokens": self.step * self.config.batch_size * self.config.context,
            "tokens_per_second": tokens / seconds,
            "seconds": self.seconds,
        }
        if (peak := self.processes.peak_flops(self.config.peak_tflops)) is not None:
            record["mfu"] = tokens / seconds * self.flops_per_token / peak
        metrics.write(record)
        trackers.write(record)
        self.observer.logged(record)

    def _evaluate(self, metrics: MetricsWriter, trackers: Trackers) -> None:
        """Evaluate and draw a sample; at a signal, save and leave that to who resumes."""
        self.unevaluated = True
        try:
            self._evaluate_to_the_end(metrics, trackers)
        except Interrupted:
            self._save(metrics)
            raise
        self.unevaluated = False

    def _evaluate_to_the_end(self, metrics: MetricsWriter, trackers: Trackers) -> None:
        with self.watch.paused():
            results = self._perplexities((self.config.context,))
            for result in results:
                record = {
                    "step": self.step,
                    "validation_loss": result.loss,
                    "validation_perplexity": result.perplexity,
                }
                metrics.write(record)
                trackers.write(record)
                self.observer.logged(record)
            if self.config.sample_tokens:
                self.observer.sampled(self.step, self._sample())

    def _perplexities(self, contexts: tuple[int, ...]) -> list[Perplexity]:
        with self._autocast(), not_compiled():
            return evaluate_text(
                self.model,
                self.corpus.validation,
                contexts,
                max_tokens=self.config.eval_tokens,
                separator=self.separator,
                check=self._raise_if_stopping,
            )

    def _sample(self) -> str:
        """Return the prompt's likeliest-by-chance continuation; every process must ask."""
        prompt = [self.corpus.separator, *self.tokenizer.encode(self.config.prompt).tolist()]
        training = self.model.training
        self.model.eval()
        try:
            with self._autocast(), not_compiled():
                tokens = sample_tokens(
                    self.model,
                    prompt,
                    max_new_tokens=self.config.sample_tokens,
                    num_tokens=self.tokenizer.vocab_size,
                    temperature=0.8,
                    generator=torch.Generator().manual_seed(self.config.seed),
                )
                return self.config.prompt + self.tokenizer.decode(list(tokens))
        finally:
            self.model.train(training)

    def _save(self, metrics: MetricsWriter) -> None:
        with self.watch.paused():
            metrics.sync()
            state = {
                "config": self.config.to_dict(),
                "corpus": self.corpus.summary,
                "seconds": self.seconds,
                "unevaluated": self.unevaluated,
                "random": ckpt.random_state(self.processes.device),
                "torch": torch.__version__,
            }
            with as_made(self.optimizer, learning_rate(self.config, self.step - 1)):
                text_ckpt.save(
                    self.checkpoints,
                    self.step,
                    self.model,
                    self.optimizer,
                    state,
                    keep=self.config.keep_checkpoints,
                    processes=self.processes,
                )

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one.

        Raises:
            CheckpointError: it is damaged, or of other settings or another corpus.
        """
        path = ckpt.latest(self.checkpoints)
        if path is None:
            return
        state = text_ckpt.read_state(path)
        ckpt.check_settings(path, state["config"], self.config)
        if state["corpus"] != self.corpus.summary:
            raise CheckpointError(
                f"{path}: the checkpoint was trained on another corpus than is there now; train in "
                "another folder"
            )
        text_ckpt.restore(path, self.model, self.optimizer, self.processes)
        ckpt.restore_random_state(state["random"], self.processes.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.unevaluated = state.get("unevaluated", False)

    def finish(self) -> TextResult:
        """Write the model, evaluate it, and write the results."""
        write_model(self.model, self.config, self.folder / "model", self.processes)
        results = self._perplexities(self.config.lengths())
        if self.processes.first:
            summary = {
                "num_parameters": self.num_parameters,
                "steps": self.step,
                "tokens": self.step * self.config.batch_size * self.config.context,
                "seconds": round(self.seconds, 3),
                "perplexity": [
                    {**dataclasses.asdict(r), "perplexity": r.perplexity} for r in results
                ],
                "config": self.config.to_dict(),
            }
            write_atomically(self.folder / "results.json", json.dumps(summary, indent=1) + "\n")
        self.observer.finished(results)
        return TextResult(self.config, self.model, results, self.step, self.seconds)

    def _raise_if_not_finite(self) -> None:
        if bad_step := int(self.state.bad_step):
            raise ckpt.not_finite("text", bad_step, self.checkpoints)

    def _raise_if_stopping(self) -> None:
        if self.processes.any(self.stop.signum is not None):
            self._raise_stopped()

    def _raise_stopped(self) -> None:
        # The signal may have come to another process; then its number is not known here.
        signum = self.stop.signum or signal.SIGTERM
        name = self.stop.name if self.stop.signum else "a signal to another process"
        raise Interrupted(f"{name} at step {self.step}; saved; continue with --resume", signum)
