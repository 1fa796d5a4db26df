"""The output folder of a text run: made ready, refused, or continued; its corpus; the run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from householder.train.errors import ConfigError, Interrupted
from householder.train.interrupt import StopRequest
from householder.train.output_folder import OutputFolder
from householder.train.settings import check_names, differences, field_types, read_toml
from householder.train.text.config import TextConfig
from householder.train.text.corpus import (
    dataset_documents,
    documents,
    require_datasets,
    standard_library,
    text_files,
    write_corpus,
)
from householder.train.text.observer import TextObserver
from householder.train.text.processes import Processes
from householder.train.text.run import TextResult, train_text
from householder.train.text.tokenizer import make_tokenizer
from householder.train.text.trackers import require_viewers

HEADER = "# Written by householder: the settings of the text run in this folder.\n"
OURS = ("corpus", "metrics.jsonl", "checkpoints", "model", "results.json", "tensorboard", "wandb")
SOURCES = ("text", "dataset")
"""Settings that say where the text comes from; they are not fields of `TextConfig`."""


def holds_text_run(folder: Path) -> bool:
    """Return whether a folder was written by a text run."""
    return _output(folder).holds_run()


def stored_text_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the text run that a folder holds, its sources among them.

    Raises:
        OutputError: it holds none.
        ConfigError: its config file is damaged.
    """
    return read_toml(_output(folder).require_config(), [*field_types(TextConfig), *SOURCES])


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
        stop: looked at while the text is read, after every step and in evaluations.

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
    # What cannot be is refused before a folder is made for it and a long text is read.
    config.make_model(2, device="meta")
    if not resume:
        config.require_effects()
    require_viewers(config)
    if "dataset" in source:
        require_datasets(source["dataset"])
    made = False
    if processes.first:
        _open_folder(config, source, folder, resume=resume, overwrite=overwrite)
        made = not (folder / "corpus").exists()
        if made:
            make_corpus(config, source, folder / "corpus", observer or TextObserver(), stop)
    processes.wait()
    try:
        return train_text(config, folder, processes, resume=resume, observer=observer, stop=stop)
    except ConfigError:
        # The text is too short for a window: what was made of it must not occupy the folder.
        if made and not (folder / "checkpoints").exists():
            shutil.rmtree(folder / "corpus")
        raise


def make_corpus(
    config: TextConfig,
    source: Mapping[str, Any],
    folder: Path,
    observer: TextObserver,
    stop: StopRequest | None = None,
) -> None:
    """Tokenize the text of a run into a folder, as `write_corpus` does.

    Args:
        config: the tokenizer, how much to hold out and where to stop.
        source: `dataset`, a name, or `text`, files and folders; none of them for the sources of
            Python's standard library.
        folder: to write; it must not exist.
        observer: told of files that are no text, and of the tokens.
        stop: looked at from time to time.

    Raises:
        ConfigError: there is no text.
        Interrupted: a signal came; nothing of the text is kept.
    """

    def progress(tokens: int) -> None:
        observer.tokenizing(tokens)
        if stop is not None and stop.signum is not None:
            raise Interrupted(
                f"{stop.name} after {tokens} tokens of the text were read, which are not kept; "
                "start again",
                stop.signum,
            )

    if "dataset" in source:
        texts = dataset_documents(source["dataset"])
    else:
        paths = [Path(name) for name in source["text"]]
        files = text_files(paths) if paths else standard_library()
        texts = documents(files, lambda file: observer.skipped(str(file)))
    write_corpus(
        texts,
        folder,
        make_tokenizer(config.tokenizer),
        validation=config.validation,
        source=dict(source),
        progress=progress,
        max_tokens=config.max_tokens,
    )


def _open_folder(
    config: TextConfig, source: Mapping[str, Any], folder: Path, *, resume: bool, overwrite: bool
) -> None:
    output = _output(folder)

    def check_same() -> None:
        stored = stored_text_settings(folder)
        stored_source = {name: stored.pop(name) for name in SOURCES if name in stored}
        different = differences(TextConfig(**stored), config)
        for name in SOURCES:
            if stored_source.get(name) != source.get(name):
                different[name] = stored_source.get(name), source.get(name)
        output.require_same(different)

    settings = {**config.to_dict(), **source}
    output.open(settings, resume=resume, overwrite=overwrite, check_same=check_same)


def _output(folder: Path) -> OutputFolder:
    return OutputFolder(folder, HEADER, lambda path: path.name in OURS)
