"""Checkpoints that any number of processes can read, whole or absent.

A checkpoint is a folder `step-00000200` with the files of `torch.distributed.checkpoint`, and

    state.json       step, settings, metrics so far, random generators, versions
    manifest.json    the size and the SHA-256 of every other file

The processes write beside its final place; the first one flushes it to the disk and renames it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from householder.storage import sha256
from householder.train.checkpoint import publish
from householder.train.errors import CheckpointError, OutputError
from householder.train.text.processes import Processes

FORMAT = 1


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
    processes: Processes,
) -> None:
    """Write a checkpoint atomically and remove the oldest beyond `keep`. All processes call it.

    Args:
        folder: the folder of checkpoints, the same for all processes; made when missing.
        step: optimizer steps done.
        model: sharded or not.
        optimizer: over its parameters.
        state: everything else, as JSON values.
        keep: how many of the newest to keep, at least 1.
        processes: of the run.

    Raises:
        OutputError: the disk is full.
        OSError: the folder cannot be written.
    """
    target = folder / f"step-{step:08d}"
    if target.exists():
        return  # saved before, on a signal at a scheduled step, and complete
    temporary = folder / f".{target.name}.tmp"
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # left behind by a kill
    processes.wait()
    weights, moments = get_state_dict(model, optimizer)
    try:
        with _without_process_group(processes):
            dcp.save(
                {"model": weights, "optimizer": moments},
                checkpoint_id=temporary,
                no_dist=not processes.several,
            )
    except (RuntimeError, dcp.CheckpointException) as error:  # how it tells of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        of_a_process = [failure for failure, _ in getattr(error, "failures", {}).values()]
        reason = str((of_a_process or [error])[0]).split("\n", 1)[0]
        raise OutputError(
            f"{target}: the checkpoint must be written, and cannot be: {reason}; make room on the "
            "disk and continue with --resume"
        ) from error
    processes.wait()
    if processes.first:
        content = json.dumps({"step": step, **state}, indent=1)
        (temporary / "state.json").write_text(content, encoding="utf-8")
        files = {
            path.name: {"size": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
        (temporary / "manifest.json").write_text(manifest, encoding="utf-8")
        publish(temporary, target, keep)
    processes.wait()


def read_state(path: Path) -> dict[str, Any]:
    """Return what `state` was, with the `step`, after checking every file of the checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, or the format is of another version.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: must be of checkpoint format {FORMAT}, is of {manifest['format']!r}; "
                "resume with the version of householder that wrote it"
            )
        for name, expected in manifest["files"].items():
            if sha256(path / name) != expected["sha256"]:
                raise CheckpointError(
                    f"{path}: {name} is damaged: its SHA-256 must be {expected['sha256']}; delete "
                    "that folder to continue from the checkpoint before"
                )
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: a file is missing or damaged: {error}; delete that folder to continue from "
            "the checkpoint before"
        ) from error


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> None:
    """Load weights and moments, written by any number of processes. All processes call it.

    Raises:
        CheckpointError: they do not fit the model.
    """
    weights, moments = get_state_dict(model, optimizer)
    content: dict[str, Any] = {"model": weights, "optimizer": moments}
    try:
        with _without_process_group(processes):
            dcp.load(content, checkpoint_id=path, no_dist=not processes.several)
    except (RuntimeError, ValueError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"{path}: the checkpoint does not fit the model: {error}; resume with the settings of "
            "the stored run"
        ) from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
    )


@contextmanager
def _without_process_group(processes: Processes) -> Iterator[None]:
    """Silence PyTorch where it warns that a single process has no process group."""
    with warnings.catch_warnings():
        if not processes.several:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights on the CPU of the first process; on the others nothing. All call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights
