"""`HouseholderProduct`: frames, LAPACK's form, factoring a given matrix, exact special cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from householder import HouseholderProduct

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def random_orthogonal(*shape, dtype=torch.float64, seed=0, sign=None):
    """Draw a frame `[*, D, M]`; for square real ones of the given determinant."""
    Q = torch.linalg.qr(draw(*shape, dtype=torch.promote_types(dtype, torch.float64), seed=seed))[0]
    if sign is not None:
        flip = torch.linalg.det(Q).real.sign() * sign
        Q = torch.cat([Q[..., :1] * flip[..., None, None], Q[..., 1:]], dim=-1)
    return Q.to(dtype)


def orthogonality_error(Q):
    """Return the largest entry of QᴴQ − I, in units of the dtype's rounding."""
    eye = torch.eye(Q.shape[-1])
    wide = Q.to(torch.complex128)
    return float((wide.mH @ wide - eye).abs().max()) / torch.finfo(Q.dtype).eps


class TestOrthogonal:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("N", "D"), [(1, 1), (3, 8), (20, 8), (200, 200)])
    def test_is_orthogonal_to_rounding(self, N, D, dtype):
        Q = HouseholderProduct.orthogonal(draw(N, D, dtype=dtype))
        assert orthogonality_error(Q.to_dense()) < 4 * D**0.5 + 4
        assert Q.logabsdet().abs() < 100 * torch.finfo(dtype).eps * N

    @pytest.mark.parametrize("noise", [0.0, 1e-6, 0.1])
    def test_correlated_reflectors_stay_orthogonal(self, noise):
        """Truncated series lose orthogonality here by orders of magnitude."""
        k = draw(1, 256) + noise * draw(64, 256, seed=1)
        for dtype in (torch.float32, torch.float64):
            Q = HouseholderProduct.orthogonal(k.to(dtype)).to_dense()
            assert orthogonality_error(Q) < 4 * 256**0.5

    @pytest.mark.parametrize("length", [1e-30, 1e-15, 1e15, 1e30])
    def test_lengths_neither_overflow_nor_vanish(self, length):
        k = draw(3, 8, dtype=torch.float32)
        Q, expected = (HouseholderProduct.orthogonal(x).to_dense() for x in (k * length, k))
        torch.testing.assert_close(Q, expected, rtol=1e-5, atol=1e-6)

    def test_lengths_change_by_powers_of_two_alone(self):
        k = draw(40, 8, dtype=torch.float32) * 3.7
        factors = HouseholderProduct.orthogonal(k).reflectors / k
        assert (factors == factors[:, :1]).all()
        assert (torch.frexp(factors).mantissa == 0.5).all()

    def test_zero_and_repeated_reflectors(self):
        k = draw(4, 8).requires_grad_()
        mask = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64).unsqueeze(-1)
        Q = HouseholderProduct.orthogonal(k * mask).to_dense()
        others = HouseholderProduct.orthogonal(k[[0, 2, 3]]).to_dense()
        torch.testing.assert_close(Q, others, rtol=1e-13, atol=1e-13)
        Q.sum().backward()
        assert k.grad.isfinite().all()
        assert (k.grad[1] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_reflectors_make_a_float32_orthogonal_product(self, dtype):
        Q = HouseholderProduct.orthogonal(draw(8, 32, dtype=dtype))
        assert Q.dtype == dtype
        assert Q.beta.dtype == torch.float32
        wide = HouseholderProduct(Q.reflectors.float(), Q.beta).to_dense()
        assert orthogonality_error(wide) < 40
        error = (Q.to_dense().float() - wide).abs().max()
        assert error <= torch.finfo(dtype).eps  # computed in float32, rounded once

    def test_gradient_is_that_of_the_direction(self):
        k = draw(3, 6).requires_grad_()
        (gradient,) = torch.autograd.grad(
            HouseholderProduct.orthogonal(k).to_dense().sin().sum(), k
        )
        torch.testing.assert_close((gradient * k).sum(-1), torch.zeros(3).double())
        assert gradient.abs().max() > 1e-3
        torch.autograd.gradcheck(lambda k: HouseholderProduct.orthogonal(k).to_dense(), k)


class TestFrame:
    @pytest.mark.parametrize("M", [0, 1, 5, 8])
    @pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
    def test_is_the_first_columns(self, M, batch):
        Q = HouseholderProduct.orthogonal(draw(*batch, 3, 8))
        frame = Q.frame(M)
        assert frame.shape == (*batch, 8, M)
        torch.testing.assert_close(frame, Q.to_dense()[..., :M], rtol=1e-13, atol=1e-13)

    def test_never_forms_the_square_matrix(self):
        """A 1,000,000 × 2 frame: its square matrix would take 4 terabytes."""
        Q = HouseholderProduct.orthogonal(draw(3, 1_000_000, dtype=torch.float32))
        assert orthogonality_error(Q.frame(2)) < 100

    @pytest.mark.parametrize("M", [-1, 9])
    def test_bad_size(self, M):
        with pytest.raises(ValueError, match=f"`M` must be between 0 and D = 8, got {M}"):
            HouseholderProduct.orthogonal(draw(3, 8)).frame(M)


class TestLapack:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("D", "N"), [(8, 8), (8, 3), (1, 1)])
    def test_agrees_with_lapack(self, D, N, dtype):
        a, tau = torch.geqrf(draw(2, D, N, dtype=dtype))
        product = HouseholderProduct.from_lapack(a, tau)
        expected = torch.linalg.householder_product(a, tau)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(product.frame(N), expected, rtol=0, atol=20 * eps)
        back, tau_back = product.to_lapack()
        assert torch.equal(back, a.tril(-1))
        torch.testing.assert_close(tau_back, tau, rtol=4 * eps, atol=0)

    def test_ormqr_agrees(self):
        a, tau = torch.geqrf(draw(8, 5))
        x = draw(8, 3, seed=1)
        product = HouseholderProduct.from_lapack(a, tau)
        torch.testing.assert_close(product(x.mT).mT, torch.ormqr(a, tau, x))
        torch.testing.assert_close(product.mT(x.mT).mT, torch.ormqr(a, tau, x, transpose=True))

    def test_given_matrix_goes_through(self):
        Q = random_orthogonal(2, 6, 6)
        a, tau = HouseholderProduct.from_orthogonal(Q).to_lapack()
        torch.testing.assert_close(torch.linalg.householder_product(a, tau), Q)

    def test_another_shape_is_refused(self):
        with pytest.raises(ValueError, match="from_orthogonal"):
            HouseholderProduct.orthogonal(draw(3, 8)).to_lapack()

    def test_bad_shapes(self):
        with pytest.raises(ValueError, match=r"N ≤ D"):
            HouseholderProduct.from_lapack(draw(3, 8), draw(8))


class TestFromOrthogonal:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("D", "M"), [(1, 1), (2, 2), (8, 8), (8, 3), (100, 100), (300, 20)])
    def test_gives_the_frame_back_to_rounding(self, D, M, dtype):
        Q = random_orthogonal(2, D, M, dtype=dtype)
        product = HouseholderProduct.from_orthogonal(Q)
        assert product.num_householder == M
        error = (product.frame(M) - Q).abs().max() / torch.finfo(dtype).eps
        assert error < 16
        assert orthogonality_error(product.frame(M)) < 16

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    @pytest.mark.parametrize("D", [1, 2, 3, 8, 9])
    def test_both_determinants(self, D, sign):
        Q = random_orthogonal(D, D, sign=sign, seed=D)
        product = HouseholderProduct.from_orthogonal(Q)
        torch.testing.assert_close(product.to_dense(), Q, rtol=1e-13, atol=1e-13)
        reflections = int((product.beta != 0).sum())
        assert (-1.0) ** reflections == sign

    @pytest.mark.parametrize("angle", [1e-3, 1e-7, 1e-12, 1e-20, 1e-21, 3e-22, 1e-30])
    def test_nearly_the_identity(self, angle):
        """Where x − ‖x‖ e_1 cancels: the small entries come back with relative accuracy."""
        A = draw(6, 6)
        Q = torch.matrix_exp(angle * (A - A.mT)).float()
        product = HouseholderProduct.from_orthogonal(Q)
        dense = product.to_dense()
        assert (dense - Q).abs().max() < 16 * 1.2e-7
        assert orthogonality_error(dense) < 16

    @pytest.mark.parametrize("diagonal", [[1, 1, 1], [-1, 1, 1], [-1, -1, -1], [1, 1, -1]])
    def test_signs(self, diagonal):
        Q = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        assert torch.equal(HouseholderProduct.from_orthogonal(Q).to_dense(), Q)

    def test_permutations(self):
        Q = torch.eye(7, dtype=torch.float64)[[3, 0, 6, 1, 2, 5, 4]]
        torch.testing.assert_close(
            HouseholderProduct.from_orthogonal(Q).to_dense(), Q, rtol=1e-15, atol=1e-15
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_gives_a_float32_product(self, dtype):
        Q = torch.eye(8, dtype=dtype)[[1, 0, 2, 3, 7, 4, 5, 6]]
        product = HouseholderProduct.from_orthogonal(Q)
        assert product.dtype == torch.float32
        torch.testing.assert_close(product.to_dense(), Q.float(), rtol=0, atol=1e-6)

    def test_a_frame_that_is_not_orthonormal_is_refused(self):
        with pytest.raises(ValueError, match=r"orthonormal .* torch\.linalg\.qr"):
            HouseholderProduct.from_orthogonal(1.001 * random_orthogonal(5, 5))
        with pytest.raises(ValueError, match="orthonormal"):
            HouseholderProduct.from_orthogonal(torch.full((3, 3), torch.nan))

    def test_wide_is_refused_with_the_remedy(self):
        with pytest.raises(ValueError, match=r"Q\.mT"):
            HouseholderProduct.from_orthogonal(random_orthogonal(8, 3).mT)

    def test_leaves_its_argument_alone(self):
        Q = random_orthogonal(5, 5).requires_grad_()
        before = Q.detach().clone()
        product = HouseholderProduct.from_orthogonal(Q)
        assert torch.equal(Q, before)
        assert not product.reflectors.requires_grad

    @given(D=st.integers(1, 12), M=st.integers(1, 12), seed=st.integers(0, 2**16))
    def test_any_frame(self, D, M, seed):
        Q = random_orthogonal(D, min(D, M), seed=seed)
        product = HouseholderProduct.from_orthogonal(Q)
        torch.testing.assert_close(product.frame(min(D, M)), Q, rtol=1e-12, atol=1e-12)


class TestInverse:
    def test_near_projections_are_inverted_and_projections_refused(self):
        k = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        nearly = HouseholderProduct(k, torch.tensor([1 + 1e-9], dtype=torch.float64))
        x = draw(2)
        torch.testing.assert_close(nearly.inverse()(nearly(x)), x, rtol=1e-6, atol=1e-6)
        with pytest.raises(ValueError, match=r"got 1 at index \[0\], a projection"):
            HouseholderProduct(k, torch.ones(1, dtype=torch.float64)).inverse()

    def test_under_vmap_without_the_check(self):
        k, beta = draw(3, 2, 4), draw(3, 2)

        def undo(k, beta, x):
            product = HouseholderProduct(k, beta)
            return product.inverse(check=False)(product(x))

        x = draw(3, 4, seed=1)
        torch.testing.assert_close(torch.func.vmap(undo)(k, beta, x), x)

    def test_singular_determinant(self):
        product = HouseholderProduct(torch.tensor([[1.0, 0.0]]), torch.ones(1))
        assert product.logabsdet() == -torch.inf


def test_composition_keeps_one_product():
    a, b = HouseholderProduct(draw(2, 4), draw(2)), HouseholderProduct(draw(3, 1, 4), draw(3, 1))
    product = a @ b
    assert isinstance(product, HouseholderProduct)
    assert product.num_householder == 3
    assert product.shape == (3, 4, 4)
    torch.testing.assert_close(product.to_dense(), a.to_dense() @ b.to_dense())


def test_other_errors_name_it_too():
    with pytest.raises(TypeError, match=r"from_lapack: `tau` must be a tensor, got list"):
        HouseholderProduct.from_lapack(torch.zeros(3, 2), [0.0, 0.0])
    for M in (1.5, True):
        with pytest.raises(TypeError, match=f"frame: `M` must be an int, got {M}"):
            HouseholderProduct.orthogonal(draw(2, 4)).frame(M)


@pytest.mark.parametrize(
    ("reflectors", "beta", "error", "match"),
    [
        (torch.zeros(5), torch.zeros(1), ValueError, r"`reflectors` must be \[\*, N, D\]"),
        (torch.zeros(2, 5), torch.zeros(3), ValueError, r"`beta` must be \[\*, N\] with N = 2"),
        (torch.zeros(2, 3, 1, 5), torch.zeros(2, 1), ValueError, r"got \[2, 3\] and \[2\]"),
        ("k", torch.zeros(3), TypeError, "`reflectors` must be a tensor, got str"),
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.int), TypeError, "`beta` must be real"),
    ],
)
def test_errors_name_the_argument(reflectors, beta, error, match):
    with pytest.raises(error, match=match):
        HouseholderProduct(reflectors, beta)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_layer_compiles_without_graph_breaks():
    def layer(k, x):
        Q = HouseholderProduct.orthogonal(k)
        return Q.compose(Q.mT)(x) + Q.inverse(check=False)(x) + x @ Q.frame(4) @ Q.frame(4).mT

    k, x = draw(3, 8).requires_grad_(), draw(5, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(k, x), layer(k, x))
    traced, eager = (torch.autograd.grad(f(k, x).sin().sum(), k)[0] for f in (compiled, layer))
    torch.testing.assert_close(traced, eager)
