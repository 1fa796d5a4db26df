"""Orthonormal frames: factoring into reflectors and signs, and the module that owns them."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from householder.nn import OrthonormalFrame
from householder.nn.frames import factor, make_frame, make_product
from householder.testing import CORRELATIONS, correlated_reflectors, orthogonality_error

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
SIZES = [(1, 1), (2, 2), (5, 5), (8, 3), (64, 64), (100, 10)]


def draw_frame(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=wide))[0].to(dtype)


def rounding_steps(a: Tensor, b: Tensor) -> float:
    """Return the largest difference in units of the dtype's rounding."""
    return float((a.detach() - b).abs().max()) / torch.finfo(b.dtype).eps


class TestFactor:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("D", "M"), SIZES)
    @pytest.mark.parametrize("extra", [0, 1, 2, 5])
    def test_a_frame_comes_back(self, D: int, M: int, dtype: torch.dtype, extra: int) -> None:
        Q = draw_frame(3, D, M, dtype=dtype)
        made = factor(Q, M + extra)
        assert made.reflectors.shape == (3, M + extra, D)
        assert made.reflectors.dtype == dtype
        assert rounding_steps(make_frame(*made), Q) < 4 * D**0.5 + 8

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("extra", [-2, -1, 0, 1, 4])
    @pytest.mark.parametrize("kind", ["identity", "its negative", "reversal"])
    def test_special_frames_come_back_with_reflectors_that_can_learn(
        self, kind: str, extra: int, dtype: torch.dtype
    ) -> None:
        E = torch.eye(8, 5, dtype=dtype)
        Q = {"identity": E, "its negative": -E, "reversal": E.flip(0)}[kind]
        if extra < 0 and kind != "identity":
            return  # differs from the identity in more dimensions than there are reflectors
        made = factor(Q, 5 + extra)
        assert rounding_steps(make_frame(*made), Q) < 20
        assert torch.linalg.vector_norm(made.reflectors, dim=-1).min() > 0.5

        reflectors = made.reflectors.requires_grad_()
        angles = None if made.angles is None else made.angles.requires_grad_()
        target = draw_frame(8, 5, dtype=dtype, seed=1)
        (make_frame(reflectors, angles, made.signs) - target).abs().square().sum().backward()
        assert (torch.linalg.vector_norm(reflectors.grad, dim=-1) > 1e-4).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("D", [1, 2, 3, 8, 9])
    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("extra", [0, 1])
    def test_both_determinants(self, D: int, sign: int, extra: int, dtype: torch.dtype) -> None:
        Q = draw_frame(D, D, seed=D)
        Q[:, 0] *= sign * torch.linalg.det(Q).sign()
        Q = Q.to(dtype)
        made = factor(Q, D + extra)
        assert rounding_steps(make_frame(*made), Q) < 40
        assert (-1) ** (D + extra) * int(made.signs.prod()) == sign

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("D", "M"), [(16, 16), (20, 7), (64, 64)])
    @pytest.mark.parametrize("rank", [1, 2, 3, 5])
    @pytest.mark.parametrize("spare", [0, 1, 2])
    def test_few_reflectors_are_found_again(
        self, D: int, M: int, rank: int, spare: int, dtype: torch.dtype
    ) -> None:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        angles = torch.rand(rank, dtype=torch.float64) * 6 if dtype.is_complex else None
        Q = make_product(torch.randn(rank, D, dtype=wide), angles).frame(M).to(dtype)
        made = factor(Q, rank + spare)
        assert made.reflectors.shape == (rank + spare, D)
        assert rounding_steps(make_frame(*made), Q) < 4 * D**0.5 + 8

    @pytest.mark.parametrize("angle", [1e-1, 1e-4])
    def test_a_small_rotation_by_two_reflectors(self, angle: float) -> None:
        """Each of the two is a whole reflection; only their product is near the identity."""
        k = torch.randn(1, 32, dtype=torch.float64)
        pair = torch.cat([k, k + angle * torch.randn(1, 32, dtype=torch.float64)])
        Q = make_product(pair, None).to_dense().float()
        assert rounding_steps(make_frame(*factor(Q, 2)), Q) < 20

    def test_batches_of_different_rank(self) -> None:
        products = [
            make_product(torch.randn(r, 12, dtype=torch.float64), None) for r in (1, 2, 3, 4)
        ]
        Q = torch.stack([torch.eye(12, dtype=torch.float64), *(p.to_dense() for p in products)])
        assert rounding_steps(make_frame(*factor(Q, 4)), Q) < 100

    def test_too_few_reflectors_approximate(self) -> None:
        Q = draw_frame(32, 32)
        E = torch.eye(32, dtype=torch.float64)
        errors = [float((make_frame(*factor(Q, N)) - Q).norm()) for N in (2, 8, 16, 24, 30)]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] < float((E - Q).norm())
        assert errors[-1] < 1.0 < errors[-2]
        for N in (1, 7, 8):
            assert orthogonality_error(make_frame(*factor(Q, N))) < 1e-13

    @pytest.mark.parametrize("N", [1, 2, 3])
    def test_half_a_rotation_is_not_taken(self, N: int) -> None:
        """One reflection of the two would be far from a matrix near the identity."""
        A = torch.randn(16, 16, dtype=torch.float64)
        Q = torch.matrix_exp(1e-3 * (A - A.mT))
        E = torch.eye(16, dtype=torch.float64)
        assert (make_frame(*factor(Q, N)) - Q).norm() <= (E - Q).norm() * (1 + 1e-9)

    @pytest.mark.parametrize("N", [3, 6, 8])
    def test_any_matrix_gives_the_q_of_its_qr_decomposition(self, N: int) -> None:
        A = torch.randn(9, 6, dtype=torch.float64)
        Q, R = torch.linalg.qr(A)
        Q = Q * R.diagonal().sign()
        found = make_frame(*factor(A, N))
        if N >= 6:
            torch.testing.assert_close(found, Q, rtol=1e-13, atol=1e-13)
        assert orthogonality_error(found) < 1e-13

    def test_a_matrix_of_zeros_is_no_special_case(self) -> None:
        for N in (2, 3, 4):
            frame = make_frame(*factor(torch.zeros(5, 3), N))
            assert orthogonality_error(frame) < 1e-6

    @given(
        D=st.integers(1, 10),
        M=st.integers(1, 10),
        N=st.integers(1, 12),
        seed=st.integers(0, 2**16),
        is_complex=st.booleans(),
    )
    def test_every_size(self, D: int, M: int, N: int, seed: int, is_complex: bool) -> None:
        dtype = torch.complex128 if is_complex else torch.float64
        Q = draw_frame(D, min(D, M), dtype=dtype, seed=seed)
        frame = make_frame(*factor(Q, N))
        assert orthogonality_error(frame) < 1e-13
        if min(D, M) <= N:
            torch.testing.assert_close(frame, Q, rtol=0, atol=1e-12)


class TestOrthonormalFrame:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    @pytest.mark.parametrize(("D", "M"), [(64, 64), (256, 64), (300, 300), (512, 16)])
    @pytest.mark.parametrize("kind", CORRELATIONS)
    def test_is_orthonormal_to_rounding(
        self, D: int, M: int, kind: str, dtype: torch.dtype
    ) -> None:
        """Also with reflectors that are nearly, or exactly, parallel."""
        frame = OrthonormalFrame(D, M, dtype=dtype)
        with torch.no_grad():
            k = correlated_reflectors(kind, M, D)
            if dtype.is_complex:
                k = torch.complex(k, correlated_reflectors(kind, M, D, seed=1))
                torch.nn.init.uniform_(frame.angles, 0.5, 5)
            frame.reflectors.copy_(k)
        assert orthogonality_error(frame()) <= 4 * torch.finfo(dtype).eps * D**0.5

    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    @pytest.mark.parametrize("noise", [0.0, 1e-6, 0.1])
    def test_in_float64_with_far_fewer_reflectors_than_dimensions(
        self, noise: float, dtype: torch.dtype
    ) -> None:
        """There nothing is wider for the triangle to be solved in."""
        frame = OrthonormalFrame(512, 16, dtype=dtype)
        with torch.no_grad():
            k = torch.randn(1, 512, dtype=dtype) + noise * torch.randn(16, 512, dtype=dtype)
            frame.reflectors.copy_(k)
        assert orthogonality_error(frame()) <= 4 * torch.finfo(dtype).eps * 512**0.5

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("D", [1, 2, 64, 300])
    def test_square_frames_are_orthogonal_to_rounding(self, D: int, dtype: torch.dtype) -> None:
        error = orthogonality_error(OrthonormalFrame(D, D, dtype=dtype)())
        assert error <= 4 * torch.finfo(dtype).eps * D**0.5

    @pytest.mark.parametrize("N", [1, 3, 6, 9])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    def test_lift_and_project_are_products_with_the_matrix(
        self, N: int, dtype: torch.dtype
    ) -> None:
        frame = OrthonormalFrame(9, 6, N, dtype=dtype)
        with torch.no_grad():
            frame.signs[::2] = -1
        Q = frame()
        z, x = torch.randn(2, 3, 6, dtype=dtype), torch.randn(2, 3, 9, dtype=dtype)
        torch.testing.assert_close(frame.lift(z), z @ Q.mT)
        torch.testing.assert_close(frame.project(x), x @ Q.conj())
        torch.testing.assert_close(frame.project(frame.lift(z)), z)
        dense = frame.product().to_dense()[:, :6] * frame.signs
        torch.testing.assert_close(Q, dense)

    @pytest.mark.parametrize(
        ("N", "dtype"), [(1, torch.float64), (3, torch.float64), (2, torch.complex128)]
    )
    def test_gradients_of_every_order(self, N: int, dtype: torch.dtype) -> None:
        frame = OrthonormalFrame(3, 2, N, dtype=dtype)
        if frame.angles is not None:
            torch.nn.init.uniform_(frame.angles, 0.5, 5)
        names = [name for name, _ in frame.named_parameters()]
        leaves = tuple(frame.parameters())

        def run(*values: Tensor) -> Tensor:
            return torch.func.functional_call(frame, dict(zip(names, values, strict=True)), ())

        torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
        torch.autograd.gradgradcheck(run, leaves)

    def test_full_frames_are_drawn_uniformly(self) -> None:
        """Second and fourth moments of the entries of Haar matrices: 1/D and 3/(D (D + 2))."""
        frame = OrthonormalFrame(4, 4)
        draws = []
        for _ in range(400):
            frame.reset_parameters()
            draws.append(frame().detach())
        Q = torch.stack(draws)
        assert Q.mean(0).abs().max() < 4 * 0.5 / 20
        assert (Q.square().mean(0) - 1 / 4).abs().max() < 0.05
        assert (Q.pow(4).mean(0) - 3 / 24).abs().max() < 0.05
        assert {-1, 1} == {int(d) for d in torch.linalg.det(Q).round()}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_rounds_once(self, dtype: torch.dtype) -> None:
        Q = draw_frame(64, 16, dtype=torch.float32)
        frame = OrthonormalFrame(64, 16, dtype=dtype)
        frame.set_frame(Q)
        made = frame()
        assert made.dtype == dtype
        exact = make_frame(frame.reflectors.double(), None, frame.signs)
        assert ((made - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()
        # The reflectors were rounded, each by half a step.
        assert (made - Q).norm() < 16 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    def test_copies_pickles_and_state_dicts(self, dtype: torch.dtype) -> None:
        frame = OrthonormalFrame(8, 5, dtype=dtype)
        other = OrthonormalFrame(8, 5, dtype=dtype)
        assert not torch.equal(other(), frame())
        other.load_state_dict(frame.state_dict())
        buffer = io.BytesIO()
        torch.save(frame, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=False)
        for same in (other, copy.deepcopy(frame), pickle.loads(pickle.dumps(frame)), saved):
            assert torch.equal(same(), frame())

    def test_is_made_on_the_meta_device(self) -> None:
        frame = OrthonormalFrame(8, 5, device="meta")
        assert frame().shape == (8, 5)
        frame = frame.to_empty(device="cpu")
        frame.reset_parameters()
        assert orthogonality_error(frame()) < 1e-6

    @pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
    def test_a_wider_complex_dtype_keeps_it_unitary(self) -> None:
        frame = OrthonormalFrame(6, 6, dtype=torch.complex64)
        before = frame().detach()
        frame = frame.to(torch.complex128)
        torch.testing.assert_close(frame().to(torch.complex64), before)
        (frame() - draw_frame(6, 6, dtype=torch.complex128)).abs().square().sum().backward()
        torch.optim.SGD(frame.parameters(), lr=0.1).step()
        assert orthogonality_error(frame()) < 1e-14

    def test_every_unitary_matrix_is_reachable_by_the_angles(self) -> None:
        """A product of Hermitian reflections has a real determinant; with angles it turns."""
        frame = OrthonormalFrame(3, 3, dtype=torch.complex128)
        frame.set_frame(torch.eye(3, dtype=torch.complex128))
        target = draw_frame(3, 3, dtype=torch.complex128, seed=3)
        assert abs(float(torch.linalg.det(target).imag)) > 0.1
        optimizer = torch.optim.Adam(frame.parameters(), lr=0.1)
        for _ in range(120):
            optimizer.zero_grad()
            loss = (frame() - target).abs().square().sum()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 1e-3
        assert float((frame.angles.detach() - math.pi).abs().max()) > 0.1

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ((3, 4), ValueError, r"^OrthonormalFrame: `columns` must be at most size = 3, got 4"),
            ((3, 0), ValueError, r"^OrthonormalFrame: `columns` must be at least 1, got 0"),
            ((3, 2, 0), ValueError, r"^OrthonormalFrame: `num_householder` must be at least 1"),
            ((3.0, 2), TypeError, r"^OrthonormalFrame: `size` must be an int, got 3.0"),
        ],
    )
    def test_wrong_sizes(self, arguments: tuple, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            OrthonormalFrame(*arguments)

    @pytest.mark.parametrize(
        ("weight", "error", "match"),
        [
            ([[1.0]], TypeError, r"`weight` must be a tensor, got list"),
            (torch.eye(4, 3).int(), TypeError, r"real floating point, got torch.int32"),
            (torch.eye(4, 3) * 1j, TypeError, r"real floating point, got torch.complex64"),
            (torch.eye(3, 4), ValueError, r"`weight` must be \[4, 3\], got shape \[3, 4\]"),
            (torch.full((4, 3), torch.nan), ValueError, r"must be finite, got NaN"),
        ],
    )
    def test_wrong_weights(self, weight: object, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=rf"^OrthonormalFrame.set_frame: .*{match}"):
            OrthonormalFrame(4, 3).set_frame(weight)
