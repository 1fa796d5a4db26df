"""Orthonormal frames with reflectors as parameters: what orthogonal and SVD weights are made of.

A frame Q `[*, D, M]`, M ≤ D, is the first M columns of a product of N reflectors, up to signs:

    Q = H_{N−1} … H_0 E diag(signs),    E = the first M columns of the identity.

The reflectors are free vectors. The signs are constants, and decide what no continuous path could
change: the sign of the determinant of a real square Q. A complex reflector has an angle beside its
vector, H = I − (1 − e^{iθ}) k kᴴ / ‖k‖², a reflection at θ = π; without it the determinant could
not leave the real axis.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from householder.maps import HouseholderProduct
from householder.nn._checks import check_positive_int
from householder.ops.wy import compute_dtype, triangle_dtype


class FrameTensors(NamedTuple):
    """What a frame is made from: `factor` makes it, `make_frame` takes it."""

    reflectors: Tensor
    """`[*, N, D]`, of any lengths; reflector 0 acts first."""
    angles: Tensor | None
    """`[*, N]`, real, in radians, for complex reflectors; `None` for real ones."""
    signs: Tensor
    """`[*, M]`, int8, 1 or −1."""


def make_product(reflectors: Tensor, angles: Tensor | None) -> HouseholderProduct:
    """Return the orthogonal (unitary) product H_{N−1} … H_0 as a map."""
    product = HouseholderProduct.orthogonal(reflectors)
    if angles is None:
        return product
    # `module.to(torch.complex128)` makes every parameter complex, this one too.
    angles = angles.real if angles.is_complex() else angles
    # As wide as the triangle of the product: what all β get wrong in the same way adds up.
    wide = triangle_dtype(compute_dtype(reflectors), reflectors.device)
    exact = HouseholderProduct(product.reflectors.to(wide))
    angles = angles.to(exact.beta.dtype)
    turn = torch.polar(torch.ones_like(angles), angles)
    return HouseholderProduct(product.reflectors, exact.beta * (1 - turn) / 2)


def make_frame(reflectors: Tensor, angles: Tensor | None, signs: Tensor) -> Tensor:
    """Return the frame `[*, D, M]`; no D × D matrix is formed unless M = D."""
    return make_product(reflectors, angles).frame(signs.shape[-1]) * signs.unsqueeze(-2)


def factor(weight: Tensor, num_householder: int) -> FrameTensors:
    """Find reflectors, angles and signs of the orthonormal frame of a matrix.

    The frame is the Q of weight = Q R with a positive diagonal of R, and so the weight itself if
    its columns are orthonormal. With N ≥ M reflectors it comes back to rounding. With fewer, it
    does if Q and E differ in at most N dimensions, rank(Q − E) ≤ N. Otherwise the product is an
    approximation, which agrees with Q on the N dimensions (or N − 1, where that is nearer) in which
    it differs most from E.

    Reflectors for which there is nothing to do become pairs of equal random vectors. (A vector of
    zeros is the identity as well, but has no gradient, and would remain one.)

    Args:
        weight: `[*, D, M]`, M ≤ D, finite, real or complex.
        num_householder: N.
    """
    N, (D, M) = num_householder, weight.shape[-2:]
    batch, real = weight.shape[:-2], not weight.is_complex()
    if weight.is_meta:
        angles = None if real else weight.new_empty(*batch, N, dtype=weight.real.dtype)
        signs = weight.new_empty(*batch, M, dtype=torch.int8)
        return FrameTensors(weight.new_empty(*batch, N, D), angles, signs)
    with torch.no_grad():
        work = weight.detach().to(compute_dtype(weight))
        if N >= M:
            k, angles, signs = _factor_by_columns(work)
            idle = torch.full(batch, N - M, device=weight.device)
            k = torch.cat([k.new_zeros(*batch, N - M, D), k], dim=-2)
            angles = F.pad(angles, (N - M, 0), value=math.pi)
        else:
            k, angles, idle = _factor_in_part(work, N, 4 * torch.finfo(weight.dtype).eps)
            signs = torch.ones(*batch, M, dtype=torch.int8, device=weight.device)
        k, signs = _fill_idle(k, signs, idle)
        return FrameTensors(
            k.to(weight.dtype), None if real else angles.to(weight.real.dtype), signs
        )


def _factor_by_columns(work: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor with one reflector a column, LAPACK's: no column is near the vector it is taken to."""
    M = work.shape[-1]
    packed, tau = torch.geqrf(work)
    columns = packed.tril(-1) + torch.eye(*work.shape[-2:], dtype=work.dtype, device=work.device)
    squares = columns.abs().square().sum(-2)
    angles = torch.angle(1 - tau * squares)
    # The diagonal of LAPACK's R is real. Where a column is done already its reflector is the
    # identity; the one that flips the column, and the flipped sign, are the same and can learn.
    diagonal = packed.diagonal(dim1=-2, dim2=-1)
    negative = (diagonal.real if work.is_complex() else diagonal) < 0
    idle = tau == 0
    angles = torch.where(idle, math.pi, angles)
    signs = torch.where(negative ^ idle, -1, 1).to(torch.int8)
    k = (columns / squares.sqrt().unsqueeze(-2)).mT
    # Written from the left, the last factor acts first.
    return k.flip(-2), angles.flip(-1), signs.reshape(*work.shape[:-2], M)


def _factor_in_part(work: Tensor, N: int, negligible: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factor with N < M reflectors; also return how many of them, the first, have nothing to do."""
    wide = torch.promote_types(work.dtype, torch.float64)
    Q, R = torch.linalg.qr(work.to(wide))
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    Q = Q * torch.where(diagonal == 0, 1, diagonal.sgn()).unsqueeze(-2)
    # ‖(Q − E) x‖² = 2 − 2 xᴴ S x with S the Hermitian part of the first M rows of Q: the
    # eigenvectors of the smallest eigenvalues span where the two frames differ most.
    top = Q[..., : Q.shape[-1], :]
    X = torch.linalg.eigh((top + top.mH) / 2).eigenvectors[..., :N]
    found = _reflect_onto(Q, X, negligible)
    if work.is_complex():
        return found
    # A small rotation is two reflections. Where only one of a pair fits, none is better.
    fewer = _reflect_onto(Q, X[..., :-1], negligible)
    fewer = (F.pad(fewer[0], (0, 0, 1, 0)), F.pad(fewer[1], (1, 0), value=math.pi), fewer[2] + 1)
    worse = _distance(Q, found[0]) > _distance(Q, fewer[0])
    k = torch.where(worse[..., None, None], fewer[0], found[0])
    angles = torch.where(worse.unsqueeze(-1), fewer[1], found[1])
    return k, angles, torch.where(worse, fewer[2], found[2])


def _reflect_onto(Q: Tensor, X: Tensor, negligible: float) -> tuple[Tensor, Tensor, Tensor]:
    """Find reflectors whose product H meets H E x = Q x for x in the span of X `[*, M, N]`.

    With b = Q x, a = E x and v = b − a, the reflector I − v vᴴ / (vᴴ b) takes b to a. It leaves
    alone each E y = Q y, since vᴴ E y = (Q x)ᴴ Q y − (E x)ᴴ E y = 0: every step takes one dimension
    from Q − E, and none adds one. The pairs are taken in the order of the largest ‖b − a‖.
    """
    *batch, D, _ = Q.shape
    N = X.shape[-1]
    a = F.pad(X, (0, 0, 0, D - X.shape[-2]))
    b = Q @ X
    k = Q.new_zeros(*batch, N, D)
    angles = torch.full((*batch, N), math.pi, dtype=torch.float64, device=Q.device)
    idle = torch.full(batch, 0, device=Q.device)
    for j in range(N):
        difference = b - a
        length, pivot = torch.linalg.vector_norm(difference, dim=-2).max(-1)
        done = length <= negligible
        index = pivot[..., None, None].expand(*batch, D, 1)
        v = difference.gather(-1, index)
        v = v / torch.where(done, 1, length)[..., None, None]
        turn = -torch.ones_like(length)
        if Q.is_complex():  # 1 − ‖v‖² / (vᴴ b), of modulus one
            inner = (v.mH @ b.gather(-1, index)).squeeze((-2, -1))
            turn = (1 - length / torch.where(done, 1, inner)).sgn()
        v = torch.where(done[..., None, None], 0, v)
        b = b - (1 - turn)[..., None, None] * v @ (v.mH @ b)
        # Q = H_1ᴴ H_2ᴴ …: the adjoint has the opposite angle, and the last of them acts first.
        k[..., N - 1 - j, :] = v.squeeze(-1)
        angles[..., N - 1 - j] = torch.where(done, math.pi, -torch.angle(turn))
        idle += done
    return k, angles, idle


def _distance(Q: Tensor, k: Tensor) -> Tensor:
    """Return ‖H E − Q‖ for real reflectors, of which zeros are the identity."""
    frame = make_product(k, None).frame(Q.shape[-1])
    return torch.linalg.matrix_norm(frame - Q)


def _fill_idle(k: Tensor, signs: Tensor, idle: Tensor) -> tuple[Tensor, Tensor]:
    """Give the first `idle` reflectors vectors of which pairs cancel.

    Where their number is odd, the very first flips the last column, and so does its sign.
    """
    if not bool((idle > 0).any()):
        return k, signs
    N, D = k.shape[-2:]
    M = signs.shape[-1]
    pairs = torch.randn(*k.shape[:-2], N // 2 + 1, D, dtype=k.dtype, device=k.device)
    pairs = pairs / torch.linalg.vector_norm(pairs, dim=-1, keepdim=True)
    row = torch.arange(N, device=k.device)
    pair = (idle.unsqueeze(-1) - 1 - row).clamp(min=0) // 2
    vectors = pairs.gather(-2, pair.unsqueeze(-1).expand_as(k))
    odd = idle % 2 == 1
    flip = F.one_hot(torch.tensor(M - 1, device=k.device), D).to(k.dtype)
    vectors[..., 0, :] = torch.where(odd.unsqueeze(-1), flip, vectors[..., 0, :])
    signs = signs.clone()
    signs[..., -1] *= torch.where(odd, -1, 1).to(torch.int8)
    return torch.where((row < idle.unsqueeze(-1)).unsqueeze(-1), vectors, k), signs


class OrthonormalFrame(nn.Module):
    """Own a frame Q `[D, M]` with orthonormal columns: QᴴQ = I whatever the parameters are.

    Q = H_{N−1} … H_0 E diag(signs), where E is the first M columns of the identity, the N
    reflectors are free vectors of which only the directions matter, and the signs are constants.
    With N ≥ M every frame can be reached, of the present sign of the determinant if M = D and Q is
    real; `set_frame` chooses the sign. With fewer, those with rank(Q − E diag(signs)) ≤ N. Weight
    decay on the reflectors does not change Q.

    Args:
        size: D.
        columns: M ≤ D.
        num_householder: N; M if `None`.
        device: of the parameters.
        dtype: of the parameters, real or complex. For bfloat16 and float16 the product is computed
            in float32 and rounded once.

    Attributes:
        reflectors: parameter `[N, D]`.
        angles: parameter `[N]` for a complex frame, otherwise `None`.
        signs: int8 buffer `[M]`.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is less than 1, or M > D.

    Gradients:
        Those of `householder.householder_product`: every order outside `torch.compile`, first
        order inside it.

    Examples:
        >>> frame = OrthonormalFrame(8, 3)
        >>> torch.allclose(frame().mT @ frame(), torch.eye(3), atol=1e-6)
        True
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(frame.project(frame.lift(z)), z, atol=1e-6)
        True

    References:
        - CWY Parametrization: a Solution for Parallelized Optimization of Orthogonal and Stiefel
          Matrices (Likhosherstov et al., 2021), https://arxiv.org/abs/2004.08675
    """

    reflectors: nn.Parameter
    angles: nn.Parameter | None
    signs: Tensor

    def __init__(
        self,
        size: int,
        columns: int,
        num_householder: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        num_householder = columns if num_householder is None else num_householder
        check_positive_int(where, "size", size)
        check_positive_int(where, "columns", columns)
        check_positive_int(where, "num_householder", num_householder)
        if columns > size:
            raise ValueError(
                f"{where}: `columns` must be at most size = {size}, got {columns}; for orthonormal "
                "rows use the transpose"
            )
        self.reflectors = nn.Parameter(
            torch.empty(num_householder, size, device=device, dtype=dtype)
        )
        self.register_parameter("angles", None)
        if self.reflectors.is_complex():
            real = self.reflectors.dtype.to_real()
            self.angles = nn.Parameter(torch.empty(num_householder, device=device, dtype=real))
        self.register_buffer("signs", torch.ones(columns, device=device, dtype=torch.int8))
        self.reset_parameters()

    @property
    def shape(self) -> torch.Size:
        """The frame's shape `[D, M]`."""
        return torch.Size((self.reflectors.shape[-1], self.signs.shape[-1]))

    @property
    def num_householder(self) -> int:
        """N, the number of reflectors."""
        return self.reflectors.shape[-2]

    def reset_parameters(self) -> None:
        """Draw the frame anew: uniformly (Haar) for N ≥ M, else as a product of N random ones."""
        D, M = self.shape
        if self.num_householder >= M:
            # Drawn in float32 at least, where a column of zeros does not happen.
            dtype = compute_dtype(self.reflectors)
            self.set_frame(torch.randn(D, M, device=self.reflectors.device, dtype=dtype))
            return
        with torch.no_grad():
            nn.init.normal_(self.reflectors, std=D**-0.5)
            nn.init.ones_(self.signs)
            if self.angles is not None:
                nn.init.constant_(self.angles, math.pi)

    @torch.no_grad()
    def set_frame(self, weight: Tensor) -> None:
        """Take the frame of a matrix `[D, M]`: the Q of weight = Q R with a positive diagonal of R.

        That is the weight itself if its columns are orthonormal. The signs are set too, and with
        them the determinant of a real square frame. With N < M reflectors Q comes back if
        rank(Q − E) ≤ N; otherwise the frame approximates it, and agrees with it on the N (or N − 1)
        dimensions in which it differs most from E.

        Raises:
            TypeError: `weight` is no tensor, or not floating point, or complex for a real frame.
            ValueError: the shape is another, or a value is not finite.
        """
        where = f"{type(self).__name__}.set_frame"
        check_weight(where, weight, self.shape, complex_allowed=self.angles is not None)
        made = factor(weight.to(compute_dtype(self.reflectors)), self.num_householder)
        self.reflectors.copy_(made.reflectors)
        self.signs.copy_(made.signs)
        if self.angles is not None and made.angles is not None:
            self.angles.copy_(made.angles)

    def product(self) -> HouseholderProduct:
        """Return the D × D product H_{N−1} … H_0, whose first columns are Q's up to signs."""
        return make_product(self.reflectors, self.angles)

    def forward(self) -> Tensor:
        """Return Q `[D, M]`."""
        return make_frame(self.reflectors, self.angles, self.signs)

    def lift(self, z: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return Q z + bias `[..., D]` for `z [..., M]`."""
        if not self._applies_reflectors():
            return F.linear(z, self(), bias)
        D, M = self.shape
        y = self.product()(F.pad(z * self.signs, (0, D - M)))
        return y if bias is None else y + bias

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return Qᴴ x + bias `[..., M]` for `x [..., D]`."""
        if not self._applies_reflectors():
            return F.linear(x, self().mH, bias)
        z = self.product().mH(x)[..., : self.shape[1]] * self.signs
        return z if bias is None else z + bias

    def _applies_reflectors(self) -> bool:
        # The reflectors cost 4 N D a vector, the formed frame 2 M D. The choice does not depend on
        # how many vectors there are, so that a vector's result does not either.
        return 2 * self.num_householder <= self.shape[1]

    def extra_repr(self) -> str:
        """Return the sizes that `print` shows."""
        D, M = self.shape
        return f"{D}, {M}, num_householder={self.num_householder}"


def check_weight(
    where: str, weight: object, shape: tuple[int, ...], *, complex_allowed: bool
) -> None:
    """Raise unless `weight` is a finite floating-point tensor of the given shape."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{where}: `weight` must be a tensor, got {type(weight).__name__}; convert it first"
        )
    if not (weight.is_floating_point() or (complex_allowed and weight.is_complex())):
        kind = "real or complex floating point" if complex_allowed else "real floating point"
        raise TypeError(f"{where}: `weight` must be {kind}, got {weight.dtype}; convert it first")
    if weight.shape != torch.Size(shape):
        raise ValueError(
            f"{where}: `weight` must be {list(shape)}, got shape {list(weight.shape)}; "
            "give a matrix of the module's own sizes"
        )
    check_finite(where, weight)


def check_finite(where: str, weight: Tensor) -> None:
    """Raise unless every entry is finite; what is on the meta device has no entries."""
    if not weight.is_meta and not bool(weight.isfinite().all()):
        raise ValueError(
            f"{where}: `weight` must be finite, got NaN or infinity; initialise it first"
        )
