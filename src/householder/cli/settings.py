"""Flags made of settings, and settings of the flags that were given."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from householder.train.comparison import COMPARED
from householder.train.errors import ConfigError
from householder.train.settings import Settings, base_type, field_types

_OUTPUT = "Output"
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder to write.", rich_help_panel=_OUTPUT)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Continue what the folder holds, bit for bit.", rich_help_panel=_OUTPUT
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what the folder holds.", rich_help_panel=_OUTPUT),
]


class App(typer.Typer):
    """A Typer whose help is as wide as the terminal: its docstrings' lines are joined.

    Typer itself keeps the line ends of all paragraphs but the first.
    """

    def command(  # type: ignore[override] # the options that are used here
        self, name: str, **options: Any
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register a command, described by its docstring."""

        def register(function: Callable[..., None]) -> Callable[..., None]:
            paragraphs = (inspect.getdoc(function) or "").split("\n\n")
            help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
            return typer.Typer.command(self, name, help=help, **options)(function)

        return register


def with_settings(
    config: type[Settings],
    *more: type[Settings],
    show_defaults: bool,
    without: Sequence[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per field of the settings, in place of its `**settings`.

    The command receives every one of them, None where the flag was not given. A field that several
    classes have is one option.

    Args:
        config: the class.
        more: others, whose fields are added.
        show_defaults: name the defaults in the help.
        without: fields that are no options of this command.
    """
    return functools.partial(_add_settings, (config, *more), show_defaults, without)


def _add_settings(
    configs: Sequence[type[Settings]],
    show_defaults: bool,
    without: Sequence[str],
    command: Callable[..., None],
) -> Callable[..., None]:
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    fields: dict[str, list[dataclasses.Field[Any]]] = {}
    types: dict[str, Any] = {}
    for config in configs:
        types = {**field_types(config), **types}
        for field in dataclasses.fields(config):
            if field.name not in without:
                fields.setdefault(field.name, []).append(field)
    settings = [
        _setting_parameter(same, types[name], show_defaults) for name, same in fields.items()
    ]

    def wrapper(**arguments: Any) -> None:
        command(**arguments)

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    # Typer reads a command's options from these two.
    wrapper.__signature__ = inspect.Signature([*own, *settings])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *settings]}
    return wrapper


def _setting_parameter(
    same: Sequence[dataclasses.Field[Any]], annotation: Any, show_default: bool
) -> inspect.Parameter:
    """Return the option for fields of one name, described by the first of them."""
    field = same[0]
    kind, _ = base_type(annotation)
    flag = "--" + field.name.replace("_", "-")
    help, default, metavar = field.metadata["help"], field.default, None
    choices = dict.fromkeys(c for each in same for c in each.metadata["choices"] or ())
    if choices:
        help += f" One of {', '.join(choices)}."
    if field.name == "num_householder":
        help, default, metavar = f"{help} Several may be given: 1,2.", "1,2", "<ints>"
    elif field.name in COMPARED:
        help, metavar = f"{help} Several may be given, with commas.", f"<{kind.__name__}s>"
    if kind is bool:
        flag, default = f"{flag}/--no-{flag[2:]}", _shown(default)
    if show_default:
        stated = default not in (None, "")
        own = str(default) if stated else _default_words(field)
        others = [_default_words(each) for each in same[1:]]
        defaults = [f"Default: {default}"] if stated else []
        defaults += [f"with --text: {words}" for words in others if words not in ("", own)]
        if defaults:
            words = "; ".join(defaults)
            help += f" [dim]{words[0].upper()}{words[1:]}.[/dim]"
    # The option's own default is None, to tell a flag that was given from one that was not.
    option = typer.Option(
        None, flag, help=help, rich_help_panel=field.metadata["section"], metavar=metavar
    )
    # A list: the flag may be repeated.
    annotation = list[str] | None if field.name in COMPARED else kind | None
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
    )


def _default_words(field: dataclasses.Field[Any]) -> str:
    """Return a field's default in words, of the help where it has none; "" if there are none."""
    if field.default not in (None, ""):
        return _shown(field.default)
    return str(field.metadata["help"]).partition("default: ")[2].rstrip(".")


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)


def given_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings whose flags were given, those that are compared as lists."""
    given = {name: value for name, value in settings.items() if value not in (None, [])}
    for name in COMPARED:
        if name not in given:
            continue
        words = [word for part in given[name] for word in part.split(",")]
        if name == "mixer":
            given[name] = words
            continue
        try:
            given[name] = [int(word) for word in words]
        except ValueError as error:
            raise ConfigError(
                f"`{name}` must be numbers such as 2 or 1,2, got {','.join(words)!r}; put commas "
                "between them"
            ) from error
    return given


def take_single(settings: dict[str, Any], name: str) -> None:
    """Replace a list of one value by the value."""
    values = settings.get(name)
    if isinstance(values, list):
        if len(values) != 1:
            raise ConfigError(
                f"`{name}` must be one value with language models, got {values}; train the others "
                "in folders of their own"
            )
        settings[name] = values[0]
