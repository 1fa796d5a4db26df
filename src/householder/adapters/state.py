"""What is attached to a model, as its functions see it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from householder.adapters.config import AdapterConfig
from householder.adapters.errors import AdapterError

# The attribute of a model that holds its `ModelState`.
STATE = "_householder_adapters"


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


def state_of(model: nn.Module, *, make: bool = False) -> ModelState:
    """Return what is attached to a model, or with `make` an empty state, not yet the model's.

    Raises:
        AdapterError: the model has no adapters.
    """
    state = getattr(model, STATE, None)
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
            f"{', '.join(state.configs)}; give one of these"
        )
    return state.configs[name]


def refuse_while_merged(function: str, state: ModelState) -> None:
    """Raise AdapterError if adapters are in the weights."""
    if state.merged:
        raise AdapterError(
            f"adapters.{function}: {', '.join(state.merged)} are merged into the weights; "
            "adapters.unmerge takes them out first"
        )
