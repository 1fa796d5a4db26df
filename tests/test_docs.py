"""What README and docs say exists: links, commands and flags, a page for every public name."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import householder
from householder.recipes import EXPERIMENTS

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
PUBLIC = (
    "householder",
    "householder.maps",
    "householder.ops",
    "householder.nn",
    "householder.nn.parametrizations",
    "householder.models",
    "householder.adapters",
    "householder.hf",
    "householder.train",
    "householder.train.tasks",
    "householder.train.text",
    "householder.train.adapt",
    "householder.testing",
)


def slug(heading: str) -> str:
    """Return the anchor of a heading, as Markdown's readers make it."""
    plain = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{target}: there is no such file"
        generated = anchor.startswith(
            "householder."
        )  # from docstrings; the site's build checks them
        if anchor and not generated:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    if page.name == "log.md":  # what was, too
        return
    folders = ("src", "tests", "benchmarks", "docs", "examples")
    there = [str(path) for folder in folders for path in (ROOT / folder).rglob("*.*")]
    # Code by its name; other files, which may be what a run writes, where a folder is named too.
    names = r"`([\w./-]+\.py|[\w.-]+/[\w./-]+\.(?:toml|csv))`"
    for name in re.findall(names, page.read_text(encoding="utf-8")):
        assert any(path.endswith(f"/{name}") for path in there), f"there is no {name}"


def commands(text: str) -> Iterator[str]:
    """Yield the command lines in fenced blocks and in inline code."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in blocks for line in block.splitlines()]
    for words in [*lines, *(" ".join(code.split()) for code in inline)]:
        for command in re.findall(r"(?:^|&& |-m )(householder [^#&]+)", words):
            yield command.strip()


def everything_said() -> list[str]:
    """Return every command line that is written down anywhere for users."""
    said = [c for page in PAGES for c in commands(page.read_text(encoding="utf-8"))]
    said += [e.command for e in EXPERIMENTS]
    for example in EXAMPLES:
        lines = re.findall(r"^#   (householder .*)$", example.read_text(), re.MULTILINE)
        assert lines, f"{example.name} does not say how it is run"
        said += lines
    return sorted(set(said))


def test_commands_and_their_flags_exist() -> None:
    typer = pytest.importorskip("typer")
    from householder.cli import app

    said = everything_said()
    assert len(said) > 20
    for line in said:
        command = typer.main.get_command(app)
        words = shlex.split(line)[1:]
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{line}: there is no command {words[0]!r}"
            command = command.commands[words.pop(0)]
        flags = {f for p in command.params for f in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
        for word in words:
            if word.startswith("-"):
                assert word.partition("=")[0] in flags, f"{line}: there is no flag {word}"


def test_the_citation_is_of_this_version() -> None:
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {householder.__version__}" in lines


def documented() -> set[int]:
    """Return the ids of the objects that a `:::` line of a page stands for."""
    found: set[int] = set()
    for page in PAGES:
        for target in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            found |= {id(x) for x in objects_of(target)}
    return found


def objects_of(target: str) -> list[object]:
    try:
        found: object = importlib.import_module(target)
    except ModuleNotFoundError:
        parent, _, name = target.rpartition(".")
        found = getattr(importlib.import_module(parent), name)
    if not isinstance(found, ModuleType):
        return [found]
    names = getattr(found, "__all__", [n for n in vars(found) if not n.startswith("_")])
    # A name that a submodule has too stands for the submodule there.
    return [getattr(found, n) for n in names if not is_module(f"{target}.{n}")]


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("module", PUBLIC)
def test_annotations_of_public_names_can_be_resolved(module: str) -> None:
    """As `typing.get_type_hints` does, for tools that make command lines or documents of them."""
    part = importlib.import_module(module)
    for name in part.__all__:
        value = getattr(part, name)
        members = vars(value).values() if isinstance(value, type) else [value]
        for member in members:
            if isinstance(member, FunctionType):
                # What would be an import in a circle is looked up beside the name itself.
                typing.get_type_hints(member, localns=vars(part))


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_documented(module: str) -> None:
    pages = documented()
    part = importlib.import_module(module)
    assert part.__doc__
    assert sorted(part.__all__) == sorted(set(part.__all__))
    for name in part.__all__:
        value = getattr(part, name)
        assert id(value) in pages or isinstance(value, ModuleType), f"{name} is on no page"
        if isinstance(value, (type, FunctionType, ModuleType)):
            assert value.__doc__, f"{name} has no docstring"
