"""Products of float32 tiles in parts, on tensor cores that an interpreter's stand for.

They take the first ten bits of their operands and cut off, after every eight terms, what does not
fit into 24 bits of a sum. Whether kernels are interpreted is settled when they are imported, and so
this file also runs as a script in a process of its own.
"""

import json

import pytest

pytest.importorskip("triton")

PRECISIONS = ("tf32x3", "fp32", "bf16x6")


def measure() -> dict[str, tuple[float, float]]:
    """Return of each case the relative error, and by what part the products are too long."""
    import numpy
    import torch
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    from householder.ops._triton import dot

    def first_bits(x):
        return (x.view(numpy.int32) & -0x2000).view(numpy.float32).astype(numpy.float64)

    def cut_off(x):
        mantissa, exponent = numpy.frexp(x)
        return numpy.ldexp(numpy.trunc(mantissa * 2.0**24), exponent - 24)

    def multiply(self, a, b, d, *_):
        total, left, right = d.data.astype(numpy.float64), first_bits(a.data), first_bits(b.data)
        for i in range(0, left.shape[1], 8):
            total = cut_off(total + left[:, i : i + 8] @ right[i : i + 8])
        return interpreter.TensorHandle(total.astype(numpy.float32), d.dtype.scalar)

    @triton.jit
    def kernel(a, b, c, PRECISION: tl.constexpr):
        o = tl.arange(0, 64)
        tile = o[:, None] * 64 + o[None, :]
        tl.store(c + tile, dot(tl.load(a + tile), tl.load(b + tile), PRECISION))

    # The interpreter looks names of other kernels up in the module.
    globals().update(tl=tl, dot=dot)
    interpreter.InterpreterBuilder.create_dot = multiply
    torch.manual_seed(0)
    orthogonal = [torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q for _ in range(2)]
    # Rows and columns of any size, and of none.
    sizes = torch.logspace(-12, 12, 64, 2.0)
    sizes[7] = 0.0
    a, b = (x.float().contiguous() for x in orthogonal)
    cases = {"orthogonal": (a, b), "any size": (sizes[:, None] * a, b * sizes.flip(0))}
    found = {}
    for name, (a, b) in cases.items():
        expected = a.double() @ b.double()
        for precision in PRECISIONS:
            actual = torch.full_like(a, float("nan"))
            kernel[(1,)](a, b, actual, PRECISION=precision)
            long = (actual * expected).sum() / expected.square().sum() - 1
            error = (actual - expected).norm() / expected.norm()
            found[f"{name} {precision}"] = error.item(), long.item()
    return found


@pytest.fixture(scope="module")
def found(interpreted) -> dict[str, tuple[float, float]]:
    return interpreted(__file__)


@pytest.mark.parametrize("precision", ["fp32", "bf16x6"])
@pytest.mark.parametrize("case", ["orthogonal", "any size"])
def test_sums_are_rounded_to_nearest(case, precision, found):
    error, long = found[f"{case} {precision}"]
    # That of rounding the result, on average less than half of 2⁻²³, and nothing to one side.
    assert error < 2.0**-24
    assert abs(long) < 1e-8


def test_three_parts_alone_shrink(found):
    error, long = found["orthogonal tf32x3"]
    assert error < 1e-6
    assert -5e-7 < long < -1e-7


if __name__ == "__main__":
    print(json.dumps(measure()))
