"""Checkpoints: whole or absent, checked when read, and never unpickled.

A checkpoint is a folder `step-00000200` with

    model.safetensors        parameters and buffers
    optimizer.safetensors    the optimizer's moments, named after the parameter they belong to
    state.json               step, settings, random generators, versions
    manifest.json            the SHA-256 of the three files above

It is written beside its final place, flushed to the disk, and renamed: after a kill at any moment
the newest folder with a final name is complete.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from householder.storage import fsync_path, sha256
from householder.train.errors import CheckpointError, ConfigError, NonFiniteError, OutputError
from householder.train.settings import Settings, describe_differences, differences

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, on the CPU.

    Attributes:
        step: optimizer steps done.
        model: the model's state dict.
        optimizer: `"<moment>/<parameter>"` to tensor.
        state: everything else, as JSON values.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write a checkpoint atomically and remove the oldest beyond `keep`.

    Args:
        folder: the folder of checkpoints; made when missing.
        checkpoint: what to write; tensors may be on any device.
        keep: how many of the newest to keep, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        OutputError: the disk is full.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{checkpoint.step:08d}"
    if target.exists():
        return target  # saved before, on a signal at a scheduled step, and complete
    temporary = folder / f".{target.name}.tmp"
    # Left behind by a kill in the middle of an earlier save.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file(_plain(checkpoint.model), temporary / FILES[0])
        save_file(_plain(checkpoint.optimizer), temporary / FILES[1])
    except SafetensorError as error:  # how it tells of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"{target}: the checkpoint must be written, and cannot be: {error}; make room on the "
            "disk and continue with --resume"
        ) from error
    state = {"step": checkpoint.step, **checkpoint.state}
    (temporary / FILES[2]).write_text(json.dumps(state, indent=1), encoding="utf-8")
    manifest = {"format": FORMAT, "sha256": {name: sha256(temporary / name) for name in FILES}}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    publish(temporary, target, keep)
    return target


def publish(temporary: Path, target: Path, keep: int) -> None:
    """Give a checkpoint that is written its final name, and remove the oldest beyond `keep`."""
    folder = target.parent
    for path in [*temporary.iterdir(), temporary]:
        fsync_path(path)
    os.rename(temporary, target)
    fsync_path(folder)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}")


def steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    found = steps(folder)
    return folder / f"step-{found[-1]:08d}" if found else None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after checking that every byte is as it was written.

    Args:
        path: the checkpoint's folder.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or the format is of another version.
    """
    _verify(path)
    try:
        model, optimizer = load_file(path / FILES[0]), load_file(path / FILES[1])
        state = json.loads((path / FILES[2]).read_text(encoding="utf-8"))
        step = state.pop("step")
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {_remedy(path)}") from error
    return Checkpoint(step, model, optimizer, state)


def _verify(path: Path) -> None:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version, digests = manifest["format"], dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: manifest.json is missing or damaged ({error}); {_remedy(path)}"
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{path}: must be of checkpoint format {FORMAT}, is of format {version!r}; "
            "resume with the version of householder that wrote it"
        )
    for name in FILES:
        try:
            actual = sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path}: {name}: {error.strerror}; {_remedy(path)}") from error
        if actual != digests.get(name):
            raise CheckpointError(
                f"{path}: {name} is damaged: its SHA-256 must be {digests.get(name)}, "
                f"is {actual}; {_remedy(path)}"
            )


def _remedy(path: Path) -> str:
    earlier = [step for step in steps(path.parent) if path.name > f"step-{step:08d}"]
    if earlier:
        return f"delete that folder to continue from step {earlier[-1]}"
    return "start again with --overwrite"


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by `"<moment>/<parameter name>"`.

    Args:
        model: the module whose parameters are optimized.
        optimizer: any optimizer whose state is tensors, as AdamW's is.

    Returns:
        The tensors themselves, not copies.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{moment}/{names[parameter]}": value
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned.

    Args:
        model: the module whose parameters are optimized.
        optimizer: a fresh optimizer over these parameters.
        tensors: its state by `"<moment>/<parameter name>"`.

    Raises:
        CheckpointError: a tensor belongs to no parameter, or has another shape.
    """
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        moment, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
            raise CheckpointError(
                f"optimizer state {key!r} of shape {list(value.shape)} fits no parameter of the "
                "model; resume with the settings of the stored run"
            )
        optimizer.state[parameter][moment] = value.to(parameter.device)


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict after checking that names and shapes agree.

    Args:
        model: the module to fill.
        tensors: its state dict.

    Raises:
        CheckpointError: naming the first tensor that is missing, left over or of another shape.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        needed, given = expected.get(name), tensors.get(name)
        if needed is None or given is None or needed.shape != given.shape:
            shapes = ("absent" if t is None else str(list(t.shape)) for t in (needed, given))
            raise CheckpointError(
                "the checkpoint does not fit the model: {} must be {}, is {}; "
                "resume with the settings of the stored run".format(name, *shapes)
            )
    model.load_state_dict(dict(tensors))


def check_settings(path: Path, stored: Mapping[str, Any], requested: Settings) -> None:
    """Raise unless a checkpoint's settings are those of the run that would continue it.

    Args:
        path: the checkpoint's folder.
        stored: its settings by name.
        requested: those of the run.

    Raises:
        CheckpointError: a setting differs that a resumed run may not change, or is unknown.
    """
    try:
        there = type(requested)(**stored)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"{path}: its settings are not of this version of householder: {error}; resume with "
            "the version that wrote it"
        ) from error
    if different := differences(there, requested):
        raise CheckpointError(
            f"{path}: the checkpoint does not fit the requested settings: "
            f"{describe_differences(different)}; drop these settings or use another folder"
        )


def not_finite(name: str, step: int, checkpoints: Path) -> NonFiniteError:
    """Return the error of a run whose loss or gradient is not finite.

    Args:
        name: of the run.
        step: the first of which it is so, counted from 1.
        checkpoints: the folder of the run's checkpoints.
    """
    last = latest(checkpoints)
    kept = "no checkpoint had been written" if last is None else f"kept {last}"
    return NonFiniteError(
        f"{name}: the loss or its gradient is not finite at step {step}; {kept}; try a smaller "
        "--lr or --grad-clip, or a longer --warmup",
        step,
    )


def random_state(device: torch.device) -> dict[str, str]:
    """Return the states of PyTorch's global generators in base64, for JSON."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {k: base64.b64encode(s.numpy().tobytes()).decode("ascii") for k, s in states.items()}


def restore_random_state(states: Mapping[str, str], device: torch.device) -> None:
    """Put back what `random_state` returned, as far as the device has such a generator."""
    tensors = {
        kind: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for kind, text in states.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
