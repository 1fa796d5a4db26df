"""Fine-tune somebody else's model with products of reflections: attach, merge, save, load.

Importing this loads torch and nothing more; peft is needed by what exchanges with peft alone.
"""

from householder.adapters.config import (
    AdapterConfig,
    HRAConfig,
    HTAConfig,
    TwoSidedConfig,
)
from householder.adapters.errors import AdapterError
from householder.adapters.merging import merge, unmerge
from householder.adapters.model import (
    activate,
    active,
    attach,
    detach,
    disabled,
    names,
    num_parameters,
    orthogonality_penalty,
    parameters,
)
from householder.adapters.peft import export_lora, load_peft, save_peft
from householder.adapters.storage import load, save

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "HRAConfig",
    "HTAConfig",
    "TwoSidedConfig",
    "activate",
    "active",
    "attach",
    "detach",
    "disabled",
    "export_lora",
    "load",
    "load_peft",
    "merge",
    "names",
    "num_parameters",
    "orthogonality_penalty",
    "parameters",
    "save",
    "save_peft",
    "unmerge",
]
