"""Finite groups as permutations with a multiplication table.

Convention, the same everywhere in the library: permutations act on points from the left,

    (a · b)(p) = a(b(p)),

so in a product the right factor acts first. A word x_1, x_2, … has the running product
y_t = x_t · y_{t-1}: the newest element acts last, as a state transition h_t = A(x_t) h_{t-1} does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Permutation = tuple[int, ...]

# Multiplication tables have order² entries of 8 bytes: 32 MB here, 203 MB for S7.
MAX_ORDER = 2000


@dataclass(frozen=True)
class Group:
    """Hold a finite group: its elements as permutations, and their multiplication table.

    Elements are numbered; element 0 is the identity, and everything else (`table`, `inverse`,
    tokens of a word problem) speaks in these numbers.

    Args:
        name: what the group is called, for example "S5".
        elements: permutations of `range(degree)`, closed under composition, the identity first.

    Attributes:
        table: int64 `[order, order]`, `table[a, b]` is the number of a · b (b acts first).

    Raises:
        ValueError: the elements are not permutations of the same points, repeat, do not begin with
            the identity or are not closed under composition.

    Examples:
        >>> group = symmetric_group(3)
        >>> group.order, group.elements[1], group.elements[2]
        (6, (0, 2, 1), (1, 0, 2))
        >>> group.elements[int(group.table[1, 2])]  # 0 → 1 → 2, 1 → 0 → 0, 2 → 2 → 1
        (2, 0, 1)
    """

    name: str
    elements: tuple[Permutation, ...]
    table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        points = list(range(self.degree))
        if not self.elements or list(self.elements[0]) != points:
            raise ValueError(
                f"Group {self.name}: the first element must be the identity of range(degree), "
                f"got {self.elements[:1]}; list the identity permutation first"
            )
        if any(sorted(p) != points for p in self.elements):
            raise ValueError(
                f"Group {self.name}: every element must be a permutation of range({self.degree}); "
                "give each as the tuple of the images of 0, 1, 2, …"
            )
        if len(set(self.elements)) != self.order:
            raise ValueError(
                f"Group {self.name}: elements must be distinct, got {self.order} of which "
                f"{len(set(self.elements))} are; remove the repeated ones"
            )
        object.__setattr__(self, "table", torch.from_numpy(_multiplication_table(self)))

    @property
    def order(self) -> int:
        """The number of elements."""
        return len(self.elements)

    @property
    def degree(self) -> int:
        """The number of points the permutations act on."""
        return len(self.elements[0]) if self.elements else 0

    def index(self, permutation: Iterable[int]) -> int:
        """Return the number of an element given as a permutation."""
        return self.elements.index(tuple(permutation))

    def inverse(self, element: int) -> int:
        """Return the number of the inverse of an element."""
        return int((self.table[element] == 0).nonzero().item())

    def running_product(self, words: Tensor) -> Tensor:
        """Multiply words along their first dimension: y_t = x_t · y_{t-1}, y_{-1} the identity.

        Args:
            words: int64 `[T, *]`, numbers of elements.

        Returns:
            int64 of the same shape, the running products, the newest element leftmost.

        Examples:
            >>> cyclic_group(5).running_product(torch.tensor([3, 4, 4])).tolist()
            [3, 2, 1]
        """
        table = self.table.flatten().to(words.device)
        products = torch.empty_like(words)
        rows = words * self.order  # where the row of x_t begins in the flattened table
        y = torch.zeros_like(words[0]) if len(words) else words
        for t in range(len(words)):
            y = products[t] = table[rows[t] + y]
        return products


def _multiplication_table(group: Group) -> np.ndarray:
    """Compute `table[a, b]` = number of a · b."""
    images = np.array(group.elements)  # [order, degree]
    # The images of a few points (a base of the group) already tell elements apart: one point for
    # rotations, two for a dihedral group, n − 1 for S_n. The shortest prefix of points that does
    # keeps the table cheap for groups of large degree.
    for size in range(1, group.degree + 1):
        radix = group.degree ** np.arange(size)
        codes = images[:, :size] @ radix
        if len(np.unique(codes)) == group.order:
            break
    by_code = np.argsort(codes)
    products = images[:, images[:, :size]] @ radix  # codes of a(b(p)), [order, order]
    places = np.searchsorted(codes, products, sorter=by_code).clip(max=group.order - 1)
    table = by_code[places]
    if not np.array_equal(codes[table], products):
        raise ValueError(
            f"Group {group.name}: the {group.order} elements must be closed under composition and "
            "are not; list the whole group"
        )
    return table.astype(np.int64)


def cyclic_group(m: int) -> Group:
    """Return Z_m: element i is the shift p → p + i mod m, so the numbers add modulo m.

    Args:
        m: the order, from 1 to 2000.
    """
    _check_size("cyclic_group", m, 1, MAX_ORDER)
    return _cyclic_group(m)


def dihedral_group(m: int) -> Group:
    """Return D_m of order 2m: element i is r_i: p → p + i, element m + i is s_i: p → i − p (mod m).

    They multiply as r_i r_j = r_{i+j}, r_i s_j = s_{i+j}, s_i r_j = s_{i−j}, s_i s_j = r_{i−j}.

    Args:
        m: the number of rotations, from 3 (fewer points do not tell the elements apart) to 1000.
    """
    _check_size("dihedral_group", m, 3, MAX_ORDER // 2)
    return _dihedral_group(m)


def symmetric_group(n: int) -> Group:
    """Return S_n of order n!: all permutations of n points in lexicographic order.

    Args:
        n: the number of points, from 1 to 6.
    """
    _check_size("symmetric_group", n, 1, 6)
    return _symmetric_group(n)


def alternating_group(n: int) -> Group:
    """Return A_n of order n!/2: the even permutations of n points in lexicographic order.

    Args:
        n: the number of points, from 2 to 6.
    """
    _check_size("alternating_group", n, 2, 6)
    return _alternating_group(n)


@lru_cache
def _cyclic_group(m: int) -> Group:
    return Group(f"Z{m}", tuple(tuple((p + i) % m for p in range(m)) for i in range(m)))


@lru_cache
def _dihedral_group(m: int) -> Group:
    rotations = [tuple((p + i) % m for p in range(m)) for i in range(m)]
    reflections = [tuple((i - p) % m for p in range(m)) for i in range(m)]
    return Group(f"D{m}", (*rotations, *reflections))


@lru_cache
def _symmetric_group(n: int) -> Group:
    return Group(f"S{n}", tuple(itertools.permutations(range(n))))


@lru_cache
def _alternating_group(n: int) -> Group:
    return Group(f"A{n}", tuple(p for p in itertools.permutations(range(n)) if is_even(p)))


def _check_size(where: str, size: int, smallest: int, largest: int) -> None:
    if not smallest <= size <= largest:
        raise ValueError(
            f"{where}: the size must be from {smallest} to {largest}, got {size}; "
            "choose one in this range"
        )


def representation(group: Group, images: Mapping[int, Tensor]) -> Tensor:
    """Extend matrices of generators to the whole group, A(a · b) = A(a) A(b).

    Args:
        group: the group.
        images: for the number of each generator, its matrix, float64 `[K, K]`.

    Returns:
        float64 `[order, K, K]`.

    Raises:
        ValueError: the generators do not reach all elements, or the matrices do not multiply as the
            elements do.

    Examples:
        >>> quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> representation(cyclic_group(4), {1: quarter})[2]  # two quarter turns
        tensor([[-1.,  0.],
                [ 0., -1.]], dtype=torch.float64)
    """
    size = next(iter(images.values())).shape[0]
    matrices = {0: torch.eye(size, dtype=torch.float64)}
    frontier = [0]
    while frontier:
        element = frontier.pop(0)
        for generator, image in images.items():
            product = int(group.table[generator, element])
            if product not in matrices:
                matrices[product] = image @ matrices[element]
                frontier.append(product)
    if len(matrices) < group.order:
        raise ValueError(
            f"representation: the generators must reach all {group.order} elements of "
            f"{group.name}, got {len(matrices)}; add generators"
        )
    A = torch.stack([matrices[element] for element in range(group.order)])
    deviation = (A[:, None] @ A[None] - A[group.table]).abs().max().item()
    if deviation > 1e-12:
        raise ValueError(
            "representation: the matrices must multiply as the elements do, got a deviation of "
            f"{deviation:.1e}; choose matrices that satisfy the relations of {group.name}"
        )
    return A


def transpositions(permutation: Permutation) -> list[tuple[int, int]]:
    """Write a permutation as a product of transpositions, the first of the list acting first.

    A cycle of c points takes c − 1 of them, which no shorter list can do, so a permutation of n
    points takes n minus its number of cycles (fixed points count): at most n − 1.

    Args:
        permutation: the images of 0, 1, 2, ….

    Returns:
        Pairs of points to exchange, in the order in which they act.

    Examples:
        >>> transpositions((1, 2, 0))  # 0 → 1 → 2 → 0
        [(1, 2), (0, 1)]
        >>> transpositions((0, 1, 2))
        []
    """
    swaps: list[tuple[int, int]] = []
    for cycle in _cycles(permutation):
        # (c_0 c_1 … c_k) = (c_0 c_1) · (c_1 c_2) · … · (c_{k-1} c_k), the last factor acts first.
        swaps.extend(reversed(list(itertools.pairwise(cycle))))
    return swaps


def is_even(permutation: Permutation) -> bool:
    """Tell whether a permutation is a product of an even number of transpositions."""
    return len(transpositions(permutation)) % 2 == 0


def num_moved(permutation: Permutation) -> int:
    """Count the points that a permutation moves."""
    return sum(image != point for point, image in enumerate(permutation))


def _cycles(permutation: Permutation) -> list[list[int]]:
    """Return the cycles c, permutation[c_i] = c_{i+1}, each from its smallest point."""
    cycles: list[list[int]] = []
    seen: set[int] = set()
    for start in range(len(permutation)):
        cycle, point = [], start
        while point not in seen:
            seen.add(point)
            cycle.append(point)
            point = permutation[point]
        if cycle:
            cycles.append(cycle)
    return cycles
