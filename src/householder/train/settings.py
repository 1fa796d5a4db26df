"""Settings declared once: attributes, TOML keys, command line flags and checks follow.

A field declared with `setting(...)` in a subclass of `Settings` is at once an attribute, a key of
the TOML file (dashes or underscores) and a flag of the command.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from householder.train.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def setting(
    default: Any,
    help: str,
    *,
    section: str,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    may_change: bool = False,
) -> Any:
    """Declare a field of a `Settings` class.

    Args:
        default: its default value.
        help: what it means, with its unit; shown by `--help`.
        section: the heading under which `--help` lists it.
        choices: the only values allowed.
        at_least: inclusive lower bound.
        above: exclusive lower bound.
        below: exclusive upper bound.
        may_change: whether a resumed run may use another value, because the weights do not depend
            on it (or only through rounding).

    Returns:
        A dataclass field.
    """
    metadata = {
        "help": help,
        "section": section,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "below": below,
        "may_change": may_change,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The settings of a run, each field checked when the object is made.

    Raises:
        ConfigError: a value is of the wrong type, or out of range.
    """

    def __post_init__(self) -> None:
        types = field_types(type(self))
        for field in dataclasses.fields(self):
            value = _checked(field, types[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by field name, without those that are None."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def field_types(config: type[Settings]) -> dict[str, Any]:
    """Return the annotated type of each field of a settings class."""
    return typing.get_type_hints(config)


def field_default(config: type[Settings], name: str) -> Any:
    """Return the default of a field of a settings class."""
    return next(f.default for f in dataclasses.fields(config) if f.name == name)


def base_type(annotation: Any) -> tuple[type, bool]:
    """Split an annotation into its type and whether None is allowed.

    Examples:
        >>> base_type(int | None)
        (<class 'int'>, True)
    """
    members = typing.get_args(annotation)
    if not members:
        return annotation, False
    (kind,) = (m for m in members if m is not type(None))
    return kind, True


def _checked(field: dataclasses.Field[Any], annotation: Any, value: Any) -> Any:
    """Return `value` in the field's type, or raise the reason why it cannot be."""
    kind, optional = base_type(annotation)
    if value is None and optional:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(
            f"`{field.name}` must be of type {kind.__name__}, "
            f"got {value!r} of type {type(value).__name__}; {_meaning(field)}"
        )
    rules = field.metadata
    required = None
    if isinstance(value, float) and not math.isfinite(value):
        required = "finite"
    elif rules["choices"] is not None and value not in rules["choices"]:
        required = f"one of {', '.join(rules['choices'])}"
    elif rules["at_least"] is not None and value < rules["at_least"]:
        required = f"at least {rules['at_least']}"
    elif rules["above"] is not None and value <= rules["above"]:
        required = f"above {rules['above']}"
    elif rules["below"] is not None and value >= rules["below"]:
        required = f"below {rules['below']}"
    if required is not None:
        raise ConfigError(f"`{field.name}` must be {required}, got {value!r}; {_meaning(field)}")
    return value


def _meaning(field: dataclasses.Field[Any]) -> str:
    """Return what a setting is for, as the remedy in an error about it."""
    return f"it means: {field.metadata['help'].rstrip('.')}"


def differences(stored: Settings, requested: Settings) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two runs differ and which a resumed run may not change.

    Args:
        stored: those of the run that is there.
        requested: those asked for, of the same class.

    Returns:
        `{name: (stored value, requested value)}`.
    """
    return {
        f.name: (getattr(stored, f.name), getattr(requested, f.name))
        for f in dataclasses.fields(stored)
        if not f.metadata["may_change"] and getattr(stored, f.name) != getattr(requested, f.name)
    }


def describe_differences(different: Mapping[str, tuple[Any, Any]]) -> str:
    """Return "length=32 there, 64 requested; …" for an error message."""
    return "; ".join(f"{k}={a!r} there, {b!r} requested" for k, (a, b) in different.items())


def check_names(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a name that is not known, naming the nearest that is.

    Raises:
        ConfigError: with the unknown name and the near match.
    """
    known = sorted(set(known))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown setting `{name}`; {hint}")


def read_toml(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Read settings from a TOML file: flat, `name = value`, with dashes or underscores.

    Args:
        path: the file.
        known: the names that may occur.

    Returns:
        The settings by field name, not yet checked for type and range.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has an unknown key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: the config file cannot be read: {error}; give a TOML file of settings"
        ) from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path}: must be TOML, is not: {error}; write one `name = value` a line"
        ) from error
    settings: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in settings:
            raise ConfigError(
                f"{path}: `{name}` is given twice, with dashes and with underscores; drop one"
            )
        settings[name] = value
    check_names(settings, known, str(path))
    return settings


def to_toml(settings: Mapping[str, Any]) -> str:
    """Write flat settings as TOML that `read_toml` reads back to the same values.

    Examples:
        >>> print(to_toml({"task": "s3", "num_householder": [1, 2], "lr": 1e-3}), end="")
        task = "s3"
        num-householder = [1, 2]
        lr = 0.001
    """
    return "".join(f"{k.replace('_', '-')} = {_toml_value(v)}\n" for k, v in settings.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but for one character that JSON writes as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    # repr of a Python float is the shortest that reads back to the same bits, and is TOML.
    return repr(value)
