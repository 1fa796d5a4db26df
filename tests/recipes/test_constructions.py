"""The exact constructions: their algebra, 3,000 exact steps, and that wrong ones are caught."""

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console

from householder.recipes.constructions import (
    OneLayer,
    TwoLayers,
    constructions,
    cube_rotations,
    icosahedron_rotations,
    reflection_angles,
    results_table,
    rotation,
    run_all,
    symmetric,
    two_reflections,
)
from householder.train.tasks.groups import (
    cyclic_group,
    dihedral_group,
    num_moved,
    symmetric_group,
    transpositions,
)

ONE_LAYER = {
    "S3": lambda: symmetric(3),
    "S4": lambda: symmetric(4),
    "S5": lambda: symmetric(5),
    "cube": cube_rotations,
    "icosahedron": icosahedron_rotations,
}
one_layer = pytest.mark.parametrize("make", ONE_LAYER.values(), ids=ONE_LAYER.keys())


def multiplied_out(construction):
    """The matrix of every element, reflector by reflector in plain PyTorch."""
    K = construction.key_dim
    A = torch.eye(K, dtype=torch.float64).expand(construction.group.order, K, K)
    for j in range(construction.num_householder):
        k, beta = construction.reflectors[:, j], construction.beta[:, j, None, None]
        A = A - beta * k[:, :, None] * (k[:, None] @ A)
    return A


def random_words(order, steps=3000, batch=3, seed=0):
    return torch.randint(order, (batch, steps), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("index", range(16))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_exact_for_3000_steps(index, dtype):
    result = constructions()[index].run(steps=3000, batch=2, dtype=dtype, seed=index)
    assert result.exact
    assert result.exact_steps == 3000
    # Rounding grows with the length at worst: a few units in the last place per reflection.
    rounding = 3000 * result.num_householder * torch.finfo(dtype).eps
    assert result.max_error < min(4 * rounding, result.radius)


def test_the_list_is_what_is_promised():
    names = [(c.group.name, c.layers, c.num_householder, c.key_dim) for c in constructions()]
    assert names == [
        ("S3", 1, 2, 3),
        ("S4", 1, 3, 4),
        ("S5", 1, 4, 5),
        ("S4", 1, 2, 3),
        ("A5", 1, 2, 3),
        *((f"Z{m}", 2, 1, 2) for m in (3, 4, 5, 7, 12, 60)),
        *((f"D{m}", 2, 1, 2) for m in (3, 4, 5, 7, 12)),
    ]


@one_layer
def test_matrices_multiply_as_the_elements_do(make):
    construction = make()
    A = construction.matrices
    assert (multiplied_out(construction) - A).abs().max() < 1e-14
    products = A[:, None] @ A[None]
    assert (products - A[construction.group.table]).abs().max() < 1e-13
    identity = torch.eye(construction.key_dim, dtype=torch.float64)
    assert (A.mT @ A - identity).abs().max() < 1e-13
    distances = (A[:, None] - A[None]).flatten(2).norm(dim=-1)
    assert distances.fill_diagonal_(1).min() > 0.9  # a matrix for each element


@one_layer
def test_reflectors_are_unit_and_beta_reflects_or_rests(make):
    construction = make()
    norms = construction.reflectors.norm(dim=-1)[construction.beta == 2]
    assert (norms - 1).abs().max() < 1e-15
    assert set(construction.beta.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("n", [3, 4, 5])
def test_permutations_take_n_minus_cycles_reflections(n):
    construction = symmetric(n)
    A = multiplied_out(construction)
    used = (construction.beta == 2).sum(dim=1)
    for element, permutation in enumerate(construction.group.elements):
        expected = torch.zeros(n, n, dtype=torch.float64)
        expected[list(permutation), list(range(n))] = 1
        assert (A[element] - expected).abs().max() < 1e-15
        # The fewest reflections that make a matrix are the dimension of what it does not fix.
        moved = torch.linalg.matrix_rank(A[element] - torch.eye(n, dtype=torch.float64))
        assert used[element] == moved == len(transpositions(permutation))
    assert used.max() == construction.num_householder == n - 1


def test_the_cube_is_mapped_to_itself():
    A = multiplied_out(cube_rotations())
    rounded = A.round()
    assert (A - rounded).abs().max() < 1e-14
    assert len({tuple(a.flatten().int().tolist()) for a in rounded}) == 24
    assert (rounded.abs().sum(dim=1) == 1).all()  # signed permutations of the axes
    assert torch.linalg.det(rounded).round().eq(1).all()


def test_the_icosahedron_is_mapped_to_itself():
    construction = icosahedron_rotations()
    A = multiplied_out(construction)
    assert (torch.linalg.det(A) - 1).abs().max() < 1e-14
    # Cycles of five are fifths of a turn; the points on their axes are the twelve corners.
    fifth = next(
        a
        for a, p in zip(A, construction.group.elements, strict=True)
        if num_moved(p) == 5  # in A5 only cycles of five move all points
    )
    assert math.isclose(
        abs(fifth.trace().item() - 0.5), 5**0.5 / 2, rel_tol=1e-12
    )  # 1 + 2 cos 72° or 144° is (1 ± √5)/2
    corner = torch.linalg.svd(fifth - torch.eye(3, dtype=torch.float64))[2][2]
    corners = A @ corner
    distinct = {tuple((10 * c).round(decimals=6).add(0.0).tolist()) for c in corners}
    assert len(distinct) == 12
    # Each corner has five nearest neighbours, all at the same distance.
    points = torch.tensor(sorted(distinct), dtype=torch.float64)
    distances = torch.cdist(points, points).sort(dim=1).values[:, 1:6]
    assert (distances - distances[0, 0]).abs().max() < 1e-5


def test_a5_drifts_no_faster_than_rounding_in_float32():
    short, long = (icosahedron_rotations().run(steps=steps) for steps in (500, 5000))
    assert 0 < short.max_error < long.max_error < 5000 * 2 * torch.finfo(torch.float32).eps
    assert long.exact


@pytest.mark.parametrize("m", [3, 4, 5, 7, 12])
def test_the_first_layer_counts_rotations_and_reflections(m):
    words = random_words(2 * m)
    layer = TwoLayers(dihedral_group(m))
    rotations, reflections = layer._parities(words < m, torch.float32, "auto")
    assert torch.equal(rotations, (words < m).long().cumsum(dim=1) % 2)
    assert torch.equal(reflections, (words >= m).long().cumsum(dim=1) % 2)


def dihedral_products(words, m, newest_first):
    table = dihedral_group(m).table
    y, products = torch.zeros_like(words[:, 0]), []
    for x in words.T:
        y = table[x, y] if newest_first else table[y, x]
        products.append(y)
    return torch.stack(products, dim=1)


@pytest.mark.parametrize("m", [3, 4, 5, 7, 12])
class TestPublishedDihedralAngles:
    """The s-angles as they stand in transcriptions of Theorem 7, which decode s as s_{m−i*}."""

    def decoded(self, words, m, s_angles):
        group = dihedral_group(m)
        angles = reflection_angles(group)
        angles[m:] = torch.stack(s_angles, dim=-1) * (math.pi / m)
        decoded = TwoLayers(group, angles).track(words, torch.float64).decoded
        return decoded.where(decoded < m, m + (m - decoded) % m)

    def test_fail_in_either_order(self, m):
        i = torch.arange(m, dtype=torch.float64)
        words = random_words(2 * m)
        decoded = self.decoded(words, m, (2 + 2 * i, -2 * i))
        for newest_first in (True, False):
            right = decoded == dihedral_products(words, m, newest_first)
            assert right.double().mean() < 0.7
            assert (~right).any(dim=1).all()

    def test_exchanged_follow_the_other_order(self, m):
        i = torch.arange(m, dtype=torch.float64)
        words = random_words(2 * m)
        decoded = self.decoded(words, m, (-2 * i, 2 + 2 * i))
        assert torch.equal(decoded, dihedral_products(words, m, newest_first=False))
        assert not torch.equal(decoded, dihedral_products(words, m, newest_first=True))

    def test_corrected_follow_ours(self, m):
        words = random_words(2 * m)
        decoded = TwoLayers(dihedral_group(m)).track(words, torch.float64).decoded
        assert torch.equal(decoded, dihedral_products(words, m, newest_first=True))


def test_angles_of_modular_addition_are_theorem_6():
    m = 7
    i = torch.arange(m, dtype=torch.float64)
    angles = reflection_angles(cyclic_group(m))
    assert torch.equal(angles[:, 1], (1 - 2 * i) * (math.pi / m))
    assert torch.equal(angles[:, 0], (1 + 2 * i) * (math.pi / m))


def altered(construction, **changes):
    parts = ("name", "group", "matrices", "reflectors", "beta", "query")
    return OneLayer(**{part: changes.get(part, getattr(construction, part)) for part in parts})


def test_a_missing_reflection_is_caught():
    whole = symmetric(4)
    # Without their third reflection the cycles of four are wrong; nothing else changes.
    cut = altered(whole, reflectors=whole.reflectors[:, :2], beta=whole.beta[:, :2])
    words = random_words(24, steps=400)
    wrong = cut.track(words, torch.float64).decoded != whole.track(words, torch.float64).decoded
    four_cycles = [i for i, p in enumerate(whole.group.elements) if len(transpositions(p)) == 3]
    first_cycle = torch.isin(words, torch.tensor(four_cycles)).int().argmax(dim=1)
    assert torch.equal(wrong.int().argmax(dim=1), first_cycle)
    result = cut.run(steps=400, batch=3)
    assert not result.exact
    assert result.max_error > result.radius


def test_an_incomplete_reflection_fades_and_is_caught():
    whole = symmetric(3)
    faded = altered(whole, beta=whole.beta * 0.98)
    result = faded.run(steps=2000, batch=2)
    assert result.first_error is not None
    assert result.exact_steps == result.first_error - 1 < 2000


def test_the_order_of_multiplication_matters():
    # Reflectors in the reverse order give the inverse: wrong for all but elements of order two.
    whole = symmetric(3)
    result = altered(whole, reflectors=whole.reflectors.flip(1), beta=whole.beta.flip(1)).run(100)
    assert not result.exact


def test_first_error_is_the_earliest_wrong_position_of_any_word():
    group = cyclic_group(12)
    angles = reflection_angles(group)
    angles[3] += 2 * math.pi / 12  # element 3 counts one too many, the others are right
    words = random_words(12, steps=40, batch=3, seed=4)
    first = int((words == 3).any(dim=0).int().argmax())
    assert first > 1
    result = TwoLayers(group, angles).run(steps=40, batch=3, seed=4)
    assert result.first_error == first + 1
    assert result.exact_steps == first


@pytest.mark.parametrize("make", [lambda: symmetric(4), lambda: TwoLayers(dihedral_group(5))])
def test_implementations_agree(make):
    words = random_words(make().group.order, steps=300)
    tracked = [make().track(words, torch.float64, impl) for impl in ("reference", "auto")]
    assert torch.equal(tracked[0].decoded, tracked[1].decoded)
    assert (tracked[0].outputs - tracked[1].outputs).abs().max() < 1e-11


def test_same_seed_same_result():
    first, again = (cube_rotations().run(steps=300, seed=3) for _ in range(2))
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(again, seconds=0)


@pytest.mark.parametrize("angle", [0.0, 1e-3, 1.0, math.pi / 2, math.pi - 1e-3, math.pi, 4.0])
@pytest.mark.parametrize("axis", [(0, 0, 1), (1, 1, 1), (-0.3, 0.2, 5.0)])
def test_two_reflections_make_the_rotation(axis, angle):
    R = rotation(axis, angle)
    k, beta = two_reflections(R)
    identity = torch.eye(3, dtype=torch.float64)
    first, second = (identity - b * torch.outer(n, n) for n, b in zip(k, beta, strict=True))
    assert (second @ first - R).abs().max() < 1e-12
    assert (beta == (0 if angle == 0 else 2)).all()
    if angle:  # the angle between the reflectors is half that of the rotation
        half = (k[0] @ k[1]).abs()
        assert half.item() == pytest.approx(abs(math.cos(angle / 2)), abs=1e-12)


def test_rotation_turns_about_its_axis():
    R = rotation((0.0, 3.0, 0.0), math.pi / 3)
    x, y, z = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(R @ y, y)
    assert torch.allclose(R @ z, 0.5 * z + 0.75**0.5 * x)


def test_table_shows_each_result():
    results = [cube_rotations().run(steps=1200, batch=2)]
    broken = altered(symmetric(3), beta=symmetric(3).beta * 0.5).run(steps=500, batch=2)
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table([*results, broken]))
    text = console.file.getvalue()
    assert "S4, cube" in text
    assert "1,200 ✓" in text
    assert f"│ {broken.exact_steps:>9,} ✗ │" in text
    assert "2 random words each, float32" in text


def test_table_of_nothing():
    assert results_table([]).row_count == 0


def test_run_all_runs_all():
    results = run_all(steps=100, batch=2, dtype=torch.float64, seed=5)
    assert [result.name for result in results] == [c.name for c in constructions()]
    assert all(result.exact and result.steps == 100 and result.batch == 2 for result in results)


def test_refuses_other_dtypes_and_empty_words():
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.bfloat16"):
        symmetric(3).run(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        symmetric(3).run(steps=0)


def test_two_layers_refuses_other_groups():
    with pytest.raises(ValueError, match=r"cyclic_group\(m\) or dihedral_group\(m\), got S4"):
        TwoLayers(symmetric_group(4))
