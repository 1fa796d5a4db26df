"""One process or several: what a run must know of the others, on PyTorch's own FSDP2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from householder.models import CausalLM
from householder.train.build import resolve_device

# Dense bfloat16 operations per second, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: which this one is, from 0.
        world_size: how many there are; 1 without `torchrun`.
        device: this one's.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.world_size > 1

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    @property
    def peak_flops(self) -> float | None:
        """What all devices together could do in bfloat16 per second, where that is known."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
        return None if peak is None else peak * self.world_size

    def shard(self, model: CausalLM) -> None:
        """Divide the parameters, block by block, among the processes."""
        if not self.several:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for layer in model.layers:
            fully_shard(layer)
            register_fsdp_forward_method(layer, "step")
            register_fsdp_forward_method(layer, "step_")
        fully_shard(model)
        # Whatever is called from outside must gather the parameters first, as forward does.
        for name in ("loss", "hidden", "logits", "step", "step_"):
            register_fsdp_forward_method(model, name)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of a scalar over the processes."""
        if self.several:
            x = x.clone()
            dist.all_reduce(x)
            x /= self.world_size
        return x

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process. All must ask."""
        if not self.several:
            return flag
        counted = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(counted)
        return bool(counted > 0)

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.several:
            dist.barrier()


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: "auto", "cpu", "cuda", …; with several processes on GPUs each takes its own.

    Raises:
        ConfigError: there is no such device here.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes(0, 1, resolve_device(device))
        return
    local = resolve_device(device)
    if local.type == "cuda":
        local = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if local.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()
