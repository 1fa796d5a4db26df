"""Every program that the launchers of `path_attention` can choose, on a GPU against float64.

Tiles and launch parameters follow from K, V, the dtypes and whether there are gates: CASES hold a
call for each of them, in the forms for Hopper where there are such and in the portable ones. That
none is missing is seen without a GPU: the launchers are asked for what they would launch for all
sizes there are.
"""

import itertools

import pytest
import torch

from householder.ops.path_attention import chunk
from householder.testing import path_attention_inputs, relative_error

NAMES = ("q", "k", "v", "w", "beta", "g", "sinks")
# Of the outputs and of the gradients, as in the tests of each.
LIMITS = {
    torch.bfloat16: (1e-2, 1.2e-2), torch.float16: (1.5e-3, 2.5e-3), torch.float32: (3e-6, 5e-6),
}  # fmt: skip
# What does not tell programs apart here: sizes of heads, and masks that every tile size has.
SHARED = ("K", "V", "GROUP", "PACKED", "WINDOW")
T, WINDOW = 300, 130


def combine(dtype, w_dtype, hopper, keys, values, gates=(False, True)):
    return [
        (K, V, gated, dtype, w_dtype, hopper)
        for K, V, gated in itertools.product(keys, values, gates)
    ]


# Queries, keys and values; reflectors and β.
HALF = [
    (dtype, w_dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for w_dtype in (dtype, torch.float32)
]
# Sizes that fill their tiles and sizes that do not.
CASES = [
    *combine(torch.bfloat16, torch.bfloat16, True, (48, 128, 208), (64, 80, 256)),
    *combine(torch.bfloat16, torch.float32, True, (64, 128, 208), (64, 128, 144)),
    *combine(torch.float16, torch.float16, True, (64, 112, 256), (48, 128, 208)),
    *combine(torch.float16, torch.float32, True, (64, 128, 208), (64, 128, 144)),
    *(case for w in (torch.float16, torch.float32)
      for case in combine(torch.float16, w, True, (32,), (48, 128, 208))),
    *(case for w in (torch.float16, torch.float32)
      for case in combine(torch.float16, w, False, (32,), (48, 128), (False,))),
    *combine(torch.float32, torch.float32, True, (16, 48, 128, 208), (32, 64, 80, 256)),
    *(case for both in HALF for case in combine(*both, False, (64, 112), (48, 128), (False,))),
]  # fmt: skip


def name_case(case):
    K, V, gated, dtype, w_dtype, hopper = case
    form = "" if hopper else ", portable"
    gate = ", gated" if gated else ""
    wide = "" if w_dtype == dtype else ", reflectors in float32"
    return f"{str(dtype).removeprefix('torch.')}, {K}x{V}{gate}{wide}{form}"


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from householder.ops.path_attention import triton as kernels

    return kernels


def test_no_half_precision_sum_goes_over_one_narrow_tile(kernels):
    from householder.ops.path_attention.triton.gradient_config import chunk_blocks

    for K in range(16, 257, 16):
        assert K > 32 or min(chunk_blocks(K, 64, half).inner_k for half in ("bf16", "fp16")) == 64


@pytest.mark.slow
def test_no_program_is_left_out(kernels, launched, monkeypatch):
    from householder.ops.path_attention.triton import problem

    def programs(K, V, gated, dtype, w_dtype, hopper):
        monkeypatch.setattr(problem, "is_hopper", lambda _: hopper)
        q, k, v = (torch.empty(1, T, 1, size, dtype=dtype) for size in (K, K, V))
        w, beta = q.to(w_dtype), torch.empty(1, T, 1, dtype=w_dtype)
        inputs = q, k, v, w, beta, beta if gated else None, None, 0.3, None, None
        launched.clear()
        o, lse = kernels.forward(*inputs)
        kernels.backward(o, *inputs, o, lse)
        return {
            (name, *sorted((n, str(x)) for n, x in constants.items() if is_told_apart(n)))
            for name, constants in launched
        }

    def is_told_apart(name):
        return (name.isupper() and name not in SHARED) or name in ("num_warps", "num_stages")

    tested = set().union(*(programs(*case) for case in CASES))
    sizes = range(16, 257, 16)
    dtypes = [*HALF, (torch.float32, torch.float32)]
    for both, hopper in itertools.product(dtypes, (True, False)):
        for case in combine(*both, hopper, sizes, sizes):
            assert programs(*case) <= tested, name_case(case)
    assert len(tested) > 200


def compare(case, kernels, monkeypatch, T0=0):
    """Compare a case with float64; T0 tokens come before the first query."""
    K, V, gated, dtype, w_dtype, hopper = case
    if not hopper:
        from householder.ops.path_attention.triton import problem

        monkeypatch.setattr(problem, "is_hopper", lambda _: False)
    inputs = path_attention_inputs(
        1, T, 2, K, V, decay=0.1 if gated else None, dtype=dtype, device="cuda"
    )
    arguments = [inputs[name] for name in NAMES]
    arguments[0] = arguments[0][:, T0:]
    arguments[3:5] = [x.to(w_dtype) for x in arguments[3:5]]
    # Masks of windows are in the same places of every tile: a third of the cases have one.
    others = K**-0.5, WINDOW if (K + V + gated) % 3 == 0 else None, None
    do = torch.randn_like(inputs["v"])[:, T0:]

    def differentiate(form, dtype=None):
        given = [x if x is None or dtype is None else x.to(dtype) for x in arguments]
        o, lse = form.forward(*given, *others)
        return [o, lse, *form.backward(do.to(o.dtype), *given, *others, o, lse)]

    actual = differentiate(kernels)
    torch.use_deterministic_algorithms(False)
    expected = differentiate(chunk, torch.float64)
    for label, a, e in zip(("o", "lse", *NAMES), actual, expected, strict=True):
        if e is not None:
            assert relative_error(a, e) < LIMITS[dtype][label not in ("o", "lse")], label


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_outputs_and_gradients_agree_with_float64(case, kernels, poisoned, monkeypatch):
    compare(case, kernels, monkeypatch)


# Programs of their own, which differ from the others by a few instructions.
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[::8], ids=name_case)
def test_they_do_with_queries_of_the_last_tokens_alone(case, kernels, poisoned, monkeypatch):
    compare(case, kernels, monkeypatch, T0=150)
