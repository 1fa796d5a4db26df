"""Linear layers with orthonormal weights, their reflectors the parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Self

from householder.nn._checks import check_positive_int
from householder.nn.frames import OrthonormalFrame
from householder.nn.initialization import init_bias


class StiefelLinear(nn.Module):
    """y = W x + b with orthonormal columns (out ≥ in) or rows (out < in) of W.

    With out ≥ in the layer keeps the lengths of inputs; with out ≤ in, those of gradients. W is
    Q or Qᴴ for an `OrthonormalFrame` Q: no matrix of max(in, out)² entries is formed. With few
    reflectors, 2 N ≤ min(in, out), W is not formed either: they are applied to the inputs.

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        num_householder: N; min(in, out) if `None`, which reaches every such W.
        bias: whether to add b; it starts as that of `torch.nn.Linear`.
        device: of the parameters.
        dtype: of the parameters, real or complex.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is less than 1.

    Gradients:
        Every order outside `torch.compile`, first order inside it.

    Examples:
        >>> layer = StiefelLinear(16, 64, bias=False)
        >>> x = torch.randn(5, 16)
        >>> torch.allclose(layer(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
        True
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_householder: int | None = None,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_positive_int(where, "in_features", in_features)
        check_positive_int(where, "out_features", out_features)
        self.in_features = in_features
        self.out_features = out_features
        sizes = (max(in_features, out_features), min(in_features, out_features))
        self.frame = OrthonormalFrame(*sizes, num_householder, device=device, dtype=dtype)
        b = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", b)
        init_bias(self.bias, in_features)

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_householder: int | None = None) -> Self:
        """Make the layer with the orthonormal weight of a linear layer's, and its bias.

        See `set_weight`; device and dtype are the layer's.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            num_householder,
            linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer._take(linear)
        return layer

    @property
    def weight(self) -> Tensor:
        """W `[out, in]`, formed when read; set it with `set_weight`."""
        return self.frame() if self._is_tall() else self.frame().mH

    def reset_parameters(self) -> None:
        """Draw W anew (see `OrthonormalFrame.reset_parameters`), and the bias."""
        self.frame.reset_parameters()
        init_bias(self.bias, self.in_features)

    def set_weight(self, weight: Tensor) -> None:
        """Take the orthonormal Q of a matrix `[out, in]` (of its adjoint, if it is wide).

        That is the weight itself if it is orthonormal. See `OrthonormalFrame.set_frame`, also for
        what happens with fewer than min(in, out) reflectors.

        Raises:
            TypeError: `weight` is no tensor, or of no dtype that fits.
            ValueError: the shape is another, or a value is not finite.
        """
        self.frame.set_frame(weight if self._is_tall() else weight.mH)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b `[..., out]` for `x [..., in]`."""
        act = self.frame.lift if self._is_tall() else self.frame.project
        return act(x, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes that `print` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def _is_tall(self) -> bool:
        return self.out_features >= self.in_features

    @torch.no_grad()
    def _take(self, linear: nn.Linear) -> None:
        self.set_weight(linear.weight)
        if self.bias is not None:
            self.bias.copy_(linear.bias)


class OrthogonalLinear(StiefelLinear):
    """y = Q x + b with a square orthogonal (unitary) Q: lengths, angles and volumes are kept.

    The inverse is the transpose, and costs what the layer does. The sign of a real Q's determinant
    is a constant of training, as nothing continuous could change it: `determinant` chooses it, and
    `set_weight` takes it from the given matrix.

    Args:
        features: D, the size of inputs and outputs.
        num_householder: N; D if `None`, which reaches every Q of that determinant.
        bias: whether to add b; it starts as that of `torch.nn.Linear`.
        determinant: 1 (a rotation) or −1 to start with; `None` leaves it to the draw. Real Q only.
        device: of the parameters.
        dtype: of the parameters, real or complex.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is less than 1, or `determinant` is not as said.

    Gradients:
        Every order outside `torch.compile`, first order inside it.

    Examples:
        >>> layer = OrthogonalLinear(16, determinant=1)
        >>> x = torch.randn(5, 16)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
        >>> round(torch.linalg.det(layer.weight).item(), 3)
        1.0
    """

    def __init__(
        self,
        features: int,
        num_householder: int | None = None,
        bias: bool = True,
        *,
        determinant: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where = type(self).__name__
        check_positive_int(where, "features", features)
        is_real = not (torch.get_default_dtype() if dtype is None else dtype).is_complex
        if determinant is not None and not (determinant in (1, -1) and is_real):
            raise ValueError(
                f"{where}: `determinant` must be 1, -1 or None, and None for a complex dtype, got "
                f"{determinant} with dtype {dtype}; a unitary Q has no sign to choose"
            )
        # Before the parent draws the weight.
        self._initial_determinant = determinant
        super().__init__(features, features, num_householder, bias, device=device, dtype=dtype)
        self._set_determinant()

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_householder: int | None = None) -> Self:
        """Make the layer with the orthogonal weight of a square linear layer's, and its bias.

        See `set_weight`; device and dtype are the layer's.

        Raises:
            ValueError: the layer is not square.
        """
        if linear.in_features != linear.out_features:
            raise ValueError(
                f"{cls.__name__}.from_linear: the layer must be square, got {linear.in_features} "
                f"to {linear.out_features} features; use StiefelLinear.from_linear"
            )
        weight = linear.weight
        layer = cls(
            linear.in_features,
            num_householder,
            linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer._take(linear)
        return layer

    def reset_parameters(self) -> None:
        """Draw Q anew, of the determinant given to the constructor, and the bias."""
        super().reset_parameters()
        self._set_determinant()

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x `[..., D]` with Q x + b = y."""
        return self.frame.project(y if self.bias is None else y - self.bias)

    def determinant(self) -> int:
        """Return det Q of a real Q: 1 or −1. It reads the signs, and so waits for a GPU.

        Raises:
            NotImplementedError: Q is complex; its determinant is any number of modulus one.
        """
        if self.frame.angles is not None:
            raise NotImplementedError(
                "OrthogonalLinear.determinant: for real weights only, got "
                f"{self.frame.reflectors.dtype}; use torch.linalg.det(layer.weight)"
            )
        flips = self.frame.num_householder + int((self.frame.signs < 0).sum())
        return -1 if flips % 2 else 1

    def _set_determinant(self) -> None:
        wanted = self._initial_determinant
        if wanted is not None and not self.frame.signs.is_meta and self.determinant() != wanted:
            self.frame.signs[-1] *= -1
