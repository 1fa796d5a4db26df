"""Compress the layers of a trained network, and train on without leaving the low rank.

    python examples/low_rank_layers.py

A network learns a function of 16 variables; its two wide layers are replaced by the nearest ones of
lower and lower rank, which costs accuracy; a few steps of training, on singular values and
reflectors, win it back. Weight decay acts on the singular values alone. Twenty seconds on one
core.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from householder.nn import SVDLinear

FEATURES, WIDTH = 16, 256


def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw inputs `[count, 16]` and what is to be learnt of them, `[count, 1]`."""
    x = torch.randn(count, FEATURES, generator=generator)
    return x, torch.sin(2 * x[:, :1]) * x[:, 1:2] + x[:, 2:3] * x[:, 3:4]


def train(network: nn.Module, steps: int, lr: float, generator: torch.Generator) -> None:
    """Minimise the squared error; decay weights of linear layers, and singular values."""
    decayed = [p for name, p in network.named_parameters() if name.endswith((".weight", ".s"))]
    others = [p for p in network.parameters() if all(p is not q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": 1e-2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    for _ in range(steps):
        x, y = sample(512, generator)
        optimizer.zero_grad()
        F.mse_loss(network(x), y).backward()
        optimizer.step()


@torch.no_grad()
def error(network: nn.Module) -> float:
    """Return the mean squared error on fresh points, relative to that of predicting the mean."""
    x, y = sample(8192, torch.Generator().manual_seed(1))
    return float(F.mse_loss(network(x), y) / y.var())


def compress(network: nn.Sequential, rank: int) -> nn.Sequential:
    """Return a copy whose wide layers are the nearest ones of a rank."""
    layers = [
        SVDLinear.from_linear(layer, rank=rank)
        if isinstance(layer, nn.Linear) and layer.out_features == WIDTH == layer.in_features
        else copy.deepcopy(layer)
        for layer in network
    ]
    return nn.Sequential(*layers)


def main(steps: int, ranks: tuple[int, ...] = (32, 8, 4)) -> dict[int, tuple[float, float]]:
    """Train, compress to each rank and train on; return and print the errors before and after."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    wide = [nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()]
    network = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.GELU(), *wide, nn.Linear(WIDTH, 1))
    train(network, steps, 1e-3, generator)
    print(f"full rank: error {error(network):.4f}", flush=True)
    results = {}
    for rank in ranks:
        small = compress(network, rank)
        before = error(small)
        train(small, steps // 4, 1e-3, generator)
        results[rank] = (before, error(small))
        print(f"rank {rank:3}: error {before:.4f}, trained on {results[rank][1]:.4f}", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=800)
    main(parser.parse_args().steps)
