"""The Triton kernels of `delta_product` on a GPU: every configuration, against float64."""

import importlib

import pytest
import torch

from householder.ops.delta_product import chunk, reference
from householder.testing import assert_as_accurate, delta_product_inputs, relative_error

pytestmark = pytest.mark.gpu

ORDER = ("q", "k", "v", "beta", "g")
OUTPUTS = ("o", "final_state", "dq", "dk", "dv", "dbeta", "dg", "dinitial_state")
# Relative errors of one product with operands of that dtype stay below these; long products of
# reflections (β near 2, no gate) come near them. For float32 the rounding of 64-term sums.
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2.5e-3, torch.float32: 3e-6}

# B, T, N, H, HV, K, V, mean decay, packed sequences: all that the tables of config.py tell apart.
SHAPES = {
    "delta rule": (2, 300, 1, 2, 2, 128, 128, None, None),
    "gated delta rule": (2, 300, 1, 2, 2, 128, 128, 0.1, None),
    "strong gate": (2, 300, 1, 2, 2, 128, 128, 20.0, None),
    "two reflections, grouped heads": (2, 300, 2, 2, 4, 128, 128, 0.1, None),
    "three reflections": (2, 300, 3, 2, 2, 128, 128, None, None),
    "three reflections, gated": (2, 300, 3, 2, 2, 128, 128, 0.1, None),
    "four reflections": (2, 300, 4, 2, 2, 128, 128, 0.1, None),
    "five reflections": (1, 200, 5, 1, 1, 96, 160, 0.1, None),
    "six reflections": (1, 200, 6, 1, 1, 64, 64, None, None),
    "seven reflections": (1, 200, 7, 1, 1, 16, 16, None, None),
    "eight reflections": (1, 200, 8, 1, 2, 32, 16, 0.1, None),
    "one token": (2, 1, 1, 2, 2, 128, 128, 0.1, None),
    "shorter than a chunk": (2, 20, 2, 2, 2, 128, 128, None, None),
    "narrow": (2, 300, 1, 2, 2, 64, 64, 0.1, None),
    "narrow, no gate": (2, 300, 1, 2, 2, 64, 64, None, None),
    "keys wider than values": (1, 300, 2, 1, 1, 128, 64, 0.1, None),
    "narrow keys": (1, 300, 1, 1, 1, 32, 48, 0.1, None),
    "wide": (1, 200, 1, 1, 1, 256, 256, 0.1, None),
    "wide keys": (1, 200, 2, 1, 1, 192, 48, None, None),
    "wide values": (1, 200, 1, 1, 1, 48, 192, 0.1, None),
    "packed": (1, 700, 2, 2, 2, 64, 128, 0.1, 9),
    "hundreds of short sequences": (1, 1000, 1, 2, 2, 128, 64, None, 300),
    # Sequences that are cut into segments.
    "long": (1, 10000, 1, 2, 2, 128, 128, None, None),
    "long, gated": (2, 9000, 1, 2, 2, 128, 128, 0.1, None),
    "long, weak gate": (1, 13000, 2, 1, 2, 64, 128, 0.001, None),
    "long and wide": (1, 13000, 3, 1, 1, 256, 96, 0.002, None),
    "long, packed": (1, 30000, 1, 2, 2, 64, 64, 0.01, 5),
}


def arrange(shape, dtype, device="cuda"):
    B, T, N, H, HV, K, V, decay, num_sequences = shape
    inputs = delta_product_inputs(
        B, T, N, H, K, V, HV=HV, decay=decay, num_sequences=num_sequences, dtype=dtype,
        device=device,
    )  # fmt: skip
    if dtype == torch.float32:
        inputs["beta"][:, ::7] = 0.0  # tokens without effect have gradients all the same
    return inputs


def run(module, inputs, dtype=None, save=True):
    """Return outputs and gradients for fixed cotangents, in `dtype` or the inputs' own."""
    inputs = {
        n: x.to(dtype) if dtype and x is not None and x.is_floating_point() else x
        for n, x in inputs.items()
    }
    scale = inputs["k"].shape[-1] ** -0.5
    arguments = [inputs[n] for n in ORDER]
    arguments += [scale, inputs["initial_state"], inputs["cu_seqlens"]]
    o, state, *saved = module.forward(*arguments, save)
    return [o, state, *module.backward(*cotangents(o, state), *arguments, *saved)]


def cotangents(o, state):
    """Return fixed gradients of the outputs; those of o are bfloat16 numbers in every dtype."""
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(o.shape, generator=generator).to(o.device, torch.bfloat16).to(o.dtype)
    dstate = torch.randn(state.shape, generator=generator).to(o.device, state.dtype)
    return do, dstate


def run_token_by_token(inputs):
    """Return what `run` does, by the definition and PyTorch's own derivative of it."""
    leaves = [
        x if x is None else x.detach().clone().requires_grad_()
        for x in (inputs[n] for n in (*ORDER, "initial_state"))
    ]
    scale = inputs["k"].shape[-1] ** -0.5
    outputs = reference.forward(*leaves[:-1], scale, leaves[-1], inputs["cu_seqlens"])
    given = [x for x in leaves if x is not None]
    gradients = iter(torch.autograd.grad(outputs, given, cotangents(*outputs)))
    return [*outputs, *(None if x is None else next(gradients) for x in leaves)]


@pytest.fixture
def kernels():
    triton = pytest.importorskip("triton")
    del triton
    from householder.ops.delta_product import triton as kernels

    return kernels


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_agree_with_float64(name, dtype, kernels, poisoned):
    inputs = arrange(SHAPES[name], dtype)
    actual, again = run(kernels, inputs), run(kernels, inputs)
    torch.use_deterministic_algorithms(False)
    expected = run(chunk, inputs, torch.float64)
    for label, a, b, e in zip(OUTPUTS, actual, again, expected, strict=True):
        if e is not None and e.numel():
            assert relative_error(a, e) < LIMITS[dtype], label
            assert torch.equal(a, b), f"{label} changes from run to run"


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("strength", [1.0, 2.0], ids=["projections", "reflections"])
def test_every_step_projects_or_reflects(strength, dtype, kernels):
    inputs = delta_product_inputs(
        2, 300, 2, 2, 128, 128, HV=4, decay=None, strength=strength, dtype=dtype, device="cuda"
    )
    expected = run(chunk, inputs, torch.float64)
    for label, a, e in zip(OUTPUTS, run(kernels, inputs), expected, strict=True):
        if e is not None:
            assert relative_error(a, e) < LIMITS[dtype], label


# Longer ones are cut into segments.
@pytest.mark.parametrize(("T", "K"), [(300, 128), (6000, 64)])
def test_float32_loses_as_little_as_reflections_one_after_the_other(T, K, kernels):
    """What is lost at one chunk stays lost, for reflections let nothing fade."""
    inputs = delta_product_inputs(
        1, T, 2, 2, K, K, decay=None, strength=2.0, dtype=torch.float32, device="cuda"
    )
    actual, plain = run(kernels, inputs), run_token_by_token(inputs)
    expected = run(chunk, inputs, torch.float64)
    for label, a, p, e in zip(OUTPUTS, actual, plain, expected, strict=True):
        if e is not None:
            assert_as_accurate(a, p, e, name=label)


@pytest.mark.parametrize(
    ("K", "V", "N", "dtype"),
    [
        (80, 112, 1, torch.bfloat16),
        (112, 224, 2, torch.bfloat16),
        (144, 16, 3, torch.float16),
        (208, 240, 1, torch.float32),
    ],
)
def test_other_multiples_of_16(K, V, N, dtype, kernels, poisoned):
    inputs = arrange((2, 150, N, 1, 2, K, V, 0.1, None), dtype)
    actual = run(kernels, inputs)
    torch.use_deterministic_algorithms(False)
    for label, a, e in zip(OUTPUTS, actual, run(chunk, inputs, torch.float64), strict=True):
        assert relative_error(a, e) < LIMITS[dtype], label


@pytest.mark.parametrize(
    "name", ["gated delta rule", "five reflections", "packed", "long", "long, gated"]
)
def test_portable_forward_agrees_with_float64(name, kernels, monkeypatch):
    """Where a chip has forms of its own, the portable ones run too."""
    for module in ("forward", "segments"):
        module = importlib.import_module(f"householder.ops.delta_product.triton.{module}")
        monkeypatch.setattr(module, "suits_hopper", lambda p, *tiles: False)
    inputs = arrange(SHAPES[name], torch.bfloat16)
    actual, expected = run(kernels, inputs), run(chunk, inputs, torch.float64)
    for label, a, e in zip(OUTPUTS, actual, expected, strict=True):
        if e is not None and e.numel():
            assert relative_error(a, e) < LIMITS[torch.bfloat16], label


@pytest.mark.parametrize("name", ["gated delta rule", "long, gated", "long and wide"])
def test_the_first_call_compiles_its_kernels_side_by_side(name, kernels, compilers):
    B, T, N, H, _, *others = SHAPES[name]
    # Numbers of heads that no other test has: strides are constants of kernels.
    shape = (B, T, N, H + 2, 3 * (H + 2), *others)
    inputs = arrange(shape, torch.bfloat16)
    first = run(kernels, inputs)
    assert len(compilers) >= 3
    assert all(thread.startswith("householder-compiler") for thread in compilers)
    for a, b in zip(first, run(kernels, inputs), strict=True):
        assert a is None if b is None else torch.equal(a, b)


def test_rows_need_not_start_at_multiples_of_16_bytes(kernels):
    inputs = arrange(SHAPES["gated delta rule"], torch.bfloat16)
    shifted = dict(inputs)
    for n in ("q", "k", "v"):
        room = inputs[n].new_empty(inputs[n].numel() + 1)[1:]
        shifted[n] = room.view(inputs[n].shape).copy_(inputs[n])
    for label, a, b in zip(OUTPUTS, run(kernels, shifted), run(kernels, inputs), strict=True):
        assert relative_error(a, b.double()) < LIMITS[torch.bfloat16], label


@pytest.mark.parametrize("name", ["delta rule", "gated delta rule", "narrow keys"])
def test_gradients_without_the_kernel_for_hopper(name, kernels, monkeypatch):
    from householder.ops.delta_product.triton import config

    monkeypatch.setattr(config, "hopper_sweep_launch", lambda *_: None)
    inputs = arrange(SHAPES[name], torch.bfloat16)
    expected = run(chunk, inputs, torch.float64)
    for label, a, e in zip(OUTPUTS, run(kernels, inputs), expected, strict=True):
        if e is not None:
            assert relative_error(a, e) < LIMITS[torch.bfloat16], label


@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("g", [0.0, -20.0, -float("inf")])
def test_gates_of_any_strength(g, N, kernels):
    """Gradients keep their digits, each for itself, beside strong gates and at resets."""
    inputs = arrange((2, 300, N, 2, 2, 128, 128, 0.1, None), torch.bfloat16)
    inputs["initial_state"] = torch.zeros_like(inputs["initial_state"])
    gates = inputs["g"]
    gates[:, 3::7] = g
    actual = dict(zip(OUTPUTS, run(kernels, inputs), strict=True))
    expected = dict(zip(OUTPUTS, run(chunk, inputs, torch.float64), strict=True))
    for label, e in expected.items():
        assert relative_error(actual[label], e) < LIMITS[torch.bfloat16], label
    strong, exact = actual["dg"][:, 3::7].double(), expected["dg"][:, 3::7]
    if g == -float("inf"):
        assert not strong.any()
    else:
        assert ((strong - exact).abs() / exact.abs()).median() < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
def test_a_sequence_does_not_depend_on_its_batch(dtype, kernels):
    inputs = arrange((4, 300, 2, 2, 2, 64, 64, 0.1, None), dtype)
    do, dstate = torch.randn_like(inputs["q"]), torch.randn_like(inputs["initial_state"])

    def differentiate(rows):
        x = {n: None if x is None else x[rows].contiguous() for n, x in inputs.items()}
        arguments = [*(x[n] for n in ORDER), 0.1, x["initial_state"], None]
        o, state, *saved = kernels.forward(*arguments, True)
        return [o, state, *kernels.backward(do[rows], dstate[rows], *arguments, *saved)]

    together, alone = differentiate(slice(None)), differentiate(slice(2, 3))
    for label, a, b in zip(OUTPUTS, together, alone, strict=True):
        assert torch.equal(a[2:3], b), label


@pytest.mark.parametrize("decay", [None, 0.05])
def test_a_long_sequence_does_not_depend_on_its_batch(decay, kernels):
    inputs = arrange((3, 9000, 1, 2, 2, 128, 128, decay, None), torch.bfloat16)
    alone = {n: None if x is None else x[1:2].contiguous() for n, x in inputs.items()}
    packed = {
        n: x if x is None or n == "initial_state" else x.flatten(0, 1).unsqueeze(0)
        for n, x in inputs.items()
    }
    packed["cu_seqlens"] = torch.arange(4, device="cuda", dtype=torch.int32) * 9000
    together, separate, in_a_row = (
        kernels.forward(*(x[n] for n in ORDER), 0.1, x["initial_state"], x["cu_seqlens"], False)
        for x in (inputs, alone, packed)
    )
    for a, b in zip(together[:2], separate[:2], strict=True):
        assert torch.equal(a[1:2], b)
    assert torch.equal(together[0].flatten(0, 1), in_a_row[0][0])
    assert torch.equal(together[1], in_a_row[1])


def test_a_million_tokens(kernels):
    def draw(*shape):
        return torch.randn(1, T, *shape, device="cuda", dtype=torch.bfloat16)

    # More than 2³¹ elements a tensor.
    T, H, D, end = 1_000_000, 18, 128, 20_032
    q, v, beta = draw(H, D), draw(1, H, D), draw(1, H).sigmoid()
    k = torch.nn.functional.normalize(draw(1, H, D), dim=-1)
    inputs = [q, k, v, beta, -0.1 * torch.rand(1, T, H, device="cuda")]
    # Under these gates nothing of 16,000 tokens ago is left.
    whole = kernels.forward(*inputs, 0.1, None, None, False)
    last = kernels.forward(*(x[:, -end:] for x in inputs), 0.1, None, None, False)
    assert relative_error(whole[0][:, -4000:], last[0][:, -4000:]) < 4e-3
    assert relative_error(whole[1], last[1]) < 4e-3


def test_strides_do_not_matter(kernels):
    inputs = arrange((2, 100, 2, 2, 2, 64, 64, 0.1, None), torch.bfloat16)
    swapped = {
        n: x.transpose(0, 1).contiguous().transpose(0, 1) if n in ORDER else x
        for n, x in inputs.items()
    }
    for a, b in zip(run(kernels, inputs), run(kernels, swapped), strict=True):
        assert torch.equal(a, b)


def test_rows_of_a_long_sequence_need_not_be_aligned(kernels):
    inputs = arrange(SHAPES["long, gated"], torch.bfloat16)
    shifted = {}
    for n, x in inputs.items():
        shifted[n] = x
        if n in ("q", "k", "v"):
            wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 4)
            shifted[n] = wide[..., 4:]
            shifted[n].copy_(x)
    expected = run(chunk, inputs, torch.float64)
    for label, a, e in zip(OUTPUTS, run(kernels, shifted), expected, strict=True):
        assert relative_error(a, e) < LIMITS[torch.bfloat16], label


def test_forward_and_backward_are_captured_in_a_graph(kernels):
    inputs = arrange((1, 300, 2, 2, 2, 64, 64, 0.1, 5), torch.bfloat16)
    scale, do = 0.1, torch.randn(1, 300, 2, 64, device="cuda", dtype=torch.bfloat16)
    arguments = [*(inputs[n] for n in ORDER), scale, inputs["initial_state"], inputs["cu_seqlens"]]

    def both():
        o, _, *saved = kernels.forward(*arguments, True)
        return [o, *kernels.backward(do, None, *arguments, *saved)]

    expected = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("N", [1, 2, 4])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (48, 80), (256, 16)])
def test_one_token(N, K, V, kernels):
    inputs = arrange((3, 1, N, 2, 4, K, V, 0.1, None), torch.bfloat16)
    token = [inputs[n][:, 0] for n in ORDER]
    o, state = kernels.step(*token, 0.1, inputs["initial_state"])
    wide = [x.double() for x in token]
    expected = reference.step(*wide, 0.1, inputs["initial_state"].double())
    assert relative_error(o, expected[0]) < 4e-3
    assert relative_error(state, expected[1]) < 1e-6
