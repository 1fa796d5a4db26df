"""From text to tokens and back: bytes, or any file of the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from householder.train.errors import ConfigError

BYTES = "bytes"


class Tokenizer(ABC):
    """Turn text into token numbers and back.

    Attributes:
        vocab_size: how many different tokens there are, the separator included.
        separator: the token in front of every document. It begins one and, being predicted there,
            ends the one before.
        separator_name: its name in `tokenizer.json`.
        identity: tells two tokenizers apart that would give different tokens.
    """

    vocab_size: int
    separator: int
    separator_name: str
    identity: str

    @abstractmethod
    def encode(self, text: str) -> np.ndarray[Any, Any]:
        """Return the tokens of `text`, int64 `[n]`, without separators."""

    def encode_all(self, texts: list[str]) -> list[np.ndarray[Any, Any]]:
        """Return the tokens of several texts."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode_bytes(self, tokens: list[int]) -> bytes:
        """Return the UTF-8 of some tokens, which may begin or end within a character."""

    def decode(self, tokens: list[int]) -> str:
        """Return the text of some tokens; what is no UTF-8 becomes �."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """One token per byte of the text's UTF-8.

    Examples:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("né").tolist()
        [110, 195, 169]
        >>> tokenizer.decode([110, 195, 169, tokenizer.separator])
        'né'
    """

    vocab_size = 257
    separator = 256
    separator_name = "<|endoftext|>"
    identity = BYTES

    def encode(self, text: str) -> np.ndarray[Any, Any]:
        """Return the bytes of `text`."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """Return the tokens as bytes; the separator is nothing."""
        return bytes(token for token in tokens if token < 256)

    @classmethod
    def file_content(cls) -> str:
        """Return it as a file of the `tokenizers` library, for who reads the model's folder there.

        That library writes a byte that is no printable character of Latin-1 as one from 256 on.
        """
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        characters = {byte: chr(byte) for byte in printable}
        characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        separator = {"id": cls.separator, "content": cls.separator_name, "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        in_front = {"SpecialToken": {"id": cls.separator_name, "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        ids = {"id": cls.separator_name, "ids": [cls.separator], "tokens": [cls.separator_name]}
        content = {
            "version": "1.0",
            "added_tokens": [{**separator, **flags}],
            "pre_tokenizer": {**byte_level, "use_regex": False},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [in_front, text],
                "pair": [in_front, text, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {cls.separator_name: ids},
            },
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {characters[byte]: byte for byte in range(256)},
                "merges": [],
            },
        }
        return json.dumps(content, indent=1) + "\n"


class FileTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, from its JSON file.

    The separator is the file's end-of-text token where it has one of the usual names.

    Args:
        path: `tokenizer.json`.

    Raises:
        ConfigError: the library is not installed, the file cannot be read, or it names no token
            that could separate documents.
    """

    SEPARATORS = (
        "<|endoftext|>",
        "</s>",
        "<|end_of_text|>",
        "<eos>",
        "<|im_end|>",
        "[SEP]",
        "<s>",
    )

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(
                f"`tokenizer` {path}: reading it needs the tokenizers library; "
                "pip install tokenizers, or use --tokenizer bytes"
            ) from error
        try:
            content = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"`tokenizer` {path}: cannot be read: {error}; give a tokenizer.json of the "
                "tokenizers library"
            ) from error
        ids = {name: self._tokenizer.token_to_id(name) for name in self.SEPARATORS}
        found = [(name, i) for name, i in ids.items() if i is not None]
        if not found:
            raise ConfigError(
                f"`tokenizer` {path}: one of the tokens {', '.join(self.SEPARATORS)} must separate "
                "documents, and it has none of them; add one as a special token"
            )
        self.separator_name, self.separator = found[0]
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.identity = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> np.ndarray[Any, Any]:
        """Return the tokens of `text`."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int64)

    def encode_all(self, texts: list[str]) -> list[np.ndarray[Any, Any]]:
        """Return the tokens of several texts, which the library turns side by side."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode_bytes(self, tokens: list[int]) -> bytes:
        """Return the text of the tokens in UTF-8; special tokens are nothing."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True).encode("utf-8")


def make_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of that name.

    Args:
        name: "bytes", a file of the `tokenizers` library, or a folder with `tokenizer.json`.

    Raises:
        ConfigError: there is no such tokenizer.
    """
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"`tokenizer` must be {BYTES!r} or a tokenizer.json, got {name!r}; there is no such "
            "file"
        )
    if path.read_bytes() == ByteTokenizer.file_content().encode():
        return ByteTokenizer()
    return FileTokenizer(path)
