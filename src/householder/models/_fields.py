"""Reading a config from its fields, shared by the models' configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def from_fields(cls: type[Config], fields: Mapping[str, Any]) -> Config:
    """Return the config of a dataclass with the given fields, defaults for those left out.

    Args:
        cls: the dataclass.
        fields: values by name.

    Raises:
        ValueError: a name is unknown, or a value is out of range.
        TypeError: a value has the wrong type, or a required one is missing.
    """
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(
            f"{cls.__name__}: fields must be among {', '.join(known)}, got "
            f"{', '.join(unknown)}; correct the name, or use the version that wrote it"
        )
    return cls(**fields)
