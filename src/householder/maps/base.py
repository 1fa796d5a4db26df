"""`LinearMap`: a structured matrix as a value, and the composition of maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor


class LinearMap(ABC):
    """A structured matrix A, applied without being formed: y = A x on the last dimension.

    A map holds tensors and no parameters; it is cheap to make and is rebuilt in each `forward`.
    Calling acts, `@` composes, and nothing else does either.

    A subclass gives `shape`, `dtype`, `device`, `__call__` and `mH`, and where they exist `inverse`
    and `logabsdet`. It must obey these laws, which
    `householder.testing.check_linear_map_laws` checks:

    - A(a x + b y) = a A(x) + b A(y)
    - ⟨A x, y⟩ = ⟨x, A.mH y⟩, and A.mT is A.mH conjugated
    - A(x) = A.to_dense() x, and (A @ B)(x) = A(B(x))
    - A.inverse()(A(x)) = x, and A.logabsdet() = log |det A.to_dense()|
    """

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """The matrix's shape `[*, out, in]`, batch dimensions first."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the tensors the map holds."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the tensors the map holds."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map to `x [..., in]`; its batch dimensions broadcast with the map's."""

    @property
    @abstractmethod
    def mH(self) -> LinearMap:
        """The conjugate transpose, as a map."""

    @property
    def mT(self) -> LinearMap:
        """The transpose, as a map."""
        if self.dtype.is_complex:
            raise NotImplementedError(
                f"{type(self).__name__}.mT: a complex map of this kind has only the conjugate "
                "transpose; use .mH"
            )
        return self.mH

    def inverse(self, *, check: bool = True) -> LinearMap:
        """Return the inverse as a map.

        Args:
            check: raise where values forbid one. It reads values, so give False inside
                `torch.compile` and `torch.func.vmap`.

        Raises:
            NotImplementedError: this kind of map has none.
            ValueError: the map is singular.
        """
        raise NotImplementedError(
            f"{type(self).__name__}.inverse: this kind of map has no inverse; solve with to_dense()"
        )

    def logabsdet(self) -> Tensor:
        """Return log |det A|, of the batch's shape.

        Raises:
            NotImplementedError: this kind of map has none.
        """
        raise NotImplementedError(
            f"{type(self).__name__}.logabsdet: this kind of map has no determinant; use "
            "torch.linalg.slogdet of to_dense()"
        )

    def to_dense(self) -> Tensor:
        """Return the matrix `[*, out, in]`."""
        batch, size = self.shape[:-2], self.shape[-1]
        # Column i is A e_i. The index i goes before the map's batch dimensions.
        eye = torch.eye(size, dtype=self.dtype, device=self.device)
        return self(eye.reshape(size, *(1,) * len(batch), size)).movedim(0, -1)

    def __matmul__(self, other: LinearMap) -> LinearMap:
        """Compose: `(A @ B)(x) = A(B(x))`. To apply a map to a tensor, call it."""
        if isinstance(other, Tensor):
            raise TypeError(
                f"{type(self).__name__}: `@` composes maps, got a tensor; apply the map by calling "
                "it, A(x), which acts on the last dimension"
            )
        return self.compose(other) if isinstance(other, LinearMap) else NotImplemented

    def compose(self, other: LinearMap) -> LinearMap:
        """Do what `@` does; use this inside `torch.compile`, which cannot trace `@` of objects.

        Args:
            other: a map to as many features as this one takes; it acts first.

        Raises:
            ValueError: the sizes do not fit.
        """
        return Composition(self, other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' × '.join(map(str, self.shape))}, {self.dtype})"


class Composition(LinearMap):
    """A product of maps, applied from the last to the first: Composition(A, B)(x) = A(B(x)).

    `A @ B` makes it where the two kinds of maps have nothing better. Its shape, transposes, inverse
    and log-determinant are those of the product.

    Attributes:
        maps: the factors, without compositions among them.

    Examples:
        >>> import torch
        >>> from householder import Composition, HouseholderProduct
        >>> A, B = (HouseholderProduct.orthogonal(torch.randn(2, 4)) for _ in range(2))
        >>> x = torch.randn(4)
        >>> torch.equal(Composition(A, B)(x), A(B(x)))
        True
    """

    def __init__(self, *maps: LinearMap) -> None:
        """Compose at least one map; neighbours must fit.

        Raises:
            TypeError: an argument is no map.
            ValueError: there is none, or the sizes of two neighbours differ.
        """
        factors: list[LinearMap] = []
        for m in maps:
            if not isinstance(m, LinearMap):
                raise TypeError(
                    f"Composition: every factor must be a LinearMap, got {type(m).__name__}; "
                    "apply a map to a tensor by calling it"
                )
            factors.extend(m.maps if isinstance(m, Composition) else [m])
        if not factors:
            raise ValueError(
                "Composition: there must be a map at least, got none; give those to compose"
            )
        for left, right in pairwise(factors):
            if left.shape[-1] != right.shape[-2]:
                raise ValueError(
                    f"Composition: a map from {left.shape[-1]} features cannot follow one to "
                    f"{right.shape[-2]}; the sizes of neighbours must be equal"
                )
        self.maps: tuple[LinearMap, ...] = tuple(factors)

    @property
    def shape(self) -> torch.Size:
        batch = torch.broadcast_shapes(*(m.shape[:-2] for m in self.maps))
        return torch.Size((*batch, self.maps[0].shape[-2], self.maps[-1].shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.maps[0].dtype
        for m in self.maps[1:]:
            dtype = torch.promote_types(dtype, m.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        return self.maps[0].device

    def __call__(self, x: Tensor) -> Tensor:
        for m in reversed(self.maps):
            x = m(x)
        return x

    @property
    def mH(self) -> LinearMap:
        return Composition(*(m.mH for m in reversed(self.maps)))

    @property
    def mT(self) -> LinearMap:
        return Composition(*(m.mT for m in reversed(self.maps)))

    def inverse(self, *, check: bool = True) -> LinearMap:
        """Return the product of the factors' inverses, in reversed order.

        Args:
            check: as in `LinearMap.inverse`, of every factor.

        Raises:
            NotImplementedError: a factor is of a kind that has none.
            ValueError: a factor is singular.
        """
        return Composition(*(m.inverse(check=check) for m in reversed(self.maps)))

    def logabsdet(self) -> Tensor:
        """Return the sum over the factors, all of which must be square."""
        return sum((m.logabsdet() for m in self.maps[1:]), self.maps[0].logabsdet())
