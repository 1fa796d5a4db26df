"""The output folder of a text run: made ready, refused, or continued; its corpus; the run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from householder.storage import write_atomically
from householder.train.errors import CheckpointError, ConfigError, OutputError
from householder.train.interrupt import StopRequest
from householder.train.settings import (
    check_names,
    describe_differences,
    differences,
    field_types,
    read_toml,
    to_toml,
)
from householder.train.text.config import TextConfig
from householder.train.text.corpus import (
    dataset_documents,
    documents,
    text_files,
    write_corpus,
)
from householder.train.text.observer import TextObserver
from householder.train.text.processes import Processes
from householder.train.text.run import TextResult, train_text
from householder.train.text.tokenizer import make_tokenizer

CONFIG_FILE = "config.toml"
HEADER = "# Written by householder: the settings of the text run in this folder.\n"
OURS = ("corpus", "metrics.jsonl", "checkpoints", "model", "results.json", "tensorboard", "wandb")
SOURCES = ("text", "dataset")
"""Settings that say where the text comes from; they are not fields of `TextConfig`."""


def holds_text_run(folder: Path) -> bool:
    """Return whether a folder was written by a text run."""
    path = folder / CONFIG_FILE
    return path.is_file() and path.read_bytes().startswith(HEADER.encode())


def stored_text_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the text run that a folder holds, its sources among them.

    Raises:
        ConfigError: its config file is damaged.
    """
    return read_toml(folder / CONFIG_FILE, [*field_types(TextConfig), *SOURCES])


def run_text(
    settings: Mapping[str, Any],
    folder: Path,
    processes: Processes,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observer: TextObserver | None = None,
    stop: StopRequest | None = None,
) -> TextResult:
    """Train on text in a folder: prepare the folder and the corpus, then train.

    Args:
        settings: fields of `TextConfig`, and `text`, a list of files and folders, or `dataset`, a
            name on the Hugging Face hub.
        folder: where to write; made when missing.
        processes: of the run.
        resume: continue what the folder holds.
        overwrite: delete what the folder holds from an earlier text run.
        observer: told of every step.
        stop: looked at after every step.

    Returns:
        The trained model and its evaluation.

    Raises:
        ConfigError: a setting is unknown or cannot be, or there is no text.
        OutputError: the folder is occupied, cannot be written, or holds nothing to resume.
        RunError: as in `train_text`.
    """
    fields = {name: value for name, value in settings.items() if name not in SOURCES}
    check_names(fields, field_types(TextConfig), "settings of a text run")
    config = TextConfig(**fields)
    source = {name: settings[name] for name in SOURCES if settings.get(name)}
    if len(source) != 1:
        raise ConfigError(
            "give --text FILES_OR_FOLDERS or --dataset NAME, one of them; got "
            f"{', '.join(source) or 'neither'}"
        )
    if processes.first:
        _open_folder(config, source, folder, resume=resume, overwrite=overwrite)
        if not (folder / "corpus").exists():
            _make_corpus(config, source, folder / "corpus", observer or TextObserver())
    processes.wait()
    return train_text(config, folder, processes, resume=resume, observer=observer, stop=stop)


def _make_corpus(
    config: TextConfig, source: Mapping[str, Any], folder: Path, observer: TextObserver
) -> None:
    if "dataset" in source:
        texts = dataset_documents(source["dataset"])
    else:
        files = text_files([Path(name) for name in source["text"]])
        texts = documents(files, lambda file: observer.skipped(str(file)))
    write_corpus(
        texts,
        folder,
        make_tokenizer(config.tokenizer),
        validation=config.validation,
        source=dict(source),
        progress=observer.tokenizing,
        max_tokens=config.max_tokens,
    )


def _open_folder(
    config: TextConfig, source: Mapping[str, Any], folder: Path, *, resume: bool, overwrite: bool
) -> None:
    if resume and overwrite:
        raise ConfigError("`resume` continues and `overwrite` deletes the same folder; give one")
    try:
        # Names with a leading dot are what a kill leaves of a file being written.
        occupied = folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir())
        if resume:
            _check_same_run(config, source, folder)
        elif occupied and not overwrite:
            raise OutputError(
                f"{folder}: the output folder is occupied; continue with --resume, replace it with "
                "--overwrite, or choose another with --out"
            )
        elif occupied:
            _delete_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = to_toml({**config.to_dict(), **source})
        write_atomically(folder / CONFIG_FILE, HEADER + content)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot write the output folder: {error.strerror}; choose another with --out"
        ) from error


def _check_same_run(config: TextConfig, source: Mapping[str, Any], folder: Path) -> None:
    if not holds_text_run(folder):
        raise OutputError(
            f"{folder}: nothing to resume, there is no {CONFIG_FILE} of a text run; start without "
            "--resume"
        )
    stored = stored_text_settings(folder)
    stored_source = {name: stored.pop(name) for name in SOURCES if name in stored}
    different = differences(TextConfig(**stored), config)
    if stored_source != dict(source):
        different["text"] = stored_source, dict(source)
    if different:
        raise CheckpointError(
            f"{folder}: what it holds does not fit the requested settings: "
            f"{describe_differences(different)}; drop these settings or use another folder"
        )


def _delete_run(folder: Path) -> None:
    """Delete what `run_text` wrote; touch nothing when there is anything else."""
    if not holds_text_run(folder):
        raise OutputError(
            f"{folder}: nothing is deleted, because no {CONFIG_FILE} says that householder trained "
            "on text in this folder; choose another with --out"
        )
    foreign = sorted({p.name for p in folder.iterdir()} - {*OURS, CONFIG_FILE})
    foreign = [name for name in foreign if not name.startswith(".")]
    if foreign:
        raise OutputError(
            f"{folder}: nothing is deleted, because {', '.join(foreign)} is not householder's; "
            "move it away or choose another folder with --out"
        )
    for name in OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    # Last: what a kill leaves half deleted can be overwritten again.
    (folder / CONFIG_FILE).unlink()
