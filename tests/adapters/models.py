"""Small models to adapt."""

from __future__ import annotations

import torch
from torch import nn


class Dense(nn.Module):
    """Linear layers with and without bias, and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    @staticmethod
    def inputs():
        return torch.randn(5, 12, dtype=torch.float64)


class Convolutional(nn.Module):
    """A convolution with every option, and one that pads by itself."""

    def __init__(self):
        super().__init__()
        options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
        self.first = nn.Conv2d(4, 6, (3, 2), **options, padding_mode="circular")
        self.second = nn.Conv2d(6, 6, 3, padding="same", bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))

    @staticmethod
    def inputs():
        return torch.randn(2, 4, 9, 10, dtype=torch.float64)


class Mixed(nn.Module):
    """What peft's HRA can adapt: plain convolutions and linear layers, with a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(torch.relu(self.conv(x)).mean((2, 3)))))

    @staticmethod
    def inputs():
        return torch.randn(3, 4, 8, 8, dtype=torch.float64)


class Block(nn.Module):
    """The linear layers of a ViT's block, by timm's names; the attention itself does not matter."""

    def __init__(self, dim):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})


def vit_skeleton(dim, depth):
    """Return a ViT's linear layers without memory: on the device "meta"."""
    with torch.device("meta"):
        model = nn.Module()
        model.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
    return model
