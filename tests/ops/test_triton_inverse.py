"""The inverse of unit lower triangles that kernels share, under Triton's interpreter.

Whether kernels are interpreted is settled when they are imported, and so this file also runs as a
script in a process of its own.
"""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

SIZES = (16, 32, 64)
# Relative errors. In float32 64-term sums bound them; for half inputs the result is rounded
# to at most 11 bits, an error of 2⁻¹², and keys that almost repeat may leave as much again.
LIMITS = {"tf32x3": 1e-5, "tf32": 2.5e-4, "bf16": 2.5e-4}
# How far keys are from one common key, and β: reflections, all but the same, are the hardest.
KEYS = {"independent": (None, 1.0), "close": (0.1, 2.0), "almost the same": (0.01, 2.0)}


def triangles(R: int, distance: float | None, beta: float):
    """Return `strict_lower(β K Kᵀ) [4, R, R]` in float64 for unit keys of 64 dimensions."""
    import torch

    generator = torch.Generator().manual_seed(R)
    k = torch.randn(4, R, 64, generator=generator, dtype=torch.float64)
    if distance is not None:
        k = torch.randn(4, 1, 64, generator=generator, dtype=torch.float64) + distance * k
    k = torch.nn.functional.normalize(k, dim=-1)
    return (beta * k @ k.mT).tril(-1)


def measure() -> dict[str, float]:
    """Return the relative error of each case."""
    import torch
    import triton
    import triton.language as tl

    from householder.ops._triton import inverse_unit_lower

    @triton.jit
    def kernel(m, inverse, R: tl.constexpr, PRECISION: tl.constexpr):
        o = tl.arange(0, R)
        tile = tl.program_id(0) * R * R + o[:, None] * R + o[None, :]
        tl.store(inverse + tile, inverse_unit_lower(tl.load(m + tile), R, PRECISION))

    # The interpreter looks names of other kernels up in the module.
    globals().update(tl=tl, inverse_unit_lower=inverse_unit_lower)
    errors = {}
    for R in SIZES:
        for keys, (distance, beta) in KEYS.items():
            m = triangles(R, distance, beta)
            m32 = m.float()
            expected = torch.linalg.inv(torch.eye(R, dtype=torch.float64) + m32.double())
            for precision in LIMITS:
                actual = torch.full_like(m32, float("nan"))
                kernel[(m.shape[0],)](m32, actual, R=R, PRECISION=precision)
                error = (actual.double() - expected).norm() / expected.norm()
                errors[f"{R} {keys} {precision}"] = error.item()
    return errors


@pytest.fixture(scope="module")
def errors(interpreted) -> dict[str, float]:
    return interpreted(__file__)


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("R", SIZES)
def test_inverse_agrees_with_float64(R, keys, precision, errors):
    assert errors[f"{R} {keys} {precision}"] < LIMITS[precision]


def test_no_kernel_has_a_third_grid_dimension():
    # The number of parts of a float32 product is 3 + program_id(2).
    package = Path(__file__).parents[2] / "src" / "householder"
    users = [
        path.name
        for path in sorted(package.rglob("*.py"))
        if re.search(r"program_id\((axis=)?2\)", path.read_text())
    ]
    assert users == ["_triton.py"]


if __name__ == "__main__":
    print(json.dumps(measure()))
