"""Products of Householder transformations as fast, trainable building blocks of neural networks.

The names here are the maps and the ops. Everything else is in the package's parts, each loaded when
it is first used: `householder.nn` (layers), `householder.models`, `householder.adapters`,
`householder.hf` (transformers), `householder.train` and `householder.testing`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from householder.hf.gated_delta import use_in_transformers
from householder.maps import Composition, HouseholderProduct, LinearMap
from householder.ops import (
    PathCache,
    delta_product,
    delta_product_step,
    householder_frame,
    householder_product,
    path_attention,
)

__version__ = "0.1.0"

__all__ = [
    "Composition",
    "HouseholderProduct",
    "LinearMap",
    "PathCache",
    "delta_product",
    "delta_product_step",
    "householder_frame",
    "householder_product",
    "path_attention",
    "use_in_transformers",
]

# Not imported here: `import householder` is to load torch and little more.
_PARTS = ("adapters", "models", "nn", "testing", "train")

if TYPE_CHECKING:
    from householder import adapters as adapters
    from householder import models as models
    from householder import nn as nn
    from householder import testing as testing
    from householder import train as train
else:

    def __getattr__(name: str) -> ModuleType:
        if name in _PARTS:
            return importlib.import_module(f"householder.{name}")
        raise AttributeError(f"module 'householder' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS})
