"""Images in folders by class, or a text file: batches as a function of (seed, step)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from householder.train.data import generator_for
from householder.train.errors import ConfigError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class AdaptBatch:
    """Inputs and labels.

    Attributes:
        inputs: images `[B, C, H, W]`, or tokens int64 `[B, T]`.
        labels: classes int64 `[B]`, or the next tokens int64 `[B, T]`.
    """

    inputs: Tensor
    labels: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> AdaptBatch:
        """Return the batch on a device, images in the model's dtype."""
        inputs = self.inputs.to(device)
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        return AdaptBatch(inputs, self.labels.to(device))


class AdaptData(ABC):
    """Training and evaluation data."""

    @abstractmethod
    def batch(self, seed: int, step: int, size: int) -> AdaptBatch:
        """Return a training batch; the same for the same arguments."""

    @abstractmethod
    def evaluation(self, size: int) -> Iterator[AdaptBatch]:
        """Yield the evaluation data once, in batches of at most `size`."""


@dataclass(frozen=True)
class ImageFormat:
    """How a model wants its images.

    Attributes:
        size: height and width.
        channels: 1 or 3.
        mean: subtracted per channel from values in [0, 1].
        std: divided by.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageFolder(AdaptData):
    """A folder with one folder of images per class, in alphabetical order.

    Args:
        folder: the folder.
        form: how the model wants the images.
        eval_fraction: the part of every class that is kept for evaluation.
        seed: of the split.

    Raises:
        ConfigError: there are fewer than two classes, or a class has fewer than two images.
    """

    def __init__(self, folder: Path, form: ImageFormat, eval_fraction: float, seed: int) -> None:
        self.form = form
        self.classes = image_classes(folder)
        self.train: list[tuple[Path, int]] = []
        self.held_out: list[tuple[Path, int]] = []
        for label, name in enumerate(self.classes):
            files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGES)
            if len(files) < 2:
                raise ConfigError(
                    f"{folder / name}: needs at least 2 images, one to train on and one to "
                    f"evaluate, has {len(files)}; add some, or move the folder away"
                )
            order = torch.randperm(len(files), generator=generator_for(seed, f"split/{name}"))
            count = min(len(files) - 1, max(1, round(eval_fraction * len(files))))
            for i in order[:count].tolist():
                self.held_out.append((files[i], label))
            for i in order[count:].tolist():
                self.train.append((files[i], label))
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="images")

    def batch(self, seed: int, step: int, size: int) -> AdaptBatch:
        # Epoch by epoch, each in an order of its own.
        n, first = len(self.train), step * size
        picked = []
        for i in range(first, first + size):
            if i % n == 0 or i == first:
                order = torch.randperm(n, generator=generator_for(seed, "order", i // n))
            picked.append(self.train[int(order[i % n])])
        return self._load(picked)

    def evaluation(self, size: int) -> Iterator[AdaptBatch]:
        for i in range(0, len(self.held_out), size):
            yield self._load(self.held_out[i : i + size])

    def _load(self, picked: list[tuple[Path, int]]) -> AdaptBatch:
        images = list(self._workers.map(self._read, (path for path, _ in picked)))
        return AdaptBatch(torch.stack(images), torch.tensor([label for _, label in picked]))

    def _read(self, path: Path) -> Tensor:
        return read_image(path, self.form)


def image_classes(folder: Path) -> list[str]:
    """Return the names of the classes in a folder of images.

    Raises:
        ConfigError: there are fewer than two.
    """
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be read: {error.strerror}; give a folder with one folder of images "
            "per class"
        ) from error
    if len(names) < 2:
        raise ConfigError(
            f"{folder}: must hold at least two folders of images, one per class, holds "
            f"{len(names)}; sort the images by class"
        )
    return names


def read_image(path: Path, form: ImageFormat) -> Tensor:
    """Return an image as `[C, size, size]`, resized and cropped about its centre, normalised.

    Raises:
        ConfigError: the file is no image.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            # Cameras store how they were held, and not the pixels turned.
            image = ImageOps.exif_transpose(file).convert("L" if form.channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(
            f"{path}: cannot be read as an image: {error}; move it out of the folder"
        ) from error
    image = ImageOps.fit(image, (form.size, form.size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    pixels = pixels.reshape(form.size, form.size, form.channels).permute(2, 0, 1)
    mean, std = (torch.tensor(x).reshape(-1, 1, 1) for x in (form.mean, form.std))
    return (pixels - mean) / std


class TextFile(AdaptData):
    """A text as one run of tokens, its end kept for evaluation.

    Args:
        tokens: int64 `[n]`.
        length: tokens of a training text.
        eval_fraction: the part kept.

    Raises:
        ConfigError: either part is shorter than one text.
    """

    def __init__(self, tokens: Tensor, length: int, eval_fraction: float) -> None:
        cut = len(tokens) - math.ceil(eval_fraction * len(tokens))
        self.train, self.held_out = tokens[:cut], tokens[cut:]
        self.length = length
        shortest = min(len(self.train), len(self.held_out))
        if shortest <= length:
            raise ConfigError(
                f"the text has {len(tokens)} tokens, of which {len(self.held_out)} are kept for "
                f"evaluation; both parts must have more than length={length}: give a longer text, "
                "a smaller --length or another --eval-fraction"
            )

    def batch(self, seed: int, step: int, size: int) -> AdaptBatch:
        most = len(self.train) - self.length
        starts = torch.randint(most, (size,), generator=generator_for(seed, "batch", step))
        return self._texts(self.train, starts.tolist())

    def evaluation(self, size: int) -> Iterator[AdaptBatch]:
        starts = list(range(0, len(self.held_out) - self.length, self.length))
        for i in range(0, len(starts), size):
            yield self._texts(self.held_out, starts[i : i + size])

    def _texts(self, tokens: Tensor, starts: list[int]) -> AdaptBatch:
        texts = torch.stack([tokens[s : s + self.length + 1] for s in starts])
        return AdaptBatch(texts[:, :-1], texts[:, 1:])


def read_tokens(path: Path, tokenizer: Any | None) -> Tensor:
    """Return a text file as tokens int64 `[n]`; as its bytes without a tokenizer.

    Raises:
        ConfigError: the file cannot be read as UTF-8.
    """
    try:
        data = path.read_bytes()
        if tokenizer is None:
            return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give a text file") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            f"{path}: must be a text in UTF-8 and not empty: {error}; convert it"
        ) from error
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
