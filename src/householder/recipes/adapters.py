"""Adapters beside one another: accuracy against the number of trained parameters.

A small vision transformer is trained on half of the classes and adapted to the other half from few
images, by every method on the same layers (queries, keys, values and outputs of all attentions, the
four sites of the published counts). Learning rates are chosen per method on held-out images, as the
publications do by a grid; accuracies are of images that neither training nor that choice saw.

Published beside it are means over other data sets and a much larger model: they say how methods
were ranked there, not what to expect here.

References:
    Efficient Adaptation of Pre-trained Vision Transformer via Householder Transformation (Dong et
    al., 2024), https://arxiv.org/abs/2410.22952;
    Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
    Adaptation (Yuan, Liu, Xu, 2024), https://arxiv.org/abs/2405.17484;
    HOFT: Householder Orthogonal Fine-tuning (Moreno Arcas et al., 2025),
    https://arxiv.org/abs/2505.16531
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from householder.recipes._adapters_data import Images, load_halves, split
from householder.recipes._adapters_records import VARIANTS, Outcome, Settings, Variant
from householder.recipes._adapters_report import plot, results_table
from householder.recipes._vision_transformer import VisionTransformer
from householder.storage import write_atomically
from householder.train.adapt.methods import Method, make_method
from householder.train.data import derive_seed, generator_for
from householder.train.errors import Interrupted, OutputError
from householder.train.interrupt import StopRequest

__all__ = [
    "VARIANTS", "Images", "Outcome", "Settings", "Variant", "load_halves", "results_table", "run",
    "split",
]  # fmt: skip

SITES = ("q_proj", "k_proj", "v_proj", "o_proj")


def fit(
    model: nn.Module,
    trainable: Sequence[nn.Parameter],
    images: Images,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    stop: StopRequest,
) -> list[float]:
    """Train with AdamW, a tenth of the steps of warm-up, half a cosine, and shifts by a pixel.

    Returns:
        The seconds of each step.

    Raises:
        Interrupted: a signal came.
    """
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=1e-4)
    times = []
    for step in range(steps):
        begun = time.perf_counter()
        rise = min(1.0, (step + 1) / max(1, steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = lr * rise * (1 + math.cos(math.pi * step / steps)) / 2
        generator = generator_for(seed, "batch", step)
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        loss = F.cross_entropy(model(_shifted(batch.pixels, generator)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if images.pixels.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        if stop.signum is not None:
            raise Interrupted(
                f"reproduce adapters: {stop.name}; methods that are done are kept; continue with "
                "--resume",
                stop.signum,
            )
    return times


def _shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Move all images of a batch by up to a pixel each way."""
    size = pixels.shape[-1]
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    i, j = torch.randint(3, (2,), generator=generator).tolist()
    return padded[..., i : i + size, j : j + size]


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the part of the images classified rightly."""
    right = sum(
        int((model(pixels).argmax(-1) == labels).sum())
        for pixels, labels in zip(images.pixels.split(512), images.labels.split(512), strict=True)
    )
    return right / len(images)


def step_bytes(model: nn.Module, trainable: Sequence[nn.Parameter], images: Images) -> int:
    """Return what a step needs beside the model: saved for backward, gradients, AdamW's moments.

    Counted from what autograd saves, each storage once and parameters not, so that it is the same
    on every machine.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}
    # Storages of freed tensors may be given out again: keep them until all are counted.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(images.pixels), images.labels)
    del loss
    trained = sum(p.numel() * p.element_size() for p in trainable)
    return sum(saved.values()) + 3 * trained


def pretrain(settings: Settings, images: Images, stop: StopRequest) -> VisionTransformer:
    """Train the base model on the first half of the classes."""
    torch.manual_seed(derive_seed(0, "model"))
    shape = images.pixels.shape
    model = VisionTransformer(
        shape[-1],
        shape[1],
        int(images.labels.max()) + 1,
        patch_size=2 if shape[-1] < 16 else shape[-1] // 8,
    ).to(images.pixels.device)
    fit(
        model,
        list(model.parameters()),
        images,
        steps=settings.pretrain_steps,
        batch_size=settings.batch_size,
        lr=1e-3,
        seed=derive_seed(0, "pretrain"),
        stop=stop,
    )
    return model


def _adapted(base: VisionTransformer, variant: Variant, classes: int, seed: int) -> Method:
    """Return a copy of the base model with a new head, made ready for a method."""
    model = copy.deepcopy(base)
    torch.manual_seed(derive_seed(seed, "head"))
    model.head = nn.Linear(base.head.in_features, classes).to(base.head.weight.device)
    return make_method(variant.kind, model, rank=variant.size, targets=SITES, head="head")


def run_variant(
    settings: Settings, base: VisionTransformer, images: Images, variant: Variant, stop: StopRequest
) -> Outcome:
    """Choose a learning rate for one method, then adapt with it once per seed."""
    classes = int(images.labels.max()) + 1
    times: list[float] = []

    def adapt(lr: float, seed: int) -> tuple[nn.Module, Images, Images]:
        train, choose, test = split(images, settings.shots, seed)
        method = _adapted(base, variant, classes, seed)
        trainable = list(method.trainable().values())
        times.extend(
            fit(
                method.model,
                trainable,
                train,
                steps=settings.steps,
                batch_size=settings.batch_size,
                lr=lr,
                seed=derive_seed(seed, "adapt"),
                stop=stop,
            )
        )
        return method.model, choose, test

    # The choice is made on splits of its own, of which no test image is used.
    scores = {}
    for lr in settings.learning_rates:
        model, choose, _ = adapt(lr, seed=0)
        scores[lr] = accuracy(model, choose)
    best = max(scores, key=lambda lr: (scores[lr], -lr))
    accuracies = []
    for seed in range(1, settings.seeds + 1):
        model, _, test = adapt(best, seed)
        accuracies.append(accuracy(model, test))

    method = _adapted(base, variant, classes, seed=0)
    trainable = list(method.trainable().values())
    train = split(images, settings.shots, 0)[0]
    batch = train[torch.arange(settings.batch_size) % len(train)]
    return Outcome(
        kind=variant.kind,
        size=variant.size,
        num_parameters=method.num_parameters(),
        head_parameters=base.head.in_features * classes + classes,
        accuracies=tuple(accuracies),
        learning_rate=best,
        step_seconds=statistics.median(times),
        step_bytes=step_bytes(method.model, trainable, batch),
    )


def run(
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    stop: StopRequest | None = None,
    variants: Sequence[Variant] | None = None,
) -> list[Outcome]:
    """Run the experiment and write `results.json` and `accuracy.png`.

    Args:
        settings: its size.
        folder: where to write; made when missing.
        resume: keep the methods that the folder has results of.
        overwrite: replace what it holds.
        say: told of progress, line by line.
        stop: looked at after every step.
        variants: the methods; `VARIANTS` if None.

    Returns:
        The outcome of each method; LoRA's is missing where peft is.

    Raises:
        ConfigError: the data does not suit the settings.
        OutputError: the folder is occupied or holds another experiment.
        Interrupted: a signal came; methods that are done are kept.
    """
    stop, variants = stop or StopRequest(), variants or VARIANTS
    done = _stored(settings, folder, resume=resume, overwrite=overwrite)
    first, second = load_halves(settings)
    # Before the first method is done: a run that is stopped until then can be resumed too.
    _write(settings, list(done.values()), folder)
    device = torch.device(settings.device)
    first, second = (Images(x.pixels.to(device), x.labels.to(device)) for x in (first, second))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        say(f"pretraining on {len(first)} images of {int(first.labels.max()) + 1} classes")
        base = pretrain(settings, first, stop)
        say(f"base model: {accuracy(base, first):.1%} of its training images")
        for i, variant in enumerate(variants):
            if (variant.kind, variant.size) in done:
                continue
            if variant.kind == "lora" and find_spec("peft") is None:
                say(f"[{i + 1}/{len(variants)}] {variant.name}: left out: pip install peft")
                continue
            outcome = run_variant(settings, base, second, variant, stop)
            done[variant.kind, variant.size] = outcome
            _write(settings, list(done.values()), folder)
            say(
                f"[{i + 1}/{len(variants)}] {variant.name}: {outcome.mean:.1%} with "
                f"{outcome.num_parameters:,} numbers"
            )
    outcomes = list(done.values())
    write_atomically(folder / "accuracy.png", plot(outcomes, settings))
    return outcomes


def _stored(
    settings: Settings, folder: Path, *, resume: bool, overwrite: bool
) -> dict[tuple[str, int], Outcome]:
    """Make the folder ready; return the outcomes it holds that are to be kept."""
    path = folder / "results.json"
    if resume:
        if not path.is_file():
            raise OutputError(f"{folder}: nothing to resume; start without --resume")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["settings"] != _plain(settings):
            raise OutputError(
                f"{folder}: what it holds was measured with other settings; repeat those or choose "
                "another folder with --out"
            )
        outcomes = [Outcome(**o | {"accuracies": tuple(o["accuracies"])}) for o in content["runs"]]
        return {(o.kind, o.size): o for o in outcomes}
    held = {p.name for p in folder.iterdir()} if folder.exists() else set()
    if held and not (overwrite and held <= {"results.json", "accuracy.png"}):
        raise OutputError(
            f"{folder}: the output folder is occupied; continue with --resume, replace its results "
            "with --overwrite, or choose another with --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return {}


def _plain(settings: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _write(settings: Settings, outcomes: Sequence[Outcome], folder: Path) -> None:
    runs = [dataclasses.asdict(outcome) for outcome in outcomes]
    content = {"settings": _plain(settings), "torch": torch.__version__, "runs": runs}
    write_atomically(folder / "results.json", json.dumps(content, indent=1) + "\n")
