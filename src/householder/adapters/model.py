"""Adapters of a whole model: attach, switch, merge, unmerge, detach."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from householder.adapters.config import DTYPES, AdapterConfig
from householder.adapters.errors import AdapterError
from householder.adapters.inject import (
    AdapterStack,
    adapted_modules,
    add_stack,
    remove_stack,
    stack_of,
)
from householder.adapters.layers import AdapterLayer, HRALayer, Replacement, make_layer
from householder.adapters.targets import (
    choose,
    choose_layers,
    device_of,
    layer_shape,
    not_dense,
    parameter_dtype,
    read_weight,
    shared_weights,
    write_weight,
)

_STATE = "_householder_adapters"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass
class ModelState:
    """What is attached to a model. Holds names and settings only; the layers hold the tensors.

    Attributes:
        configs: settings by adapter name.
        active: names of those that act, the first innermost.
        merged: names of those merged into the weights, in order.
        frozen: names of those attached for use and not for training.
        was_trainable: the base model's parameters that `attach` froze.
    """

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    frozen: frozenset[str] = frozenset()
    was_trainable: tuple[str, ...] = ()


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
    _refuse_while_merged("attach", state)
    made = _make(model, config, layers, apart)
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
    setattr(model, _STATE, state)
    _set_active(model, state, (name,) if activate else state.active)
    return model


def _make(
    model: nn.Module,
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
                f"convolution changes its kernel, but {reason}"
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
    """
    state = state_of(model)
    for name in names:
        config_of("activate", state, name)
    if len(set(names)) != len(names):
        raise AdapterError(f"adapters.activate: names must differ, got {list(names)}")
    _refuse_while_merged("activate", state)
    _set_active(model, state, names)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let the base model act by itself for the time of the block.

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
    _refuse_while_merged("disabled", state)
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


@torch.no_grad()
def merge(model: nn.Module, *, keep_base: bool = False) -> None:
    """Put the active adapters into the base model's weights, which then cost nothing more.

    Computed in at least float32 and rounded once to the weights' dtype.

    Args:
        model: a model with active adapters.
        keep_base: keep a copy of the weights, so that `unmerge` puts them back bit for bit.

    Raises:
        AdapterError: a layer is quantised or packed, shares its weight with another module, or an
            adapter has values that are not finite. Nothing is then merged.
    """
    state = state_of(model)
    _refuse_while_merged("merge", state)
    modules = {n: ms for n, ms in adapted_modules(model).items() if _acting(ms[1])}
    if not modules:
        raise AdapterError(
            "adapters.merge: needs an active adapter, got none; adapters.activate makes one act"
        )
    layers = {n: m for n, (m, s) in modules.items() if not _replaces(s)}
    shared = shared_weights(model, layers)
    for name, module in layers.items():
        if reason := not_dense(module):
            raise AdapterError(
                f"adapters.merge: {name} cannot hold the change: {reason}; leave the adapter "
                "beside it, or merge into the model before quantising"
            )
        if name in shared:
            raise AdapterError(
                f"adapters.merge: {name} shares its weight with {shared[name]}, which would change "
                "too; give it a copy of its own first"
            )
    for name, (_, stack) in modules.items():
        for layer in _acting(stack):
            if not all(bool(p.isfinite().all()) for p in layer.parameters()):
                raise AdapterError(
                    f"adapters.merge: the adapter of {name} has values that are not finite; load "
                    "an earlier one"
                )
    for module, stack in modules.values():
        _merge_module(module, stack, keep_base)
    state.merged = state.active


def _acting(stack: AdapterStack) -> list[nn.Module]:
    return [stack.layers[name] for name in stack.active if name in stack.layers]


def _replaces(stack: AdapterStack) -> bool:
    return any(isinstance(layer, Replacement) for layer in stack.layers.values())


def _merge_module(module: nn.Module, stack: AdapterStack, keep_base: bool) -> None:
    acting = _acting(stack)
    names = tuple(name for name in stack.active if name in stack.layers)
    if isinstance(acting[-1], Replacement):
        own = _own_tensors(module)
        stack.replaced = {name: tensor.clone() for name, tensor in own.items()}
        for name, tensor in acting[-1].module.state_dict().items():
            own[name].copy_(tensor)
    else:
        W, bias = read_weight(module), module.bias
        if keep_base:
            stack.kept = W.clone(), None if bias is None else bias.clone()  # type: ignore[operator]
        for layer in acting:
            assert isinstance(layer, AdapterLayer)
            W, bias = layer.adapt(W, bias)  # type: ignore[arg-type, assignment]
        _write(module, W, bias)  # type: ignore[arg-type]
    stack.merged = names


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a replaced module's own state, without that of its copies."""
    return {n: t for n, t in module.state_dict().items() if not n.startswith("householder_")}


def _write(module: nn.Module, W: Tensor, bias: Tensor | None) -> None:
    write_weight(module, W)
    if bias is not None:
        module.bias.data.copy_(bias)  # type: ignore[operator]


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the weights again.

    Weights that `merge` kept come back bit for bit. Others are computed back, each adapter's change
    undone in at least float32: exact to a rounding or two of the weights' dtype.

    Raises:
        AdapterError: nothing is merged, or a change cannot be undone at the weights' precision. The
            model then stays merged.
    """
    state = state_of(model)
    if not state.merged:
        raise AdapterError("adapters.unmerge: nothing is merged; adapters.merge does that")
    modules = {n: ms for n, ms in adapted_modules(model).items() if ms[1].merged}
    restored: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, (module, stack) in modules.items():
        if stack.replaced is not None:
            continue
        try:
            restored[name] = _restore(module, stack)
        except AdapterError as error:
            raise AdapterError(f"adapters.unmerge: {name}: {error}") from error
    for name, (module, stack) in modules.items():
        if stack.replaced is not None:
            own = _own_tensors(module)
            for key, tensor in stack.replaced.items():
                own[key].copy_(tensor)
        else:
            _write(module, *restored[name])
        stack.merged, stack.kept, stack.replaced = (), None, None
    state.merged = ()


def _restore(module: nn.Module, stack: AdapterStack) -> tuple[Tensor, Tensor | None]:
    if stack.kept is not None:
        return stack.kept
    W, bias = read_weight(module), module.bias
    eps = torch.finfo(W.dtype).eps
    for name in reversed(stack.merged):
        layer = stack.layers[name]
        assert isinstance(layer, AdapterLayer)
        W, bias = layer.restore(W, bias, eps)  # type: ignore[arg-type, assignment]
    return W, bias  # type: ignore[return-value]


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
    delattr(model, _STATE)
    return model


def names(model: nn.Module) -> list[str]:
    """Return the names of the attached adapters, in the order attached."""
    state: ModelState = getattr(model, _STATE, ModelState())
    return list(state.configs)


def active(model: nn.Module) -> list[str]:
    """Return the names of the adapters that act, the first innermost."""
    state: ModelState = getattr(model, _STATE, ModelState())
    return list(state.active)


def parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by full name, for an optimizer.

    Args:
        model: a model with adapters.
        name: of one adapter; all active ones if None.

    Raises:
        AdapterError: the name is unknown.
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
    """Return how many numbers `parameters` holds."""
    return sum(parameter.numel() for parameter in parameters(model, name).values())


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """Return Σ ‖K Kᵀ − I‖² over the layers of active HRA adapters, K the unit reflectors as rows.

    Added to the loss with a weight λ (published: 1e-4 and less) it is the regularised form of HRA.
    The equal pairs of `init="identity"` are a stationary point of it: the loss has to part them.

    Raises:
        AdapterError: no active adapter is of kind HRA.
    """
    penalties = [
        layer.penalty()
        for _, stack in adapted_modules(model).values()
        for layer in _acting(stack)
        if isinstance(layer, HRALayer)
    ]
    if not penalties:
        raise AdapterError(
            "adapters.orthogonality_penalty: needs an active HRA adapter, got "
            f"{active(model) or 'none'}; only HRA has this regularisation"
        )
    return torch.stack(penalties).sum()


def state_of(model: nn.Module, *, make: bool = False) -> ModelState:
    """Return what is attached to a model, or with `make` an empty state, not yet the model's.

    Raises:
        AdapterError: the model has no adapters.
    """
    state = getattr(model, _STATE, None)
    if state is None and not make:
        raise AdapterError(
            f"adapters: this {type(model).__name__} has no adapters; adapters.attach gives it one "
            "(adapters are known to the module they were attached to, not to parts of it)"
        )
    return state or ModelState()


def config_of(function: str, state: ModelState, name: str) -> AdapterConfig:
    """Return an adapter's settings.

    Raises:
        AdapterError: the model has no adapter of that name.
    """
    if name not in state.configs:
        raise AdapterError(
            f"adapters.{function}: the model has no adapter {name!r}, it has "
            f"{', '.join(state.configs)}"
        )
    return state.configs[name]


def _refuse_while_merged(function: str, state: ModelState) -> None:
    if state.merged:
        raise AdapterError(
            f"adapters.{function}: {', '.join(state.merged)} are merged into the weights; "
            "adapters.unmerge takes them out first"
        )
