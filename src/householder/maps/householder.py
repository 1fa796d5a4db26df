"""`HouseholderProduct`: a product of Householder transformations as a linear map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from householder.maps.base import Composition, LinearMap
from householder.ops import _checks
from householder.ops.householder_product import householder_frame, householder_product
from householder.ops.householder_product.api import check_product
from householder.ops.wy import compute_dtype, result_dtype


class HouseholderProduct(LinearMap):
    """The product H_{N−1} … H_1 H_0 of reflectors H_j = I − β_j k_j k_jᴴ, reflector 0 first.

    β is free. Zero reflectors, β = 0, repeated and nearly parallel reflectors are no special
    cases, and N may exceed D. The map is applied in compact WY form, never as a D × D matrix; see
    `householder.householder_product` for the algorithm and the orders of gradient.

    Args:
        reflectors: `[*, N, D]`, real or complex floating point.
        beta: `[*, N]`; its batch dimensions broadcast with those of `reflectors`. None for an
            orthogonal (unitary) product, β = 2 / ‖k‖², computed with more digits than `reflectors`
            have; `HouseholderProduct.orthogonal` also takes reflectors of extreme lengths.

    Raises:
        ValueError: the shapes do not fit.
        TypeError: an argument is no tensor, or neither floating point nor complex.

    Examples:
        >>> import torch
        >>> from householder import HouseholderProduct
        >>> Q = HouseholderProduct.orthogonal(torch.randn(3, 5, dtype=torch.float64))
        >>> x = torch.randn(7, 5, dtype=torch.float64)
        >>> torch.allclose(Q.mT(Q(x)), x)
        True
        >>> Q.frame(2).shape  # its first two columns
        torch.Size([5, 2])
    """

    def __init__(self, reflectors: Tensor, beta: Tensor | None = None) -> None:
        op = "HouseholderProduct"
        tensors = {"reflectors": reflectors, "beta": beta}
        _checks.check_tensors(op, tensors, optional=("beta",), allow_complex=True)
        check_product(op, reflectors, beta)
        if beta is not None:
            _check_batches(reflectors, beta)
        self.reflectors = reflectors
        self._beta = beta

    @classmethod
    def orthogonal(cls, reflectors: Tensor) -> HouseholderProduct:
        """Make the orthogonal (unitary) product with β = 2 / ‖k‖².

        Only the directions matter: each reflector is first divided by a power of two near its
        largest entry, which rounds nothing, so that no length, however small or large, overflows. A
        zero reflector is the identity, with zero gradient. For bfloat16 and float16 reflectors β is
        float32, which keeps the product orthogonal to float32's rounding.

        Args:
            reflectors: `[*, N, D]`, of any lengths.

        Examples:
            >>> import torch
            >>> from householder import HouseholderProduct
            >>> Q = HouseholderProduct.orthogonal(torch.tensor([[3.0, 4.0]]))
            >>> Q.reflectors, Q.beta
            (tensor([[0.7500, 1.0000]]), tensor([1.2800]))
        """
        op = "HouseholderProduct.orthogonal"
        _checks.check_tensors(op, {"reflectors": reflectors}, allow_complex=True)
        if reflectors.numel():
            # A constant, since the product does not depend on the lengths. (Of an empty tensor
            # there is no largest entry.)
            least = torch.finfo(reflectors.dtype).smallest_normal
            largest = torch.linalg.vector_norm(
                reflectors.detach(), ord=math.inf, dim=-1, keepdim=True
            ).clamp(min=least)
            reflectors = reflectors / (largest / (2 * torch.frexp(largest).mantissa))
        return cls(reflectors)

    @property
    def beta(self) -> Tensor:
        """The coefficients `[*, N]`: as given, or 2 / ‖k‖² and 0 for a zero reflector."""
        if self._beta is not None:
            return self._beta
        squares = _squared_norm(self.reflectors)
        zero = squares == 0
        return torch.where(zero, torch.zeros_like(squares), 2 / torch.where(zero, 1, squares))

    @property
    def num_householder(self) -> int:
        """N, the number of reflectors."""
        return self.reflectors.shape[-2]

    @property
    def shape(self) -> torch.Size:
        batch, D = self.reflectors.shape[:-2], self.reflectors.shape[-1]
        if self._beta is not None:
            batch = torch.broadcast_shapes(batch, self._beta.shape[:-1])
        return torch.Size((*batch, D, D))

    @property
    def dtype(self) -> torch.dtype:
        if self._beta is None:
            return self.reflectors.dtype
        return result_dtype(self.reflectors, self._beta)

    @property
    def device(self) -> torch.device:
        return self.reflectors.device

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the product to `x [..., D]`."""
        return householder_product(x, self.reflectors, self._beta)

    @property
    def mH(self) -> HouseholderProduct:
        """The conjugate transpose: the order reversed, β conjugated."""
        beta = None if self._beta is None else self._beta.flip(-1).conj()
        return HouseholderProduct(self.reflectors.flip(-2), beta)

    @property
    def mT(self) -> HouseholderProduct:
        """The transpose: the order reversed, the reflectors conjugated."""
        beta = None if self._beta is None else self._beta.flip(-1)
        return HouseholderProduct(self.reflectors.flip(-2).conj(), beta)

    def inverse(self, *, check: bool = True) -> HouseholderProduct:
        """Return the inverse: the order reversed, with β / (β ‖k‖² − 1).

        Args:
            check: raise where there is no inverse. The check reads values, so give False inside
                `torch.compile` and `torch.func.vmap`; β is then infinite there.

        Raises:
            ValueError: a reflector has β ‖k‖² = 1 exactly, a projection, which has no inverse.
        """
        if self._beta is None:
            return self.mH
        excess = self._strength() - 1
        if check and bool((excess == 0).any()):
            where = (excess == 0).nonzero()[0].tolist()
            raise ValueError(
                "HouseholderProduct.inverse: needs β‖k‖² ≠ 1 for every reflector, got 1 at index "
                f"{where}, a projection; change its beta"
            )
        beta = self.beta / excess
        return HouseholderProduct(self.reflectors.flip(-2), beta.flip(-1))

    def logabsdet(self) -> Tensor:
        """Return log |det| = Σ_j log |1 − β_j ‖k_j‖²|, of the batch's shape; −inf if singular."""
        return (1 - self._strength()).abs().log().sum(-1)

    def _strength(self) -> Tensor:
        """Return β ‖k‖²: 0 for the identity, 1 for a projection, 2 for a reflection."""
        return self.beta * _squared_norm(self.reflectors)

    def frame(self, M: int) -> Tensor:
        """Return the first M columns, `[*, D, M]`, without forming the D × D matrix.

        For an orthogonal product they are orthonormal: a point on the Stiefel manifold. Gradients
        are those of `householder.householder_frame`.

        Args:
            M: how many columns, from 0 to D.

        Raises:
            TypeError: M is no int.
            ValueError: M is not between 0 and D.

        References:
            - CWY Parametrization: a Solution for Parallelized Optimization of Orthogonal and
              Stiefel Matrices (Likhosherstov et al., 2021), https://arxiv.org/abs/2004.08675
        """
        D = self.shape[-1]
        if isinstance(M, bool) or not isinstance(M, (int, torch.SymInt)):
            raise TypeError(
                f"HouseholderProduct.frame: `M` must be an int, got {M!r}; give a number of columns"
            )
        if not 0 <= M <= D:
            raise ValueError(
                f"HouseholderProduct.frame: `M` must be between 0 and D = {D}, got {M}; "
                "a product has no more columns than features"
            )
        return householder_frame(self.reflectors, self._beta, M)

    def to_dense(self) -> Tensor:
        """Return the matrix `[*, D, D]`."""
        return self.frame(self.shape[-1])

    def compose(self, other: LinearMap) -> LinearMap:
        """Do what `@` does: two Householder products make one, with the reflectors of both.

        Args:
            other: any map to as many features; it acts first.

        Raises:
            ValueError: the sizes do not fit.
        """
        if not isinstance(other, HouseholderProduct) or self.shape[-1] != other.shape[-1]:
            return Composition(self, other)  # which says so where sizes do not fit
        batch = torch.broadcast_shapes(self.shape[:-2], other.shape[:-2])
        factors = (other, self)  # in the order in which they act
        reflectors = [p.reflectors.expand(*batch, *p.reflectors.shape[-2:]) for p in factors]
        if all(p._beta is None for p in factors):
            return HouseholderProduct(torch.cat(reflectors, dim=-2))
        betas = [p.beta.expand(*batch, p.num_householder) for p in factors]
        return HouseholderProduct(torch.cat(reflectors, dim=-2), torch.cat(betas, dim=-1))

    @classmethod
    def from_lapack(cls, a: Tensor, tau: Tensor) -> HouseholderProduct:
        """Make the product from LAPACK's packed form, as `torch.geqrf` returns it.

        Q = H_1 H_2 … H_N with H_i = I − τ_i v_i v_iᴴ, where v_i is 0 above row i, 1 in it, and
        column i of `a` below it. The first N columns are
        `torch.linalg.householder_product(a, tau)`.

        Args:
            a: `[*, D, N]`, N ≤ D; what is on and above the diagonal is not used.
            tau: `[*, N]`.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: the shapes do not fit.
        """
        for name, x in (("a", a), ("tau", tau)):
            _checks.check_tensor("HouseholderProduct.from_lapack", name, x)
        if a.dim() < 2 or a.shape[-1] > a.shape[-2] or tau.shape[-1:] != a.shape[-1:]:
            raise ValueError(
                "HouseholderProduct.from_lapack: `a` must be [*, D, N] with N ≤ D and `tau` "
                f"[*, N], got shapes {list(a.shape)} and {list(tau.shape)}; torch.geqrf makes both"
            )
        columns = a.tril(-1) + torch.eye(*a.shape[-2:], dtype=a.dtype, device=a.device)
        # Written from the left, the last factor acts first.
        return cls(columns.mT.flip(-2), tau.flip(-1))

    def to_lapack(self) -> tuple[Tensor, Tensor]:
        """Return LAPACK's packed form `(a [*, D, N], tau [*, N])`; see `from_lapack`.

        Only a product of that shape has one: with reflectors counted from the last, reflector i is
        zero before feature i and not zero there (or has β = 0). Those of `from_lapack` and
        `from_orthogonal` are so.

        Raises:
            ValueError: a reflector is of another shape, or N > D.
        """
        N, D = self.reflectors.shape[-2:]
        batch = self.shape[:-2]
        columns = self.reflectors.to(self.dtype).expand(*batch, N, D).flip(-2).mT
        beta = self.beta.to(self.dtype).expand(*batch, N).flip(-1)
        pivots = columns.diagonal(dim1=-2, dim2=-1)
        idle = beta == 0
        if (
            N > D
            or bool(((columns.triu(1) != 0).any(-2) & ~idle).any())
            or bool(((pivots == 0) & ~idle).any())
        ):
            raise ValueError(
                "HouseholderProduct.to_lapack: reflector N−1−i must be zero before feature i and "
                "not zero at it, and N ≤ D; got another shape. An orthogonal product can be "
                "refactored: HouseholderProduct.from_orthogonal(product.to_dense()).to_lapack()"
            )
        pivots = torch.where(idle, torch.ones_like(pivots), pivots)
        columns = torch.where(idle.unsqueeze(-2), torch.zeros_like(columns), columns)
        a = (columns / pivots.unsqueeze(-2)).tril(-1)
        return a, beta * pivots.abs().square()

    @classmethod
    def from_orthogonal(cls, Q: Tensor) -> HouseholderProduct:
        """Make the product whose first M columns are a given orthonormal frame, to rounding.

        With M = D that is any orthogonal (unitary) matrix, of either determinant. The M reflectors
        have unit length; where Q is already the identity, β is 0. For real Q all other β are 2;
        for complex Q they are complex.

        Each reflector takes its column x to the unit vector itself, not to its negative as LAPACK's
        does, so that no signs are left over. The pivot x_1 − ‖x‖ is computed without cancellation,
        which keeps it accurate to rounding when the column is nearly the unit vector.

        Args:
            Q: `[*, D, M]` with orthonormal columns, M ≤ D.

        Returns:
            The product, float32 for bfloat16 and float16 Q. It is detached from Q's graph: this is
            a factorisation for initialising.

        Raises:
            ValueError: the shape does not fit, or the columns are not orthonormal to the dtype's
                rounding.

        Examples:
            >>> import torch
            >>> from householder import HouseholderProduct
            >>> Q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
            >>> torch.allclose(HouseholderProduct.from_orthogonal(Q).to_dense(), Q)
            True
        """
        _checks.check_tensors("HouseholderProduct.from_orthogonal", {"Q": Q}, allow_complex=True)
        if Q.dim() < 2 or Q.shape[-1] > Q.shape[-2]:
            raise ValueError(
                "HouseholderProduct.from_orthogonal: `Q` must be [*, D, M] with M ≤ D, got shape "
                f"{list(Q.shape)}; for orthonormal rows give Q.mT and use the product's .mT"
            )
        with torch.no_grad():
            work = Q.detach().to(compute_dtype(Q), copy=True)
            _check_orthonormal(work, torch.finfo(Q.dtype).eps)
            return cls(*_factor_frame(work))


def _check_batches(reflectors: Tensor, beta: Tensor) -> None:
    batches = reflectors.shape[:-2], beta.shape[:-1]
    # Counted here rather than tried out: `torch.compile` cannot trace the error of a trial.
    pairs = zip(reversed(batches[0]), reversed(batches[1]), strict=False)
    if any(m != n and 1 not in (m, n) for m, n in pairs):
        raise ValueError(
            "HouseholderProduct: the batch dimensions of `reflectors` and `beta` must broadcast, "
            f"got {list(batches[0])} and {list(batches[1])}; give a dimension of 1 where one of "
            "them is the same for all"
        )


def _squared_norm(reflectors: Tensor) -> Tensor:
    """Return ‖k‖² `[*, N]`, real and at least float32."""
    k = reflectors.to(compute_dtype(reflectors))
    return torch.linalg.vecdot(k, k).real if k.is_complex() else k.square().sum(-1)


def _check_orthonormal(Q: Tensor, eps: float) -> None:
    D, M = Q.shape[-2:]
    error = (Q.mH @ Q - torch.eye(M, dtype=Q.dtype, device=Q.device)).abs()
    allowed = 16 * eps * max(D, 1) ** 0.5
    if error.numel() and not float(error.max()) <= allowed:
        raise ValueError(
            "HouseholderProduct.from_orthogonal: the columns of `Q` must be orthonormal to "
            f"{allowed:.1e}, got an error of {float(error.max()):.1e}; "
            "orthonormalise first, with torch.linalg.qr(Q)[0] or a polar factor"
        )


def _factor_frame(work: Tensor) -> tuple[Tensor, Tensor]:
    """Take the frame `work [*, D, M]` to the identity, column by column; overwrites it.

    With x the rest of a column, μ = ‖x‖ and v = x − μ e_1, H = I − v vᴴ / (vᴴ x) takes x to μ e_1,
    and vᴴ x = −μ v_1.
    """
    *batch, D, M = work.shape
    reflectors = work.new_zeros(*batch, M, D)
    beta = work.new_zeros(*batch, M)
    # Below this a column is the unit vector to much better than rounding, and squares underflow.
    negligible = torch.finfo(work.dtype).eps ** 2
    for j in range(M):
        x = work[..., j:, j]
        head, tail = x[..., 0], x[..., 1:]
        sigma = torch.linalg.vector_norm(tail, dim=-1).square()
        mu = torch.linalg.vector_norm(x, dim=-1)
        real, imag = (head.real, head.imag) if work.is_complex() else (head, torch.zeros_like(head))
        # Re x_1 − μ, which cancels when Re x_1 > 0.
        pivot = torch.where(real > 0, -(sigma + imag.square()) / (real + mu), real - mu)
        v = x.clone()
        v[..., 0] = torch.complex(pivot, imag) if work.is_complex() else pivot
        length = torch.linalg.vector_norm(v, dim=-1)
        idle = length <= negligible
        scale = torch.where(idle, torch.ones_like(length), length)
        unit = torch.where(idle.unsqueeze(-1), 0, v / scale.unsqueeze(-1))
        b = torch.where(idle, 0, -scale.square() / torch.where(idle, 1, mu * v[..., 0]))
        rest = work[..., j:, j + 1 :]
        rest -= (b.unsqueeze(-1) * unit).unsqueeze(-1) @ (unit.conj().unsqueeze(-2) @ rest)
        # Q = H_1ᴴ … H_Mᴴ, and the last of them acts first.
        reflectors[..., M - 1 - j, j:] = unit
        beta[..., M - 1 - j] = b.conj()
    return reflectors, beta
