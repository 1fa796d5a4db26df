"""The test tools themselves: they must fail on wrong data."""

import pytest
import torch

from householder.testing import (
    CORRELATIONS,
    assert_as_accurate,
    correlated_reflectors,
    delta_product_inputs,
    path_attention_inputs,
    relative_error,
)

EXPECTED = torch.linspace(1, 2, 1000, dtype=torch.float64).exp()
PLAIN = torch.linspace(1, 2, 1000).exp()


class TestAccuracyRule:
    def test_accepts_what_is_as_accurate(self):
        assert_as_accurate(PLAIN, PLAIN, EXPECTED)
        assert_as_accurate(EXPECTED.float(), PLAIN, EXPECTED)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_refuses_a_result_three_times_worse(self, dtype):
        step = torch.finfo(dtype).eps
        noise = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        plain = (EXPECTED * (1 + step * noise)).to(dtype)
        worse = (EXPECTED * (1 + 4 * step * noise)).to(dtype)
        assert_as_accurate(plain, plain, EXPECTED)
        with pytest.raises(AssertionError, match="relative error"):
            assert_as_accurate(worse, plain, EXPECTED)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
    def test_refuses_one_wrong_entry(self, value):
        wrong = PLAIN.clone()
        wrong[500] = value
        with pytest.raises(AssertionError):
            assert_as_accurate(wrong, PLAIN, EXPECTED)

    def test_refuses_one_entry_that_hides_in_many(self):
        many = EXPECTED.repeat(1000)
        wrong = many.float()
        wrong[3] += 3e-5
        assert relative_error(wrong, many) < 1e-7
        with pytest.raises(AssertionError, match="one entry is off"):
            assert_as_accurate(wrong, many.float(), many)

    def test_refuses_other_shapes_and_dtypes(self):
        with pytest.raises(AssertionError, match="shapes differ"):
            assert_as_accurate(PLAIN[:5], PLAIN, EXPECTED)
        with pytest.raises(AssertionError, match="dtypes differ"):
            assert_as_accurate(EXPECTED, PLAIN, EXPECTED)

    def test_zero_is_no_exception(self):
        zero = torch.zeros(5, dtype=torch.float64)
        assert_as_accurate(zero.float(), zero.float(), zero)
        with pytest.raises(AssertionError):
            assert_as_accurate(torch.full((5,), 1e-3), zero.float(), zero)


def test_relative_error_of_nan_is_infinite():
    assert relative_error(torch.tensor([torch.nan]), torch.ones(1)) == float("inf")


# The factory of each op, and what it calls its reflectors.
FACTORIES = {"delta_product": (delta_product_inputs, "k"), "path": (path_attention_inputs, "w")}


@pytest.mark.parametrize("op", FACTORIES)
class TestInputs:
    def test_seeded(self, op):
        make, reflectors = FACTORIES[op]
        first, again, other = (make(seed=s)[reflectors] for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_packed_bounds_are_valid_and_hold_an_empty_sequence(self, op):
        make, _ = FACTORIES[op]
        for seed in range(10):
            bounds = make(1, 50, num_sequences=5, seed=seed)["cu_seqlens"].tolist()
            assert bounds == sorted(bounds)
            assert (bounds[0], bounds[1], bounds[-1], len(bounds)) == (0, 0, 50, 6)

    def test_reflectors_are_unit_and_gates_not_positive_of_the_mean_that_was_asked_for(self, op):
        make, reflectors = FACTORIES[op]
        inputs = make(decay=3.0, strength=1.5)
        lengths = inputs[reflectors].norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
        assert (inputs["beta"] == 1.5).all()
        assert (inputs["g"] <= 0).all()
        assert 2.5 < -inputs["g"].mean() < 3.5
        assert make(decay=None)["g"] is None
        assert (make()["beta"] <= 2).all()


def test_correlated_reflectors_are_of_the_asked_size_and_kind():
    for kind in CORRELATIONS:
        assert correlated_reflectors(kind, 5, 8).shape == (5, 8)
    close = correlated_reflectors("close", 5, 64, dtype=torch.float64)
    unit = close / close.norm(dim=-1, keepdim=True)
    assert (unit @ unit.T).min() > 0.999
    with pytest.raises(ValueError, match=r"must be one of independent, equal, .* got 'clos'"):
        correlated_reflectors("clos", 5, 8)
