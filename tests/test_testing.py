"""The test tools themselves: they must fail on wrong data."""

import pytest
import torch

from householder.testing import assert_as_accurate, delta_product_inputs, relative_error

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


class TestInputs:
    def test_seeded(self):
        first, again, other = (delta_product_inputs(seed=s) for s in (1, 1, 2))
        assert torch.equal(first["k"], again["k"])
        assert not torch.equal(first["k"], other["k"])

    def test_packed_bounds_are_valid_and_hold_an_empty_sequence(self):
        for seed in range(10):
            bounds = delta_product_inputs(1, 50, num_sequences=5, seed=seed)["cu_seqlens"].tolist()
            assert bounds == sorted(bounds)
            assert (bounds[0], bounds[1], bounds[-1], len(bounds)) == (0, 0, 50, 6)

    def test_gates_are_not_positive_and_keys_are_unit(self):
        inputs = delta_product_inputs(decay=3.0)
        assert (inputs["g"] <= 0).all()
        torch.testing.assert_close(inputs["k"].norm(dim=-1), torch.ones(2, 37, 2, 2).double())
