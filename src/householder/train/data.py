"""Batches as a pure function of (seed, step): a resumed run sees what it would have seen."""

from __future__ import annotations

import hashlib
import math

import torch

from householder.train.config import TrainConfig
from householder.train.errors import ConfigError
from householder.train.tasks import Batch, Task, make_task


def derive_seed(seed: int, stream: str, index: int = 0) -> int:
    """Return a seed for one purpose, unrelated to those of other streams and indices.

    Args:
        seed: the run's seed.
        stream: the purpose, for example "batch".
        index: the step, epoch or length within the stream.

    Returns:
        An integer from 0 to 2³² − 1 (PyTorch's CPU generator uses no more bits).

    Examples:
        >>> derive_seed(0, "batch", 1) == derive_seed(0, "batch", 1) != derive_seed(0, "batch", 2)
        True
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def generator_for(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """Return a CPU generator seeded with `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, index))


def make_training_task(config: TrainConfig) -> Task:
    """Make the configured task.

    Raises:
        ConfigError: there is no such task, or it cannot make sequences of the configured lengths.
    """
    options = {} if config.min_length is None else {"min_length": config.min_length}
    try:
        task = make_task(config.task, **options)
        task.sample(1, config.length, torch.Generator().manual_seed(0))
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    if config.start_length is not None and task.metric != "prefix":
        raise ConfigError(
            f"`start_length` must be left out for {task.name}: a prefix of its sequences is no "
            "example of it; use `min_length`"
        )
    return task


def training_length(config: TrainConfig, step: int) -> int:
    """Return how many supervised tokens the sequences of a training step have.

    Args:
        config: `length`, `start_length`, `growth_steps`.
        step: counted from 0.

    Examples:
        >>> config = TrainConfig(length=32, start_length=4, growth_steps=3, steps=5)
        >>> [training_length(config, step) for step in range(5)]
        [4, 8, 16, 32, 32]
    """
    if config.start_length is None:
        return config.length
    assert config.growth_steps is not None
    grown = min(1.0, step / config.growth_steps)
    return round(config.start_length * (config.length / config.start_length) ** grown)


# Tokens that are drawn ahead for a GPU: 16 MiB of numbers with their labels.
AHEAD_TOKENS = 1 << 20


def steps_ahead(config: TrainConfig, device: torch.device) -> int:
    """Return for how many steps `FreshData` draws at once: one on a CPU."""
    if device.type == "cpu":
        return 1
    return max(1, min(64, AHEAD_TOKENS // (config.batch_size * config.length)))


class FreshData:
    """Draw a new batch for every step.

    A GPU gets the batches of many steps in one copy: a copy a step, each waiting for its own pinned
    memory, made a step of a small model four times as long on an H200.

    Args:
        task: what to draw.
        config: length, batch size and seed.
        device: where the batches go.
    """

    def __init__(self, task: Task, config: TrainConfig, device: torch.device) -> None:
        self._task, self._config, self._device = task, config, device
        self._ahead = steps_ahead(config, device)
        self._first, self._batches = -1, list[Batch]()

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        first = step - step % self._ahead
        if first != self._first:
            drawn = zip(*map(self._draw, range(first, first + self._ahead)), strict=True)
            tokens, labels = (torch.stack(x).to(self._device).unbind() for x in drawn)
            self._first, self._batches = first, list(map(Batch, tokens, labels))
        return self._batches[step - first]

    def _draw(self, step: int) -> Batch:
        generator = generator_for(self._config.seed, "batch", step)
        return self._task.sample(self._config.batch_size, self._config.length, generator)


class FixedData:
    """Draw `num_samples` sequences once and pass over them in a new order every epoch.

    The set lives on the device. The last batch of an epoch is smaller when the batch size does not
    divide the number of samples.

    Args:
        task: what to draw.
        config: number of samples, length, batch size and seed.
        device: where the set is kept.
    """

    def __init__(self, task: Task, config: TrainConfig, device: torch.device) -> None:
        assert config.num_samples is not None
        self._seed, self._size = config.seed, config.batch_size
        samples = task.sample(config.num_samples, config.length, generator_for(config.seed, "set"))
        self._samples = Batch(*(x.to(device) for x in samples))
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        num = len(self._samples.tokens)
        epoch, place = divmod(step, math.ceil(num / self._size))
        if epoch != self._epoch:
            order = torch.randperm(num, generator=generator_for(self._seed, "epoch", epoch))
            self._epoch, self._order = epoch, order.to(self._samples.tokens.device)
        rows = self._order[place * self._size : (place + 1) * self._size]
        return Batch(*(x[rows] for x in self._samples))


class GrowingPrefixes:
    """Cut batches to their first tokens, fewer in early steps: see `training_length`.

    Args:
        data: where the batches come from; every token after the leading BOS is supervised.
        config: `length`, `start_length`, `growth_steps`.
    """

    def __init__(self, data: FreshData | FixedData, config: TrainConfig) -> None:
        self._data, self._config = data, config

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        batch = self._data.batch(step)
        cut = self._config.length - training_length(self._config, step)
        return Batch(*(x[:, : x.shape[1] - cut] for x in batch))


def make_data(
    task: Task, config: TrainConfig, device: torch.device
) -> FreshData | FixedData | GrowingPrefixes:
    """Return the source of training batches that the settings ask for."""
    data = (FixedData if config.num_samples else FreshData)(task, config, device)
    return data if config.start_length is None else GrowingPrefixes(data, config)
