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

# Dense bfloat16 products added up in float32, in 10¹² operations per second as their makers say, by
# words of the device's name; the first that fits counts.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


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

    def peak_flops(self, peak_tflops: float | None = None) -> float | None:
        """Return what all devices together could do per second, or `None` if it is not known.

        Args:
            peak_tflops: what one could do, in 10¹² operations; `None` for what is known of it in
                bfloat16.
        """
        if peak_tflops is None and self.device.type == "cuda":
            peak_tflops = known_peak_tflops(torch.cuda.get_device_name(self.device))
        return None if peak_tflops is None else 1e12 * peak_tflops * self.world_size

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


def known_peak_tflops(name: str) -> float | None:
    """Return what a device of that name could do in bfloat16, in 10¹² operations per second.

    Examples:
        >>> known_peak_tflops("NVIDIA A100-SXM4-80GB"), known_peak_tflops("NVIDIA A10")
        (312.0, 125.0)
    """
    words = name.replace("-", " ").split()
    for named, peak in PEAK_TFLOPS:
        if set(named.split()) <= set(words):
            return peak
    return None


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
