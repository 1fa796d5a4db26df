"""`householder_product` on the CPU: the blocked form against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from householder import householder_frame, householder_product
from householder.ops.householder_product import chunk
from householder.testing import (
    CORRELATIONS,
    assert_as_accurate,
    correlated_reflectors,
    orthogonality_error,
    relative_error,
)


def make(x_shape, k_shape, dtype=torch.float64, strength=None, seed=0):
    """Draw vectors, reflectors of about unit length, and coefficients."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x = torch.randn(x_shape, generator=generator, dtype=wide)
    k = torch.randn(k_shape, generator=generator, dtype=wide) / max(k_shape[-1], 1) ** 0.5
    beta = torch.rand(k_shape[:-1], generator=generator, dtype=torch.float64) * 2
    if strength is not None:
        beta = strength / torch.linalg.vecdot(k, k).real
    return [t.to(dtype) for t in (x, k, beta.to(wide))]


def run(args, impl, **options):
    """Return the output and all gradients."""
    leaves = [a.detach().clone().requires_grad_() for a in args]
    y = householder_product(*leaves, impl=impl, **options)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    y.backward(dy)
    return {"y": y.detach()} | {
        name: leaf.grad for name, leaf in zip(("dx", "dk", "dbeta"), leaves, strict=True)
    }


def check(args, factor=2.0, **options):
    """Hold the blocked form to the accuracy rule, in its output and in every gradient."""
    if args[1].numel() < 200:
        factor *= 2  # of a few numbers the rounding error is a lottery
    wide = torch.complex128 if args[0].is_complex() else torch.float64
    narrow = torch.complex64 if args[0].is_complex() else torch.float32
    if args[0].dtype == wide:
        actual, expected = run(args, "chunk", **options), run(args, "reference", **options)
        for name in expected:
            assert relative_error(actual[name], expected[name]) < 1e-12, name
        args = [a.to(narrow) for a in args]
    expected = run([a.to(wide) for a in args], "reference", **options)
    plain, actual = run(args, "reference", **options), run(args, "chunk", **options)
    for name in expected:
        assert_as_accurate(actual[name], plain[name], expected[name], name=name, factor=factor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("x_shape", "k_shape"),
    [
        ((9,), (3, 9)),  # one vector
        ((5, 9), (1, 9)),  # one reflector
        ((5, 9), (20, 9)),  # more reflectors than dimensions
        ((70, 32), (150, 32)),  # several blocks, the last not full
        ((4, 5, 9), (4, 1, 3, 9)),  # a product for each row of a batch
        ((4, 5, 9), (5, 3, 9)),  # a product for each column
        ((4, 5, 9), (4, 5, 3, 9)),  # a product for each vector
        ((9,), (4, 3, 9)),  # one vector under several products
        ((2, 1, 9), (2, 6, 3, 9)),
        ((3, 4, 5, 9), (4, 1, 3, 9)),  # the product's own dimension in the middle
    ],
)
def test_equals_the_definition(x_shape, k_shape, transpose, dtype):
    check(make(x_shape, k_shape, dtype), transpose=transpose)


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_identities_projections_and_reflections(strength, dtype):
    check(make((10, 16), (8, 16), dtype, strength))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_accuracy_in_every_dtype(dtype):
    args = make((33, 64), (64, 64), dtype)
    assert householder_product(*args).dtype == dtype
    check(args)


def test_beta_may_be_wider_than_the_reflectors():
    x, k, beta = make((10, 64), (64, 64), torch.bfloat16, strength=2.0)
    exact = 2 / k.float().square().sum(-1)
    assert householder_product(x, k, exact).dtype == torch.bfloat16
    # In float32 the wide β keeps the lengths; the bfloat16 one cannot.
    lengths = [householder_product(x.float(), k, b).norm(dim=-1) for b in (exact, beta)]
    errors = [float((y / x.float().norm(dim=-1) - 1).abs().max()) for y in lengths]
    assert errors[0] < 1e-5 < 1e-3 < errors[1]


@pytest.mark.parametrize("mixed", [torch.float32, torch.float64, torch.complex64])
def test_dtypes_promote(mixed):
    x, k, beta = make((5, 8), (3, 8), torch.float32)
    y = householder_product(x, k.to(mixed), beta)
    assert y.dtype == torch.promote_types(torch.float32, mixed)


def test_repeated_and_nearly_parallel_reflectors():
    x, k, _ = make((10, 32), (24, 32))
    k = k[:1] + 1e-7 * k
    k[5:9] = k[0]
    beta = 2 / k.square().sum(-1)
    check([x, k, beta], factor=10.0)  # each rounding error counts once per parallel reflector
    y = householder_product(x.float(), k.float(), 2 / k.float().square().sum(-1))
    torch.testing.assert_close(y.norm(dim=-1).double(), x.norm(dim=-1), rtol=1e-5, atol=0)


def test_twice_the_same_reflection_is_the_identity():
    x, k, beta = make((10, 8), (1, 8), strength=2.0)
    y = householder_product(x, k.repeat(2, 1), beta.repeat(2))
    torch.testing.assert_close(y, x, rtol=1e-14, atol=1e-14)


def test_zero_reflectors_and_zero_beta_are_exact():
    x, k, beta = make((10, 8), (4, 8))
    assert torch.equal(householder_product(x, torch.zeros_like(k), beta), x)
    assert torch.equal(householder_product(x, k, torch.zeros_like(beta)), x)
    k[2] = 0
    check([x, k, beta])


@pytest.mark.parametrize(
    ("x_shape", "k_shape"), [((0, 8), (3, 8)), ((5, 8), (0, 8)), ((2, 0), (3, 0))]
)
def test_nothing_to_do(x_shape, k_shape):
    args = make(x_shape, k_shape)
    result = run(args, "chunk")
    assert torch.equal(result["y"], args[0])
    assert result["y"].data_ptr() != args[0].data_ptr() or not args[0].numel()
    if args[0].numel():
        assert result["dx"].shape == args[0].shape


def test_strides_do_not_matter():
    x, k, beta = make((6, 5, 8), (4, 8))
    expected = householder_product(x, k, beta)
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    close = {"rtol": 1e-13, "atol": 1e-13}
    actual = householder_product(strided, k.mT.contiguous().mT, beta)
    torch.testing.assert_close(actual, expected, **close)
    expanded = householder_product(x[:, :1].expand(6, 5, 8), k, beta)
    torch.testing.assert_close(expanded[:, 3], expected[:, 0], **close)


@pytest.mark.parametrize("impl", ["chunk", "reference"])
def test_autocast_does_not_reach_inside(impl):
    args = make((5, 16), (8, 16), torch.float32)
    expected = run(args, impl)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(args, impl)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_no_matrix_is_formed(monkeypatch):
    """Neither D × D nor N × N: the largest square is that of a block."""
    squares = []
    solve = torch.linalg.solve_triangular

    def spy(A, *args, **kwargs):
        squares.append(A.shape[-1])
        return solve(A, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "solve_triangular", spy)
    householder_product(*make((300, 256), (200, 256)))
    assert squares
    assert max(squares) <= chunk.MAX_BLOCK


@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    own=st.lists(st.booleans(), max_size=3),
    N=st.integers(1, 12),
    D=st.integers(1, 9),
    transpose=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_broadcast(batch, own, N, D, transpose, seed):
    own_batch = [n if keep else 1 for n, keep in zip(batch[::-1], own, strict=False)][::-1]
    args = make((*batch, D), (*own_batch, N, D), seed=seed)
    actual, expected = (run(args, impl, transpose=transpose) for impl in ("chunk", "reference"))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["chunk", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
def test_without_beta_the_product_is_orthogonal(impl, dtype):
    x, k, beta = make((10, 16), (8, 16), dtype, strength=2.0)
    k = torch.cat([k, torch.zeros_like(k[:1])])  # a zero reflector is the identity
    close = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    )
    actual = householder_product(x, k, impl=impl)
    assert actual.dtype == dtype
    expected = householder_product(x, k[:-1], beta, impl=impl)
    torch.testing.assert_close(actual, expected, **close)
    leaf = k.clone().requires_grad_()
    householder_product(x, leaf, impl=impl).sin().sum().abs().backward()
    assert leaf.grad.isfinite().all()
    # The lengths of the reflectors do not matter, and so the gradient is at right angles to them.
    inner = torch.linalg.vecdot(leaf.grad, k).real
    torch.testing.assert_close(inner, torch.zeros_like(inner), rtol=0, atol=1e2 * close["atol"])
    assert leaf.grad[:-1].abs().max() > 1e-2


class TestFrame:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    @pytest.mark.parametrize("given", [True, False])
    @pytest.mark.parametrize(
        ("batch", "N", "D", "M"),
        [((), 1, 5, 5), ((), 3, 9, 4), ((2, 3), 3, 9, 9), ((), 90, 40, 40), ((2,), 20, 9, 1)],
    )
    def test_equals_the_product_with_the_identity(self, batch, N, D, M, given, dtype):
        _, k, beta = make((1, D), (*batch, N, D), dtype)
        arguments = [k, beta] if given else [k]
        eye = torch.eye(M, D, dtype=dtype).reshape(M, *(1,) * len(batch), D)
        results = []
        for function in (
            lambda *a: householder_frame(*a, num_columns=M),
            lambda *a: householder_frame(*a, num_columns=M, impl="reference"),
            lambda *a: householder_product(eye, *a).movedim(0, -1),
        ):
            leaves = [a.detach().clone().requires_grad_() for a in arguments]
            Q = function(*leaves)
            assert Q.shape == (*batch, D, M)
            results.append([Q, *torch.autograd.grad(Q.sin().sum().abs(), leaves)])
        for other in results[1:]:
            torch.testing.assert_close(results[0], other, rtol=1e-10, atol=1e-10)

    def test_is_as_accurate_as_the_definition(self):
        _, k, beta = make((1, 64), (100, 64), strength=2.0)
        results = [
            householder_frame(*(t.to(dtype) for t in (k, beta)), impl=impl)
            for dtype, impl in (
                (torch.float32, "chunk"),
                (torch.float32, "reference"),
                (torch.float64, "reference"),
            )
        ]
        assert_as_accurate(*results)

    @pytest.mark.parametrize("kind", CORRELATIONS)
    @pytest.mark.parametrize(("N", "D"), [(64, 64), (30, 200), (200, 200), (320, 320)])
    def test_is_orthogonal_however_close_the_reflectors_are(self, N, D, kind):
        """‖QᵀQ − I‖₂ is at most 4 ε √D: no length changes by more."""
        for noise in (1e-6, 1e-3, 0.1) if kind == "close" else (1e-3,):
            k = correlated_reflectors(kind, N, D, noise=noise)
            error = orthogonality_error(householder_frame(k))
            assert error <= 4 * torch.finfo(torch.float32).eps * D**0.5

    def test_rows_of_the_identity_are_not_multiplied(self):
        """With one reflector nothing of D × D is summed over D but K Kᵀ."""
        _, k, beta = make((1, 64), (1, 64))
        with FlopCounterMode(display=False) as counter:
            householder_frame(k, beta)
        assert counter.get_total_flops() < 3 * 64 * 64

    @pytest.mark.parametrize("batch", [(), (2,)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    def test_nothing_to_do(self, batch, dtype):
        k = torch.zeros(*batch, 0, 5, dtype=dtype)
        expected = torch.eye(5, 3, dtype=dtype).expand(*batch, 5, 3)
        assert torch.equal(householder_frame(k, num_columns=3), expected)
        k = torch.ones(*batch, 2, 5, dtype=dtype)
        assert householder_frame(k, num_columns=0).shape == (*batch, 5, 0)

    def test_every_order_in_both_modes(self):
        leaves = [a.requires_grad_() for a in make((1, 3), (2, 3))[1:]]
        assert torch.autograd.gradcheck(householder_frame, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(householder_frame, leaves)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiles_without_graph_breaks(self):
        _, k, beta = make((1, 6), (4, 6))
        leaves = [k.requires_grad_(), beta.requires_grad_()]
        compiled = torch.compile(householder_frame, fullgraph=True, backend="aot_eager")
        results = [torch.autograd.grad(f(*leaves).sin().sum(), leaves)
                   for f in (compiled, householder_frame)]  # fmt: skip
        assert all(map(torch.equal, *results))

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ((torch.zeros(6),), r"reflectors\.unsqueeze\(-2\)"),
            ((torch.zeros(4, 6), torch.zeros(5)), "`beta` must be"),
            ((torch.zeros(2, 4, 6), torch.zeros(3, 4)), "batch dimensions must broadcast"),
            ((torch.zeros(4, 6), None, 7), "`num_columns` must be between 0 and D = 6, got 7"),
        ],
    )
    def test_errors_name_the_argument(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            householder_frame(*arguments)

    @pytest.mark.parametrize("num_columns", [2.0, True, "2"])
    def test_a_number_of_columns_is_an_int(self, num_columns):
        with pytest.raises(TypeError, match="frame: `num_columns` must be an int, got"):
            householder_frame(torch.zeros(4, 6), num_columns=num_columns)


def test_triton_says_why_it_cannot_run():
    x, k, beta = make((3, 6), (4, 6), torch.float32)
    with pytest.raises(NotImplementedError, match=r'impl="triton" cannot run: it needs tensors on'):
        householder_product(x, k, beta, impl="triton")


class TestTransforms:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_every_order_in_both_modes(self, dtype):
        leaves = [a.requires_grad_() for a in make((2, 3), (4, 3), dtype)]
        assert torch.autograd.gradcheck(
            householder_product, leaves, check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(householder_product, leaves, check_fwd_over_rev=True)

    def test_third_order(self):
        args = make((2, 3), (4, 3))

        def value(x, impl):
            return householder_product(x, *args[1:], impl=impl).sin().sum()

        third = [
            torch.func.jacrev(torch.func.jacrev(torch.func.grad(value)))(args[0], impl)
            for impl in ("chunk", "reference")
        ]
        torch.testing.assert_close(*third, rtol=1e-9, atol=1e-9)

    def test_hessian_and_jacobians(self):
        args = make((3, 6), (4, 6))

        def loss(x, k, beta, impl="auto"):
            return householder_product(x, k, beta, impl=impl).sin().sum()

        for transform in (torch.func.hessian, torch.func.jacrev, torch.func.jacfwd):
            actual, expected = (
                transform(lambda *a, impl=impl: loss(*a, impl=impl), argnums=(0, 1, 2))(*args)
                for impl in ("auto", "reference")
            )
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("dims", [(0, None, None), (None, 0, None), (1, 2, 0)])
    def test_vmap(self, dims):
        args = make((3, 6), (4, 6))
        stacked = [
            a if dim is None else torch.stack([a, -a, 2 * a], dim)
            for a, dim in zip(args, dims, strict=True)
        ]
        each = [
            householder_product(
                *(
                    a if dim is None else a.select(dim, i)
                    for a, dim in zip(stacked, dims, strict=True)
                )
            )
            for i in range(3)
        ]
        actual = torch.func.vmap(householder_product, in_dims=dims)(*stacked)
        torch.testing.assert_close(actual, torch.stack(each), rtol=1e-12, atol=1e-12)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiles_without_graph_breaks(self):
        leaves = [a.requires_grad_() for a in make((3, 6), (4, 6))]
        compiled = torch.compile(householder_product, fullgraph=True, backend="aot_eager")
        for function in (lambda *a: compiled(*a), lambda *a: compiled(*a, transpose=True)):
            traced = torch.autograd.grad(function(*leaves).sin().sum(), leaves)
            assert all(g.isfinite().all() for g in traced)
        traced = torch.autograd.grad(compiled(*leaves).sin().sum(), leaves)
        eager = torch.autograd.grad(householder_product(*leaves).sin().sum(), leaves)
        for a, b in zip(traced, eager, strict=True):
            assert torch.equal(a, b)

    def test_registration(self):
        x, *args = [a.unsqueeze(0) for a in make((3, 6), (4, 6))]
        forward = torch.ops.householder.householder_product.default
        alone = torch.ops.householder.householder_product_alone.default
        backward = torch.ops.householder.householder_product_backward.default
        for rows, transpose in ((x, False), (x, True), (None, False)):
            y, *saved = forward(rows, *args, 3, transpose, False, "chunk")
            torch.library.opcheck(forward, (rows, *args, 3, transpose, False, "chunk"))
            torch.library.opcheck(alone, (rows, *args, 3, transpose, "chunk"))
            assert torch.equal(alone(rows, *args, 3, transpose, "chunk"), y)
            torch.library.opcheck(backward, (y, rows, *args, transpose, *saved, "chunk"))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"reflectors": torch.zeros(4, 5)}, ValueError, r"`reflectors` must be \[\*, N, D\]"),
        ({"reflectors": torch.zeros(6)}, ValueError, r"reflectors\.unsqueeze\(-2\)"),
        ({"beta": torch.zeros(5)}, ValueError, r"`beta` must be \[\*, N\] with N = 4"),
        ({"reflectors": torch.zeros(2, 4, 6)}, ValueError, "batch dimensions must broadcast"),
        ({"x": [1.0]}, TypeError, "`x` must be a tensor, got list"),
        ({"beta": torch.zeros(4, dtype=torch.long)}, TypeError, "`beta` must be real or complex"),
        ({"beta": torch.zeros(4, device="meta")}, ValueError, "one device"),
        ({"impl": "cuda"}, ValueError, "`impl` must be one of"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    arguments = dict(zip(("x", "reflectors", "beta"), make((3, 6), (4, 6)), strict=True))
    with pytest.raises(error, match=match):
        householder_product(**{**arguments, **change})
