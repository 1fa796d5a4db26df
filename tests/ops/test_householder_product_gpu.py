"""The Triton kernels of `householder_product` on a GPU: every configuration, against float64."""

import pytest
import torch
from torch.nn import functional as F

from householder import householder_frame, householder_product
from householder.testing import (
    CORRELATIONS,
    assert_as_accurate,
    correlated_reflectors,
    orthogonality_error,
    relative_error,
)

pytestmark = pytest.mark.gpu

OUTPUTS = ("y", "dx", "dk", "dbeta")
# Relative errors of products with operands of that dtype; for float32, of sums of up to 2,000 terms
# through a triangle of 128.
LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 3e-6}

# Shape of x, shape of the reflectors, whether β is given, transposed or not.
SHAPES = {
    "one reflector": ((300, 512), (1, 512), True, False),
    "few": ((300, 512), (8, 512), True, True),
    "few, orthogonal": ((2, 100, 512), (17, 512), False, False),
    "odd sizes": ((77, 301), (29, 301), True, False),
    "narrow": ((50, 3), (2, 3), True, False),
    "a block of 64": ((200, 256), (64, 256), True, False),
    "a block of 64, odd sizes": ((65, 129), (50, 129), False, True),
    "a block of 128": ((300, 512), (128, 512), True, False),
    "a block of 128, odd sizes": ((131, 301), (100, 301), False, True),
    "two blocks": ((200, 256), (200, 256), True, True),
    "as many as dimensions": ((300, 300), (300, 300), False, False),
    "more than dimensions": ((40, 100), (260, 100), True, False),
    "a product for each row": ((5, 70, 64), (5, 1, 8, 64), True, False),
    "a product for each vector": ((5, 7, 64), (5, 7, 3, 64), False, True),
    "many rows": ((5000, 256), (40, 256), True, False),
    "one row": ((256,), (40, 256), True, True),
}


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make(shape, dtype):
    """Draw vectors, unit reflectors, of which some are repeated or zero, and coefficients."""
    x_shape, k_shape, given, transpose = SHAPES[shape]
    x, k = draw(*x_shape), F.normalize(draw(*k_shape, seed=1), dim=-1)
    if k_shape[-2] > 7:
        k[..., 3, :] = k[..., 0, :]
        k[..., 5, :] = 0.0
    leaves = {"x": x.to(dtype), "k": k.to(dtype)}
    if given:
        leaves["beta"] = 2 * draw(*k_shape[:-1], seed=2).sigmoid().float()
        leaves["beta"][..., 0] = 0.0
    return {n: t.cuda() for n, t in leaves.items()}, transpose


def run(leaves, transpose, impl, dtype=None):
    """Return the output and all gradients, in `dtype` or the leaves' own."""
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in leaves.items()}
    y = householder_product(
        leaves["x"], leaves["k"], leaves.get("beta"), transpose=transpose, impl=impl
    )
    dy = draw(*y.shape, seed=3).to(next(iter(leaves.values())).device, torch.bfloat16)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_agree_with_float64(shape, dtype, poisoned):
    leaves, transpose = make(shape, dtype)
    actual, again = (run(leaves, transpose, "triton") for _ in range(2))
    torch.use_deterministic_algorithms(False)
    expected = run(leaves, transpose, "chunk", torch.float64)
    for name, a, b, e in zip(OUTPUTS, actual, again, expected, strict=False):
        assert relative_error(a, e) < LIMITS[dtype], name
        assert torch.equal(a, b), f"{name} changes from run to run"


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("batch", "N", "D", "M"),
    [((), 3, 9, 9), ((), 32, 512, 512), ((), 8, 512, 100), ((2, 3), 20, 40, 30), ((), 64, 257, 257),
     ((), 128, 256, 256), ((), 100, 301, 77), ((), 256, 256, 256), ((2,), 300, 301, 200)],
)  # fmt: skip
def test_frames_agree_with_float64(batch, N, D, M, given, dtype, poisoned):
    k = F.normalize(draw(*batch, N, D), dim=-1).to("cuda", dtype)
    beta = 2 * draw(*batch, N, seed=1).sigmoid().to("cuda", torch.float32) if given else None
    dQ = draw(*batch, D, M, seed=2).to("cuda", torch.bfloat16)
    results = []
    for impl, to in (("triton", None), ("chunk", torch.float64)):
        leaves = [t.detach().to(to or t.dtype).requires_grad_() for t in (k, beta) if t is not None]
        Q = householder_frame(
            *leaves, **({} if given else {"beta": None}), num_columns=M, impl=impl
        )
        assert Q.shape == (*batch, D, M)
        results.append([Q, *torch.autograd.grad(Q, leaves, dQ.to(Q.dtype))])
        torch.use_deterministic_algorithms(False)
    for a, e in zip(*results, strict=True):
        # All of it is computed in float32, and rounded to the dtype once.
        assert relative_error(a, e) < max(3e-6, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("kind", CORRELATIONS)
@pytest.mark.parametrize(
    ("N", "D"), [(64, 64), (32, 1024), (128, 512), (100, 300), (512, 512), (1024, 1024)]
)
def test_frames_are_orthogonal_however_close_the_reflectors_are(N, D, kind):
    """‖QᵀQ − I‖₂ is at most 4 ε √D: no length changes by more."""
    for noise in (1e-6, 1e-3, 0.1) if kind == "close" else (1e-3,):
        k = correlated_reflectors(kind, N, D, noise=noise, device="cuda")
        with_tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True  # which must make no difference
        Q = householder_frame(k)
        torch.backends.cuda.matmul.allow_tf32 = with_tf32
        assert orthogonality_error(Q) <= 4 * torch.finfo(torch.float32).eps * D**0.5


@pytest.mark.parametrize("kind", CORRELATIONS)
@pytest.mark.parametrize(("N", "D"), [(32, 1024), (64, 64), (128, 512)])
def test_gradients_of_correlated_reflectors(N, D, kind):
    """The loop's error, up to 4 times: what is left is that of sums of products with vectors.

    Every triangle in float64 would change it by a twentieth.
    """
    k = correlated_reflectors(kind, N, D, device="cuda")
    x, dy = draw(300, D).to("cuda", torch.float32), draw(300, D, seed=1).to("cuda", torch.float32)
    grads = []
    for impl, dtype in (
        ("triton", torch.float32),
        ("reference", torch.float32),
        ("chunk", torch.float64),
    ):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, k)]
        y = householder_product(*leaves, impl=impl)
        grads.append(torch.autograd.grad(y, leaves, dy.to(dtype)))
    for name, actual, plain, expected in zip(("dx", "dk"), *grads, strict=True):
        assert_as_accurate(actual, plain, expected, factor=4.0, name=name)


def test_auto_runs_the_kernels(monkeypatch):
    from householder.ops.householder_product import triton

    calls = []
    forward = triton.forward
    monkeypatch.setattr(triton, "forward", lambda *a: calls.append(1) or forward(*a))
    leaves, transpose = make("few", torch.bfloat16)
    y = run(leaves, transpose, "auto")[0]
    assert calls
    assert torch.equal(y, run(leaves, transpose, "triton")[0])
    run({n: t.double() for n, t in leaves.items()}, transpose, "auto")
    assert len(calls) == 2  # float64 is not theirs


@pytest.mark.parametrize("shape", ["few", "a block of 128", "as many as dimensions"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_depend_on_the_others(shape, dtype):
    leaves, transpose = make(shape, dtype)
    together = householder_product(**rename(leaves), transpose=transpose)
    for rows in (slice(2, 3), slice(0, 70)):
        alone = householder_product(
            **rename({**leaves, "x": leaves["x"][rows]}), transpose=transpose
        )
        assert torch.equal(alone, together[rows])


def rename(leaves):
    return {"reflectors" if n == "k" else n: t for n, t in leaves.items()}


@pytest.mark.parametrize("shape", ["few", "two blocks"])
def test_higher_orders_and_forward_mode(shape):
    leaves, transpose = make(shape, torch.float32)
    x, k = leaves["x"][:2, :], leaves["k"]
    v = torch.randn_like(k)

    def loss(k, impl):
        return householder_product(x, k, transpose=transpose, impl=impl).sin().sum()

    for impl_free in (
        lambda impl: torch.func.jvp(lambda k: loss(k, impl), (k,), (v,))[1],
        lambda impl: torch.func.jvp(torch.func.grad(lambda k: loss(k, impl)), (k,), (v,))[1],
        lambda impl: torch.vmap(torch.func.grad(lambda k: loss(k, impl)))(torch.stack([k, 2 * k])),
    ):
        actual, expected = impl_free("triton"), impl_free("reference")
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("shape", ["few", "two blocks"])
def test_compiles_and_is_captured_in_a_graph(shape):
    leaves, transpose = make(shape, torch.float32)
    expected = run(leaves, transpose, "triton")
    dy = draw(*expected[0].shape, seed=3).to("cuda", torch.bfloat16).float()
    compiled = torch.compile(householder_product, fullgraph=True)
    for function in (householder_product, compiled):

        def both(function=function):
            # Leaves of their own: autograd remembers the stream that a leaf was first used on.
            inputs = {n: t.detach().requires_grad_() for n, t in leaves.items()}
            y = function(**rename(inputs), transpose=transpose)
            return [y, *torch.autograd.grad(y, list(inputs.values()), dy)]

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            both()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
        graph.replay()
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a, b)


def test_strides_do_not_matter():
    leaves, transpose = make("few", torch.bfloat16)
    shifted = {}
    for n, t in leaves.items():
        wide = t.new_empty(*t.shape[:-1], t.shape[-1] + 3)
        shifted[n] = wide[..., 3:].copy_(t)
    shifted["x"] = leaves["x"].mT.contiguous().mT
    for a, b in zip(
        run(shifted, transpose, "triton"), run(leaves, transpose, "triton"), strict=True
    ):
        assert torch.equal(a, b)


def test_more_than_two_to_the_31_entries():
    k = F.normalize(draw(4, 4096), dim=-1).to("cuda", torch.bfloat16)
    x = torch.randn(530_000, 4096, device="cuda", dtype=torch.bfloat16)
    y = householder_product(x, k)
    assert torch.equal(y[-100:], householder_product(x[-100:], k))
