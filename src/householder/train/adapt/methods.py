"""Ways to fine-tune a model, behind one interface: adapters of reflections, LoRA, all, the head.

LoRA is peft's own, for comparison.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from householder import adapters
from householder.adapters.targets import layer_shape
from householder.train.errors import ConfigError

METHODS = ("hta", "hra", "two-sided", "lora", "full", "probe")


class Method(ABC):
    """A model made ready for fine-tuning.

    Attributes:
        model: what to call, in place of the base model.
    """

    model: nn.Module

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by full name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def num_parameters(self) -> int:
        """Return how many numbers are trained."""
        return sum(p.numel() for p in self.trainable().values())

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was trained, and no more."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """Return the base model with the change in its weights; ends the use of this method."""


class ReflectionMethod(Method):
    """An adapter of this library."""

    def __init__(self, model: nn.Module, config: adapters.AdapterConfig) -> None:
        self.model = adapters.attach(model, config)

    def save(self, folder: Path) -> None:
        adapters.save(self.model, folder)

    def merged(self) -> nn.Module:
        adapters.merge(self.model)
        return adapters.detach(self.model, keep_merged=True)


class LoRAMethod(Method):
    """LoRA by peft, with scale alpha / r = 1."""

    def __init__(self, model: nn.Module, rank: int, targets: list[str], head: str | None) -> None:
        peft = _peft()
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            # A list would match endings too; an expression matches whole names.
            target_modules="|".join(name.replace(".", r"\.") for name in targets),
            modules_to_save=None if head is None else [head],
        )
        with warnings.catch_warnings():
            # peft asks transformers by a name that transformers has since renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            self.model = peft.get_peft_model(model, config)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(str(folder))  # type: ignore[operator]

    def merged(self) -> nn.Module:
        return self.model.merge_and_unload()  # type: ignore[operator]


class PlainMethod(Method):
    """The model's own parameters: all of them, or those of the head."""

    def __init__(self, model: nn.Module, head: str | None, *, full: bool) -> None:
        self.model = model.requires_grad_(full)
        if head is not None:
            model.get_submodule(head).requires_grad_(True)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous() for name, p in self.trainable().items()}
        save_file(tensors, folder / "trained.safetensors")

    def merged(self) -> nn.Module:
        return self.model


def linear_layers(model: nn.Module, head: str | None = None) -> list[str]:
    """Return the names of a model's linear layers, without its head and its output embedding.

    Examples:
        >>> linear_layers(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 3), nn.Linear(4, 2)), "2")
        ['0']
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = []
    for name, module in model.named_modules():
        shape = layer_shape(module)
        inside = head is not None and (name == head or name.startswith(f"{head}."))
        if shape is not None and shape.layer != "conv2d" and not inside and module is not output:
            found.append(name)
    return found


def make_method(
    kind: str,
    model: nn.Module,
    *,
    rank: int = 8,
    targets: Sequence[str] | None = None,
    head: str | None = None,
    **options: Any,
) -> Method:
    """Make a model ready for fine-tuning, in place.

    Args:
        kind: "hra", "two-sided" (`rank` reflectors), "hta", "lora" (of that rank), "full" or
            "probe" (the head alone).
        model: the base model.
        rank: size of the adapter.
        targets: layers to adapt, names or patterns; all linear layers but the head if None.
        head: full name of a module that is trained whole beside the adapter.
        **options: further settings of the adapter's config.

    Raises:
        ConfigError: the adapter does not fit the model, or a package is missing.
    """
    chosen = list(targets) if targets else linear_layers(model, head)
    shared: dict[str, Any] = {"targets": chosen, **options}
    if head is not None:
        shared["train_also"] = [head]
    try:
        if kind == "hra":
            return ReflectionMethod(model, adapters.HRAConfig(num_householder=rank, **shared))
        if kind == "two-sided":
            return ReflectionMethod(model, adapters.TwoSidedConfig(num_householder=rank, **shared))
        if kind == "hta":
            # A fused projection of queries, keys and values is three of the published sites.
            splits = {"qkv": 3, "c_attn": 3}
            return ReflectionMethod(model, adapters.HTAConfig(rank=rank, splits=splits, **shared))
        if kind == "lora":
            from householder.adapters.targets import choose_layers

            exact = choose_layers(model, chosen, (), [head] if head else [])
            return LoRAMethod(model, rank, list(exact), head)
        if kind in ("full", "probe"):
            return PlainMethod(model, head, full=kind == "full")
    except adapters.AdapterError as error:
        raise ConfigError(str(error)) from error
    raise ConfigError(f"`kind` must be one of {', '.join(METHODS)}, got {kind!r}; pick one of them")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"LoRA is done by peft, which cannot be imported ({error}); "
            "pip install 'householder[adapters]'"
        ) from error
    return peft


def freeze_statistics(model: nn.Module) -> None:
    """Put a model in training mode but for its batch norms: their statistics are the base's."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
