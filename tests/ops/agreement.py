"""How the tests of an op hold its chunked form to the definition."""

import torch

from householder.testing import assert_as_accurate


def cast(inputs, dtype):
    """Return the inputs, by name, with floating-point tensors in another dtype."""
    return {
        name: x.to(dtype) if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def compare(actual, expected, tolerance=1e-12):
    """Compare results by name, each against the largest of its kind: some are zero."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        error = (actual[name] - x).abs().max() if x.numel() else 0.0
        assert error <= tolerance * (1 + x.abs().max() if x.numel() else 1), name


def check_chunk(run, inputs, factor=2.0, **options):
    """Hold the chunked form to the accuracy rule, in its outputs and in every gradient.

    Float64 inputs are rounded to float32 for it, and compared in float64 as well, where a slip of
    the algebra shows at once. `run(inputs, impl, **options)` returns outputs and gradients by name.
    """
    is_double = inputs["v"].dtype == torch.float64
    if is_double:
        inputs = cast(inputs, torch.float32)
    wide = cast(inputs, torch.float64)
    expected = run(wide, "reference", **options)
    if is_double:
        compare(run(wide, "chunk", **options), expected)
    plain = run(inputs, "reference", **options)
    actual = run(inputs, "chunk", **options)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_as_accurate(actual[name], plain[name], expected[name], name=name, factor=factor)
