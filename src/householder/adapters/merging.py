"""Adapters in the base model's weights: put there, and taken out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from householder.adapters.errors import AdapterError
from householder.adapters.inject import AdapterStack, adapted_modules
from householder.adapters.layers import AdapterLayer, Replacement
from householder.adapters.state import refuse_while_merged, state_of
from householder.adapters.targets import not_dense, read_weight, shared_weights, write_weight


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

    Examples:
        >>> from householder import adapters
        >>> model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
        >>> config = adapters.HRAConfig(targets="0", num_householder=2, init="random")
        >>> before = adapters.attach(model, config)(x)
        >>> adapters.merge(model)
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
        >>> type(adapters.detach(model, keep_merged=True)[0]).__name__  # an ordinary layer again
        'Linear'
    """
    state = state_of(model)
    refuse_while_merged("merge", state)
    modules = {n: ms for n, ms in adapted_modules(model).items() if ms[1].acting()}
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
        for layer in stack.acting():
            if not all(bool(p.isfinite().all()) for p in layer.parameters()):
                raise AdapterError(
                    f"adapters.merge: the adapter of {name} has values that are not finite; load "
                    "an earlier one"
                )
    for module, stack in modules.values():
        _merge_module(module, stack, keep_base)
    state.merged = state.active


def _replaces(stack: AdapterStack) -> bool:
    return any(isinstance(layer, Replacement) for layer in stack.layers.values())


def _merge_module(module: nn.Module, stack: AdapterStack, keep_base: bool) -> None:
    acting = stack.acting()
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

    Args:
        model: a model with merged adapters; they act beside the weights again.

    Raises:
        AdapterError: nothing is merged, or a change cannot be undone at the weights' precision. The
            model then stays merged.

    Examples:
        >>> from householder import adapters
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> weight = model[0].weight.detach().clone()
        >>> _ = adapters.attach(model, adapters.HRAConfig(targets="0", init="random"))
        >>> adapters.merge(model, keep_base=True)
        >>> torch.equal(model[0].weight, weight)
        False
        >>> adapters.unmerge(model)
        >>> torch.equal(model[0].weight, weight)
        True
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
