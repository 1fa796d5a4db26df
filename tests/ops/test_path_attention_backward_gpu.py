"""The backward kernels of `path_attention` on a GPU: every configuration, against float64."""

import math

import pytest
import torch

from householder import path_attention
from householder.ops.path_attention import chunk
from householder.testing import path_attention_inputs, relative_error

pytestmark = pytest.mark.gpu

NAMES = ("q", "k", "v", "w", "beta", "g", "sinks")
# Gradients are rounded once per level, and are products of operands of that dtype; for float32 the
# rounding of sums of 64 terms.
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2.5e-3, torch.float32: 5e-6}
# Thousands of reflections with β‖w‖² = 2, as in the outputs' test: on an H200 dw was 1.2e-2 off in
# bfloat16 with reflectors in float32, and 4.5e-3 in float16.
REFLECTION_LIMITS = {torch.bfloat16: 1.5e-2, torch.float16: 7e-3, torch.float32: 5e-6}

# Sizes and options of `path_attention_inputs`, and `window`: all that gradient_config.py tells
# apart, trees of up to six levels, and what the kernels have branches for.
SHAPES = {
    "narrow": {"B": 2, "T": 2500, "K": 64, "V": 64, "decay": None},
    "wide": {"B": 2, "T": 2500, "K": 128, "V": 128, "decay": None},
    "wide, grouped heads, sinks": {"B": 2, "T": 700, "K": 128, "V": 128, "HQ": 10, "decay": None,
                                   "with_sinks": True},
    "wide keys": {"B": 2, "T": 700, "K": 128, "V": 64, "decay": None},
    "wide values": {"B": 2, "T": 700, "K": 64, "V": 128, "decay": None},
    "odd sizes": {"B": 1, "T": 500, "K": 112, "V": 80, "decay": None},
    "packed, wide": {"B": 1, "T": 3000, "K": 128, "V": 128, "num_sequences": 7, "decay": None},
    "packed, wide, short": {"B": 1, "T": 2000, "K": 128, "V": 128, "num_sequences": 300,
                            "decay": None},
    "narrow, gated, sinks": {"B": 2, "T": 700, "K": 64, "V": 64, "with_sinks": True},
    "wide, gated, grouped heads": {"B": 1, "T": 700, "K": 128, "V": 128, "HQ": 6},
    "strong gate": {"B": 2, "T": 700, "K": 64, "V": 64, "decay": 20.0},
    "reflections": {"B": 1, "T": 3000, "K": 64, "V": 64, "strength": 2.0, "decay": None},
    "least": {"B": 1, "T": 700, "K": 16, "V": 16},
    "keys wider than values": {"B": 1, "T": 700, "K": 128, "V": 32},
    "values wider than keys": {"B": 1, "T": 700, "K": 32, "V": 160},
    "not powers of two": {"B": 1, "T": 500, "K": 48, "V": 80, "window": 200},
    "widest": {"B": 1, "T": 650, "K": 256, "V": 256},
    "widest keys": {"B": 1, "T": 460, "K": 192, "V": 64, "HQ": 4},
    "window": {"B": 2, "T": 900, "K": 64, "V": 64, "window": 100, "decay": None},
    "long window, gated": {"B": 1, "T": 900, "K": 128, "V": 128, "window": 500},
    "packed": {"B": 1, "T": 4000, "K": 64, "V": 64, "num_sequences": 5},
    "hundreds of short sequences": {"B": 1, "T": 2000, "K": 64, "V": 64, "num_sequences": 300},
    "packed, wide, window": {"B": 1, "T": 2000, "K": 128, "V": 128, "num_sequences": 5,
                             "window": 300, "decay": None},
    "one token": {"B": 3, "T": 1, "K": 64, "V": 64},
}  # fmt: skip


def arrange(shape, dtype):
    shape = dict(shape)
    window = shape.pop("window", None)
    inputs = path_attention_inputs(**{"H": 2, **shape}, dtype=dtype, device="cuda")
    if inputs["g"] is not None:
        inputs["g"][:, shape["T"] // 3] = -math.inf
    scale = shape["K"] ** -0.5
    return [inputs[name] for name in NAMES], (scale, window, inputs["cu_seqlens"])


def draw_like(o):
    """Draw the gradient of o, the same numbers in every dtype."""
    drawn = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    return drawn.to(o.device, torch.bfloat16).to(o.dtype)


def differentiate(form, arguments, others, dtype=None):
    """Return all gradients, computed in `dtype` or the inputs' own."""
    arguments = [x if x is None or dtype is None else x.to(dtype) for x in arguments]
    o, lse = form.forward(*arguments, *others)
    return form.backward(draw_like(o), *arguments, *others, o, lse)


def assert_near(actual, expected, limit, arguments):
    """Hold the gradients of all arguments to an error, in the arguments' dtypes."""
    for label, x, a, e in zip(NAMES, arguments, actual, expected, strict=True):
        if x is not None:
            assert a.dtype == x.dtype
            assert relative_error(a, e) < limit, label


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from householder.ops.path_attention import triton as kernels

    return kernels


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_agree_with_float64(name, dtype, kernels, poisoned):
    arguments, others = arrange(SHAPES[name], dtype)
    actual = differentiate(kernels, arguments, others)
    again = differentiate(kernels, arguments, others)
    torch.use_deterministic_algorithms(False)
    expected = differentiate(chunk, arguments, others, torch.float64)
    limits = REFLECTION_LIMITS if "strength" in SHAPES[name] else LIMITS
    assert_near(actual, expected, limits[dtype], arguments)
    for label, a, b in zip(NAMES, actual, again, strict=True):
        assert a is b is None or torch.equal(a, b), f"d{label} changes from run to run"


@pytest.mark.parametrize("decay", [0.5, None])
@pytest.mark.parametrize("K", [64, 128])
def test_a_sequence_depends_neither_on_its_batch_nor_on_packing(K, decay, kernels):
    arguments, (scale, window, _) = arrange(
        {"B": 3, "T": 1700, "K": K, "V": K, "decay": decay}, torch.bfloat16
    )  # fmt: skip
    alone, packed = (
        [None if x is None else change(x) for x in arguments]
        for change in (lambda x: x[1:2].contiguous(), lambda x: x.flatten(0, 1).unsqueeze(0))
    )
    bounds = torch.arange(4, device="cuda", dtype=torch.int32) * 1700
    o, lse = kernels.forward(*arguments, scale, window, None)
    do = draw_like(o)
    together = kernels.backward(do, *arguments, scale, window, None, o, lse)
    separate = kernels.backward(do[1:2], *alone, scale, window, None, o[1:2], lse[1:2])
    in_a_row = kernels.backward(
        *(x.flatten(0, 1).unsqueeze(0) if i == 0 else x for i, x in enumerate([do, *packed])),
        scale, window, bounds, o.flatten(0, 1)[None], lse.flatten(0, 1)[None],
    )  # fmt: skip
    for a, b, c in zip(together[:6], separate, in_a_row, strict=False):
        if a is None:
            continue
        assert torch.equal(a[1:2], b)
        assert torch.equal(a.flatten(0, 1), c[0])


@pytest.mark.parametrize("K", [64, 128])
def test_strides_do_not_matter(K, kernels):
    arguments, others = arrange({"B": 2, "T": 300, "K": K, "V": K}, torch.bfloat16)
    strided = [
        x if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in arguments
    ]
    o, lse = kernels.forward(*arguments, *others)
    do = draw_like(o)
    plain = kernels.backward(do, *arguments, *others, o, lse)
    do = do.transpose(0, 3).contiguous().transpose(0, 3)
    for a, b in zip(plain, kernels.backward(do, *strided, *others, o, lse), strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("K", [64, 128])
def test_many_runs_give_the_same_bits(K, kernels):
    """Warps that copy ahead of others, and fail to wait for them, are seen now and then only."""
    arguments, others = arrange({"B": 4, "T": 4096, "H": 8, "K": K, "V": K, "decay": None},
                                torch.bfloat16)  # fmt: skip
    o, lse = kernels.forward(*arguments, *others)
    do = torch.randn_like(o)
    first = o, lse, *kernels.backward(do, *arguments, *others, o, lse)[:5]
    for _ in range(30):
        o, lse = kernels.forward(*arguments, *others)
        again = o, lse, *kernels.backward(do, *arguments, *others, o, lse)[:5]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["narrow", "wide", "packed, wide", "wide, grouped heads, sinks"])
def test_portable_forms_agree_with_float64(name, kernels, monkeypatch):
    """Where a chip has forms of its own, the portable ones run too."""
    from householder.ops.path_attention.triton.problem import Problem

    monkeypatch.setattr(Problem, "suits_hopper", property(lambda _: False))
    arguments, others = arrange(SHAPES[name], torch.bfloat16)
    actual = differentiate(kernels, arguments, others)
    expected = differentiate(chunk, arguments, others, torch.float64)
    assert_near(actual, expected, LIMITS[torch.bfloat16], arguments)


def test_inputs_of_several_dtypes(kernels):
    arguments, others = arrange(SHAPES["narrow, gated, sinks"], torch.float32)
    arguments[2] = arguments[2].bfloat16()
    actual = differentiate(kernels, arguments, others)
    expected = differentiate(chunk, arguments, others, torch.float64)
    assert_near(actual, expected, LIMITS[torch.bfloat16], arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["wide", "narrow, gated, sinks", "reflections", "widest keys", "values wider than keys",
     "not powers of two", "least"],
)  # fmt: skip
def test_reflectors_in_float32_beside_half_precision(name, dtype, kernels):
    arguments, others = arrange(SHAPES[name], torch.float32)
    arguments[:3] = [x.to(dtype) for x in arguments[:3]]
    actual = differentiate(kernels, arguments, others)
    expected = differentiate(chunk, arguments, others, torch.float64)
    limit = (REFLECTION_LIMITS if name == "reflections" else LIMITS)[dtype]
    assert_near(actual, expected, limit, arguments)


@pytest.mark.parametrize("offset", [0, 3])
def test_float32_reflectors_beside_narrow_float16_keys_begin_anywhere(offset, kernels):
    shape = {"B": 3, "T": 300, "H": 1, "HQ": 2, "K": 32, "V": 96, "window": 50, "decay": None}
    arguments, others = arrange(shape, torch.float32)
    arguments[:3] = [x.half() for x in arguments[:3]]
    w = arguments[3]
    arguments[3] = w.new_empty(w.numel() + offset)[offset:].view_as(w).copy_(w)
    expected = differentiate(chunk, arguments, others, torch.float64)
    actual = differentiate(kernels, arguments, others)
    assert_near(actual, expected, LIMITS[torch.float16], arguments)


@pytest.mark.parametrize("name", ["wide", "narrow, gated, sinks"])
def test_the_first_call_compiles_its_kernels_side_by_side(name, kernels, compilers):
    # A number of heads that no other test has: strides are constants of kernels. In the forms for
    # Hopper that is so of four (prepare for either pass, the leaves, the chunks' gradient); tests
    # before may have left the others in memory.
    arguments, others = arrange({**SHAPES[name], "H": 5}, torch.bfloat16)
    first = differentiate(kernels, arguments, others)
    assert len(compilers) >= 4
    assert all(thread.startswith("householder-compiler") for thread in compilers)
    for a, b in zip(first, differentiate(kernels, arguments, others), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_small_gradients_in_float16_keep_their_digits(kernels):
    arguments, others = arrange(SHAPES["narrow"], torch.float16)
    o, lse = kernels.forward(*arguments, *others)
    do = draw_like(o)
    plain, small = (
        kernels.backward(d, *arguments, *others, o, lse)[4] for d in (do, do * 2.0**-10)
    )
    assert relative_error(small * 2.0**10, plain.double()) < 2.5e-3


def test_forward_and_backward_are_captured_in_a_graph(kernels):
    arguments, others = arrange(SHAPES["packed"], torch.bfloat16)
    leaves = [x if x is None else x.requires_grad_() for x in arguments]
    options = {"scale": others[0], "sinks": leaves[6], "cu_seqlens": others[2], "impl": "triton"}

    def both():
        o = path_attention(*leaves[:6], **options)
        return torch.autograd.grad(o.square().sum(), leaves[:6])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = both()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = both()
    torch.cuda.current_stream().wait_stream(side)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_sequences_of_131072_tokens_train(kernels):
    T, H, D = 131_072, 16, 128
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free memory")
    leaves = [torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    leaves[3] = torch.nn.functional.normalize(leaves[3], dim=-1)
    # Reflections: what shortens vectors leaves nothing of a key's gradient over such a distance.
    leaves.append(torch.full((1, T, H), 2.0, device="cuda", dtype=torch.bfloat16))
    leaves = [x.requires_grad_() for x in leaves]
    o = path_attention(*leaves, impl="triton")
    # Only the last queries have a gradient, and give one to the first keys and values.
    do = torch.zeros_like(o)
    do[:, -300:].normal_()
    grads = torch.autograd.grad(o, leaves, do)
    assert all(x.isfinite().all() for x in grads)
    assert all(x[:, :300].any() for x in grads[1:3])
    assert all(x[:, -600:-300].any() for x in grads[1:5])
    assert not grads[0][:, :-300].any()
