"""The Triton kernels of `householder_product` under Triton's interpreter: float32, tiny, CPU.

Whether kernels are interpreted is settled when they are imported, and so this file also runs as a
script in a process of its own, where the cases are computed; the tests look at its answers.
"""

import json

import pytest

pytest.importorskip("triton")

# G, M, N, D; whether β is given, whether the rows are those of the identity, transposed or not.
# Interpreted, a block of 128 takes seconds whatever N is, and more with D: few cases, small D.
CASES = {
    "few": (1, 5, 3, 9, True, False, False),
    "one": (1, 3, 1, 7, False, False, False),
    "a block of 32, two products": (2, 40, 32, 20, True, False, False),
    "orthogonal, transposed": (2, 12, 20, 40, False, False, True),
    "a block of 64": (1, 10, 50, 70, True, False, True),
    "a block of 128": (1, 9, 100, 34, True, False, False),
    "a block of 128, orthogonal, transposed": (1, 9, 128, 33, False, False, True),
    "two blocks, transposed": (1, 6, 130, 36, True, False, True),
    "frame of few": (2, 6, 3, 9, True, True, False),
    "whole frame, orthogonal": (1, 33, 20, 33, False, True, False),
    "frame of a block of 64": (1, 6, 50, 10, True, True, False),
    "frame of two blocks, orthogonal": (1, 6, 130, 24, False, True, False),
    "frame of more columns than a part of the sums": (1, 4, 5, 257, True, True, False),
}
OUTPUTS = ("y", "dx", "dk", "dbeta")
# A block solves for up to 128 reflectors at once what the definition does one by one.
# float32 factors are multiplied in two parts without the product of the small ones, as on a GPU.
FACTOR = 5.0


def compute(case: tuple) -> dict[str, str]:
    """Run one case; return what breaks the accuracy rule, by output."""
    import torch

    from householder.ops.householder_product import reference, triton
    from householder.testing import assert_as_accurate

    G, M, N, D, given, identity, transpose = case
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # so that memory comes filled with NaN
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(G, N, D, generator=generator) / D**0.5
    k[:, 1::7] = k[:, :1]  # repeated reflectors
    if N > 2:
        k[:, 2] = 0.0
    beta = None
    if given:  # and behind it what is not to be read
        beta = torch.full((G, N + 1), float("nan"))[:, :N]
        beta.copy_(torch.rand(G, N, generator=generator) * 2)
    if beta is not None and N > 2:
        beta[:, 1] = 0.0
    x = None if identity else torch.randn(G, M, D, generator=generator)
    dy = torch.randn(G, D, M, generator=generator).mT
    y, *saved = triton.forward(k, beta, x, M, transpose, True)
    actual = [y, *triton.backward(dy, k, beta, x, transpose, *saved)]

    def define(dtype: torch.dtype) -> list:
        leaves = [
            None if t is None else t.to(dtype, copy=True).requires_grad_() for t in (x, k, beta)
        ]
        rows, vectors, b = leaves
        if b is None:
            squares = vectors.square().sum(-1)
            b = torch.where(squares == 0, 0.0, 2 / torch.where(squares == 0, 1.0, squares))
        if rows is None:
            rows = torch.eye(M, D, dtype=dtype).expand(G, M, D)
        order = (vectors.flip(1), b.flip(1)) if transpose else (vectors, b)
        out = reference.forward(rows, *order)
        out.backward(dy.to(dtype))
        return [out.detach(), *(None if t is None else t.grad for t in leaves)]

    broken = {}
    for name, a, p, e in zip(
        OUTPUTS, actual, define(torch.float32), define(torch.float64), strict=True
    ):
        if (a is None) != (e is None):
            broken[name] = "present or absent where it should not be"
        elif a is not None:
            try:
                assert_as_accurate(a, p, e, factor=FACTOR, name=name)
            except AssertionError as error:
                broken[name] = str(error)
    declared = triton.saved_shapes(x, k, M)
    if [(tuple(t.shape), t.dtype) for t in saved] != list(declared):
        broken["saved"] = f"{[t.shape for t in saved]} is not what is declared, {declared}"
    if N <= 3:  # nothing of it depends on N
        unsaved = triton.forward(k, beta, x, M, transpose, False)
        if not torch.equal(unsaved[0], y) or any(t.numel() for t in unsaved[1:]):
            broken["unsaved"] = "forward without saving differs or saves"
    return broken


def compute_public() -> dict[str, str]:
    """Go through the public functions, whose gradients, transforms and errors are the op's."""
    import torch

    from householder import householder_frame, householder_product

    generator = torch.Generator().manual_seed(0)
    x, k = (torch.randn(s, generator=generator) for s in ((2, 3, 4, 10), (2, 1, 1, 5, 10)))
    k /= 10**0.5
    b = 2 * torch.rand(2, 1, 1, 5, generator=generator)
    broken = {}

    def compare(name, function, *arguments):
        results = []
        for impl in ("triton", "reference"):
            leaves = [a.clone().requires_grad_() for a in arguments]
            out = function(*leaves, impl=impl)
            out.sin().sum().backward()
            results.append([out.detach(), *(a.grad for a in leaves)])
        try:
            torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)
        except AssertionError as error:
            broken[name] = str(error)

    compare("product", householder_product, x, k, b)
    x, k, b = x[0], k[0], b[0]
    compare("orthogonal product", householder_product, x, k)
    compare(
        "transposed", lambda *a, impl: householder_product(*a, transpose=True, impl=impl), x, k, b
    )
    compare("frame", lambda *a, impl: householder_frame(*a, num_columns=4, impl=impl), k, b)
    compare("orthogonal frame", householder_frame, k)

    x, k = x[0, 0, :4], k[0, 0, :2, :4]
    found = {}
    for impl in ("triton", "reference"):

        def loss(k, x, impl=impl):
            return householder_product(x, k, transpose=True, impl=impl).sin().sum()

        found[impl] = {
            "second order": torch.func.hessian(loss, argnums=(0, 1))(k, x),
            "forward mode": torch.func.jacfwd(loss, argnums=(0, 1))(k, x),
            "vmap": torch.vmap(loss, (None, 0))(k, torch.stack([x, 2 * x])),
            "vmap of gradients": torch.vmap(torch.func.grad(loss), (None, 0))(
                k, torch.stack([x, 2 * x])
            ),
        }
    for name in found["triton"]:
        results = [found[impl][name] for impl in ("triton", "reference")]
        try:
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        except AssertionError as error:
            broken[name] = str(error)
    try:
        householder_product(x.double(), k.double(), impl="triton")
        broken["float64"] = "was taken"
    except NotImplementedError as error:
        if "float64" not in str(error):
            broken["float64"] = str(error)
    return broken


def compute_orthogonality() -> dict[str, str]:
    """Form Q of reflectors close to one another; return which errors are above 4 ε √D."""
    from householder import householder_frame
    from householder.testing import correlated_reflectors, orthogonality_error

    broken = {}
    for kind in ("close", "lengths"):
        k = correlated_reflectors(kind, 40, 40)  # a tile that is full, and one that is not
        error = orthogonality_error(householder_frame(k, impl="triton")) / 2**-23 / 40**0.5
        if not error <= 4:
            broken[kind] = f"{error:.1f} ε √D"
    return broken


@pytest.fixture(scope="module")
def answers(interpreted) -> dict[str, dict[str, str]]:
    return interpreted(__file__)


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_accurate_as_the_definition(name, answers):
    assert answers[name] == {}


def test_public_functions_run_them(answers):
    assert answers["public"] == {}


def test_frames_are_orthogonal_however_close_the_reflectors_are(answers):
    assert answers["orthogonality"] == {}


if __name__ == "__main__":
    answers = {name: compute(case) for name, case in CASES.items()}
    others = {"public": compute_public(), "orthogonality": compute_orthogonality()}
    print(json.dumps(answers | others))
