"""Images for the comparison of adapters: two halves of the classes, and splits of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from householder.train.adapt.data import IMAGES, ImageFormat, image_classes, read_image
from householder.train.data import generator_for
from householder.train.errors import ConfigError

if TYPE_CHECKING:
    from householder.recipes._adapters_records import Settings


@dataclass(frozen=True)
class Images:
    """Labelled images: `[n, C, H, W]` and int64 `[n]`."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


def load_halves(settings: Settings) -> tuple[Images, Images]:
    """Return the images of the first and of the second half of the classes, labels from 0 in each.

    Raises:
        ConfigError: scikit-learn is missing, or the folder holds too few images.
    """
    images = _digits() if settings.images is None else _folder(settings)
    classes = int(images.labels.max()) + 1
    half = classes // 2
    first, second = images.labels < half, images.labels >= half
    halves = images[first], Images(images.pixels[second], images.labels[second] - half)
    needed = 2 * settings.shots + 1
    for part in halves:
        fewest = int(part.labels.bincount().min())
        if fewest < needed:
            raise ConfigError(
                f"reproduce adapters: every class must have at least {needed} images (shots = "
                f"{settings.shots} to train on, as many to choose on, and a rest to test on), one "
                f"has {fewest}; give more images or fewer --shots"
            )
    return halves


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            f"reproduce adapters: the digits come with scikit-learn, which cannot be imported "
            f"({error}); pip install 'householder[adapters]', or give --images"
        ) from error
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32) / 16
    return Images(pixels.unsqueeze(1) - 0.5, torch.tensor(digits.target, dtype=torch.int64))


def _folder(settings: Settings) -> Images:
    assert settings.images is not None
    folder = Path(settings.images)
    form = ImageFormat(settings.image_size, 3, (0.5,) * 3, (0.5,) * 3)
    pixels, labels = [], []
    for label, name in enumerate(image_classes(folder)):
        for path in sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGES):
            pixels.append(read_image(path, form))
            labels.append(label)
    if not pixels or max(labels) < 3:
        raise ConfigError(
            f"{folder}: must hold at least four classes, two to pretrain on and two to adapt to; "
            "give a folder of more"
        )
    return Images(torch.stack(pixels), torch.tensor(labels))


def split(images: Images, shots: int, seed: int) -> tuple[Images, Images, Images]:
    """Return `shots` images per class to train on, as many to choose on, and the rest."""
    parts: list[list[Tensor]] = [[], [], []]
    for label in range(int(images.labels.max()) + 1):
        mine = (images.labels == label).nonzero().squeeze(-1)
        order = torch.randperm(len(mine), generator=generator_for(seed, "split", label))
        mine = mine[order]
        for part, chosen in zip(parts, mine.tensor_split([shots, 2 * shots]), strict=True):
            part.append(chosen)
    train, choose, test = (images[torch.cat(part)] for part in parts)
    return train, choose, test
