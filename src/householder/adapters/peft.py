"""Exchange with peft: its HRA checkpoints in and out, and HRA's change as a LoRA that it loads.

The files are peft's: `adapter_config.json` and `adapter_model.safetensors`. Reading and writing
them needs no peft.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from householder.adapters.config import HRAConfig
from householder.adapters.errors import AdapterError
from householder.adapters.inject import adapted_modules
from householder.adapters.layers import AdapterLayer, HRALayer, Replacement
from householder.adapters.model import detach, install
from householder.adapters.state import state_of
from householder.adapters.storage import fill, the_name
from householder.adapters.targets import layer_shape, not_dense, read_weight
from householder.storage import write_atomically

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def load_peft(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    activate: bool = True,
    trainable: bool = True,
) -> nn.Module:
    """Attach an HRA adapter that peft saved, in place.

    Args:
        model: the base model, not wrapped by peft.
        folder: what peft's `save_pretrained` wrote.
        name: to give the adapter.
        activate: make it the one that acts.
        trainable: whether its parameters want gradients while it is active.

    Returns:
        The same model. Its outputs are peft's to rounding; with `apply_GS` too, once trained away
        from peft's start, where peft itself normalises rounding noise.

    Raises:
        AdapterError: it is no HRA adapter, is damaged, or does not fit the model.

    Examples:
        >>> import tempfile
        >>> from householder import adapters
        >>> model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
        >>> config = adapters.HRAConfig(targets="0", num_householder=2, init="random")
        >>> before = adapters.attach(model, config)(x)
        >>> folder = adapters.save_peft(model, tempfile.mkdtemp())  # as peft itself writes it
        >>> after = adapters.load_peft(adapters.detach(model), folder)(x)
        >>> torch.allclose(after, before, atol=1e-6)
        True
    """
    folder = Path(folder)
    settings, tensors = _read(folder)
    if settings.get("peft_type") != "HRA":
        raise AdapterError(
            f"{folder}: must be an adapter of peft's type HRA, is {settings.get('peft_type')!r}; "
            "peft itself loads other types"
        )
    if settings.get("bias", "none") != "none":
        raise AdapterError(
            f"{folder}: was trained with bias={settings['bias']!r}, which changes the base model's "
            'biases; only bias="none" can be attached'
        )
    modules = dict(model.named_modules())
    layers, apart, renamed = _places(folder, modules, tensors)
    config = HRAConfig(
        targets=list(layers),
        train_also=list(apart),
        num_householder=settings["r"],
        orthogonalize="all" if settings.get("apply_GS") else None,
        init="random",
    )
    install(model, config, name, layers, apart, activate=activate, trainable=trainable)
    try:
        fill(model, name, renamed, str(folder))
    except AdapterError:
        detach(model, name)
        raise
    return model


def _places(
    folder: Path, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], dict[str, Tensor]]:
    """Return adapted layers, modules trained whole, and the tensors under our names for them."""
    layers: dict[str, nn.Module] = {}
    apart: dict[str, nn.Module] = {}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, last = key.removeprefix(PREFIX).rpartition(".")
        if name not in modules:
            raise AdapterError(
                f"{folder}: does not fit the model: {name} must be a layer, is absent; load it "
                "into the model it was made for"
            )
        if last == "hra_u":
            layers[name] = modules[name]
            # Columns, the last of which acts first.
            renamed[f"{name}:reflectors"] = tensor.mT.flip(0).contiguous()
        else:
            apart[name] = modules[name]
            renamed[f"{name}:module.{last}"] = tensor
    return layers, apart, renamed


def save_peft(model: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """Save an HRA adapter as peft does, for `PeftModel.from_pretrained` to load.

    Args:
        model: a model with an HRA adapter.
        folder: where to write; made when missing.
        name: of the adapter; may be left out where there is only one.

    Returns:
        The folder.

    Raises:
        AdapterError: the adapter is of another kind or of a form that peft does not have
            (`orthogonalize="halves"`), or peft would compute something else: it ignores dilation,
            groups, padding modes, and all but the first entry of a kernel's size, stride and
            padding.
        OSError: the folder cannot be written.
    """
    name = the_name("save_peft", model, name)
    config = state_of(model).configs[name]
    if not isinstance(config, HRAConfig) or config.orthogonalize == "halves":
        raise AdapterError(
            'adapters.save_peft: needs an HRA adapter with orthogonalize=None or "all", got '
            f"{config}; merge it into the model, or save with adapters.save"
        )
    layers, apart, tensors = _members(model, name)
    for module_name, (module, layer) in layers.items():
        assert isinstance(layer, HRALayer)
        _check_peft_computes_the_same(module_name, module)
        tensors[f"{PREFIX}{module_name}.hra_u"] = _plain(layer.reflectors.flip(0).mT)
    settings = {
        "peft_type": "HRA",
        "r": config.num_householder,
        "apply_GS": config.orthogonalize == "all",
        "target_modules": list(layers),
        "modules_to_save": apart or None,
        "bias": "none",
        "init_weights": True,
        "inference_mode": True,
    }
    return _write(folder, settings, tensors)


def export_lora(model: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """Save the change an HRA adapter makes as a LoRA of rank N, which peft and others load.

    W Q − W = −(W Kᵀ) T K is of rank N exactly, so the LoRA is not an approximation: its outputs
    differ by rounding. It belongs to this base model's weights, which must be dense and readable.

    Args:
        model: a model with an HRA adapter, not merged.
        folder: where to write; made when missing.
        name: of the adapter; may be left out where there is only one.

    Returns:
        The folder, for `PeftModel.from_pretrained`.

    Raises:
        AdapterError: the adapter's change is not of low rank, a layer is quantised, the adapter is
            merged, or a convolution has groups, for which LoRA has no such form.
        OSError: the folder cannot be written.
    """
    name = the_name("export_lora", model, name)
    state = state_of(model)
    if state.merged:
        raise AdapterError(
            "adapters.export_lora: needs the base model's own weights, but "
            f"{', '.join(state.merged)} are merged into them; adapters.unmerge first"
        )
    layers, apart, tensors = _members(model, name)
    rank, transposed = 1, set()
    for module_name, (module, layer) in layers.items():
        B, A = _low_rank_change(module_name, module, layer)
        rank = len(A)
        tensors[f"{PREFIX}{module_name}.lora_A.weight"] = _plain(A)
        tensors[f"{PREFIX}{module_name}.lora_B.weight"] = _plain(B)
        transposed.add(_is_transposed(module))
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,  # the scale alpha / r is 1
        "lora_dropout": 0.0,
        "target_modules": list(layers),
        "modules_to_save": apart or None,
        "fan_in_fan_out": transposed == {True},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return _write(folder, settings, tensors)


@torch.no_grad()
def _low_rank_change(name: str, module: nn.Module, layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """Return B and A in the shapes of LoRA's parameters for this layer."""
    if reason := not_dense(module):
        raise AdapterError(
            f"adapters.export_lora: needs the weight of {name}, but {reason}; adapters.save keeps "
            "the adapter as it is"
        )
    B, A = layer.change(read_weight(module))
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            raise AdapterError(
                f"adapters.export_lora: {name} has {module.groups} groups, for which no LoRA has "
                "the form of this change; merge the adapter into the model instead"
            )
        return B[:, :, None, None], A.reshape(-1, *module.weight.shape[1:])
    return B, A


def _members(
    model: nn.Module, name: str
) -> tuple[dict[str, tuple[nn.Module, AdapterLayer]], list[str], dict[str, Tensor]]:
    """Return adapted modules with their layers, the names of those trained whole, their tensors."""
    layers: dict[str, tuple[nn.Module, AdapterLayer]] = {}
    apart: list[str] = []
    tensors: dict[str, Tensor] = {}
    for module_name, (module, stack) in adapted_modules(model).items():
        if name not in stack.layers:
            continue
        layer = stack.layers[name]
        if isinstance(layer, AdapterLayer):
            layers[module_name] = module, layer
        elif isinstance(layer, Replacement):
            apart.append(module_name)
            for key, value in layer.module.state_dict().items():
                tensors[f"{PREFIX}{module_name}.{key}"] = _plain(value)
    return layers, apart, tensors


def _is_transposed(module: nn.Module) -> bool:
    shape = layer_shape(module)
    return shape is not None and shape.layer == "linear_transposed"


def _check_peft_computes_the_same(name: str, module: nn.Module) -> None:
    if _is_transposed(module):
        raise AdapterError(
            f"adapters.save_peft: {name} is a Conv1D, which peft's HRA does not adapt; "
            "adapters.export_lora makes a LoRA of it"
        )
    if not isinstance(module, nn.Conv2d):
        return
    pairs = {
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
    }
    uneven = [f"{k}={v}" for k, v in pairs.items() if isinstance(v, tuple) and v[0] != v[1]]
    if module.dilation != (1, 1):
        uneven.append(f"dilation={module.dilation}")
    if module.groups > 1:
        uneven.append(f"groups={module.groups}")
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        uneven.append(f"padding={module.padding!r}, padding_mode={module.padding_mode!r}")
    if uneven:
        raise AdapterError(
            f"adapters.save_peft: {name} has {', '.join(uneven)}, which peft's HRA ignores or "
            "refuses, so that it would compute something else; adapters.save keeps it"
        )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSOR_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(
            f"{folder}: cannot be read as an adapter of peft's: {error}; give the folder that "
            f"save_pretrained wrote, with {CONFIG_FILE} and {TENSOR_FILE}"
        ) from error
    return settings, tensors


def _write(folder: str | Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSOR_FILE, save_tensors(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, json.dumps(settings, indent=2) + "\n")
    return folder
