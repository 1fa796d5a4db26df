"""A little text, and a model small enough to train on it in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TINY: dict[str, Any] = {
    "context": 16,
    "d_model": 16,
    "head_dim": 8,
    "num_layers": 2,
    "mlp_width": 16,
    "pattern": "delta_product,path",
    "steps": 8,
    "batch_size": 4,
    "warmup": 2,
    "validation": 0.2,
    "eval_interval": 3,
    "eval_tokens": 64,
    "sample_tokens": 3,
    "log_interval": 2,
    "checkpoint_interval": 3,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of text: two files in two folders, a `.jsonl`, and what is no text or hidden."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 6)
    (folder / "more" / "b.md").write_text("Häuser, Höfe und Hütten; " * 8, encoding="utf-8")
    (folder / "c.jsonl").write_text('{"text": "one two three four"}\n{"text": "five six"}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    (folder / ".hidden").write_text("not this")
    return folder
