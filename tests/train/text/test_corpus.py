"""Files become tokens, tokens become documents in two parts."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from householder.train import ConfigError
from householder.train.text import corpus
from householder.train.text.batches import Windows, pack, validation_windows
from householder.train.text.corpus import (
    documents,
    open_corpus,
    standard_library,
    text_files,
    write_corpus,
)
from householder.train.text.tokenizer import ByteTokenizer, make_tokenizer

SEPARATOR = ByteTokenizer.separator


def build(folder: Path, texts: list[str], validation: float = 0.3):
    write_corpus(texts, folder, ByteTokenizer(), validation=validation, source={})
    return open_corpus(folder)


def split_documents(tokens) -> list[bytes]:
    pieces: list[list[int]] = []
    for token in np.asarray(tokens[0 : len(tokens)]).tolist():
        if token == SEPARATOR:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [bytes(piece) for piece in pieces]


def test_files_and_lines_are_documents(texts):
    skipped = []
    found = list(documents(text_files([texts]), skipped.append))
    assert [path.name for path in skipped] == ["picture.png"]
    assert sorted(text[:8] for text in found) == ["Häuser, ", "The quic", "five six", "one two "]


def test_every_document_is_in_one_part(tmp_path):
    texts = [f"document {i} " + "x" * (7 * i % 50) for i in range(40)]
    corpus = build(tmp_path / "corpus", texts)
    train, held_out = split_documents(corpus.train), split_documents(corpus.validation)
    assert sorted([*train, *held_out]) == sorted(text.encode() for text in texts)
    # Shuffled: the held-out documents are not those at the end.
    assert set(held_out) != {text.encode() for text in texts[-len(held_out) :]}
    assert 0.3 <= len(corpus.validation) / corpus.summary["tokens"] < 0.4


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_no_document_more_is_held_out_than_the_share_needs(tmp_path, share):
    corpus = build(tmp_path / "corpus", ["x" * 2**i for i in range(12)], validation=share)
    lengths = [1 + len(text) for text in split_documents(corpus.validation)]
    wanted = share * corpus.summary["tokens"]
    assert sum(lengths[1:]) <= wanted < sum(lengths)


def test_slices_cross_documents(tmp_path):
    corpus = build(tmp_path / "corpus", [f"{i:03d}" for i in range(50)])
    whole = np.asarray(corpus.train[0 : len(corpus.train)])
    for begin, end in [(0, 1), (3, 9), (17, 90), (len(whole) - 5, len(whole) + 5), (4, 4)]:
        np.testing.assert_array_equal(np.asarray(corpus.train[begin:end]), whole[begin:end])


def test_of_one_document_the_end_is_held_out(tmp_path):
    corpus = build(tmp_path / "corpus", ["abcdefghi"], validation=0.2)
    assert split_documents(corpus.train) == [b"abcdefg"]
    assert bytes(corpus.validation.astype(np.uint8)) == b"hi"


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

        def encode(self, text):
            return super().encode(text) + 69_000

    write_corpus(["abc"], tmp_path / "corpus", Wide(), validation=0.1, source={})
    corpus = open_corpus(tmp_path / "corpus")
    assert corpus.train.dtype == np.uint32
    assert corpus.train.tolist() == [256, 69_097, 69_098, 69_099]


def test_max_tokens_ends_with_the_document_that_reaches_it(tmp_path):
    write_corpus(
        ["abc", "def", "ghi"],
        tmp_path / "corpus",
        ByteTokenizer(),
        validation=0.1,
        source={},
        max_tokens=5,
    )
    assert open_corpus(tmp_path / "corpus").summary["documents"] == 2


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_refused_and_leaves_nothing(tmp_path, texts):
    with pytest.raises(ConfigError, match=r"must name files with text in UTF-8, got .*; name"):
        build(tmp_path / "corpus", texts)
    assert not (tmp_path / "corpus").exists()


def test_bad_lines_and_paths_are_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(ConfigError, match=r"line 2 of .*bad.jsonl must be .* got .*not.*; mend"):
        list(documents([tmp_path / "bad.jsonl"], print))
    with pytest.raises(ConfigError, match=r"got .*absent: there is no such path"):
        text_files([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no files in"):
        text_files([tmp_path / "empty"])


def test_damaged_corpus_is_refused(tmp_path):
    build(tmp_path / "corpus", ["abcdefghi"])
    with open(tmp_path / "corpus" / "tokens.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ConfigError, match="must hold 10 tokens in format 1, holds 11"):
        open_corpus(tmp_path / "corpus")


def test_windows_of_an_epoch_cover_the_text_once_and_epochs_differ():
    windows = Windows(np.arange(1000), context=10, seed=3, separator=None)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch)
        rows = [windows.batch(step, 1).tokens[0] for step in steps]
        starts = sorted(int(row[0]) for row in rows)
        assert all(b - a == 10 for a, b in pairwise(starts))
        assert all((row.diff() == 1).all() for row in rows)
        epochs.append([int(row[0]) for row in rows])
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    begins = {
        int(windows.batch(epoch * windows.per_epoch, 1).tokens[0, 0]) % 10 for epoch in range(9)
    }
    assert len(begins) > 3  # the first token of a window is another one in every epoch


def test_a_batch_depends_on_seed_and_step_alone():
    def batch(step, seed=0):
        return Windows(np.arange(1000), 10, seed, None).batch(step, 4).tokens

    assert batch(30).equal(batch(30))
    assert not batch(30).equal(batch(31))
    assert not batch(30).equal(batch(30, seed=1))


def test_processes_share_a_batch():
    windows = Windows(np.arange(1000), 10, 0, None)
    whole = windows.batch(5, 6).tokens
    parts = [windows.batch(5, 6, rank=rank, world_size=2).tokens for rank in (0, 1)]
    assert parts[0].equal(whole[0::2])
    assert parts[1].equal(whole[1::2])


def test_too_little_text_is_refused():
    with pytest.raises(ConfigError, match="`context` must be at most half of the 19 training"):
        Windows(np.arange(19), 10, 0, None)


def test_windows_end_documents():
    windows = np.array([[1, SEPARATOR, 2, SEPARATOR], [SEPARATOR, 3, 4, 5]])
    assert pack(windows, SEPARATOR).cu_seqlens.tolist() == [0, 1, 3, 6]
    assert pack(windows, None).cu_seqlens is None


def test_validation_windows_are_at_least_one_if_there_is_text():
    assert validation_windows(np.arange(50), 10, max_tokens=3).shape == (1, 11)
    assert validation_windows(np.arange(50), 10, max_tokens=35).shape == (3, 11)
    assert validation_windows(np.arange(50), 60, max_tokens=999).shape == (0, 61)


def test_tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = make_tokenizer(str(name))
        assert tokenizer.encode("b a b").tolist() == [2, 1, 2]
        assert tokenizer.decode([2, 0, 1]) == "b a"
        assert (tokenizer.separator, tokenizer.vocab_size) == (0, 4)


def test_bytes_as_a_file_of_the_library(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer.file_content())
    plain = make_tokenizer(str(tmp_path))
    assert isinstance(plain, ByteTokenizer)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    characters = "".join(chr(i) for i in range(0x3000) if not 0xD800 <= i < 0xE000)
    for text in ("", "né ☃ \t\n  it's 12", characters, "\U0001f600"):
        ids = made.encode(text).ids
        assert ids == [plain.separator, *plain.encode(text).tolist()]
        assert made.decode(ids) == text
    assert made.token_to_id(plain.separator_name) == plain.separator


def test_tokenizers_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must be 'bytes' or a tokenizer.json, got 'words'"):
        make_tokenizer("words")
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_tokenizer(str(tmp_path))


def test_summary_is_json(tmp_path):
    build(tmp_path / "corpus", ["abc", "de"])
    summary = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert (summary["documents"], summary["tokens"]) == (2, 7)


def test_the_standard_library_is_without_installed_packages():
    files = standard_library()
    names = {path.name for path in files}
    assert {"argparse.py", "abc.py"} <= names
    assert not any({"site-packages", "dist-packages"} & set(path.parts) for path in files)
    assert all(path.suffix == ".py" for path in files)


def test_a_dataset_is_read_as_it_arrives(monkeypatch):
    rows = [{"text": "one", "id": 1}, {"text": "two", "id": 2}]
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        yield from rows

    library = ModuleType("datasets")
    library.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: name)
    assert list(corpus.dataset_documents("a/b:c")) == ["one", "two"]
    assert asked == [(("a/b", "c"), {"split": "train", "streaming": True})]
    rows.append({"body": "three", "id": 3})
    with pytest.raises(ConfigError, match='a/b: every row must have a string "text", got one of'):
        list(corpus.dataset_documents("a/b"))

    def fail(*arguments, **options):
        raise ConnectionError("no route to the hub")

    library.load_dataset = fail
    with pytest.raises(ConfigError, match="cannot be read: no route to the hub; check its name"):
        list(corpus.dataset_documents("a/b"))
