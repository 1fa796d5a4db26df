"""Which layers of a model can be adapted, how they are chosen, and what their weight is."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from householder.adapters.errors import AdapterError


@dataclass(frozen=True)
class LayerShape:
    """The matrix that an adapter sees in a layer: y = W x with W `[out_features, in_features]`.

    Attributes:
        layer: "linear"; "linear_transposed" (GPT-2's layer, which stores Wᵀ); or "conv2d", whose W
            is the kernel `[out, in / groups, kh, kw]`, flattened but for its first dimension.
        out_features: rows of W.
        in_features: columns of W.
    """

    layer: str
    out_features: int
    in_features: int

    def to_dict(self) -> dict[str, Any]:
        """Return the shape as JSON values."""
        return asdict(self)


def layer_shape(module: nn.Module) -> LayerShape | None:
    """Return what an adapter sees in a layer, or None where it is not a layer that it knows.

    Known are `nn.Linear` and whatever else has `in_features` and `out_features` (quantised linear
    layers do), `nn.Conv2d`, and transformers' `Conv1D`.

    Examples:
        >>> layer_shape(nn.Conv2d(6, 4, 3, groups=2))
        LayerShape(layer='conv2d', out_features=4, in_features=27)
    """
    if isinstance(module, nn.Conv2d) and not isinstance(module, nn.ConvTranspose2d):
        kernel = module.kernel_size[0] * module.kernel_size[1]
        return LayerShape(
            "conv2d", module.out_channels, module.in_channels // module.groups * kernel
        )
    # Recognised by its class's name: transformers need not be installed.
    if any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf"):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return LayerShape("linear_transposed", weight.shape[1], weight.shape[0])
    # A bilinear layer has in1_features and in2_features; an embedding neither.
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return LayerShape("linear", sizes[1], sizes[0])
    return None


def choose(model: nn.Module, config_name: str, entries: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules, by full name, that names, endings and patterns stand for.

    Args:
        model: the model.
        config_name: what errors call the setting.
        entries: full names, endings of names after a dot, or shell patterns of either.

    Raises:
        AdapterError: an entry stands for no module at all.
    """
    modules = {name: module for name, module in model.named_modules() if name and _own(name)}
    chosen: dict[str, nn.Module] = {}
    for entry in entries:
        found = {name: m for name, m in modules.items() if matches(name, entry)}
        if not found:
            endings = sorted({*modules, *(name.rpartition(".")[2] for name in modules)})
            near = difflib.get_close_matches(entry, endings, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "see model.named_modules()"
            raise AdapterError(
                f"adapters: `{config_name}` must name modules of the model, got {entry!r}, which "
                f"stands for none of its {len(modules)}; {hint}"
            )
        chosen.update(found)
    return chosen


def choose_layers(
    model: nn.Module, targets: Sequence[str], exclude: Sequence[str], apart: Collection[str]
) -> dict[str, nn.Module]:
    """Return the layers to adapt, by full name.

    Args:
        model: the model.
        targets: names and patterns; patterns pass over what cannot be adapted.
        exclude: names and patterns to leave out.
        apart: full names of modules trained whole, whose insides patterns pass over too.

    Raises:
        AdapterError: nothing is left, or an entry without a wildcard stands for a module that
            cannot be adapted.
    """
    left_out = choose(model, "exclude", exclude).keys() if exclude else set()
    layers: dict[str, nn.Module] = {}
    for entry in targets:
        for name, module in choose(model, "targets", [entry]).items():
            reason = _why_not(model, name, module, apart)
            if name in left_out:
                continue
            if reason is None:
                layers[name] = module
            elif not any(letter in entry for letter in "*?["):
                raise AdapterError(f"adapters: `targets` cannot have {name}: {reason}")
    if targets and not layers:
        raise AdapterError(
            f"adapters: `targets` must name layers that can be adapted, got {list(targets)} and "
            f"`exclude` {list(exclude)}, which leave none; adaptable are linear layers and Conv2d"
        )
    # In the model's order, whatever the entries' order was.
    return {name: m for name, m in model.named_modules() if name in layers}


def matches(name: str, entry: str) -> bool:
    """Tell whether an entry stands for a module: its name, an ending after a dot, or a pattern.

    Examples:
        >>> matches("blocks.0.attn.qkv", "qkv"), matches("blocks.0.attn.qkv", "kv")
        (True, False)
        >>> matches("blocks.0.attn.qkv", "attn.*"), matches("blocks.0.attn.qkv", "blocks.[1-9].*")
        (True, False)
    """
    return fnmatchcase(name, entry) or fnmatchcase(name, f"*.{entry}")


def _own(name: str) -> bool:
    """Tell whether a module is the model's own and not an adapter's."""
    return STACK not in name.split(".")


# The child that an adapted layer gets; its adapters live in there.
STACK = "householder_adapters"


def _why_not(model: nn.Module, name: str, module: nn.Module, apart: Collection[str]) -> str | None:
    if any(name == other or name.startswith(f"{other}.") for other in apart):
        return "it is trained whole, as `train_also` asks; leave it out of one of the two"
    if layer_shape(module) is None:
        return (
            f"{type(module).__name__} is no layer that can be adapted; linear layers and Conv2d are"
        )
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return (
            "nn.MultiheadAttention reads the weight of its out_proj without calling the layer, so "
            "an adapter on it would have no effect; use an attention of linear layers"
        )
    return None


def read_weight(module: nn.Module) -> Tensor:
    """Return the layer's matrix W `[out, in]`; it may be a view of the weight.

    Raises:
        AdapterError: the layer has no plain dense weight.
    """
    if reason := not_dense(module):
        raise AdapterError(
            f"adapters: needs the layer's weight, but {reason}; adapt the model before quantising"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = layer_shape(module)
    assert shape is not None
    return weight.mT if shape.layer == "linear_transposed" else weight.flatten(1)


def write_weight(module: nn.Module, W: Tensor) -> None:
    """Put a matrix `[out, in]` in the place of the layer's, keeping parameter, dtype and layout."""
    shape, weight = layer_shape(module), module.weight
    assert shape is not None
    assert isinstance(weight, Tensor)
    if shape.layer == "linear_transposed":
        W = W.mT
    weight.data.copy_(W.reshape(weight.shape))


def not_dense(module: nn.Module) -> str | None:
    """Return why the layer's weight cannot be read and changed as a matrix, or None if it can."""
    weight = getattr(module, "weight", None)
    kind = getattr(type(module), "base_class", type(module))  # not the name of the adapted class
    if not isinstance(weight, Tensor):
        return f"{kind.__name__} keeps no weight tensor: it is quantised or packed"
    if kind.__module__.startswith("bitsandbytes") or not weight.is_floating_point():
        return f"{kind.__name__} is quantised: its weight is {weight.dtype}"
    if weight.dtype.itemsize == 1:
        return f"its weight is {weight.dtype}, too coarse to hold the change"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    return None


def shared_weights(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return, of the named layers, those whose weight another module uses too, and where."""
    users: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(path)
    shared = {}
    for name in names:
        weight = getattr(model.get_submodule(name), "weight", None)
        others = [p for p in users.get(id(weight), []) if p != f"{name}.weight"]
        if others:
            shared[name] = others[0]
    return shared


def parameter_dtype(module: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a layer's adapter: as asked, or the weight's, but at least float32."""
    weight = getattr(module, "weight", None)
    if dtype is not None:
        return dtype
    if isinstance(weight, Tensor) and weight.dtype == torch.float64:
        return torch.float64
    return torch.float32


def device_of(module: nn.Module) -> torch.device:
    """Return where a layer's adapter goes: where the layer is."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
