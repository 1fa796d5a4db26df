"""Adapters of a whole model: attach, switch, detach."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from householder.adapters.config import DTYPES, AdapterConfig
from householder.adapters.errors import AdapterError
from householder.adapters.inject import adapted_modules, add_stack, remove_stack, stack_of
from householder.adapters.layers import AdapterLayer, HRALayer, Replacement, make_layer
from householder.adapters.state import (
    STATE,
    ModelState,
    config_of,
    refuse_while_merged,
    state_of,
)
from householder.adapters.targets import (
    choose,
    choose_layers,
    device_of,
    layer_shape,
    not_dense,
    parameter_dtype,
)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def attach(
    model: nn.Module,
    config: AdapterConfig,
    name: str = "default",
    *,
    activate: bool = True,
    trainable: bool = True,
    freeze: bool = True,
) -> nn.Module:
    """Attach an adapter to a model, in place.

    The adapted layers stay the objects they are and keep the names of their weights; each gets a
    child that holds its adapters. A fresh adapter of `init="identity"` (the default) changes
    nothing yet. Quantised linear layers can be adapted, since none of the kinds needs to read a
    linear layer's weight.

    Args:
        model: any PyTorch model.
        config: an `HRAConfig`, `HTAConfig` or `TwoSidedConfig`; says which layers.
        name: of the adapter; several can be attached under different names.
        activate: make it the one that acts, in place of those active before.
        trainable: whether its parameters want gradients while it is active.
        freeze: let no parameter of the base model want gradients, until the last adapter is
            detached.

    Returns:
        The same model.

    Raises:
        AdapterError: the name is taken, no layer fits, a layer cannot be adapted, or its sizes do
            not suit the settings. The model is then as it was.

    Examples:
        >>> import torch
        >>> from householder import adapters
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(3, 8)
        >>> before = model(x)
        >>> _ = adapters.attach(model, adapters.HRAConfig(targets="0", num_householder=4))
        >>> torch.allclose(model(x), before, atol=1e-6)  # starts as the identity
        True
        >>> adapters.num_parameters(model)
        32
    """
    if not isinstance(config, AdapterConfig):
        raise AdapterError(
            f"adapters.attach: `config` must be a settings object, got {type(config).__name__}; "
            "make an HRAConfig, an HTAConfig or a TwoSidedConfig"
        )
    apart = choose(model, "train_also", config.train_also) if config.train_also else {}
    layers = choose_layers(model, config.targets, config.exclude, apart.keys())
    return install(
        model,
        config,
        name,
        layers,
        apart,
        activate=activate,
        trainable=trainable,
        freeze=freeze,
    )


def install(
    model: nn.Module,
    config: AdapterConfig,
    name: str,
    layers: Mapping[str, nn.Module],
    apart: Mapping[str, nn.Module],
    *,
    activate: bool = True,
    trainable: bool = True,
    freeze: bool = True,
) -> nn.Module:
    """Do what `attach` does, to layers and modules chosen already, by full name."""
    state = state_of(model, make=True)
    if not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise AdapterError(
            "adapters.attach: `name` must be a word of letters, digits, _ and -, which no method "
            f'of nn.ModuleDict has, got {name!r}; "default" or "task_a" will do'
        )
    if name in state.configs:
        raise AdapterError(
            f"adapters.attach: the model has an adapter {name!r} already; detach it first or give "
            "another name"
        )
    refuse_while_merged("attach", state)
    made = _make(config, layers, apart)
    if freeze and not state.configs:
        state.was_trainable = tuple(n for n, p in model.named_parameters() if p.requires_grad)
        model.requires_grad_(False)
    for module_name, layer in made.items():
        stack = add_stack(
            model.get_submodule(module_name), hook=_has_fused_ancestor(model, module_name)
        )
        stack.layers[name] = layer.train(model.training)
    state.configs[name] = config
    if not trainable:
        state.frozen |= {name}
    setattr(model, STATE, state)
    _set_active(model, state, (name,) if activate else state.active)
    return model


def _make(
    config: AdapterConfig,
    layers: Mapping[str, nn.Module],
    apart: Mapping[str, nn.Module],
) -> dict[str, AdapterLayer | Replacement]:
    """Make the adapters of all layers, and the copies of the modules that are trained whole."""
    made: dict[str, AdapterLayer | Replacement] = {}
    for module_name, module in apart.items():
        others = [layer for stack in [stack_of(module)] if stack for layer in stack.layers.values()]
        inside = [n for n, m in module.named_modules() if n and stack_of(m) is not None]
        if inside or any(isinstance(other, AdapterLayer) for other in others):
            raise AdapterError(
                f"adapters.attach: `train_also` cannot have {module_name}: another adapter has "
                "adapted layers in it; detach that first"
            )
        copied = copy.deepcopy(module)
        if stack_of(copied) is not None:
            remove_stack(copied)
        made[module_name] = Replacement(copied)
    dtype = None if config.dtype is None else DTYPES[config.dtype]
    for module_name, module in layers.items():
        stack = stack_of(module)
        if stack and any(isinstance(other, Replacement) for other in stack.layers.values()):
            raise AdapterError(
                f"adapters.attach: `targets` cannot have {module_name}: another adapter trains it "
                "whole; detach that first"
            )
        shape = layer_shape(module)
        assert shape is not None  # or it would not have been chosen
        if shape.layer == "conv2d" and (reason := not_dense(module)):
            raise AdapterError(
                f"adapters.attach: `targets` cannot have {module_name}: an adapter of a "
                f"convolution changes its kernel, but {reason}; leave it out with `exclude`"
            )
        layer = make_layer(config, shape, module_name)
        made[module_name] = layer.to(device_of(module), parameter_dtype(module, dtype))
    return made


def _has_fused_ancestor(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    return any(isinstance(module, nn.TransformerEncoderLayer) for module in above)


def activate(model: nn.Module, *names: str) -> None:
    """Choose which adapters act, and want gradients; none at all for no names.

    Several act one upon the other: the first on the base model's layers, the next on what that
    makes of them. Modules trained whole are those of the last.

    Args:
        model: a model with adapters.
        *names: of attached adapters.

    Raises:
        AdapterError: a name is unknown or given twice, or adapters are merged.

    Examples:
        >>> from householder import adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("first", "second"):
        ...     _ = adapters.attach(model, adapters.HTAConfig(targets="0"), name)
        >>> adapters.active(model)
        ['second']
        >>> adapters.activate(model, "first", "second")
        >>> adapters.active(model)
        ['first', 'second']
    """
    state = state_of(model)
    for name in names:
        config_of("activate", state, name)
    if len(set(names)) != len(names):
        raise AdapterError(
            f"adapters.activate: names must differ, got {list(names)}; give each once"
        )
    refuse_while_merged("activate", state)
    _set_active(model, state, names)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let the base model act by itself for the time of the block.

    Args:
        model: a model with adapters.

    Raises:
        AdapterError: adapters are merged into the weights.

    Examples:
        >>> import torch
        >>> from householder import adapters
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(4)
        >>> base = model(x)
        >>> config = adapters.HRAConfig(targets="0", num_householder=1, init="random")
        >>> _ = adapters.attach(model, config)
        >>> bool((model(x) == base).all())
        False
        >>> with adapters.disabled(model):
        ...     bool((model(x) == base).all())
        True
    """
    state = state_of(model)
    refuse_while_merged("disabled", state)
    before = state.active
    _set_active(model, state, (), gradients=False)
    try:
        yield
    finally:
        _set_active(model, state, before, gradients=False)


def _set_active(
    model: nn.Module, state: ModelState, names: tuple[str, ...], *, gradients: bool = True
) -> None:
    state.active = names
    for _, stack in adapted_modules(model).values():
        stack.active = names
        if gradients:
            for name, layer in stack.layers.items():
                layer.requires_grad_(name in names and name not in state.frozen)


def detach(model: nn.Module, name: str | None = None, *, keep_merged: bool = False) -> nn.Module:
    """Remove one adapter, or all, in place; without adapters the model is what it was.

    Args:
        model: a model with adapters.
        name: of the adapter to remove; all of them if None.
        keep_merged: leave the weights as merged and remove all adapters: the model has then taken
            up the adapters for good.

    Returns:
        The same model.

    Raises:
        AdapterError: the name is unknown; adapters are merged and `keep_merged` is not given.

    Examples:
        >>> from householder import adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = adapters.attach(model, adapters.HTAConfig(targets="0"))
        >>> adapters.detach(model)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
        )
    """
    state = state_of(model)
    if name is not None:
        config_of("detach", state, name)
    if state.merged and not keep_merged:
        raise AdapterError(
            f"adapters.detach: {', '.join(state.merged)} are merged into the weights; unmerge "
            "first, or keep them there with keep_merged=True"
        )
    if keep_merged and name is not None and set(state.configs) != {name}:
        raise AdapterError(
            "adapters.detach: keep_merged=True removes all adapters, since the others were made "
            f"for the weights from before merging; got name={name!r}"
        )
    gone = [name] if name is not None else list(state.configs)
    for module, stack in adapted_modules(model).values():
        for each in gone:
            if each in stack.layers:
                del stack.layers[each]
        if not stack.layers:
            remove_stack(module)
    for each in gone:
        del state.configs[each]
    state.frozen -= set(gone)
    if state.configs:
        _set_active(model, state, tuple(n for n in state.active if n not in gone))
        return model
    parameters = dict(model.named_parameters())
    for each in state.was_trainable:
        if each in parameters:
            parameters[each].requires_grad_(True)
    delattr(model, STATE)
    return model


def names(model: nn.Module) -> list[str]:
    """Return the names of the attached adapters, in the order attached.

    Args:
        model: any model; one without adapters has none.

    Examples:
        >>> from householder import adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = adapters.attach(model, adapters.HTAConfig(targets="0"), "task_a", activate=False)
        >>> adapters.names(model), adapters.active(model)
        (['task_a'], [])
    """
    state: ModelState = getattr(model, STATE, ModelState())
    return list(state.configs)


def active(model: nn.Module) -> list[str]:
    """Return the names of the adapters that act, the first innermost; see `activate`.

    Args:
        model: any model; in one without adapters none acts.
    """
    state: ModelState = getattr(model, STATE, ModelState())
    return list(state.active)


def parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by full name, for an optimizer.

    Args:
        model: a model with adapters.
        name: of one adapter; all active ones if None.

    Returns:
        The parameters themselves, not copies, in the model's order.

    Raises:
        AdapterError: the name is unknown.

    Examples:
        >>> import torch
        >>> from householder import adapters
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = adapters.attach(model, adapters.HTAConfig(targets="0"))
        >>> optimizer = torch.optim.AdamW(adapters.parameters(model).values(), lr=1e-3)
    """
    state = state_of(model)
    if name is not None:
        config_of("parameters", state, name)
    wanted = state.active if name is None else (name,)
    return {
        f"{module_name}.householder_adapters.layers.{each}.{key}": parameter
        for module_name, (_, stack) in adapted_modules(model).items()
        for each in wanted
        if each in stack.layers
        for key, parameter in stack.layers[each].named_parameters()
    }


def num_parameters(model: nn.Module, name: str | None = None) -> int:
    """Return how many numbers `parameters` holds.

    Args:
        model: a model with adapters.
        name: of one adapter; all active ones if None.

    Raises:
        AdapterError: the name is unknown.

    Examples:
        >>> from householder import adapters
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> config = adapters.HRAConfig(targets="0", num_householder=2)
        >>> adapters.num_parameters(adapters.attach(model, config))  # two vectors of 8
        16
    """
    return sum(parameter.numel() for parameter in parameters(model, name).values())


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """Return Σ ‖K Kᵀ − I‖² over the layers of active HRA adapters, K the unit reflectors as rows.

    Added to the loss with a weight λ (published: 1e-4 and less) it is the regularised form of HRA.
    The equal pairs of `init="identity"` are a stationary point of it: the loss has to part them.

    Args:
        model: a model with an active HRA adapter.

    Returns:
        A scalar with gradients to the reflectors; 0 where those of each layer are orthogonal.

    Raises:
        AdapterError: no active adapter is of kind HRA.

    Examples:
        >>> from householder import adapters
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> config = adapters.HRAConfig(targets="0", num_householder=2)  # an equal pair
        >>> penalty = adapters.orthogonality_penalty(adapters.attach(model, config))
        >>> round(penalty.item(), 3)
        2.0
    """
    penalties = [
        layer.penalty()
        for _, stack in adapted_modules(model).values()
        for layer in stack.acting()
        if isinstance(layer, HRALayer)
    ]
    if not penalties:
        raise AdapterError(
            "adapters.orthogonality_penalty: needs an active HRA adapter, got "
            f"{active(model) or 'none'}; only HRA has this regularisation"
        )
    return torch.stack(penalties).sum()
