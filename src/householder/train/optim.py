"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class OptimizerSettings(Protocol):
    """What an optimizer depends on."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...


def make_optimizer(model: nn.Module, config: OptimizerSettings) -> torch.optim.AdamW:
    """Make AdamW, with weight decay on matrices only.

    Biases, gains and the gates' parameters have one dimension and are not decayed; neither is a
    parameter that carries the attribute `_no_weight_decay = True`.

    Args:
        model: the module to train.
        config: `lr`, `weight_decay`, `beta1`, `beta2`.

    Returns:
        The optimizer. Its update is one fused pass over the parameters, on the CPU too.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2 and not getattr(p, "_no_weight_decay", False)]
    chosen = set(decayed)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p not in chosen], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def make_recordable(optimizer: torch.optim.AdamW, lr: Tensor) -> None:
    """Make an optimizer ready for steps that a CUDA graph records.

    Such a step reads on the device what differs from one to the next, and allocates nothing: its
    moments are made here where there are none yet.

    Args:
        optimizer: of parameters on one GPU.
        lr: the learning rate, float32 there; what is written to it is that of the next step.
    """
    for group in optimizer.param_groups:
        group.update(lr=lr, capturable=True)
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@contextmanager
def as_made(optimizer: torch.optim.AdamW, lr: float) -> Iterator[None]:
    """Give an optimizer's groups the options they had before `make_recordable`, for a while.

    Args:
        optimizer: made recordable or not.
        lr: the learning rate as a number.
    """
    before = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(lr=lr, capturable=False)
    try:
        yield
    finally:
        for group, (rate, capturable) in zip(optimizer.param_groups, before, strict=True):
            group.update(lr=rate, capturable=capturable)


class Schedule(Protocol):
    """What a learning rate by step depends on."""

    @property
    def lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup(self) -> int | None: ...
    @property
    def steps(self) -> int | None: ...


@runtime_checkable
class StableThenDecay(Schedule, Protocol):
    """What the schedule "wsd" needs besides."""

    @property
    def decay(self) -> float: ...


def learning_rate(config: Schedule, step: int) -> float:
    """Return the learning rate of a step.

    It rises linearly over the first `warmup` steps, lr · (step + 1) / warmup; then it stays, or
    falls along half a cosine from `lr` to `min_lr`, or ("wsd": warmup, stable, decay) stays and
    falls linearly to `min_lr` over the last `decay` · `steps`. It would reach `min_lr` one step
    after the last.

    Args:
        config: `lr`, `min_lr`, `schedule`, `warmup`, `steps`, and `decay` for "wsd".
        step: counted from 0.

    Examples:
        >>> from householder.train import TrainConfig
        >>> config = TrainConfig(lr=1.0, warmup=2, steps=6, schedule="cosine")
        >>> [round(learning_rate(config, step), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    assert config.steps is not None
    assert config.warmup is not None
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        assert isinstance(config, StableThenDecay)
        left = (config.steps - step) / max(1.0, config.decay * config.steps)
        return config.min_lr + (config.lr - config.min_lr) * min(1.0, left)
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2
