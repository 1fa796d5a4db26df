"""A language model as a folder: its config and its weights, never unpickled.

config.json          the fields of `CausalLMConfig`
model.safetensors    the parameters
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from householder.models.causal_lm import CausalLM
from householder.models.causal_lm_config import CausalLMConfig
from householder.storage import fsync_path, write_atomically

MODEL_TYPE = "householder"


def save_causal_lm(model: CausalLM, folder: Path | str) -> None:
    """Write a model to a folder, each file whole or absent.

    Args:
        model: on any device.
        folder: made when missing; a model that it holds is replaced.

    Raises:
        OSError: the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> model = CausalLM(CausalLMConfig(256, d_model=32, num_layers=1, head_dim=16))
        >>> folder = tempfile.mkdtemp()
        >>> save_causal_lm(model, folder)
        >>> tokens = torch.randint(256, (1, 5))
        >>> torch.equal(load_causal_lm(folder)(tokens), model(tokens))
        True
    """
    write_causal_lm(model.config, model.state_dict(), Path(folder))


def write_causal_lm(
    config: CausalLMConfig, state_dict: dict[str, torch.Tensor], folder: Path
) -> None:
    """Write a model from its config and its state dict, as `save_causal_lm` does."""
    write_model({"model_type": MODEL_TYPE, **config.to_dict()}, state_dict, folder)


def write_model(
    fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path
) -> None:
    """Write `config.json` and `model.safetensors`, each whole or not at all.

    Args:
        fields: of the config.
        tensors: by name, on any device.
        folder: made when missing.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    plain = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
    weights = folder / ".model.safetensors.tmp"
    save_file(plain, weights, metadata={"format": "pt"})
    fsync_path(weights)
    os.replace(weights, folder / "model.safetensors")
    write_atomically(folder / "config.json", json.dumps(fields, indent=2) + "\n")


def load_causal_lm(
    folder: Path | str,
    *,
    impl: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CausalLM:
    """Read a model that `save_causal_lm` or transformers wrote, in evaluation mode.

    Args:
        folder: with `config.json` and `model.safetensors`.
        impl: as in `CausalLM`.
        device: of the parameters; `None` for the CPU.
        dtype: of the parameters; `None` for that of the file.

    Returns:
        The model.

    Raises:
        ValueError: the folder holds no such model, or its weights do not fit its config.

    Examples:
        >>> import tempfile
        >>> model = CausalLM(CausalLMConfig(256, d_model=32, num_layers=1, head_dim=16))
        >>> folder = tempfile.mkdtemp()
        >>> save_causal_lm(model, folder)
        >>> load_causal_lm(folder, dtype=torch.bfloat16).head_weight.dtype
        torch.bfloat16
    """
    folder = Path(folder)
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = read_weights(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"load_causal_lm: `folder` must hold config.json and model.safetensors, {folder} does "
            f"not: {error}; give the folder `model` of a training run"
        ) from error
    model = CausalLM(config_from_json(fields, folder), impl=impl, device="meta")
    # transformers' model holds ours as `model`, and writes large ones in several files.
    tensors = {name.removeprefix("model."): x for name, x in tensors.items()}
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"load_causal_lm: the weights in {folder} must be those of its config, they are not: "
            f"{error}; give both of one model"
        ) from error
    return model.to(device=device, dtype=dtype).eval()


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in the folder's `model*.safetensors`, one file or several.

    Raises:
        OSError: there is no such file.
        ValueError: one is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors")) or [folder / "model.safetensors"]
    try:
        return {name: x for file in files for name, x in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def config_from_json(fields: dict[str, Any], folder: Path) -> CausalLMConfig:
    """Return the config in the content of `config.json`.

    Raises:
        ValueError: it is of another kind of model.
    """
    if fields.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"load_causal_lm: {folder}/config.json must be of model_type {MODEL_TYPE!r}, got "
            f"{fields.get('model_type')!r}; give a folder that householder wrote"
        )
    known = CausalLMConfig.__dataclass_fields__
    return CausalLMConfig.from_dict({k: v for k, v in fields.items() if k in known})
