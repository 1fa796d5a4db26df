"""The Hugging Face ecosystem: what other people's models and tools need of this library.

All but `use_in_transformers` needs transformers, and is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from householder.hf.gated_delta import TransformersPatch, use_in_transformers

if TYPE_CHECKING:
    from householder.hf.cache import HouseholderCache
    from householder.hf.configuration import HouseholderConfig
    from householder.hf.fla import convert, from_fla, to_fla
    from householder.hf.fla_config import ConversionError
    from householder.hf.modeling import HouseholderForCausalLM

__all__ = [
    "ConversionError",
    "HouseholderCache",
    "HouseholderConfig",
    "HouseholderForCausalLM",
    "TransformersPatch",
    "convert",
    "from_fla",
    "to_fla",
    "use_in_transformers",
]

_MODULES = {
    "ConversionError": "fla_config",
    "HouseholderCache": "cache",
    # With the model, which tells transformers of both.
    "HouseholderConfig": "modeling",
    "HouseholderForCausalLM": "modeling",
    "convert": "fla",
    "from_fla": "fla",
    "to_fla": "fla",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
