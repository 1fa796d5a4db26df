"""Run the gated delta layers of transformers' own models on this library's ops."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from householder.hf.gated_delta_functions import (
    causal_conv1d_fn,
    causal_conv1d_update,
    over_sequences,
    over_tokens,
)

MODELS = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid")
"""Models known to have such layers; of others, those that are imported already are found too."""

CHUNK, RECURRENT = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"

# Up to version 5.14 a layer keeps the two functions, or flash-linear-attention's, itself.
_IN_LAYERS = {CHUNK: "chunk_gated_delta_rule", RECURRENT: "recurrent_gated_delta_rule"}

# Since version 5.15 the convolutions in front of the recurrence are functions of the module too.
_CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
}

_ABSENT = object()


class _Place(NamedTuple):
    """Where models look a function up: in a module, or in a class of layers.

    Attributes:
        owner: the module or the class.
        name: of the attribute.
        original: what it was, or `_ABSENT`.
        ours: what it is now.
    """

    owner: ModuleType | type
    name: str
    original: Any
    ours: Any

    @property
    def module(self) -> str:
        return str(getattr(self.owner, "__module__", self.owner.__name__))

    @property
    def is_ours(self) -> bool:
        """Whether one of our functions was there already."""
        function = self.original.function if type(self.original) is _Kept else self.original
        return getattr(function, "__module__", None) == over_sequences.__module__

    def fill(self) -> None:
        setattr(self.owner, self.name, self.ours)

    def restore(self) -> None:
        """Put back what was there, unless somebody else replaced ours since."""
        if vars(self.owner).get(self.name) is not self.ours:
            return
        if self.original is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)


class TransformersPatch:
    """What `use_in_transformers` replaced, and the way back.

    As a context manager it goes back at the end of the block.

    Attributes:
        modules: names of the modules whose models now run on our ops.
    """

    def __init__(self, replaced: list[_Place]) -> None:
        self._replaced = replaced
        self.modules = tuple(dict.fromkeys(place.module for place in replaced))

    def undo(self) -> None:
        """Put back what was there. What somebody else replaced since then stays."""
        for place in self._replaced:
            place.restore()
        self._replaced = []

    def __enter__(self) -> TransformersPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"TransformersPatch(modules={self.modules})"


def use_in_transformers(*, impl: str = "auto") -> TransformersPatch:
    """Run gated delta layers in transformers (Qwen3-Next and its successors) on `delta_product`.

    The models' functions for the recurrence and for the short convolution in front of it, over
    whole sequences and for one token, are replaced in their modules: for models that exist already
    and those made later, in training and in decoding, on CPU and GPU, without the fallbacks that
    transformers warns of. Packed sequences (`cu_seq_lens_q` or `seq_idx`), which the fallbacks mix
    up or refuse, stay apart. Called twice it replaces nothing more.

    Args:
        impl: the form of `delta_product` over whole sequences; see there.

    Returns:
        A handle whose `undo()` puts back what was there.

    Raises:
        ImportError: transformers is not installed.
        NotImplementedError: the installed transformers has no such model, or keeps its functions
            elsewhere.

    Examples:
        >>> import householder
        >>> patch = householder.use_in_transformers()
        >>> "transformers.models.qwen3_next.modeling_qwen3_next" in patch.modules
        True
        >>> patch.undo()

    References:
        Gated Delta Networks: Improving Mamba2 with Delta Rule (Yang, Kautz, Hatamizadeh, 2024),
        https://arxiv.org/abs/2412.06464
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(
            "use_in_transformers: transformers must be installed, and is not; "
            "pip install transformers"
        )
    ours = {CHUNK: over_sequences(impl), RECURRENT: over_tokens(impl), **_CONVOLUTIONS}
    places = [place for module in _modules() for place in _places(module, ours)]
    if not places:
        import transformers

        raise NotImplementedError(
            f"use_in_transformers: transformers must have one of {', '.join(MODELS)} with the "
            f"functions {CHUNK} and {RECURRENT}, and {transformers.__version__} has none; use "
            "version 5.0 to 5.23"
        )
    replaced = [place for place in places if not place.is_ours]
    for place in replaced:
        place.fill()
    return TransformersPatch(replaced)


def _modules() -> list[ModuleType]:
    """Return the modules that have both functions, importing those of `MODELS` that exist."""
    for name in MODELS:
        package = f"transformers.models.{name}"
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(f"{package}.modeling_{name}")
    loaded = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name
    ]
    # Looked up in `vars`: transformers' lazy packages would import whatever they are asked for.
    return [m for m in loaded if {CHUNK, RECURRENT} <= vars(m).keys()]


def _places(module: ModuleType, ours: dict[str, Callable[..., Any]]) -> Iterator[_Place]:
    """Yield where the models of a module look the two functions up."""
    layers = [c for c in vars(module).values() if isinstance(c, type) and _keeps_functions(c)]
    for name, function in ours.items():
        if not layers and callable(getattr(module, name, None)):
            yield _Place(module, name, getattr(module, name), function)
        for layer in layers if name in _IN_LAYERS else ():
            kept = _IN_LAYERS[name]
            yield _Place(layer, kept, vars(layer).get(kept, _ABSENT), _Kept(kept, function))


def _keeps_functions(layer: type) -> bool:
    # Where it is made: `forward` may be behind a decorator that hides what it calls.
    code = getattr(inspect.unwrap(vars(layer).get("__init__", print)), "__code__", None)
    return code is not None and _IN_LAYERS[CHUNK] in code.co_names


class _Kept:
    """Our function in a class, in front of what its layers keep under that name themselves."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function

    def __get__(self, layer: Any, kind: type) -> Callable[..., Any]:
        return self.function

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)[self.name] = value
