"""Documents as one file of tokens, read through memory mapping.

    tokens.bin       the separator and the tokens of document after document, uint16 or uint32
    documents.npy    int64 [D + 1], where each document begins, and the end
    corpus.json      what they were made from

The last documents of a fixed shuffle are held out for validation.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from householder.storage import fsync_path, write_atomically
from householder.train.errors import ConfigError
from householder.train.text.tokenizer import Tokenizer

FORMAT = 1
_BUFFERED_TOKENS = 1 << 22
_SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Corpus:
    """Tokens of documents, in training and validation.

    Attributes:
        train: memory-mapped tokens, each document led by the separator.
        validation: the same of the documents held out.
        separator: the token that begins a document.
        summary: what `corpus.json` says.
    """

    train: np.ndarray[Any, Any]
    validation: np.ndarray[Any, Any]
    separator: int
    summary: dict[str, Any]


def text_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths` and below the folders among them, sorted.

    Hidden files and folders are left out of a folder, not if named themselves.

    Raises:
        ConfigError: a path does not exist, or there is no file at all.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.is_file())
            files += sorted(p for p in inside if not _hidden(p.relative_to(path)))
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(
                f"`text` must be files or folders, got {path}: there is no such path; check it"
            )
    if not files:
        raise ConfigError(f"`text`: no files in {', '.join(map(str, paths))}; name other folders")
    return files


def standard_library() -> list[Path]:
    """Return the sources of the running Python's standard library, its tests too if they are there.

    Installed packages, which may be in a folder of it, are left out.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(path for path in folder.rglob("*.py") if not others & set(path.parts))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def documents(files: Iterable[Path], skipped: Callable[[Path], None]) -> Iterator[str]:
    """Yield the documents of some files: a file is one, a line of a `.jsonl` file is one.

    Args:
        files: text in UTF-8; of `.jsonl` files the field "text" of every line.
        skipped: called with each file that is no text.

    Raises:
        ConfigError: a line of a `.jsonl` file is no JSON object with a text.
    """
    for file in files:
        if file.suffix == ".jsonl":
            yield from _json_lines(file)
            continue
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            skipped(file)


def _json_lines(file: Path) -> Iterator[str]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ConfigError(
                    f'`text`: line {number} of {file} must be a JSON object with a string "text", '
                    f"got {_shortened(line.strip())}; mend or remove the line"
                )
            yield text


def _shortened(line: str, most: int = 80) -> str:
    return repr(line if len(line) <= most else f"{line[:most]}…")


def require_datasets(name: str) -> None:
    """Raise ConfigError if the library is missing that reads a dataset of this name."""
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"`dataset` {name}: reading it needs the datasets library; pip install datasets"
        )


def dataset_documents(name: str) -> Iterator[str]:
    """Yield the texts of a Hugging Face dataset's training split, as they arrive.

    Args:
        name: as on the hub, "owner/name" or "owner/name:configuration".

    Raises:
        ConfigError: the library `datasets` is missing, the dataset cannot be had, or its rows have
            no field "text".
    """
    require_datasets(name)
    import datasets

    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split="train", streaming=True)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise ConfigError(
                    f'`dataset` {name}: every row must have a string "text", got one of '
                    f"{', '.join(row)}; write what is wanted to files and give --text"
                )
            yield row["text"]
    except ConfigError:
        raise
    except Exception as error:  # whatever the network and the hub raise
        raise ConfigError(
            f"`dataset` {name}: cannot be read: {error}; check its name and the network, or give "
            "files with --text"
        ) from error


def write_corpus(
    texts: Iterable[str],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    validation: float,
    source: dict[str, Any],
    progress: Callable[[int], None] = lambda tokens: None,
    max_tokens: int | None = None,
) -> None:
    """Tokenize documents into a folder, which is complete when it exists.

    Args:
        texts: the documents.
        folder: to write; it must not exist.
        tokenizer: turns each into tokens.
        validation: share of the tokens to hold out, in whole documents; of a single document, its
            end.
        source: what the documents are, to be kept in `corpus.json`.
        progress: told how many tokens there are so far; it may raise, and nothing is left then.
        max_tokens: stop after the document that reaches so many; `None` for all.

    Raises:
        ConfigError: there is no text.
        OSError: the folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left behind by a kill
    temporary.mkdir(parents=True)
    try:
        _write_files(
            texts,
            temporary,
            tokenizer,
            validation=validation,
            source=source,
            progress=progress,
            max_tokens=max_tokens,
        )
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(folder)
    fsync_path(folder.parent)


def _write_files(
    texts: Iterable[str],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    validation: float,
    source: dict[str, Any],
    progress: Callable[[int], None],
    max_tokens: int | None,
) -> None:
    """Write the files of a corpus to the disk, into a folder that is there."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    with open(folder / "tokens.bin", "wb") as file:
        starts = _write_tokens(texts, file, tokenizer, dtype, progress, max_tokens)
    if len(starts) < 2 or starts[-1] <= len(starts) - 1:
        named = ", ".join(map(str, source.get("text", source.values()))) or "these files"
        raise ConfigError(
            f"`text` must name files with text in UTF-8, got {named}, with not a character of it; "
            "name other files"
        )
    np.save(folder / "documents.npy", np.array(starts, dtype=np.int64))
    summary = {
        "format": FORMAT,
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "dtype": dtype.name,
        "documents": len(starts) - 1,
        "tokens": starts[-1],
        "validation": validation,
        "source": source,
    }
    write_atomically(folder / "corpus.json", json.dumps(summary, indent=1) + "\n")
    for path in [*folder.iterdir(), folder]:
        fsync_path(path)


def _write_tokens(
    texts: Iterable[str],
    file: Any,
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
    progress: Callable[[int], None],
    max_tokens: int | None,
) -> list[int]:
    """Write every document behind its separator; return where each begins, and the end."""
    starts, buffer, buffered = [0], [], 0
    separator = np.array([tokenizer.separator], dtype=dtype)
    for text in texts:
        tokens = tokenizer.encode(text)
        if not len(tokens):
            continue
        buffer += [separator, tokens.astype(dtype)]
        buffered += 1 + len(tokens)
        starts.append(starts[-1] + 1 + len(tokens))
        if buffered >= _BUFFERED_TOKENS:
            file.write(np.concatenate(buffer).data)  # unlike tofile, it says why it cannot
            buffer, buffered = [], 0
            progress(starts[-1])
        if max_tokens is not None and starts[-1] >= max_tokens:
            break
    if buffer:
        file.write(np.concatenate(buffer).data)
    progress(starts[-1])
    return starts


def open_corpus(folder: Path) -> Corpus:
    """Open what `write_corpus` wrote.

    Raises:
        ConfigError: the folder holds no corpus, or a damaged one.
    """
    try:
        summary = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=summary["dtype"], mode="r")
        starts = np.load(folder / "documents.npy")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{folder}: is no corpus of tokens, or a damaged one: {error}; delete it to have it "
            "made again"
        ) from error
    if summary["format"] != FORMAT or len(tokens) != starts[-1]:
        raise ConfigError(
            f"{folder}: must hold {starts[-1]} tokens in format {FORMAT}, holds {len(tokens)} in "
            f"format {summary['format']}; delete it to have it made again"
        )
    train, validation = _split(tokens, starts, summary["validation"])
    return Corpus(train, validation, summary["separator"], summary)


class _Documents:
    """Documents of a memory-mapped file in an order of their own, read as one array of tokens."""

    def __init__(self, tokens: np.ndarray[Any, Any], starts: Any, order: Any) -> None:
        self._tokens = tokens
        self._starts = starts
        self._order = order
        lengths = starts[order + 1] - starts[order]
        self._ends = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: slice) -> np.ndarray[Any, Any]:
        begin, end, _ = index.indices(len(self))
        first = int(np.searchsorted(self._ends, begin, side="right")) - 1
        parts = []
        while begin < end:
            document = self._order[first]
            offset = self._starts[document] + begin - self._ends[first]
            count = min(end, self._ends[first + 1]) - begin
            parts.append(self._tokens[offset : offset + count])
            begin += count
            first += 1
        return np.concatenate(parts) if parts else self._tokens[:0]


def _split(tokens: Any, starts: Any, share: float) -> tuple[Any, Any]:
    """Return the training and the validation tokens, in whole shuffled documents if there are."""
    count = len(starts) - 1
    wanted = share * len(tokens)
    if count == 1 or not share:
        cut = len(tokens) - round(wanted)
        return tokens[:cut], tokens[cut:]
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(count)
    lengths = np.cumsum((starts[order + 1] - starts[order])[::-1])
    held_out = min(count - 1, int(np.searchsorted(lengths, wanted)) + 1)
    cut = count - held_out
    return _Documents(tokens, starts, order[:cut]), _Documents(tokens, starts, order[cut:])
