"""Adapters in a folder: tensors as safetensors, everything else as JSON.

    adapter.json                   settings, adapted layers with their sizes, name and digest of
    adapter-<digest>.safetensors   the tensors

Both are written whole or not at all. The JSON file is replaced last and names the tensors it goes
with, so that a kill at any moment leaves the old adapter or the new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from householder.adapters.config import config_from_dict
from householder.adapters.errors import AdapterError
from householder.adapters.inject import adapted_modules
from householder.adapters.layers import Replacement
from householder.adapters.model import detach, install
from householder.adapters.state import config_of, state_of
from householder.adapters.targets import LayerShape, layer_shape
from householder.storage import write_atomically

FORMAT = 1
CONFIG_FILE = "adapter.json"
REPLACED = "replaced"  # what stands in place of a layer's kind for modules trained whole


def save(model: nn.Module, folder: str | Path, name: str | None = None) -> Path:
    """Save one adapter: its settings, its tensors and the modules trained whole with it.

    Args:
        model: a model with adapters.
        folder: where to write; made when missing. An adapter it holds is replaced.
        name: of the adapter; may be left out where there is only one.

    Returns:
        The folder.

    Raises:
        AdapterError: the name is unknown, or left out with several adapters attached.
        OSError: the folder cannot be written.

    Examples:
        >>> import tempfile, torch
        >>> from householder import adapters
        >>> def base():
        ...     torch.manual_seed(0)
        ...     return torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> model = adapters.attach(base(), adapters.HTAConfig(targets="0"))
        >>> folder = adapters.save(model, tempfile.mkdtemp())
        >>> other = adapters.load(base(), folder)
        >>> x = torch.randn(3, 8)
        >>> bool((model(x) == other(x)).all())
        True
    """
    name = the_name("save", model, name)
    config = state_of(model).configs[name]
    layers: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for module_name, (module, stack) in adapted_modules(model).items():
        if name not in stack.layers:
            continue
        layer = stack.layers[name]
        shape = layer_shape(module)
        if isinstance(layer, Replacement):
            layers[module_name] = {"layer": REPLACED, "class": type(layer.module).__name__}
        else:
            assert shape is not None
            layers[module_name] = shape.to_dict()
        for key, tensor in layer.state_dict().items():
            # A copy: safetensors refuses tensors that share memory.
            tensors[f"{module_name}:{key}"] = tensor.detach().to("cpu", copy=True).contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors(tensors)
    digest = hashlib.sha256(data).hexdigest()
    file = f"adapter-{digest[:12]}.safetensors"
    write_atomically(folder / file, data)
    content = {
        "format": FORMAT,
        "name": name,
        "config": config.to_dict(),
        "layers": layers,
        "tensors": {"file": file, "sha256": digest},
    }
    write_atomically(folder / CONFIG_FILE, json.dumps(content, indent=1) + "\n")
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != file:
            old.unlink()
    return folder


def load(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    activate: bool = True,
    trainable: bool = True,
) -> nn.Module:
    """Attach an adapter that `save` wrote, in place.

    Everything is checked before the model is touched: the bytes against their digest, the adapted
    layers against the model's, every tensor's shape.

    Args:
        model: the base model, or one with other adapters.
        folder: what `save` wrote.
        name: to give it in this model; the name it was saved under if None.
        activate: make it the one that acts.
        trainable: whether its parameters want gradients while it is active.

    Returns:
        The same model.

    Raises:
        AdapterError: the folder holds no adapter or a damaged one, or it does not fit the model;
            says what must be and what is.

    Examples:
        >>> import tempfile
        >>> from householder import adapters
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> folder = tempfile.mkdtemp()
        >>> _ = adapters.save(adapters.attach(model, adapters.HTAConfig(targets="0")), folder)
        >>> adapters.names(adapters.load(adapters.detach(model), folder, "again"))
        ['again']
    """
    folder = Path(folder)
    content = _read_json(folder)
    tensors = _read_tensors(folder, content)
    config = config_from_dict(content["config"])
    _check_layers(folder, model, content["layers"])
    chosen = name or content["name"]
    modules = dict(model.named_modules())
    replaced = {n: modules[n] for n, s in content["layers"].items() if s["layer"] == REPLACED}
    layers = {n: modules[n] for n in content["layers"] if n not in replaced}
    install(model, config, chosen, layers, replaced, activate=activate, trainable=trainable)
    try:
        fill(model, chosen, tensors, str(folder))
    except AdapterError:
        detach(model, chosen)
        raise
    return model


def fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put tensors, by `<module>:<key>`, into an attached adapter; all or none.

    Raises:
        AdapterError: a tensor is missing, left over or of another shape.
    """
    places: dict[str, Tensor] = {}
    for module_name, (_, stack) in adapted_modules(model).items():
        if name in stack.layers:
            for key, tensor in stack.layers[name].state_dict().items():
                places[f"{module_name}:{key}"] = tensor
    for key in sorted(places.keys() | tensors.keys()):
        needed, given = places.get(key), tensors.get(key)
        if needed is None or given is None or needed.shape != given.shape:
            sizes = ["absent" if t is None else str(list(t.shape)) for t in (needed, given)]
            raise AdapterError(
                f"{source}: does not fit the model: {key} must be {sizes[0]}, is {sizes[1]}; load "
                "it into the model it was made for"
            )
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(tensors[key])


def the_name(function: str, model: nn.Module, name: str | None) -> str:
    """Return the name, or that of the only adapter.

    Raises:
        AdapterError: the name is unknown, or left out with several adapters attached.
    """
    state = state_of(model)
    if name is None and len(state.configs) != 1:
        raise AdapterError(
            f"adapters.{function}: `name` must say which of {', '.join(state.configs)}, got None; "
            "adapters.active tells which of them act"
        )
    name = name or next(iter(state.configs))
    config_of(function, state, name)
    return name


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
    except FileNotFoundError as error:
        if (folder / "adapter_config.json").is_file():
            message = "holds an adapter of peft's; read it with adapters.load_peft"
        else:
            message = f"holds no adapter, no {CONFIG_FILE}; give the folder adapters.save wrote"
        raise AdapterError(f"{folder}: {message}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: is damaged ({error}); save the adapter again") from error
    if version != FORMAT:
        raise AdapterError(
            f"{path}: must be of adapter format {FORMAT}, is of format {version!r}; load it with "
            "the version of householder that wrote it"
        )
    if missing := [key for key in ("name", "config", "layers", "tensors") if key not in content]:
        raise AdapterError(f"{path}: is damaged: lacks {', '.join(missing)}; save it again")
    return content


def _read_tensors(folder: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    # Only the name: a config must not be able to point out of its folder.
    path = folder / Path(content["tensors"]["file"]).name
    try:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != content["tensors"]["sha256"]:
            raise AdapterError(
                f"{path}: is damaged: its SHA-256 must be {content['tensors']['sha256']}, is "
                f"{digest}; save the adapter again"
            )
        return load_tensors(data)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}; save the adapter again") from error


def _check_layers(folder: Path, model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless the model has every layer of the adapter, with its kind and sizes."""
    modules = dict(model.named_modules())
    misfits = []
    for name, stored in layers.items():
        module = modules.get(name)
        shape = None if module is None else layer_shape(module)
        if module is None:
            misfits.append(f"{name} must be a {stored['layer']} layer, is absent")
        elif stored["layer"] != REPLACED and shape != LayerShape(**stored):
            is_ = "another kind of module" if shape is None else _words(shape)
            misfits.append(f"{name} must be {_words(LayerShape(**stored))}, is {is_}")
    if misfits:
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise AdapterError(
            f"{folder}: does not fit the model: {misfits[0]}{more}; load it into the model it was "
            "made for"
        )


def _words(shape: LayerShape) -> str:
    return f"{shape.layer} [{shape.out_features}, {shape.in_features}]"
