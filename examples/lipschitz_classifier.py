"""A classifier that no small change of its input can fool, and can prove it.

    python examples/lipschitz_classifier.py

Every layer is 1-Lipschitz: orthonormal weights, and activations that keep the lengths of gradients.
If the two outputs differ by m at a point, no point within m / √2 of it is classified otherwise.
With ReLU that holds as well, but it loses gradient at each layer, and with it slope and margin. A
quarter of a minute on one core.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from householder.nn import HouseholderActivation, MaxMin, StiefelLinear

ACTIVATIONS = {
    "ReLU": lambda width: nn.ReLU(),
    "MaxMin": lambda width: MaxMin(),
    "Householder": lambda width: HouseholderActivation(width),
}


def spirals(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw points `[count, 2]` on two spiral arms, and which arm each is on."""
    arm = torch.randint(0, 2, (count,), generator=generator)
    turn = 0.5 + 3.5 * torch.rand(count, generator=generator)
    angle = turn + math.pi * arm
    points = (0.5 * turn)[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return points + 0.03 * torch.randn(count, 2, generator=generator), arm


def make_network(activation: str, width: int, depth: int) -> nn.Sequential:
    """Make a 1-Lipschitz network from points to two outputs."""
    layers: list[nn.Module] = []
    sizes = [2, *[width] * depth]
    for n, m in pairwise(sizes):
        layers += [StiefelLinear(n, m), ACTIVATIONS[activation](m)]
    return nn.Sequential(*layers, StiefelLinear(width, 2))


def train(network: nn.Module, steps: int, generator: torch.Generator) -> None:
    """Minimise the cross-entropy of outputs scaled up, which rewards a margin of about 1/10."""
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps)
    for _ in range(steps):
        points, arm = spirals(256, generator)
        optimizer.zero_grad()
        F.cross_entropy(20 * network(points), arm).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(network: nn.Module, radius: float, generator: torch.Generator) -> dict[str, float]:
    """Return the accuracy, the certified accuracy at a radius, and the steepest slope seen."""
    points, arm = spirals(4096, generator)
    outputs = network(points)
    margin = outputs.gather(1, arm[:, None])[:, 0] - outputs.gather(1, 1 - arm[:, None])[:, 0]
    # The slope between each point and a near one: never above 1.
    step = 0.01 * torch.randn(points.shape, generator=generator)
    slope = (network(points + step) - outputs).norm(dim=-1) / step.norm(dim=-1)
    return {
        "accuracy": float((margin > 0).float().mean()),
        "certified": float((margin > math.sqrt(2) * radius).float().mean()),
        "slope": float(slope.max()),
    }


def main(steps: int, width: int = 32, depth: int = 4, radius: float = 0.3) -> dict[str, dict]:
    """Train one network for each activation; return and print what `evaluate` finds."""
    results = {}
    for activation in ACTIVATIONS:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        network = make_network(activation, width, depth)
        train(network, steps, generator)
        results[activation] = evaluate(network, radius, generator)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in results[activation].items())
        print(f"{activation:12} {shown}", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
