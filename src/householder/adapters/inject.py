"""How adapters get into a model: each adapted layer stays the object it is, with a changed class.

The layer's class becomes a subclass of itself whose `forward` asks the layer's stack of adapters.
So the names in the base model's `state_dict` stay, `isinstance(layer, nn.Linear)` stays true, and
code that reads `layer.weight` finds it. The adapters are a child of the layer: they move, copy,
pickle and save with the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from householder.adapters.layers import AdapterLayer, Call, Replacement
from householder.adapters.targets import STACK, read_weight


class AdapterStack(nn.Module):
    """The adapters of one layer, by name, of which some are active.

    Attributes:
        layers: by adapter name, an `AdapterLayer` or a `Replacement`.
        active: names of those that act, the first innermost.
        merged: names of those that are in the weight already, in the order they went in.
        kept: the weight and bias from before merging, if they were kept.
        replaced: tensors of a replaced module from before merging.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.kept: tuple[Tensor, Tensor | None] | None = None
        self.replaced: dict[str, Tensor] | None = None
        self.hook: RemovableHandle | None = None

    def acting(self) -> list[nn.Module]:
        """Return the layers that act, the first innermost."""
        return [self.layers[name] for name in self.active if name in self.layers]

    def forward(
        self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute what the adapted module does.

        Args:
            module: the layer these adapters belong to.
            call: its own `forward`.
            *args: of the call.
            **kwargs: of the call.
        """
        acting = self.acting()
        if not acting or self.merged:
            return call(*args, **kwargs)
        if isinstance(acting[-1], Replacement):
            return acting[-1](*args, **kwargs)
        # The input may be given by its name, which differs between kinds of layers.
        (x, *rest), options = (args, kwargs) if args else (tuple(kwargs.values()), {})
        adapters: list[AdapterLayer] = acting  # type: ignore[assignment]
        if isinstance(module, nn.Conv2d):
            return _adapted_conv(module, adapters, x)
        bias = getattr(module, "bias", None)
        bias = bias if isinstance(bias, Tensor) else None
        return _nest(adapters, lambda z: call(z, *rest, **options), bias)(x)


def _nest(adapters: list[AdapterLayer], call: Call, bias: Tensor | None) -> Call:
    """Return the function that the adapters make of `call`, each acting on what the last made."""
    for adapter in adapters:
        call = functools.partial(adapter, call, bias=bias)
        bias = adapter.adapted_bias(bias)
    return call


def _adapted_conv(module: nn.Conv2d, adapters: list[AdapterLayer], x: Tensor) -> Tensor:
    # The matrix that is adapted acts on patches, which the convolution alone sees: the kernel is
    # adapted instead, at the cost of a few images' worth of one pixel each.
    W, bias = read_weight(module), module.bias
    for adapter in adapters:
        W, bias = adapter.adapt(W, bias)
    kernel = W.reshape(module.weight.shape).to(module.weight.dtype)
    # The layer's own method: stride, padding and its mode, dilation and groups are its attributes.
    return module._conv_forward(x, kernel, bias)


class AdaptedModule:
    """What an adapted module's class has in front of its own."""

    base_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the stack of adapters."""
        stack = getattr(self, STACK)
        return stack(self, super().forward, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time and has no name to be found under: make it again.
        return _rebuild, (self.base_class,), self.__dict__


@functools.cache
def _adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{base.__name__}", (AdaptedModule, base), {"base_class": base})


def _rebuild(base: type[nn.Module]) -> nn.Module:
    made = _adapted_class(base)  # type: ignore[arg-type]
    return made.__new__(made)


def stack_of(module: nn.Module) -> AdapterStack | None:
    """Return the module's stack of adapters, if it is adapted."""
    return module._modules.get(STACK) if isinstance(module, AdaptedModule) else None  # type: ignore[return-value]


def add_stack(module: nn.Module, *, hook: bool = False) -> AdapterStack:
    """Return the module's stack of adapters, made if it has none.

    Args:
        module: the module to adapt.
        hook: give it a hook that does nothing, for `nn.TransformerEncoderLayer`: that has a fused
            path which reads the weights of its layers without calling them, and leaves it where
            there are hooks.
    """
    stack = stack_of(module)
    if stack is None:
        stack = AdapterStack()
        module.add_module(STACK, stack)
        module.__class__ = _adapted_class(type(module))  # type: ignore[arg-type]
        if hook:
            stack.hook = module.register_forward_pre_hook(_no_change)
    return stack


def remove_stack(module: nn.Module) -> None:
    """Make an adapted module what it was."""
    assert isinstance(module, AdaptedModule)
    assert isinstance(module, nn.Module)
    stack = stack_of(module)
    if stack is not None and stack.hook is not None:
        stack.hook.remove()
    module.__class__ = module.base_class  # type: ignore[assignment]
    del module._modules[STACK]


def _no_change(module: nn.Module, args: Any) -> None:
    return None


def adapted_modules(model: nn.Module) -> dict[str, tuple[nn.Module, AdapterStack]]:
    """Return every adapted module of a model with its stack, by full name."""
    found = {}
    for name, module in model.named_modules():
        stack = stack_of(module)
        if stack is not None:
            found[name] = (module, stack)
    return found
