"""What an optimizer step reads and writes on the device beside the model and its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from householder.train.optim import make_recordable


@dataclass(frozen=True)
class StepState:
    """Learning rate and count of the steps, and the first one that went wrong.

    Attributes:
        optimizer: what takes the steps.
        done: how many were taken, int64.
        bad_step: the first whose loss or gradient was not finite, 0 while there is none, int64. It
            is read only when something is due, because reading waits for the device to catch up.
        lr: the learning rate where steps are recorded and replayed, float32; `None` where they are
            not: then it is a number in the optimizer.
    """

    optimizer: torch.optim.AdamW
    done: Tensor
    bad_step: Tensor
    lr: Tensor | None

    @classmethod
    def of(cls, optimizer: torch.optim.AdamW, device: torch.device, *, replayed: bool) -> StepState:
        """Return the state before the first step.

        Args:
            optimizer: what takes the steps.
            device: of the model.
            replayed: steps shall be recorded in a CUDA graph where the device is a GPU.
        """
        done, bad_step = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        lr = torch.zeros((), device=device) if replayed and device.type == "cuda" else None
        return cls(optimizer, done, bad_step, lr)

    @property
    def recorded(self) -> bool:
        """Whether steps are recorded and replayed."""
        return self.lr is not None

    def prepare(self, step: int) -> None:
        """Make ready for training from a step on; the optimizer has its moments if there are any.

        Args:
            step: how many are done.
        """
        self.done.fill_(step)
        if self.lr is not None:
            make_recordable(self.optimizer, self.lr)

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        if self.lr is not None:
            self.lr.fill_(lr)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def count(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Count a step that was taken; part of what is recorded.

        Args:
            loss: of the step, a scalar on the device.
            grad_norm: likewise.
        """
        self.done.add_(1)
        first = (self.bad_step == 0) & ~(loss.isfinite() & grad_norm.isfinite())
        self.bad_step.copy_(torch.where(first, self.done, self.bad_step))
