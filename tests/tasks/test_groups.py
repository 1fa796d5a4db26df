"""Finite groups: the axioms on the multiplication table, orders, presentations, decompositions."""

import itertools
import math

import pytest
import torch

from householder.train.tasks.groups import (
    Group,
    alternating_group,
    cyclic_group,
    dihedral_group,
    is_even,
    num_moved,
    representation,
    symmetric_group,
    transpositions,
)

GROUPS = [
    (cyclic_group(1), 1),
    (cyclic_group(2), 2),
    (cyclic_group(60), 60),
    (dihedral_group(3), 6),
    (dihedral_group(7), 14),
    (symmetric_group(3), 6),
    (symmetric_group(4), 24),
    (alternating_group(4), 12),
    (alternating_group(5), 60),
    (symmetric_group(5), 120),
]
by_name = pytest.mark.parametrize(
    ("group", "order"), GROUPS, ids=[group.name for group, _ in GROUPS]
)


def compose(a, b):
    """a · b point by point: b acts first."""
    return tuple(a[b[p]] for p in range(len(a)))


def power(group, element, exponent):
    product = 0
    for _ in range(exponent):
        product = int(group.table[element, product])
    return product


def element_order(group, element):
    return next(n for n in itertools.count(1) if power(group, element, n) == 0)


@by_name
def test_has_its_order_and_distinct_elements(group, order):
    assert group.order == len(set(group.elements)) == order
    assert group.table.shape == (order, order)


@by_name
def test_table_is_composition_of_the_permutations(group, order):
    for a, b in itertools.product(range(order), repeat=2):
        product = group.elements[int(group.table[a, b])]
        assert product == compose(group.elements[a], group.elements[b])


@by_name
def test_satisfies_the_axioms(group, order):
    table, elements = group.table, torch.arange(order)
    assert torch.equal(table[0], elements)
    assert torch.equal(table[:, 0], elements)
    for a in range(order):  # (a b) c = a (b c), all pairs b, c at once
        assert torch.equal(table[table[a]], table[a][table])
        assert sorted(table[a].tolist()) == elements.tolist()  # a x = b is solvable
    inverses = torch.tensor([group.inverse(a) for a in range(order)])
    assert (table[elements, inverses] == 0).all()
    assert (table[inverses, elements] == 0).all()


def test_cyclic_group_adds_modulo_m():
    for m in (2, 5, 60):
        i = torch.arange(m)
        assert torch.equal(cyclic_group(m).table, (i[:, None] + i) % m)


@pytest.mark.parametrize("m", [3, 4, 5, 12])
def test_dihedral_group_multiplies_as_documented(m):
    table = dihedral_group(m).table
    for i, j in itertools.product(range(m), repeat=2):
        assert table[i, j] == (i + j) % m  # r_i r_j = r_{i+j}
        assert table[i, m + j] == m + (i + j) % m  # r_i s_j = s_{i+j}
        assert table[m + i, j] == m + (i - j) % m  # s_i r_j = s_{i−j}
        assert table[m + i, m + j] == (i - j) % m  # s_i s_j = r_{i−j}


@pytest.mark.parametrize("n", [3, 4, 5])
def test_symmetric_group_satisfies_the_coxeter_relations(n):
    group = symmetric_group(n)
    swaps = []
    for i in range(n - 1):
        swap = list(range(n))
        swap[i], swap[i + 1] = swap[i + 1], swap[i]
        swaps.append(group.index(swap))
    for i, j in itertools.product(range(n - 1), repeat=2):
        product = int(group.table[swaps[i], swaps[j]])
        assert element_order(group, product) == {0: 1, 1: 3}.get(abs(i - j), 2)
    # They generate the group: the closure of {identity} under them is everything.
    reached, frontier = {0}, {0}
    while frontier:
        frontier = {int(group.table[s, a]) for s in swaps for a in frontier} - reached
        reached |= frontier
    assert len(reached) == group.order


def test_a5_satisfies_its_presentation():
    # A5 = ⟨a, b | a² = b³ = (ab)⁵ = 1⟩, and every element is even.
    group = alternating_group(5)
    a, b = group.index((1, 0, 3, 2, 4)), group.index((2, 1, 4, 3, 0))
    assert [element_order(group, g) for g in (a, b, int(group.table[a, b]))] == [2, 3, 5]
    for permutation in group.elements:
        inversions = sum(x > y for x, y in itertools.combinations(permutation, 2))
        assert inversions % 2 == 0


@pytest.mark.parametrize("n", [3, 4, 5])
def test_transpositions_multiply_back_and_are_as_few_as_possible(n):
    counts = set()
    for permutation in symmetric_group(n).elements:
        swaps = transpositions(permutation)
        points = list(range(n))
        for i, j in swaps:  # each acts on the images so far
            points = [{i: j, j: i}.get(p, p) for p in points]
        assert tuple(points) == permutation
        assert is_even(permutation) == (len(swaps) % 2 == 0)
        counts.add(len(swaps))
    assert max(counts) == n - 1


def test_num_moved_counts_classes_of_s5():
    moved = [num_moved(p) for p in symmetric_group(5).elements]
    assert [moved.count(k) for k in range(6)] == [1, 0, 10, 20, 45, 44]
    assert len(moved) == math.factorial(5)


def test_running_product_is_the_product_from_the_right():
    group = symmetric_group(4)
    words = torch.randint(24, (50, 3), generator=torch.Generator().manual_seed(0))
    products = group.running_product(words)
    for b in range(3):
        state = group.elements[0]
        for t in range(50):
            state = compose(group.elements[words[t, b]], state)
            assert group.elements[products[t, b]] == state


def test_running_product_of_nothing_is_nothing():
    assert cyclic_group(3).running_product(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2)


@pytest.mark.parametrize(
    ("elements", "complaint"),
    [
        ((), "identity"),
        (((1, 0),), "identity"),
        (((0, 1, 2), (0, 0, 1)), "permutation of range"),
        (((0, 1), (0, 1)), "distinct"),
        (((0, 1, 2), (1, 2, 0)), "closed"),
        (((0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2)), "closed"),
    ],
)
def test_refuses_what_is_no_group(elements, complaint):
    with pytest.raises(ValueError, match=complaint):
        Group("broken", elements)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (cyclic_group, 0),
        (cyclic_group, 5000),
        (dihedral_group, 2),
        (symmetric_group, 7),
        (alternating_group, 1),
    ],
)
def test_refuses_sizes_out_of_range(make, size):
    with pytest.raises(ValueError, match=r"must be"):
        make(size)


def test_representation_extends_generators_to_the_group():
    # S3 on the corners of a triangle, from a turn and a mirror.
    turn = torch.tensor([[-0.5, -(0.75**0.5)], [0.75**0.5, -0.5]], dtype=torch.float64)
    mirror = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    group = symmetric_group(3)
    a, b = group.index((1, 2, 0)), group.index((0, 2, 1))
    A = representation(group, {a: turn, b: mirror})
    for x, y in itertools.product(range(6), repeat=2):
        assert torch.allclose(A[x] @ A[y], A[group.table[x, y]])
    with pytest.raises(ValueError, match="reach all 6 elements of S3, got 3"):
        representation(group, {a: turn})
    with pytest.raises(ValueError, match="relations of S3"):
        representation(group, {a: mirror, b: mirror})
