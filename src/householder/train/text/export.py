"""A trained model as others read it: config, weights and tokenizer in one folder."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError

from householder.models import CausalLM, pretrained
from householder.storage import write_atomically
from householder.train.errors import OutputError
from householder.train.text.checkpoint import whole_state_dict
from householder.train.text.config import TextConfig
from householder.train.text.processes import Processes
from householder.train.text.tokenizer import BYTES, ByteTokenizer, make_tokenizer


def write_model(
    model: CausalLM, config: TextConfig, folder: Path, processes: Processes | None = None
) -> None:
    """Write a trained model and what turns text into its tokens. All processes call it.

    Args:
        model: sharded or not.
        config: `tokenizer`.
        folder: made when missing.
        processes: of the run; `None` for one.

    Raises:
        OutputError: the disk is full.
        OSError: the folder cannot be written.
    """
    weights = whole_state_dict(model)
    if processes is not None and not processes.first:
        return
    tokenizer = make_tokenizer(config.tokenizer)
    # What transformers has to know: where a document begins and ends, and how rows are filled up.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.separator)
    fields = {"model_type": pretrained.MODEL_TYPE, **model.config.to_dict(), **ids}
    try:
        pretrained.write_model(fields, weights, folder)
    except SafetensorError as error:  # how it tells of a full disk
        raise OutputError(
            f"{folder}: the model must be written, and cannot be: {error}; make room on the disk "
            "and continue with --resume"
        ) from error
    write_atomically(folder / "tokenizer.json", _tokenizer_file(config.tokenizer))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.separator_name)
    config_of_it = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    content = json.dumps({**config_of_it, **special}, indent=1) + "\n"
    write_atomically(folder / "tokenizer_config.json", content)


def _tokenizer_file(name: str) -> bytes:
    if name == BYTES:
        return ByteTokenizer.file_content().encode()
    path = Path(name)
    return (path / "tokenizer.json" if path.is_dir() else path).read_bytes()
