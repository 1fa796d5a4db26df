"""The Triton kernels of `path_attention` on a GPU: every configuration, against float64."""

import itertools
import math

import pytest
import torch

from householder import path_attention
from householder.ops.path_attention import chunk
from householder.testing import assert_as_accurate, path_attention_inputs, relative_error

pytestmark = pytest.mark.gpu

NAMES = ("q", "k", "v", "w", "beta", "g", "sinks")
# A logit is a product of two vectors that were rounded once per level; for float32 the rounding of
# sums of 64 terms.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 3e-6}

# Thousands of reflections with β‖w‖² = 2, which shorten nothing: the tensor cores' sums are
# truncated and not rounded, and so products of float16 reflections shrink.
REFLECTION_LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 3e-6}

# Sizes and options of `path_attention_inputs`, and `window`: all that config.py tells apart.
SHAPES = {
    "narrow": {"B": 2, "T": 700, "K": 64, "V": 64, "decay": None},
    "wide": {"B": 2, "T": 700, "K": 128, "V": 128, "decay": None},
    "wide, deep": {"B": 1, "T": 2500, "K": 128, "V": 128, "decay": None},
    "wide, grouped heads, sinks": {"B": 2, "T": 700, "K": 128, "V": 128, "HQ": 10, "decay": None,
                                   "with_sinks": True},
    "wide keys": {"B": 2, "T": 700, "K": 128, "V": 64, "decay": None},
    "wide values": {"B": 2, "T": 700, "K": 64, "V": 128, "decay": None},
    "packed, wide": {"B": 1, "T": 3000, "K": 128, "V": 128, "num_sequences": 7, "decay": None},
    "narrow, gated, sinks": {"B": 2, "T": 700, "K": 64, "V": 64, "with_sinks": True},
    "wide, gated, grouped heads": {"B": 1, "T": 700, "K": 128, "V": 128, "HQ": 6},
    "strong gate": {"B": 2, "T": 700, "K": 64, "V": 64, "decay": 20.0},
    "reflections": {"B": 1, "T": 3000, "K": 64, "V": 64, "strength": 2.0, "decay": None},
    "grouped heads, sinks": {"B": 2, "T": 700, "K": 64, "V": 64, "HQ": 4, "decay": None,
                             "with_sinks": True},
    "not powers of two, no gate": {"B": 1, "T": 500, "K": 48, "V": 112, "decay": None},
    "least, no gate": {"B": 2, "T": 300, "K": 16, "V": 16, "decay": None},
    "packed, no gate": {"B": 1, "T": 2000, "K": 64, "V": 64, "num_sequences": 7, "decay": None},
    "packed, short, no gate": {"B": 1, "T": 2000, "K": 128, "V": 128, "num_sequences": 300,
                               "decay": None},
    "one chunk, no gate": {"B": 2, "T": 50, "K": 128, "V": 64, "decay": None},
    "least": {"B": 1, "T": 700, "K": 16, "V": 16},
    "keys wider than values": {"B": 1, "T": 700, "K": 128, "V": 32},
    "values wider than keys": {"B": 1, "T": 700, "K": 32, "V": 160},
    "not powers of two": {"B": 1, "T": 500, "K": 48, "V": 80, "window": 200},
    "widest": {"B": 1, "T": 500, "K": 256, "V": 256},
    "window": {"B": 2, "T": 900, "K": 64, "V": 64, "window": 100, "decay": None},
    "long window, gated": {"B": 1, "T": 900, "K": 128, "V": 128, "window": 500},
    "packed": {"B": 1, "T": 2000, "K": 64, "V": 64, "num_sequences": 7},
    "hundreds of short sequences": {"B": 1, "T": 2000, "K": 64, "V": 64, "num_sequences": 300},
    "packed, wide, window": {"B": 1, "T": 2000, "K": 128, "V": 128, "num_sequences": 5,
                             "window": 300, "decay": None},
    "one token": {"B": 3, "T": 1, "K": 64, "V": 64},
}  # fmt: skip


def arrange(shape, dtype):
    shape = dict(shape)
    window = shape.pop("window", None)
    inputs = path_attention_inputs(**{"H": 2, **shape}, dtype=dtype, device="cuda")
    scale = shape["K"] ** -0.5
    return [inputs[name] for name in NAMES], (scale, window, inputs["cu_seqlens"])


def exact(arguments, others):
    return chunk.forward(*(None if x is None else x.double() for x in arguments), *others)


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from householder.ops.path_attention import triton as kernels

    return kernels


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_agree_with_float64(name, dtype, kernels, poisoned):
    arguments, others = arrange(SHAPES[name], dtype)
    o, lse = kernels.forward(*arguments, *others)
    again, _ = kernels.forward(*arguments, *others)
    torch.use_deterministic_algorithms(False)
    expected, expected_lse = exact(arguments, others)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    limits = REFLECTION_LIMITS if "strength" in SHAPES[name] else LIMITS
    assert relative_error(o, expected) < limits[dtype]
    assert relative_error(lse, expected_lse) < limits[dtype]
    assert torch.equal(o, again)


@pytest.mark.parametrize("name", ["narrow", "wide", "reflections", "values wider than keys"])
def test_portable_forms_agree_with_float64(name, kernels, monkeypatch):
    """Where a chip has forms of its own, the portable ones run too."""
    from householder.ops.path_attention.triton.problem import Problem

    monkeypatch.setattr(Problem, "suits_hopper", property(lambda _: False))
    shape = {**SHAPES[name], "decay": None}
    arguments, others = arrange(shape, torch.bfloat16)
    o, lse = kernels.forward(*arguments, *others)
    expected, expected_lse = exact(arguments, others)
    assert relative_error(o, expected) < LIMITS[torch.bfloat16]
    assert relative_error(lse, expected_lse) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("apart", [0.0, 0.01])
def test_nearly_parallel_reflectors(apart, kernels):
    """The triangle of a chunk is then far from the identity: its inverse has entries of ±2."""
    shape = {"B": 1, "T": 700, "K": 64, "V": 64, "strength": 2.0, "decay": None}
    arguments, others = arrange(shape, torch.float16)
    w = arguments[3].float()
    arguments[3] = torch.nn.functional.normalize(w[:, :1] + apart * w, dim=-1).half()
    arguments[4] = arguments[3].float().square().sum(-1).reciprocal().mul(2).half()
    o, _ = kernels.forward(*arguments, *others)
    assert relative_error(o, exact(arguments, others)[0]) < 1e-2


def test_inputs_of_several_dtypes(kernels):
    arguments, others = arrange(SHAPES["narrow, gated, sinks"], torch.float32)
    arguments[2] = arguments[2].bfloat16()
    o, _ = kernels.forward(*arguments, *others)
    assert o.dtype == torch.bfloat16
    assert relative_error(o, exact(arguments, others)[0]) < 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wide", "narrow, gated, sinks", "reflections", "widest"])
def test_reflectors_in_float32_leave_the_products_of_pairs_in_half_precision(name, dtype, kernels):
    from householder.ops.path_attention.inputs import Inputs
    from householder.ops.path_attention.triton import problem

    arguments, others = arrange(SHAPES[name], torch.float32)
    arguments[:3] = [x.to(dtype) for x in arguments[:3]]
    arranged = problem.arrange(Inputs(*arguments, *others))
    assert problem.make_problem(*arranged).operand == dtype
    o, lse = kernels.forward(*arguments, *others)
    expected, expected_lse = exact(arguments, others)
    limit = (REFLECTION_LIMITS if name == "reflections" else LIMITS)[dtype]
    assert o.dtype == dtype
    assert relative_error(o, expected) < limit
    assert relative_error(lse, expected_lse) < limit


@pytest.mark.parametrize("decay", [0.5, None])
@pytest.mark.parametrize("K", [64, 128])
def test_a_sequence_depends_neither_on_its_batch_nor_on_packing(K, decay, kernels):
    arguments, (scale, window, _) = arrange(
        {"B": 3, "T": 700, "K": K, "V": K, "decay": decay}, torch.bfloat16
    )  # fmt: skip
    alone, packed = (
        [None if x is None else change(x) for x in arguments]
        for change in (lambda x: x[1:2].contiguous(), lambda x: x.flatten(0, 1).unsqueeze(0))
    )
    bounds = torch.arange(4, device="cuda", dtype=torch.int32) * 700
    together = kernels.forward(*arguments, scale, window, None)
    separate = kernels.forward(*alone, scale, window, None)
    in_a_row = kernels.forward(*packed, scale, window, bounds)
    for a, b, c in zip(together, separate, in_a_row, strict=True):
        assert torch.equal(a[1:2], b)
        assert torch.equal(a.flatten(0, 1), c[0])


@pytest.mark.parametrize("name", ["packed", "packed, no gate", "packed, wide"])
def test_packed_sequences_are_those_alone(name, kernels):
    arguments, (scale, window, bounds) = arrange(SHAPES[name], torch.bfloat16)
    together, _ = kernels.forward(*arguments, scale, window, bounds)
    start, end = bounds[3:5].tolist()
    others = [x.clone() for x in arguments[:4]]
    for x in others:
        x[:, :start] = x[:, end:] = math.inf
    among_others, _ = kernels.forward(*others, *arguments[4:], scale, window, bounds)
    assert torch.equal(among_others[:, start:end], together[:, start:end])
    for start, end in itertools.pairwise(bounds.tolist()):
        alone = [None if x is None else x[:, start:end] for x in arguments]
        o, _ = kernels.forward(*alone, scale, window, None)
        assert torch.equal(o, together[:, start:end])


@pytest.mark.parametrize("K", [64, 128])
def test_strides_do_not_matter(K, kernels):
    arguments, others = arrange({"B": 2, "T": 300, "K": K, "V": K}, torch.bfloat16)
    expected = kernels.forward(*arguments, *others)
    swapped = [
        None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in arguments[:6]
    ]  # fmt: skip
    shifted = []
    for x in arguments[:6]:
        room = None if x is None else x.new_empty(x.numel() + 1)[1:]
        shifted.append(None if x is None else room.view(x.shape).copy_(x))
    for changed in (swapped, shifted):
        for a, b in zip(kernels.forward(*changed, None, *others), expected, strict=True):
            assert torch.equal(a, b)


def test_rows_need_not_start_at_multiples_of_16_bytes(kernels):
    arguments, others = arrange(SHAPES["narrow"], torch.bfloat16)
    for i in range(4):
        x = arguments[i]
        arguments[i] = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    o, _ = kernels.forward(*arguments, *others)
    assert relative_error(o, exact(arguments, others)[0]) < LIMITS[torch.bfloat16]


def test_a_gate_of_minus_infinity_hides_all_earlier_tokens(kernels):
    arguments, others = arrange({"B": 1, "T": 900, "K": 64, "V": 64}, torch.bfloat16)
    arguments[5][:, 400] = -math.inf
    whole, _ = kernels.forward(*arguments, *others)
    tail = [None if x is None else x[:, 400:] for x in arguments]
    assert relative_error(whole[:, 400:], exact(tail, others)[0]) < LIMITS[torch.bfloat16]
    assert whole.isfinite().all()


def test_the_call_is_captured_without_waiting_for_the_host(kernels):
    arguments, others = arrange(SHAPES["packed"], torch.bfloat16)
    expected, _ = kernels.forward(*arguments, *others)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = kernels.forward(*arguments, *others)
    o.zero_()
    graph.replay()
    assert torch.equal(o, expected)


@pytest.mark.parametrize("num_sequences", [None, 5])
def test_compiles_into_one_graph(num_sequences):
    inputs = path_attention_inputs(
        1, 300, 2, 64, 64, num_sequences=num_sequences, dtype=torch.bfloat16, device="cuda"
    )
    compiled = torch.compile(path_attention, fullgraph=True)
    assert torch.equal(compiled(**inputs), path_attention(**inputs, impl="triton"))


def test_auto_takes_the_kernels_where_they_can(monkeypatch, kernels):
    inputs = path_attention_inputs(1, 100, 1, 64, 64, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(path_attention(**inputs), path_attention(**inputs, impl="triton"))
    odd = path_attention_inputs(1, 100, 1, 20, 64, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(path_attention(**odd), path_attention(**odd, impl="chunk"))
    with pytest.raises(NotImplementedError, match="K must be a multiple of 16"):
        path_attention(**odd, impl="triton")


@pytest.mark.parametrize("portable", [False, True], ids=["", "portable"])
@pytest.mark.parametrize("wide", [False, True], ids=["", "reflectors in float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_grow_slowly_with_the_length(dtype, wide, portable, kernels, monkeypatch):
    """Twice as much were reflectors, triangles or Z in one float16 half where F is made of them."""
    from householder.ops.path_attention.triton.problem import Problem

    if portable:
        monkeypatch.setattr(Problem, "suits_hopper", property(lambda _: False))
    arguments, others = arrange(
        {"B": 1, "T": 16_000, "H": 1, "K": 64, "V": 64, "decay": None, "strength": 2.0},
        torch.float32,
    )
    w = arguments[3] if wide else arguments[3].to(dtype)
    # Reflections, whatever the rounding of w.
    arguments[4] = 2 / w.float().square().sum(-1)
    arguments[:4] = *(x.to(dtype) for x in arguments[:3]), w
    o, _ = kernels.forward(*arguments, *others)
    expected, _ = exact(arguments, others)
    in_one_half = portable and dtype == torch.float16 and not wide
    assert relative_error(o[:, -64:], expected[:, -64:]) < (2e-2 if in_one_half else 8e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["wide", "narrow, gated, sinks", "packed, wide", "packed"])
def test_calls_that_repeat_launches_give_the_same_bits(name, dtype, kernels):
    """A call of a layout seen before does without working out what to launch."""
    from householder.ops._recording import forget_recordings

    def differentiate(seed):
        arguments, others = arrange({**SHAPES[name], "seed": seed}, dtype)
        do = 0.5 * arguments[2]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o, lse = kernels.forward(*arguments, *others)
        grads = kernels.backward(do, *arguments, *others, o, lse)
        peak = torch.cuda.max_memory_allocated() - before
        return peak, [x for x in (o, lse, *grads) if x is not None]

    differentiate(0)
    peak, repeated = differentiate(1)
    forget_recordings()
    first_peak, first = differentiate(1)
    assert peak <= 1.1 * first_peak
    assert all(torch.equal(a, b) for a, b in zip(repeated, first, strict=True))


def attend_token_by_token(q, k, v, w, beta, scale, rows):
    """Return the outputs of the last `rows` tokens of one head, a reflection after the other."""
    T, K = k.shape
    queries = q.new_zeros(rows, K)
    logits = q.new_full((rows, T), -math.inf)
    for j in range(T - 1, -1, -1):
        first = max(j - (T - rows), 0)
        if j >= T - rows:
            queries[first] = q[j]
        logits[first:, j] = queries[first:] @ k[j] * scale
        queries -= beta[j] * torch.outer(queries @ w[j], w[j])
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("T", [3000, 16_000])
@pytest.mark.parametrize("K", [64, 128])
def test_float32_loses_as_little_as_reflections_one_after_the_other(K, T, kernels):
    """Products of reflections must not shrink, however many there are."""
    shape = {"B": 1, "T": T, "H": 1, "K": K, "V": 64, "decay": None, "strength": 2.0}
    arguments, others = arrange(shape, torch.float32)
    rows = 200
    plain, expected = (
        attend_token_by_token(*(x[0, :, 0].to(dtype) for x in arguments[:5]), others[0], rows)
        for dtype in (torch.float32, torch.float64)
    )
    o, _ = kernels.forward(*arguments, *others)
    assert_as_accurate(o[0, -rows:, 0], plain, expected)


def test_more_than_two_to_the_31_elements(kernels):
    def draw(*shape):
        return torch.randn(1, T, H, *shape, device="cuda", dtype=torch.bfloat16)

    # The levels' queries and keys together are 4·10⁹ elements.
    T, H, D, window = 300_000, 16, 64, 1000
    q, k, v, beta = draw(D), draw(D), draw(D), draw().sigmoid()
    w = torch.nn.functional.normalize(draw(D), dim=-1)
    o, _ = kernels.forward(q, k, v, w, beta, None, None, 0.1, window, None)
    start = T - 3 * 1024 - T % 1024
    last = [x[:, start:].contiguous() for x in (q, k, v, w, beta)]
    expected, _ = kernels.forward(*last, None, None, 0.1, window, None)
    assert relative_error(o[:, -1000:], expected[:, -1000:]) < 1e-2
