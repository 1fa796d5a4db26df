"""Optimizer steps as CUDA graphs: what a small model's GPU waits for is the host.

A step of a model of two layers is some three hundred kernels, most of them shorter than their
launch. Recorded once and replayed, they cost the host one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from householder.train.tasks import Batch

# Graphs that are kept: one for the batches of an epoch and one for its last, which may be smaller.
# The lengths of prefixes that grow come and do not come back.
KEPT_GRAPHS = 2
WARM_UPS = 2


Result = TypeVar("Result", bound=tuple[Tensor, ...])


@dataclass(frozen=True)
class _Recorded(Generic[Result]):
    graph: torch.cuda.CUDAGraph
    batch: Batch
    result: Result


class CapturedSteps(Generic[Result]):
    """Take optimizer steps by replaying CUDA graphs, one per shape of batch.

    What a step reads beside its batch (weights, the optimizer's state, learning rate) must be
    tensors that exist before and are changed in place; a number of the host would stay as it was
    when the graph was recorded. Every step is a replay, the first of a shape too, so that a resumed
    run repeats what an uninterrupted one does.

    Args:
        update: takes one optimizer step on a batch.
        warm_up: runs on a batch what compiles, chooses algorithms or allocates when it is first
            run, and changes nothing that a step reads.
        device: a GPU.
    """

    def __init__(
        self,
        update: Callable[[Batch], Result],
        warm_up: Callable[[Batch], None],
        device: torch.device,
    ) -> None:
        self._update, self._warm_up = update, warm_up
        self._recorded: dict[torch.Size, _Recorded[Result]] = {}
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Result:
        """Take a step.

        Args:
            batch: on the GPU.

        Returns:
            Tensors that the next step overwrites.
        """
        shape = batch.tokens.shape
        if shape not in self._recorded:
            while len(self._recorded) >= KEPT_GRAPHS:
                del self._recorded[next(iter(self._recorded))]
            self._recorded[shape] = self._record(Batch(*(x.clone() for x in batch)))
        recorded = self._recorded[shape]
        for read, given in zip(recorded.batch, batch, strict=True):
            read.copy_(given)
        recorded.graph.replay()
        return recorded.result

    def _record(self, batch: Batch) -> _Recorded[Result]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._stream.device):
            current = torch.cuda.current_stream()
            # On the stream that records, where autograd then finds its nodes.
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    self._warm_up(batch)
            current.wait_stream(self._stream)
            with torch.cuda.graph(graph, stream=self._stream):
                result = self._update(batch)
        return _Recorded(graph, batch, result)
