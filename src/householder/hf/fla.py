"""Checkpoints of flash-linear-attention as ours, and ours as theirs.

Both name most parameters alike; what differs are the config's words, the block's, and PaTH's
projections. A model of theirs that ours cannot be exactly is refused with the reason.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from householder.hf.fla_config import READERS, ConversionError, config_from_fla, config_to_fla
from householder.models import CausalLM, load_causal_lm
from householder.models.pretrained import MODEL_TYPE, read_weights, write_model

# Ours beside theirs, for parts of a parameter's name. PaTH has names of its own.
_NAMES = (
    ("mixer_norm.", "attn_norm."),
    ("mixer.", "attn."),
)
_PATH_NAMES = (
    ("attn.w_down_proj.", "attn.w_proj.0."),
    ("attn.w_up_proj.", "attn.w_proj.1."),
    ("attn.b_proj.", "attn.bt_proj."),
    ("attn.f_proj.", "attn.g_proj."),
)

# What stands beside the weights and is the same for both: the tokenizer, and when to stop.
_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "generation_config.json",
)
# What their config means where it does not say; ours has none then.
_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def from_fla(folder: Path | str) -> CausalLM:
    """Read a model of flash-linear-attention: `delta_net`, `gated_deltanet`, … `path_attn`.

    Args:
        folder: as its `save_pretrained` writes it: `config.json` and safetensors.

    Returns:
        The same function of tokens, in evaluation mode, with the weights in their dtype.

    Raises:
        ConversionError: the folder holds no such model, or one that has something ours has not.

    Examples:
        >>> import tempfile
        >>> from householder.models import CausalLMConfig
        >>> config = CausalLMConfig(64, d_model=32, num_layers=1, head_dim=16, pattern="delta")
        >>> model, folder = CausalLM(config), tempfile.mkdtemp()
        >>> to_fla(model, folder)  # as theirs is saved
        >>> tokens = torch.randint(64, (1, 5))
        >>> torch.equal(from_fla(folder)(tokens), model(tokens))
        True

    References:
        flash-linear-attention, https://github.com/fla-org/flash-linear-attention
    """
    folder = Path(folder)
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = read_weights(folder)
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"from_fla: `folder` must hold config.json and safetensors, {folder} does not: {error}"
            "; save the model with save_pretrained"
        ) from error
    config = config_from_fla(theirs)
    model = CausalLM(config, device="meta")
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    renamed = {_our_name(name, theirs["model_type"]): x for name, x in tensors.items()}
    if theirs["model_type"] == "path_attn" and not theirs.get("use_low_rank_w", True):
        renamed = dict(_factored(renamed))
    try:
        model.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        raise ConversionError(
            f"from_fla: the weights in {folder} must be those of its config, and are not: {error}"
            "; give both of one model"
        ) from error
    return model.eval()


def to_fla(model: CausalLM, folder: Path | str) -> None:
    """Write a model as flash-linear-attention reads it.

    Args:
        model: all of whose layers are one kind of recurrent mixer or PaTH, apart from rotary
            attention among recurrent ones.
        folder: made when missing.

    Raises:
        ConversionError: theirs cannot be the same function.
        OSError: the folder cannot be written.
    """
    _write_theirs(model, dict.fromkeys(_TOKEN_IDS), Path(folder))


def _write_theirs(model: CausalLM, ids: Mapping[str, Any], folder: Path) -> str:
    theirs = config_to_fla(model.config)
    tensors: Mapping[str, Tensor] = model.state_dict()
    if not theirs.get("use_low_rank_w", True):
        tensors = dict(_multiplied(tensors))
    state = {_their_name(name, theirs["model_type"]): x for name, x in tensors.items()}
    state.setdefault("lm_head.weight", state["model.embeddings.weight"])
    write_model({**theirs, **ids}, state, folder)
    return str(theirs["model_type"])


def convert(source: Path, target: Path) -> str:
    """Turn a folder of theirs into one of ours, or one of ours into one of theirs.

    The tokenizer's files and `generation_config.json` are copied.

    Args:
        source: a model of either kind, or the folder of a text run; its config says which.
        target: a folder that does not exist, or is empty.

    Returns:
        What was done, for people.

    Raises:
        ConversionError: it is no such model, cannot be converted, or `target` is occupied.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(
            f"convert: `target` must be a new or empty folder, {target} is occupied; choose another"
        )
    if (source / "model" / "config.json").is_file():
        source = source / "model"
    try:
        fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
        kind = fields.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConversionError(
            f"convert: `source` must be a folder with config.json and safetensors, {source} holds "
            f"no model: {error}; give the folder that save_pretrained or a text run wrote"
        ) from error
    unsaid = _TOKEN_IDS if kind in READERS else dict.fromkeys(_TOKEN_IDS)
    ids = {name: fields.get(name, default) for name, default in unsaid.items()}
    if kind in READERS:
        model = from_fla(source)
        ours = {"model_type": MODEL_TYPE, **model.config.to_dict(), **ids}
        write_model(ours, model.state_dict(), target)
        done = f"{source}: {kind} of flash-linear-attention -> {target}"
    else:
        try:
            model = load_causal_lm(source)
        except ValueError as error:
            raise ConversionError(
                f"convert: `source` must hold a model of householder, or of flash-linear-attention "
                f"({', '.join(READERS)}), {source} does not, of model_type {kind!r}: {error}; "
                "give the folder of one"
            ) from error
        done = f"{source} -> {target}: {_write_theirs(model, ids, target)}"
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return done


def _our_name(name: str, kind: str) -> str:
    name = name.removeprefix("model.").replace("lm_head.", "head.")
    if kind == "path_attn":
        for ours, theirs in _PATH_NAMES:
            name = name.replace(theirs, ours)
    for ours, theirs in _NAMES:
        name = name.replace(theirs, ours)
    return name


def _their_name(name: str, kind: str) -> str:
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    if kind == "path_attn":
        for ours, theirs in _PATH_NAMES:
            name = name.replace(ours, theirs)
    return f"lm_head.{name[5:]}" if name.startswith("head.") else f"model.{name}"


def _factored(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with W of `w_proj` as I · W, since ours is a product of two."""
    for name, x in tensors.items():
        head, found, _ = name.partition("mixer.w_proj.")
        if not found:
            yield name, x
            continue
        yield f"{head}mixer.w_down_proj.weight", x
        yield f"{head}mixer.w_up_proj.weight", torch.eye(x.shape[0], dtype=x.dtype)


def _multiplied(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with one `w_proj` in place of our two; of `_factored` the same W again."""
    for name, x in tensors.items():
        head, found, _ = name.partition("mixer.w_down_proj.")
        if found:
            yield f"{head}mixer.w_proj.weight", tensors[f"{head}mixer.w_up_proj.weight"] @ x
        elif "mixer.w_up_proj." not in name:
            yield name, x
