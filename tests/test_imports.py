"""Imports are light, and point one way.

The light side is measured in fresh processes; the direction is read from the source, where an
import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import householder

ROOT = Path(householder.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What each part of the package may import of the package, itself included.
BELOW = {
    "ops": {"ops"},
    "maps": {"maps", "ops"},
    "nn": {"nn", "maps", "ops"},
    "models": {"models", "storage", "nn", "maps", "ops"},
    # Writing a file whole or not at all: no mathematics, and needed by adapters and train.
    "storage": {"storage"},
    "adapters": {"adapters", "storage", "nn", "maps", "ops"},
    "hf": {"hf", "models", "nn", "maps", "ops"},
    "train": {"train", "adapters", "storage", "models", "nn", "maps", "ops"},
    "recipes": {"recipes", "train", "adapters", "storage", "hf", "models", "nn", "maps", "ops", ""},
    "cli": {
        *("cli", "recipes", "train", "adapters", "storage", "hf", "models", "nn", "maps", "ops"),
        "",
    },
    "__main__": {"cli"},
    "testing": {"testing", "nn", "maps", "ops", ""},
    # The package's own __init__ re-exports maps, ops and one function of hf, and names the parts
    # that it loads when they are asked for. Only what stands above everything else may import it:
    # below, that would be a cycle.
    "": {"hf", "maps", "ops", "adapters", "models", "nn", "testing", "train"},
}
# Inside an op's folder: the forms know nothing of one another.
BELOW_IN_OP = {
    "__init__": {"api", "cache"},
    "cache": {"api", "cache", "chunk"},
    "api": {"op", "activations", "reference", "chunk", "triton"},
    # Of delta_product: what a layer does in front of the recurrence, with kernels of its own.
    "activations": {"triton"},
    "op": {"inputs", "reference", "chunk", "triton"},
    "reference": {"inputs", "reference"},
    "chunk": {"inputs", "chunk"},
    "triton": {"inputs", "triton"},
    # Of path_attention: what its forms get, by name.
    "inputs": set(),
}
# Packages that `import householder` must not load: optional ones, and those of single functions.
BLOCKED = (
    *("triton", "transformers", "matplotlib", "pandas", "typer", "rich", "scipy", "sklearn"),
    *("peft", "timm", "PIL"),
)


def module_name(path: Path, root: Path = ROOT) -> str:
    """Return the dotted name of a file of the package."""
    parts = ["householder", *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Yield the dotted name of every module, and of every name, that the source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                up = node.level - 1 if is_package else node.level
                base = ".".join([*parts[: len(parts) - up], *([base] if base else [])])
            # `from package import name` may mean the submodule `package.name`.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def wrong_way(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return the imports of a module of the package that point upwards or sideways."""
    parts = module.split(".")
    part = parts[1] if len(parts) > 1 else ""
    wrong = []
    for name in imported_modules(source, module, is_package):
        target = name.split(".")
        if target[0] != "householder" or part not in BELOW:
            continue
        # What is no part of the package is a name that the package's own __init__ gives out.
        target_part = target[1] if len(target) > 1 and target[1] in BELOW else ""
        in_op = part == "ops" and len(parts) > 2 and (ROOT / "ops" / parts[2]).is_dir()
        if target_part not in BELOW[part] or (in_op and leaves_its_op(parts, target)):
            wrong.append(name)
    return wrong


def leaves_its_op(parts: list[str], target: list[str]) -> bool:
    """Tell whether a module in an op's folder imports another op, or another form of its own."""
    op, shared = parts[2], target[2:]
    if not shared:
        return True
    if shared[0] != op:
        # The shared mathematics are files; another op is a folder, and off limits.
        return (ROOT / "ops" / shared[0]).is_dir() or not (
            ROOT / "ops" / f"{shared[0]}.py"
        ).is_file()
    own = parts[3] if len(parts) > 3 else "__init__"
    return len(shared) < 2 or shared[1] not in BELOW_IN_OP.get(own, set())


def in_fresh_process(code: str) -> str:
    """Run code in a new interpreter and return what it prints; its failure fails the test."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_beyond_torch(*modules: str) -> dict[str, set[str]]:
    """Return the packages that each module, imported in turn after torch, adds to those loaded."""
    code = f"""
import importlib, json, sys
import torch

def loaded():
    return {{name.split(".")[0] for name in sys.modules}}

added = {{}}
for module in {modules!r}:
    before = loaded()
    importlib.import_module(module)
    added[module] = sorted(loaded() - before - sys.stdlib_module_names)
print(json.dumps(added))
"""
    added = json.loads(in_fresh_process(code).splitlines()[-1])
    return {module: set(packages) for module, packages in added.items()}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_arrows_point_one_way(path: Path) -> None:
    is_package = path.name == "__init__.py"
    assert wrong_way(path.read_text(encoding="utf-8"), module_name(path), is_package) == []


def test_every_part_has_its_arrows() -> None:
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert parts <= set(BELOW), "a new part of the package needs its line in BELOW"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("householder.ops.delta_product.api", "from householder.maps import LinearMap"),
        ("householder.ops.wy", "import householder.nn"),
        ("householder.maps.base", "from householder import nn"),
        ("householder.maps.base", "def f():\n    from householder.train import loop"),
        ("householder.nn.mixer", "from ..models import SequenceTagger"),
        ("householder.train.loop", "from householder import recipes"),
        ("householder.recipes.word", "from householder.cli import main"),
        ("householder.train.loop", "from householder import __version__"),
        (
            "householder.ops.delta_product.chunk",
            "from householder.ops.delta_product import reference",
        ),
        ("householder.ops.delta_product.reference", "from . import chunk"),
        ("householder.ops.delta_product.chunk", "from .op import delta_product_op"),
        ("householder.ops.delta_product.op", "from householder.ops.delta_product.api import x"),
        ("householder.ops.delta_product.chunk", "from householder.ops import householder_product"),
        ("householder.ops.delta_product.chunk", "from householder.ops import delta_product"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, source: str) -> None:
    assert len(wrong_way(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("householder.ops.delta_product.chunk", "from householder.ops.wy import compute_dtype"),
        ("householder.ops.delta_product.chunk", "from householder.ops import wy"),
        (
            "householder.ops.delta_product.api",
            "from householder.ops.delta_product import reference",
        ),
        ("householder.ops.delta_product.api", "from householder.ops.delta_product.op import x"),
        ("householder.nn.mixer", "import torch\nfrom householder.ops import delta_product"),
        ("householder.nn.mixer", "from .norm import RMSNorm"),
        ("householder.recipes.word", "from householder import delta_product"),
        ("householder.cli", "import householder"),
    ],
)
def test_a_right_arrow_is_allowed(module: str, source: str) -> None:
    assert wrong_way(source, module) == []


def test_importing_loads_torch_and_nothing_more() -> None:
    parts = [f"householder.{part}" for part in ("ops", "maps", "nn", "models", "adapters")]
    for module, packages in loaded_beyond_torch("householder", *parts).items():
        # Core dependencies, and light: torch loads numpy itself where it is installed, and adapters
        # are saved as safetensors.
        light = {"householder", "numpy", "safetensors"}
        assert packages <= light, f"{module} loads {packages}"


def test_parts_are_loaded_when_they_are_asked_for() -> None:
    code = """
import sys
import householder

parts = ("adapters", "models", "nn", "testing", "train")
print([f"householder.{part}" in sys.modules for part in parts])
print([getattr(householder, part).__name__ for part in parts], set(parts) <= set(dir(householder)))
try:
    householder.mn
except AttributeError as error:
    print(error)
"""
    before, after, unknown = in_fresh_process(code).splitlines()
    assert before == "[False, False, False, False, False]"
    assert after.startswith("['householder.adapters', ")
    assert after.endswith("'householder.train'] True")
    assert unknown == "module 'householder' has no attribute 'mn'"


def test_the_measure_sees_a_heavy_import() -> None:
    assert "matplotlib" in loaded_beyond_torch("matplotlib")["matplotlib"]


def test_everything_runs_where_optional_packages_cannot_be_imported() -> None:
    # torch itself asks for some of them and copes; so must we.
    code = f"""
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Block())
import torch
import householder, householder.maps, householder.models, householder.nn, householder.ops
import householder.adapters

k = torch.nn.functional.normalize(torch.randn(1, 3, 2, 1, 4), dim=-1).requires_grad_()
o, _ = householder.delta_product(
    torch.randn(1, 3, 1, 4), k, torch.randn(1, 3, 2, 1, 4), torch.rand(1, 3, 2, 1)
)
o.sum().backward()
A = householder.HouseholderProduct(torch.randn(2, 4), torch.rand(2))
A(torch.randn(3, 4))
print(bool(k.grad.isfinite().all()), sorted(set({BLOCKED!r}) & set(sys.modules)))
"""
    assert in_fresh_process(code).splitlines()[-1] == "True []"
