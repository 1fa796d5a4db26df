"""A linear layer that holds its weight as a singular value decomposition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from householder.nn._checks import check_positive_int
from householder.nn.frames import OrthonormalFrame, check_weight
from householder.nn.initialization import init_bias
from householder.nn.singular_values import (
    Bounds,
    best_singular_values,
    bound_singular_values,
    check_bounds,
    singular_vectors,
    unbound_singular_values,
)
from householder.ops.wy import compute_dtype


class SVDLinear(nn.Module):
    """y = W x + b with W = U diag(s) Vᴴ, U and V orthonormal frames made of reflectors.

    The decomposition is the parametrization, so that what otherwise takes a decomposition at each
    step is read off: singular values, norms, the inverse, the log-determinant; and weight decay on
    the parameter `s` alone is weight decay on W, since ‖W‖_F² = Σ s². W is formed only where that
    is the cheaper way, r (in + out) ≥ in · out.

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        rank: r; min(in, out) if `None`.
        num_householder: reflectors of U and of V; r if `None`, which reaches every W of rank r.
        bias: whether to add b; it starts as that of `torch.nn.Linear`.
        bounds: `(lowest, highest)`, between which the singular values stay: they are then lowest +
            (highest − lowest) · sigmoid(s). `None` leaves s free; its entries may turn negative.
        device: of the parameters.
        dtype: of the parameters, real or complex (s is real).

    Attributes:
        left: the `OrthonormalFrame` U `[out, r]`.
        right: the `OrthonormalFrame` V `[in, r]`.
        s: parameter `[r]`: the singular values up to their signs, or their logits.
        bias: parameter `[out]`, or `None`.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is less than 1, the rank too large, or the bounds are not
            0 ≤ lowest < highest.

    Gradients:
        Every order outside `torch.compile`, first order inside it.

    Examples:
        >>> layer = SVDLinear(6, 6, bounds=(0.5, 2.0))
        >>> x = torch.randn(3, 6)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
        >>> torch.allclose(layer.logabsdet(), torch.linalg.slogdet(layer.weight)[1], atol=1e-5)
        True
        >>> low_rank = SVDLinear.from_linear(torch.nn.Linear(64, 32), rank=8)
        >>> torch.linalg.matrix_rank(low_rank.weight).item()
        8

    References:
        - Stabilizing Gradients for Deep Neural Networks via Efficient SVD Parameterization
          (Zhang et al., 2018), https://arxiv.org/abs/1803.09327
        - What if Neural Networks had SVDs? (Mathiasen et al., 2020),
          https://arxiv.org/abs/2009.13977
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        num_householder: int | None = None,
        bias: bool = True,
        *,
        bounds: Bounds | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_positive_int(where, "in_features", in_features)
        check_positive_int(where, "out_features", out_features)
        smaller = min(in_features, out_features)
        rank = smaller if rank is None else rank
        check_positive_int(where, "rank", rank)
        if rank > smaller:
            raise ValueError(
                f"{where}: `rank` must be at most min(in_features, out_features) = {smaller}, got "
                f"{rank}; pass a smaller number, or None for the largest"
            )
        check_bounds(where, bounds)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.bounds = bounds
        N = num_householder
        self.left = OrthonormalFrame(out_features, rank, N, device=device, dtype=dtype)
        self.right = OrthonormalFrame(in_features, rank, N, device=device, dtype=dtype)
        real = self.left.reflectors.dtype.to_real()
        self.s = nn.Parameter(torch.empty(rank, device=device, dtype=real))
        b = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", b)
        self._reset_singular_values_and_bias()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int | None = None,
        num_householder: int | None = None,
        *,
        bounds: Bounds | None = None,
    ) -> Self:
        """Make the layer nearest to a linear layer, with its bias, device and dtype.

        See `set_weight`.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank,
            num_householder,
            linear.bias is not None,
            bounds=bounds,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.set_weight(linear.weight)
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """W `[out, in]`, formed when read; set it with `set_weight`."""
        return (self.left() * self._signed_singular_values()) @ self.right().mH

    @property
    def singular_values(self) -> Tensor:
        """The r singular values of W, in no particular order; differentiable."""
        return self._signed_singular_values().abs()

    def reset_parameters(self) -> None:
        """Draw U and V anew, and set the singular values to one, or to the bound nearest to one."""
        self.left.reset_parameters()
        self.right.reset_parameters()
        self._reset_singular_values_and_bias()

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Take the nearest matrix of rank r, its singular values within the bounds, to `[out, in]`.

        Nearest in every unitarily invariant norm. A value outside the bounds, or within a hundredth
        of the interval of one, starts that hundredth inside, where the sigmoid has a slope. With
        fewer than r reflectors U and V are approximated, see `OrthonormalFrame.set_frame`, and s is
        the best for them.

        Raises:
            TypeError: `weight` is no tensor, or of no dtype that fits.
            ValueError: the shape is another, or a value is not finite.
        """
        where = f"{type(self).__name__}.set_weight"
        shape = (self.out_features, self.in_features)
        check_weight(where, weight, shape, complex_allowed=self.left.angles is not None)
        matrix = weight.to(compute_dtype(weight, self.left.reflectors))
        U, V = singular_vectors(matrix, self.rank)
        self.left.set_frame(U)
        self.right.set_frame(V)
        U, V = (frame().to(matrix.dtype) for frame in (self.left, self.right))
        self.s.copy_(unbound_singular_values(best_singular_values(matrix, U, V), self.bounds))

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b `[..., out]` for `x [..., in]`."""
        n, m = self.out_features, self.in_features
        if self.rank * (n + m) >= n * m:
            return F.linear(x, self.weight, self.bias)
        return self.left.lift(self.right.project(x) * self._signed_singular_values(), self.bias)

    def inverse(self, y: Tensor, *, check: bool = True) -> Tensor:
        """Return the x `[..., in]` with W x + b = y, as V diag(1/s) Uᴴ (y − b).

        Args:
            y: `[..., out]`.
            check: raise where a singular value is zero. That reads values: give False inside
                `torch.compile` and `torch.func.vmap`.

        Raises:
            ValueError: W is not square, not of full rank, or singular.
        """
        where = f"{type(self).__name__}.inverse"
        self._check_square(where)
        s = self._signed_singular_values()
        if check and bool((s == 0).any()):
            raise ValueError(
                f"{where}: needs singular values other than 0, got {int((s == 0).sum())} of them; "
                "bounds with a lowest value > 0 keep them away"
            )
        centred = y if self.bias is None else y - self.bias
        return self.right.lift(self.left.project(centred) / s)

    def logabsdet(self) -> Tensor:
        """Return log |det W| = Σ log s; −inf if W is singular.

        Raises:
            ValueError: W is not square, or not of full rank.
        """
        self._check_square(f"{type(self).__name__}.logabsdet")
        return self.singular_values.log().sum()

    def spectral_norm(self) -> Tensor:
        """Return the largest singular value, the Lipschitz constant of the layer."""
        return self.singular_values.max()

    def frobenius_norm(self) -> Tensor:
        """Return ‖W‖_F = √(Σ s²)."""
        return torch.linalg.vector_norm(self._signed_singular_values())

    def extra_repr(self) -> str:
        """Return the options that `print` shows."""
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, bounds={self.bounds}"
        )

    def _signed_singular_values(self) -> Tensor:
        # `module.to(torch.complex128)` makes every parameter complex.
        s = self.s.real if self.s.is_complex() else self.s
        return bound_singular_values(s, self.bounds)

    def _reset_singular_values_and_bias(self) -> None:
        with torch.no_grad():
            ones = torch.ones_like(self.s, dtype=torch.float32)
            self.s.copy_(unbound_singular_values(ones, self.bounds))
        init_bias(self.bias, self.in_features)

    def _check_square(self, where: str) -> None:
        if not self.in_features == self.out_features == self.rank:
            raise ValueError(
                f"{where}: needs a square W of full rank, got {self.out_features} × "
                f"{self.in_features} of rank {self.rank}; another W has none"
            )
