"""Every program that the launchers of `delta_product` can choose, on a GPU against float64.

Tiles and launch parameters follow from K, V, N, the precision and whether there are gates: CASES
hold a call for each of them, a sequence cut into segments, in the forms for Hopper where there are
such and in the portable ones. That none is missing is seen without a GPU: the launchers are asked
for what they would launch for all sizes there are.
"""

import importlib
import itertools

import pytest
import torch

from householder.ops.delta_product import chunk
from householder.testing import delta_product_inputs, relative_error

ORDER = ("q", "k", "v", "beta", "g")
OUTPUTS = ("o", "final_state", "dq", "dk", "dv", "dbeta", "dg", "dinitial_state")
# As in test_delta_product_gpu.py.
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2.5e-3, torch.float32: 3e-6}
# What tells programs of a kernel apart, beside sizes of heads, strides and what is packed.
CONSTANTS = (
    "BK", "BV", "BC", "GATED", "PRECISION", "STAGES", "num_warps", "num_stages", "maxnreg",
)  # fmt: skip
T, SEGMENT_TOKENS = 300, 128


def combine(dtype, hopper, keys, values, reflections):
    return [
        (K, V, N, gated, dtype, hopper)
        for K, V, N, gated in itertools.product(keys, values, reflections, (False, True))
    ]


# Sizes that fill their tiles and sizes that do not.
CASES = [
    *combine(torch.bfloat16, True, (16, 32, 48, 112), (16, 80), (1, 2, 4)),
    *combine(torch.bfloat16, True, (16, 32, 48, 112), (240,), (1, 2, 4)),
    *combine(torch.bfloat16, True, (208,), (16, 32, 64), (1, 2, 4)),
    *combine(torch.bfloat16, False, (16, 48), (16, 32, 64), (1, 2, 4)),
    *combine(torch.bfloat16, False, (32, 112), (16, 32, 80), (1, 2, 4)),
    *combine(torch.float16, True, (16, 48, 112, 208), (16, 64), (1, 2)),
    *combine(torch.float32, True, (32, 64, 128, 256), (32, 240), (1, 2)),
]


def name_case(case):
    K, V, N, gated, dtype, hopper = case
    form = "" if hopper else ", portable"
    gate = ", gated" if gated else ""
    return f"{str(dtype).removeprefix('torch.')}, {K}x{V}, N={N}{gate}{form}"


def modules():
    """Return those of the kernels' modules that ask what the chip is."""
    names = ("backward", "chunks")
    return [importlib.import_module(f"householder.ops.delta_product.triton.{n}") for n in names]


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, whose sequences are cut into short segments."""
    pytest.importorskip("triton")
    from householder.ops.delta_product import triton as kernels

    monkeypatch.setattr(kernels.config, "SEGMENT_TOKENS", SEGMENT_TOKENS)
    return kernels


@pytest.mark.slow
def test_no_program_is_left_out(kernels, launched, monkeypatch):
    def programs(K, V, N, gated, dtype, hopper):
        for module in modules():
            monkeypatch.setattr(module, "is_hopper", lambda _: hopper)
        q, k, v = (
            torch.empty(size, dtype=dtype)
            for size in ((1, T, 1, K), (1, T, N, 1, K), (1, T, N, 1, V))
        )
        beta = v[..., 0]
        g = beta[:, :, 0] if gated else None
        inputs = q, k, v, beta, g, 0.3, torch.empty(1, 1, K, V), None
        launched.clear()
        o, state, *saved = kernels.forward(*inputs, True)
        kernels.backward(o, state, *inputs, *saved)
        return {(name, *map(constants.get, CONSTANTS)) for name, constants in launched}

    tested = set().union(*(programs(*case) for case in CASES))
    sizes = range(16, 257, 16)
    for dtype, hopper in itertools.product(LIMITS, (True, False)):
        for case in combine(dtype, hopper, sizes, sizes, (1, 2, 3, 8)):
            assert programs(*case) <= tested, name_case(case)
    assert len(tested) > 600


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_outputs_and_gradients_agree_with_float64(case, kernels, poisoned, monkeypatch):
    K, V, N, gated, dtype, hopper = case
    if not hopper:
        for module in modules():
            monkeypatch.setattr(module, "is_hopper", lambda _: False)
    inputs = delta_product_inputs(
        1, T, N, 1, K, V, HV=2, decay=0.1 if gated else None, dtype=dtype, device="cuda"
    )
    do, dstate = torch.randn_like(inputs["v"][:, :, 0]), torch.randn_like(inputs["initial_state"])

    def differentiate(form, dtype):
        given = [None if inputs[n] is None else inputs[n].to(dtype) for n in ORDER]
        wide = torch.promote_types(dtype, torch.float32)
        given += [K**-0.5, inputs["initial_state"].to(wide), None]
        o, state, *saved = form.forward(*given, True)
        return [o, state, *form.backward(do.to(dtype), dstate.to(wide), *given, *saved)]

    actual = differentiate(kernels, dtype)
    torch.use_deterministic_algorithms(False)
    expected = differentiate(chunk, torch.float64)
    for label, a, e in zip(OUTPUTS, actual, expected, strict=True):
        if e is not None:
            assert relative_error(a, e) < LIMITS[dtype], label
