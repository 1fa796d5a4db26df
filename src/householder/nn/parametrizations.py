"""Parametrizations of the weights of existing modules, as those of `torch.nn.utils`.

They are registered with `torch.nn.utils.parametrize`: `module.weight` is computed from reflectors
each time it is read (once inside `parametrize.cached()`), assigning to it sets them, and
`parametrize.remove_parametrizations(module, "weight")` leaves the present weight as a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from householder.nn._checks import check_positive_int
from householder.nn.frames import check_finite, factor, make_frame
from householder.nn.singular_values import (
    Bounds,
    best_singular_values,
    bound_singular_values,
    check_bounds,
    singular_vectors,
    unbound_singular_values,
)
from householder.ops.wy import compute_dtype

__all__ = ["orthogonal", "singular_values", "svd"]


def orthogonal(
    module: nn.Module,
    name: str = "weight",
    num_householder: int | None = None,
    *,
    flatten: bool = False,
) -> nn.Module:
    """Keep a weight orthogonal, or of orthonormal columns or rows, by a product of reflectors.

    Q = H_{N−1} … H_0 E diag(signs) with H_j = I − 2 k_j k_jᵀ / ‖k_j‖² and E the first columns of
    the identity. A weight `[*, n, m]` becomes Q with D = n if it is square or tall and Qᵀ with
    D = m if it is wide; more than two dimensions are a batch of matrices, as they are for
    `torch.nn.utils.parametrizations.orthogonal`. Memory and time are those of the D × M frame: for
    thin weights no D × D matrix exists at any time.

    It starts at the present weight if that is orthogonal, else at the Q of its QR decomposition
    with a positive diagonal of R (PyTorch's own choice). Assigning to the weight does the same. The
    signs are constants, set at that moment: a real square weight keeps the determinant it is given,
    1 or −1, and the other one is reached by assigning a weight that has it. Where M < D, and for
    complex weights, every orthonormal Q can be reached from every other.

    With `num_householder` N below M a weight is met exactly if rank(Q − E) ≤ N, and approximated
    otherwise; see `householder.nn.OrthonormalFrame.set_frame`.

    Args:
        module: owns the weight.
        name: of the weight, a parameter or buffer of two or more dimensions, real or complex.
            bfloat16 and float16 weights are computed in float32 and rounded once.
        num_householder: N; M = min(n, m) if `None`.
        flatten: take a weight `[n, ...]` of more dimensions as one matrix `[n, m]`, instead of as a
            batch: a convolution then has orthonormal filters `[out, in / groups · kernel]`.

    Returns:
        The module itself. Its parameter `parametrizations.<name>.original` now holds the reflectors
        `[*, N, D]` (the same object as the weight was, so that an optimizer keeps it); for a
        complex weight `original0` holds them and `original1` their angles, which an optimizer has
        to be given.

    Raises:
        TypeError: the weight is neither floating point nor complex, or N is no int.
        ValueError: there is no such weight, it has fewer than two dimensions, is not finite, or
            has a parametrization already; or N < 1.

    Gradients:
        Every order outside `torch.compile`, first order inside it.

    Examples:
        >>> import torch
        >>> from householder.nn import parametrizations
        >>> layer = parametrizations.orthogonal(torch.nn.Linear(20, 40))
        >>> torch.allclose(layer.weight.mT @ layer.weight, torch.eye(20), atol=1e-5)
        True
        >>> layer.weight = torch.eye(40, 20)  # any matrix: its Q is taken
        >>> torch.equal(layer.weight.round(decimals=5), torch.eye(40, 20))
        True

    References:
        - Efficient Orthogonal Parametrisation of Recurrent Neural Networks Using Householder
          Reflections (Mhammedi et al., 2017), https://arxiv.org/abs/1612.00188
    """
    where = "parametrizations.orthogonal"
    weight = _find_weight(where, module, name)
    matrix = weight.flatten(1) if flatten else weight
    N = min(matrix.shape[-2:]) if num_householder is None else num_householder
    check_positive_int(where, "num_householder", N)
    parametrization = OrthogonalParametrization(weight.shape, matrix.shape, N, weight.device)
    parametrize.register_parametrization(module, name, parametrization)
    return module


def svd(
    module: nn.Module,
    name: str = "weight",
    rank: int | None = None,
    num_householder: int | None = None,
    bounds: Bounds | None = None,
) -> nn.Module:
    """Hold a weight as W = U diag(s) Vᴴ, with U and V products of reflectors.

    The weight `[n, ...]` is taken as the matrix `[n, m]` with all further dimensions flattened: for
    a convolution `[out, in / groups · kernel]`. (The norm of the convolution as a map of signals is
    at most √(kernel positions) times that matrix's.) It starts at the nearest matrix of the given
    rank and bounds to the present weight, and so does every assignment to it.

    Args:
        module: owns the weight.
        name: of the weight, a parameter or buffer of two or more dimensions, real or complex.
        rank: r; min(n, m) if `None`.
        num_householder: reflectors of U and of V; r if `None`. With fewer than r the singular
            vectors are approximated, see `householder.nn.OrthonormalFrame.set_frame`, and s is the
            best for them.
        bounds: `(lowest, highest)`, between which singular values stay: s = lowest + (highest −
            lowest) · sigmoid(logits). `None` leaves s free; its entries may turn negative.

    Returns:
        The module itself. Its parameters `parametrizations.<name>.original0` … are now s `[r]` (the
        logits, with bounds), the reflectors of U `[N, n]` and of V `[N, m]`, and for complex
        weights the angles of both. They are new: give them to the optimizer.

    Raises:
        TypeError: the weight is neither floating point nor complex, or a size is no int.
        ValueError: there is no such weight, it has fewer than two dimensions, is not finite, or has
            a parametrization already; rank, N or bounds are out of range.

    Examples:
        >>> import torch
        >>> from householder.nn import parametrizations
        >>> conv = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1)
        >>> conv = parametrizations.svd(conv, rank=4, bounds=(0.0, 1.0))
        >>> torch.linalg.matrix_rank(conv.weight.flatten(1)).item()
        4
        >>> bool(parametrizations.singular_values(conv).max() <= 1)
        True

    References:
        - Stabilizing Gradients for Deep Neural Networks via Efficient SVD Parameterization
          (Zhang et al., 2018), https://arxiv.org/abs/1803.09327
    """
    where = "parametrizations.svd"
    weight = _find_weight(where, module, name)
    smaller = min(weight.shape[0], math.prod(weight.shape[1:]))
    rank = smaller if rank is None else rank
    check_positive_int(where, "rank", rank)
    if rank > smaller:
        raise ValueError(
            f"{where}: `rank` must be at most {smaller} for a weight {list(weight.shape)}, got "
            f"{rank}; pass a smaller number, or None for the largest"
        )
    N = rank if num_householder is None else num_householder
    check_positive_int(where, "num_householder", N)
    check_bounds(where, bounds)
    parametrization = SVDParametrization(weight, rank, N, bounds)
    parametrize.register_parametrization(module, name, parametrization)
    return module


def singular_values(module: nn.Module, name: str = "weight") -> Tensor:
    """Return the singular values `[r]` of a weight held by `svd`, in no particular order.

    They are differentiable: the spectral norm is their largest, the squared Frobenius norm the sum
    of their squares.

    Raises:
        ValueError: the weight is not parametrized by `svd`.

    Examples:
        >>> import torch
        >>> from householder.nn import parametrizations
        >>> layer = parametrizations.svd(torch.nn.Linear(6, 4))
        >>> penalty = parametrizations.singular_values(layer).square().sum()
        >>> torch.allclose(penalty, layer.weight.square().sum())
        True
    """
    held = parametrize.is_parametrized(module, name)
    stack = module.parametrizations[name] if held else None  # type: ignore[index]
    if not isinstance(stack, nn.ModuleList) or not isinstance(stack[0], SVDParametrization):
        raise ValueError(
            f"parametrizations.singular_values: `{name}` must be parametrized by "
            f"parametrizations.svd, but it is not in {type(module).__name__}; call svd first"
        )
    return bound_singular_values(stack.original0, stack[0].bounds).abs()  # type: ignore[arg-type]


class OrthogonalParametrization(nn.Module):
    """Weight from reflectors, and back; made by `orthogonal`."""

    signs: Tensor

    def __init__(
        self,
        shape: torch.Size,
        matrix_shape: torch.Size,
        num_householder: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.matrix_shape = matrix_shape
        self.num_householder = num_householder
        *batch, n, m = matrix_shape
        self.wide = n < m
        signs = torch.ones(*batch, min(n, m), dtype=torch.int8, device=device)
        self.register_buffer("signs", signs)

    def forward(self, reflectors: Tensor, angles: Tensor | None = None) -> Tensor:
        """Return the weight."""
        frame = make_frame(reflectors, angles, self.signs)
        return (frame.mT if self.wide else frame).reshape(self.shape)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the reflectors (and angles) of a weight, and set the signs."""
        where = "parametrizations.orthogonal"
        _check_assigned(where, weight, self.shape)
        matrix = weight.reshape(self.matrix_shape)
        made = factor(matrix.mT if self.wide else matrix, self.num_householder)
        self.signs = made.signs
        return made.reflectors if made.angles is None else (made.reflectors, made.angles)

    def extra_repr(self) -> str:
        """Return the options that `print` shows."""
        return f"num_householder={self.num_householder}"


class SVDParametrization(nn.Module):
    """Weight from singular values and reflectors, and back; made by `svd`."""

    left_signs: Tensor
    right_signs: Tensor

    def __init__(
        self, weight: Tensor, rank: int, num_householder: int, bounds: Bounds | None
    ) -> None:
        super().__init__()
        self.shape = weight.shape
        self.rank = rank
        self.num_householder = num_householder
        self.bounds = bounds
        for name in ("left_signs", "right_signs"):
            signs = torch.ones(rank, dtype=torch.int8, device=weight.device)
            self.register_buffer(name, signs)

    def forward(self, s: Tensor, left: Tensor, right: Tensor, *angles: Tensor) -> Tensor:
        """Return the weight."""
        left_angles, right_angles = angles or (None, None)
        U = make_frame(left, left_angles, self.left_signs)
        V = make_frame(right, right_angles, self.right_signs)
        s = bound_singular_values(s.real if s.is_complex() else s, self.bounds)
        return ((U * s) @ V.mH).reshape(self.shape)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Sequence[Tensor]:
        """Return s, the reflectors of U and V, and their angles; set the signs."""
        _check_assigned("parametrizations.svd", weight, self.shape)
        matrix = weight.flatten(1).to(compute_dtype(weight))
        left, right = (
            factor(frame, self.num_householder) for frame in singular_vectors(matrix, self.rank)
        )
        self.left_signs, self.right_signs = left.signs, right.signs
        s = best_singular_values(matrix, make_frame(*left), make_frame(*right))
        s = unbound_singular_values(s, self.bounds)
        parts = [s, left.reflectors, right.reflectors]
        if left.angles is not None and right.angles is not None:
            parts += [left.angles, right.angles]
        dtype = weight.dtype
        return [p.to(dtype if p.is_complex() else dtype.to_real()) for p in parts]

    def extra_repr(self) -> str:
        """Return the options that `print` shows."""
        return f"rank={self.rank}, num_householder={self.num_householder}, bounds={self.bounds}"


def _find_weight(where: str, module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{where}: `name` must be a parameter or buffer of the module, got {name!r} for "
            f"{type(module).__name__}; it has {[n for n, _ in module.named_parameters()]}"
        )
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"{where}: must be the first parametrization of a weight, but {name!r} has one; "
            "remove it with torch.nn.utils.parametrize.remove_parametrizations, or register it "
            "after this one"
        )
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(
            f"{where}: the weight must be real or complex floating point, got {weight.dtype}; "
            "convert it first"
        )
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(
            f"{where}: the weight must be a matrix or a batch of them, got shape "
            f"{list(weight.shape)}; choose another weight"
        )
    return weight


def _check_assigned(where: str, weight: Tensor, shape: torch.Size) -> None:
    if weight.shape != shape:
        raise ValueError(
            f"{where}: the assigned weight must be {list(shape)}, got shape {list(weight.shape)}; "
            "give a tensor of the weight's own shape"
        )
    check_finite(where, weight)
