"""Exact solutions of word problems, written down instead of trained.

A layer whose state is updated by N reflections per token can follow a group if it can give each
element a matrix, A(a · b) = A(a) A(b), that is a product of N reflections. Theory says how; here
the constructions run through `householder.delta_product` on long random words, and every running
product is decoded and compared with the group's multiplication table. Nothing is learnt: the tables
from elements to reflectors are what a trained layer has to find.

References:
    Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues (Grazzi, Siems, Zela,
    Franke, Hutter, Pontil, 2024), https://arxiv.org/abs/2411.12537, Theorems 3 and 6;
    DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products (Siems,
    Carstensen, Zela, Hutter, Pontil, Grazzi, 2025), https://arxiv.org/abs/2502.10297, Theorem 7.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from householder.ops import delta_product
from householder.train.tasks.groups import (
    Group,
    alternating_group,
    cyclic_group,
    dihedral_group,
    representation,
    symmetric_group,
    transpositions,
)

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ConstructionResult:
    """Say how far a construction followed its words.

    Attributes:
        name: the group, with what its elements act on.
        order: number of elements.
        layers: number of layers.
        num_householder: reflections per token in each layer.
        key_dim: size of the state's key dimension in the last layer.
        steps: length of the words.
        batch: number of words.
        dtype: dtype of the computation.
        first_error: the earliest position, counted from 1, at which any word was decoded wrongly;
            None if there is none.
        max_error: the largest distance, over all positions, of the last layer's output from what it
            would be in exact arithmetic.
        radius: half the smallest distance between the outputs of two elements: a `max_error` below
            it cannot be decoded wrongly.
        seconds: time taken.
    """

    name: str
    order: int
    layers: int
    num_householder: int
    key_dim: int
    steps: int
    batch: int
    dtype: torch.dtype
    first_error: int | None
    max_error: float
    radius: float
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether every position of every word was decoded rightly."""
        return self.first_error is None

    @property
    def exact_steps(self) -> int:
        """How many positions from the beginning were right in all words."""
        return self.steps if self.first_error is None else self.first_error - 1


class Tracking(NamedTuple):
    """What a construction makes of a batch of words.

    Attributes:
        decoded: int64 `[B, T]`, the element read off after each token.
        outputs: `[B, T, D]`, the last layer's output it was read off from.
        exact: `[B, T, D]`, what the output should be.
    """

    decoded: Tensor
    outputs: Tensor
    exact: Tensor


class Construction(ABC):
    """A way to follow the running product y_t = x_t · y_{t-1} of words over a group.

    Attributes:
        name: the group, with what its elements act on.
        group: the group.
        layers: number of layers.
        num_householder: reflections per token in each layer.
        key_dim: size of the state's key dimension in the last layer.
        radius: half the smallest distance between the outputs of two elements.
    """

    name: str
    group: Group
    layers: int
    num_householder: int
    key_dim: int
    radius: float

    @abstractmethod
    def track(self, words: Tensor, dtype: torch.dtype, impl: str = "auto") -> Tracking:
        """Follow words, int64 `[B, T]`."""

    def run(
        self,
        steps: int = 3000,
        batch: int = 4,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        impl: str = "auto",
    ) -> ConstructionResult:
        """Follow random words and compare every position with the multiplication table.

        Args:
            steps: length of the words.
            batch: number of words.
            dtype: float32 or float64.
            seed: of the random words.
            impl: implementation of `delta_product`.

        Raises:
            ValueError: `steps` or `batch` is below 1, or `dtype` is another one.

        Examples:
            >>> result = symmetric(3).run(steps=200, batch=2)
            >>> result.exact, result.exact_steps, result.max_error < 1e-4
            (True, 200, True)
        """
        if steps < 1 or batch < 1:
            raise ValueError(
                f"constructions: `steps` and `batch` must be at least 1, got {steps} and {batch}; "
                "ask for a word of a token or more"
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"constructions: `dtype` must be float32 or float64, got {dtype}; the reflectors "
                "themselves are not exact in less"
            )
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(self.group.order, (batch, steps), generator=generator)
        start = time.perf_counter()
        tracking = self.track(words, dtype, impl)
        seconds = time.perf_counter() - start
        wrong = (tracking.decoded != self.group.running_product(words.T).T).any(dim=0).nonzero()
        return ConstructionResult(
            name=self.name,
            order=self.group.order,
            layers=self.layers,
            num_householder=self.num_householder,
            key_dim=self.key_dim,
            steps=steps,
            batch=batch,
            dtype=dtype,
            first_error=int(wrong[0]) + 1 if len(wrong) else None,
            max_error=(tracking.outputs - tracking.exact).norm(dim=-1).max().item(),
            radius=self.radius,
            seconds=seconds,
        )


class OneLayer(Construction):
    """Follow a group with one head whose transition is the matrix of the element read.

    With no values and the identity as initial state, the state after t tokens is S_t = A(x_t) …
    A(x_1) = A(y_t), and the output for a fixed query q is o_t = A(y_t)ᵀ q. A query that no element
    but the identity fixes gives every element another output, and the nearest of them tells y_t.

    Args:
        name: the group, with what its elements act on.
        group: the group.
        matrices: float64 `[order, K, K]`, A of each element.
        reflectors: float64 `[order, N, K]`, unit vectors, the reflections that make up A, 0 first.
        beta: float64 `[order, N]`, 2, or 0 where an element needs fewer than N.
        query: float64 `[K]`.
    """

    layers = 1

    def __init__(
        self,
        name: str,
        group: Group,
        *,
        matrices: Tensor,
        reflectors: Tensor,
        beta: Tensor,
        query: Tensor,
    ) -> None:
        self.name = name
        self.group = group
        self.matrices = matrices
        self.reflectors = reflectors
        self.beta = beta
        self.query = query
        self.num_householder, self.key_dim = reflectors.shape[1:]
        self.points = matrices.mT @ query
        self.radius = _separation(self.points) / 2

    def track(self, words: Tensor, dtype: torch.dtype, impl: str = "auto") -> Tracking:
        """Follow words, int64 `[B, T]`."""
        B, T = words.shape
        K = self.key_dim
        k = self.reflectors.to(dtype)[words][:, :, :, None]  # [B, T, N, 1, K]
        beta = self.beta.to(dtype)[words][..., None]  # [B, T, N, 1]
        q = self.query.to(dtype).expand(B, T, 1, K)
        identity = torch.eye(K, dtype=dtype).expand(B, 1, K, K)
        o, _ = delta_product(
            q, k, torch.zeros_like(k), beta, scale=1.0, initial_state=identity, impl=impl
        )
        outputs = o[:, :, 0].double()
        exact = self.points[self.group.running_product(words.T).T]
        return Tracking(_nearest(outputs, self.points), outputs, exact)


class TwoLayers(Construction):
    """Follow Z_m or D_m with two layers of single reflections.

    One reflection per token cannot be a rotation, so the first layer counts for the second. It has
    a scalar state h ← h − β (h − ½), which β = 2 flips between 0 and 1 and β = 0 keeps, once for
    the rotations read so far and once for the reflections read so far (the current token included):
    their parities ρ_t and σ_t. The second layer reflects a plane vector h_0 = (1, 0) by

        h_t = H(θ(x_t, ρ_t)) h_{t-1},    H(θ) = [[cos θ, sin θ], [sin θ, −cos θ]],

    which maps the direction at angle a to that at θ − a. The angles are chosen such that element
    r_i or s_i is always at the angle of one of

        d_i = 2iπ/m where ρ_t = 0,    c_i = (1 − 2i)π/m where ρ_t = 1.

    These 2m directions differ, so the nearest one tells i, and σ_t tells r_i from s_i.

    Args:
        group: `cyclic_group(m)` or `dihedral_group(m)`.
        angles: float64 `[order, 2]`, θ(x, ρ) of each element x for ρ = 0 and 1, radians; those of
            `reflection_angles` by default.

    Raises:
        ValueError: `group` is neither.
    """

    layers = 2
    num_householder = 1
    key_dim = 2

    def __init__(self, group: Group, angles: Tensor | None = None) -> None:
        m = group.degree
        if group == cyclic_group(m):
            self.name = f"{group.name}, cyclic"
        elif m >= 3 and group == dihedral_group(m):
            self.name = f"{group.name}, dihedral"
        else:
            raise ValueError(
                "TwoLayers: `group` must be cyclic_group(m) or dihedral_group(m), got "
                f"{group.name}; use OneLayer for other groups"
            )
        self.group = group
        self.m = m
        self.angles = reflection_angles(group) if angles is None else angles
        i = torch.arange(m, dtype=torch.float64)
        directions = torch.cat([2 * i, 1 - 2 * i]) * (math.pi / m)  # d_0 …, then c_0 …
        self.points = torch.stack([directions.cos(), directions.sin()], dim=-1)
        self.radius = _separation(self.points) / 2

    def track(self, words: Tensor, dtype: torch.dtype, impl: str = "auto") -> Tracking:
        """Follow words, int64 `[B, T]`."""
        is_rotation = words < self.m
        rotations, reflections = self._parities(is_rotation, dtype, impl)
        outputs = self._plane(words, rotations, dtype, impl).double()
        index = _nearest(outputs, self.points) % self.m
        products = self.group.running_product(words.T).T
        exact_rotations = is_rotation.long().cumsum(dim=1) % 2
        exact = self.points[products % self.m + self.m * exact_rotations]
        return Tracking(index + self.m * reflections, outputs, exact)

    def _parities(
        self, is_rotation: Tensor, dtype: torch.dtype, impl: str
    ) -> tuple[Tensor, Tensor]:
        """Run the first layer: parities of the rotations and of the reflections, each `[B, T]`."""
        flips = torch.stack([is_rotation, ~is_rotation], dim=-1)  # a head for each
        beta = 2 * flips.to(dtype)[:, :, None]  # [B, T, 1, 2]
        one = torch.ones_like(beta)[..., None]  # [B, T, 1, 2, 1]
        o, _ = delta_product(one[:, :, 0], one, one / 2, beta, scale=1.0, impl=impl)
        rotations, reflections = o[..., 0].round().long().unbind(dim=-1)
        return rotations, reflections

    def _plane(self, words: Tensor, rotations: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
        """Run the second layer: h_t, `[B, T, 2]`, its two coordinates read by a head each."""
        B, T = words.shape
        half = self.angles[words, rotations] / 2
        normal = torch.stack([-half.sin(), half.cos()], dim=-1)  # H(θ) = I − 2 n nᵀ
        k = normal.to(dtype)[:, :, None, None].expand(B, T, 1, 2, 2)
        v = torch.zeros(B, T, 1, 2, 1, dtype=dtype)
        beta = torch.full((B, T, 1, 2), 2.0, dtype=dtype)
        q = torch.eye(2, dtype=dtype).expand(B, T, 2, 2)
        start = torch.tensor([[1.0], [0.0]], dtype=dtype).expand(B, 2, 2, 1)
        o, _ = delta_product(q, k, v, beta, scale=1.0, initial_state=start, impl=impl)
        return o[..., 0]


def reflection_angles(group: Group) -> Tensor:
    """Return the angles θ(x, ρ) of the second layer of `TwoLayers`.

    With r_j · r_i = r_{i+j}, r_j · s_i = s_{i+j}, s_j · r_i = s_{j−i} and s_j · s_i = r_{j−i}, a
    rotation adds j to the index and changes ρ, a reflection takes the index from j and leaves ρ:

        θ(r_j, 1): d_i → c_{i+j},  (1 − 2j)π/m        θ(s_j, 0): d_i → d_{j−i},  2jπ/m
        θ(r_j, 0): c_i → d_{i+j},  (1 + 2j)π/m        θ(s_j, 1): c_i → c_{j−i},  (2 − 2j)π/m

    Args:
        group: `cyclic_group(m)` (rotations only) or `dihedral_group(m)`.

    Returns:
        float64 `[order, 2]`, radians, for ρ = 0 and 1 of the rotations read, the current included.

    Examples:
        >>> (reflection_angles(cyclic_group(4)) / torch.pi)[1]
        tensor([ 0.7500, -0.2500], dtype=torch.float64)
    """
    m = group.degree
    j = torch.arange(m, dtype=torch.float64)
    rotations = torch.stack([1 + 2 * j, 1 - 2 * j], dim=-1)
    reflections = torch.stack([2 * j, 2 - 2 * j], dim=-1)
    return torch.cat([rotations, reflections])[: group.order] * (math.pi / m)


def symmetric(n: int) -> OneLayer:
    """Construct S_n in one layer of n − 1 reflections in n dimensions.

    A permutation acts as e_p → e_{a(p)}. The transposition (i j) is the reflection along (e_i −
    e_j)/√2, and a permutation is a product of at most n − 1 of them; the rest have β = 0. The query
    (1, …, n), centred, has its entries permuted, so the output spells the permutation out.
    """
    group = symmetric_group(n)
    matrices = torch.eye(n, dtype=torch.float64)[torch.tensor(group.elements)].mT
    reflectors = torch.zeros(group.order, n - 1, n, dtype=torch.float64)
    beta = torch.zeros(group.order, n - 1, dtype=torch.float64)
    for element, permutation in enumerate(group.elements):
        for place, (i, j) in enumerate(transpositions(permutation)):
            reflectors[element, place, i] = 0.5**0.5
            reflectors[element, place, j] = -(0.5**0.5)
            beta[element, place] = 2
    query = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    return OneLayer(
        f"S{n}, {n} axes",
        group,
        matrices=matrices,
        reflectors=reflectors,
        beta=beta,
        query=query / query.norm(),
    )


def cube_rotations() -> OneLayer:
    """Construct S4 in one layer of 2 reflections in 3 dimensions: the cube's 24 rotations.

    S4 = ⟨a, b | a² = b³ = (ab)⁴ = 1⟩, with a half turn about an edge's axis for a = (0 1), a third
    of a turn about a corner's axis for b = (1 2 3), and a quarter turn about a face's axis for ab.
    """
    group = symmetric_group(4)
    a = rotation((1.0, 1.0, 0.0), math.pi)
    b = rotation((1.0, 1.0, 1.0), 2 * math.pi / 3)
    images = {group.index((1, 0, 2, 3)): a, group.index((0, 2, 3, 1)): b}
    return _of_rotations("S4, cube", group, images)


def icosahedron_rotations() -> OneLayer:
    """Construct A5 in one layer of 2 reflections in 3 dimensions: the icosahedron's 60 rotations.

    A5 = ⟨a, b | a² = b³ = (ab)⁵ = 1⟩, with a half turn for a = (0 1)(2 3) and a third of a turn for
    b = (0 2 4), about axes z and (0, 1/φ, φ) of an edge and of a face next to it (φ the golden
    ratio), which makes ab a fifth of a turn about a corner's axis.
    """
    group = alternating_group(5)
    golden = (1 + 5**0.5) / 2
    a = rotation((0.0, 0.0, 1.0), math.pi)
    b = rotation((0.0, 1 / golden, golden), 2 * math.pi / 3)
    images = {group.index((1, 0, 3, 2, 4)): a, group.index((2, 1, 4, 3, 0)): b}
    return _of_rotations("A5, icosahedron", group, images)


def _of_rotations(name: str, group: Group, images: Mapping[int, Tensor]) -> OneLayer:
    """Construct a group of rotations of space from the images of its generators."""
    matrices = representation(group, images)
    pairs = [two_reflections(matrix) for matrix in matrices]
    reflectors, beta = (torch.stack(part) for part in zip(*pairs, strict=True))
    # The query decides how far apart the outputs of two elements are. Any direction off the axes
    # would do; this is the best of many.
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randn(500, 3, dtype=torch.float64, generator=generator)
    candidates /= candidates.norm(dim=1, keepdim=True)
    query = max(candidates, key=lambda q: _separation(matrices.mT @ q))
    return OneLayer(name, group, matrices=matrices, reflectors=reflectors, beta=beta, query=query)


def rotation(axis: Sequence[float], angle: float) -> Tensor:
    """Return the rotation of space by `angle` radians about `axis` (any length), float64 `[3, 3]`.

    Examples:
        >>> rotation((0, 0, 2), torch.pi / 2).round().int().tolist()
        [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    """
    n = torch.tensor(axis, dtype=torch.float64)
    x, y, z = (n / n.norm()).tolist()
    # The matrix of v → n × v; exp(angle · cross) is the rotation.
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(angle * cross)


def two_reflections(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Write a rotation of space as two reflections, planes through its axis at half its angle.

    Args:
        matrix: float64 `[3, 3]`, orthogonal of determinant 1.

    Returns:
        reflectors `[2, 3]`, unit vectors, reflector 0 applied first, and beta `[2]`: 2, or 0 for
        the identity.

    Examples:
        >>> k, beta = two_reflections(rotation((0, 0, 1), 1.0))
        >>> H = [torch.eye(3) - b * torch.outer(n, n) for n, b in zip(k, beta)]
        >>> bool(torch.allclose(H[1] @ H[0], rotation((0, 0, 1), 1.0)))
        True
    """
    displacement = matrix - torch.eye(3, dtype=matrix.dtype)
    _, size, directions = torch.linalg.svd(displacement)
    in_plane, axis = directions[0], directions[2]  # displaced most, and not at all
    if size[0] < 1e-9:  # the identity: any vectors, switched off
        return torch.eye(3, dtype=matrix.dtype)[:2], torch.zeros(2, dtype=matrix.dtype)
    # The first reflection keeps `in_plane`, the second takes it where it belongs.
    first = torch.linalg.cross(axis, in_plane)
    second = in_plane - matrix @ in_plane
    reflectors = torch.stack([first, second / second.norm()])
    return reflectors, torch.full((2,), 2.0, dtype=matrix.dtype)


def _nearest(outputs: Tensor, points: Tensor) -> Tensor:
    """Return the number of the nearest of `points [P, D]` to each output `[B, T, D]`."""
    # All points have the same length, so the nearest is the one with the largest inner product.
    return (outputs @ points.T).argmax(dim=-1)


def _separation(points: Tensor) -> float:
    """Return the smallest distance between two of `points [P, D]`."""
    distances = torch.linalg.norm(points[:, None] - points, dim=-1)
    return distances.fill_diagonal_(math.inf).min().item()


def constructions() -> list[Construction]:
    """List the constructions that `householder reproduce constructions` runs."""
    return [
        *(symmetric(n) for n in (3, 4, 5)),
        cube_rotations(),
        icosahedron_rotations(),
        *(TwoLayers(cyclic_group(m)) for m in (3, 4, 5, 7, 12, 60)),
        *(TwoLayers(dihedral_group(m)) for m in (3, 4, 5, 7, 12)),
    ]


def run_all(
    steps: int = 3000, batch: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[ConstructionResult]:
    """Run all constructions on random words; arguments as in `Construction.run`.

    Examples:
        >>> all(result.exact for result in run_all(steps=50, batch=2))
        True
    """
    return [construction.run(steps, batch, dtype, seed) for construction in constructions()]


def results_table(results: Sequence[ConstructionResult]) -> Table:
    """Return the results as a table for the terminal."""
    from rich.table import Table

    table = Table(title="Exact constructions, no training")
    table.add_column("group")
    for header in ("order", "layers", "N", "K", "steps exact", "error", "allowed"):
        table.add_column(header, justify="right")
    for result in results:
        steps = f"{result.steps:,} [green]✓[/]"
        table.add_row(
            result.name,
            str(result.order),
            str(result.layers),
            str(result.num_householder),
            str(result.key_dim),
            steps if result.exact else f"[red]{result.exact_steps:,} ✗[/]",
            f"{result.max_error:.1e}",
            f"{result.radius:.1e}",
        )
    if results:
        dtype = str(results[0].dtype).removeprefix("torch.")
        seconds = sum(result.seconds for result in results)
        table.caption = (
            f"{results[0].batch} random words each, {dtype}, {seconds:.1f} s. N: reflections per "
            "token; K: key dimension. Error: the largest distance of an output from the exact one; "
            "below the allowed it cannot be decoded wrongly."
        )
    return table
