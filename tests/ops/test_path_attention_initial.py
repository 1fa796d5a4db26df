"""`initial` of `path_attention`: tokens before the first query, in every form."""

from functools import partial

import pytest
import torch

from householder import path_attention
from householder.ops.path_attention.chunk import gradients, outputs, tree
from householder.testing import assert_as_accurate, path_attention_inputs, relative_error

TOKENS = ("q", "k", "v", "w", "beta", "g")
NAMES = (*TOKENS, "sinks")


def draw(shape, like):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn.to(like.device, torch.bfloat16).to(like.dtype)


def after(T0, leaves, **options):
    """Call the function for the tokens from T0 on, with those before as `initial`."""
    initial = tuple(x[:, :T0] for name, x in leaves.items() if name in TOKENS[1:])
    rest = {name: x if name == "sinks" else x[:, T0:] for name, x in leaves.items()}
    return path_attention(**rest, initial=initial, **options)


def whole(T0, leaves, **options):
    """Do the same by one call for all tokens."""
    return path_attention(**leaves, **options)[:, T0:]


def differentiate(call, T0, inputs, dtype=None, **options):
    """Return the outputs from T0 on and the gradients of all tokens, by name."""
    leaves = {
        name: inputs[name].detach().to(dtype or inputs[name].dtype).requires_grad_()
        for name in NAMES
        if inputs[name] is not None
    }
    o = call(T0, leaves, **options)
    found = torch.autograd.grad(o, leaves.values(), draw(o.shape, o), allow_unused=True)
    return {"o": o} | {
        f"d{name}": torch.zeros_like(x) if dx is None else dx
        for (name, x), dx in zip(leaves.items(), found, strict=True)
    }


def assert_close(actual, expected):
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-11, atol=1e-11, msg=name)


CASES = {
    "plain": {"decay": None},
    "gates, sinks, grouped heads": {"HQ": 4, "with_sinks": True},
    "window": {"window": 19},
    "long window": {"decay": None, "window": 90, "HQ": 4},
}


@pytest.mark.parametrize("impl", ["reference", "chunk"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("T0", "T"), [(0, 40), (1, 70), (39, 1), (64, 64), (97, 34), (131, 0), (3, 128)]
)
def test_the_rest_of_a_sequence_sees_what_was_before(impl, name, T0, T):
    sizes = dict(CASES[name])
    options = {"impl": impl, "window": sizes.pop("window", None), "scale": 0.3}
    inputs = path_attention_inputs(T=T0 + T, **sizes)
    expected = differentiate(whole, T0, inputs, **{**options, "impl": "reference"})
    assert_close(differentiate(after, T0, inputs, **options), expected)


@pytest.mark.parametrize("tile", [1, 1 << 30])
def test_small_and_large_tiles(tile, monkeypatch):
    monkeypatch.setattr(tree, "TILE_ELEMENTS", {"cpu": tile})
    monkeypatch.setattr(tree, "MAX_TILE_COLUMNS", 7)
    inputs = path_attention_inputs(B=1, T=300, H=1, HQ=2)
    for T0 in (75, 220, 260):
        expected = differentiate(whole, T0, inputs)
        assert_close(differentiate(after, T0, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_in_every_dtype(dtype):
    inputs = path_attention_inputs(T=190, H=2, HQ=4, K=32, V=32, dtype=dtype, with_sinks=True)
    expected = differentiate(whole, 101, inputs, torch.float64, impl="reference")
    plain = differentiate(whole, 101, inputs, impl="reference")
    actual = differentiate(after, 101, inputs, impl="chunk")
    for name, e in expected.items():
        assert actual[name].dtype == dtype
        assert_as_accurate(actual[name], plain[name], e, name=name)


@pytest.mark.parametrize("module", [outputs, gradients])
def test_work_does_not_grow_with_the_square_of_what_was_before(module, logits_of):
    computed = logits_of(module)
    T0, T = 1500, 70
    inputs = path_attention_inputs(B=1, T=T0 + T, H=1, decay=None)
    differentiate(after, T0, inputs)
    assert T * T0 < sum(computed) < 1.1 * T * (T0 + T)


def test_gradients_of_all_orders():
    sizes = {"B": 1, "T": 5, "H": 1, "K": 2, "V": 1, "with_sinks": True}
    leaves = {n: x for n, x in path_attention_inputs(**sizes).items() if n in NAMES}

    def call(*leaves, impl):
        return after(3, dict(zip(NAMES, leaves, strict=True)), impl=impl)

    tensors = tuple(x.requires_grad_() for x in leaves.values())
    assert torch.autograd.gradcheck(lambda *x: call(*x, impl="chunk"), tensors)
    assert torch.autograd.gradgradcheck(lambda *x: call(*x, impl="reference"), tensors)
    with pytest.raises(NotImplementedError, match="first-order gradients only"):
        torch.autograd.gradgradcheck(lambda *x: call(*x, impl="chunk"), tensors)


def test_the_past_may_be_cut_off_from_the_gradient():
    """As for truncated backpropagation: the same outputs, and the past has no gradient."""
    inputs = path_attention_inputs(T=80)
    inputs = {n: x.requires_grad_() for n, x in inputs.items() if n in TOKENS}
    past = tuple(inputs[n][:, :50].detach() for n in TOKENS[1:])
    o = path_attention(**{n: x[:, 50:] for n, x in inputs.items()}, initial=past)
    dk, dw = torch.autograd.grad(o.sum(), (inputs["k"], inputs["w"]))
    torch.testing.assert_close(o, path_attention(**inputs)[:, 50:])
    assert not dk[:, :50].any()
    assert not dw[:, :50].any()
    assert dk[:, 50:].any()


def test_function_transforms():
    inputs = path_attention_inputs(B=1, T=60, decay=None)
    given = tuple(inputs[n] for n in TOKENS[:5])
    stacked = [torch.stack([x, x.flip(1)]) for x in given]

    def loss(*given):
        return after(37, dict(zip(TOKENS, given, strict=False)), window=45).sin().sum()

    each = torch.func.grad(loss, argnums=tuple(range(5)))
    together = torch.func.vmap(each)(*stacked)
    one_past = torch.func.vmap(lambda q: path_attention(q, *given[1:], initial=given[1:]))
    for i in range(2):
        for a, b in zip(together, each(*(x[i] for x in stacked)), strict=True):
            torch.testing.assert_close(a[i], b)
        expected = path_attention(stacked[0][i], *given[1:], initial=given[1:])
        torch.testing.assert_close(one_past(stacked[0])[i], expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks():
    inputs = path_attention_inputs(B=1, T=60)
    compiled = torch.compile(after, fullgraph=True, backend="aot_eager")

    def call(T0, leaves):
        return compiled(T0, leaves)

    expected = differentiate(after, 33, inputs)
    assert all(torch.equal(x, expected[n]) for n, x in differentiate(call, 33, inputs).items())


def test_the_registered_ops_take_fewer_queries():
    inputs = path_attention_inputs(T=40, HQ=4, with_sinks=True)
    arguments = (inputs["q"][:, 25:], *(inputs[n] for n in NAMES[1:]), 0.3, 9, None)
    op = torch.ops.householder
    o, lse = op.path_attention.default(*arguments, "chunk")
    assert o.shape[:3] == lse.shape == (2, 15, 4)
    torch.library.opcheck(op.path_attention.default, (*arguments, "chunk"))
    torch.library.opcheck(
        op.path_attention_backward.default, (torch.ones_like(o), *arguments, o, lse, "chunk")
    )


zeros = partial(torch.zeros, dtype=torch.float64)


class TestErrors:
    """Each names the part of `initial`, what was required, what came and the remedy."""

    @pytest.mark.parametrize(
        ("place", "part", "error", "match"),
        [
            (0, zeros(2, 5, 1, 8), ValueError, r"`initial k` must be \[B, T0, H, K\] = "),
            (0, zeros(5), ValueError, r"`initial k` must be \[B, T0, H, K\] = "),
            (1, zeros(2, 6, 2, 6), ValueError, r"\[B, T0, H, V\] = \[2, 5, 2, 6\]"),
            (2, zeros(1, 5, 2, 8), ValueError, r"`initial w` must be"),
            (3, zeros(2, 5, 2, 1), ValueError, r"`initial beta` must be \[B, T0, H\]"),
            (4, zeros(2, 5), ValueError, r"`initial g` must be \[B, T0, HQ\]"),
            (2, [1.0], TypeError, "`initial w` must be a tensor, got list"),
            (1, zeros(2, 5, 2, 6).long(), TypeError, "`initial v` must be real"),
            (3, zeros(2, 5, 2).float(), TypeError, "float64, got torch.float32; convert"),
            (1, zeros(2, 5, 2, 6).to("meta"), ValueError, "`initial v` on meta"),
        ],
    )
    def test_wrong_part(self, place, part, error, match):
        inputs = path_attention_inputs()
        initial = [inputs[n][:, :5] for n in TOKENS[1:]]
        initial[place] = part
        with pytest.raises(error, match=match):
            path_attention(**inputs, initial=tuple(initial))

    @pytest.mark.parametrize("parts", [3, 6, None])
    def test_wrong_number_of_parts(self, parts):
        inputs = path_attention_inputs()
        initial = torch.zeros(4) if parts is None else (inputs["k"],) * parts
        with pytest.raises(TypeError, match=r"must be a tuple \(k, v, w, beta\)"):
            path_attention(**inputs, initial=initial)

    @pytest.mark.parametrize("given", ["arguments", "initial"])
    def test_gates_on_one_side_only(self, given):
        inputs = path_attention_inputs()
        initial = tuple(inputs[n][:, :5] for n in TOKENS[1 : 5 if given == "arguments" else 6])
        if given == "initial":
            inputs["g"] = None
        with pytest.raises(ValueError, match="exactly where `g` is given, got"):
            path_attention(**inputs, initial=initial)

    def test_packed_sequences(self):
        inputs = path_attention_inputs(B=1, T=30, num_sequences=2)
        initial = tuple(inputs[n][:, :5] for n in TOKENS[1:])
        with pytest.raises(ValueError, match="`initial` must be None where `cu_seqlens`"):
            path_attention(**inputs, initial=initial)

    def test_an_absent_gate_may_be_none(self):
        inputs = path_attention_inputs(decay=None)
        parts = tuple(inputs[n] for n in TOKENS[1:5])
        o = path_attention(**inputs, initial=(*parts, None))
        assert torch.equal(o, path_attention(**inputs, initial=parts))


# Tokens before and after the first query, and what else there is.
SHAPES = {
    "narrow": (1000, 300, {"K": 64, "V": 64, "decay": None}),
    "wide": (1000, 300, {"K": 128, "V": 128, "decay": None}),
    "wide, no multiple of anything": (913, 77, {"K": 128, "V": 128, "B": 2, "decay": None}),
    "wide, few queries": (1919, 3, {"K": 128, "V": 128, "decay": None}),
    "wide, grouped heads, sinks": (
        640, 200, {"K": 128, "V": 128, "HQ": 6, "with_sinks": True, "decay": None},
    ),
    "wide, few before": (70, 500, {"K": 128, "V": 128, "decay": None}),
    "gates": (700, 150, {"K": 64, "V": 64, "B": 2}),
    "gates, grouped heads, sinks, window": (
        700, 300, {"K": 64, "V": 64, "HQ": 4, "with_sinks": True, "window": 400},
    ),
    "window": (700, 300, {"K": 128, "V": 128, "window": 100, "decay": None}),
    "widest": (300, 200, {"K": 256, "V": 256}),
    "not powers of two": (333, 150, {"K": 48, "V": 80}),
    "no queries": (200, 0, {"K": 64, "V": 64}),
    "nothing before": (0, 200, {"K": 64, "V": 64}),
}  # fmt: skip
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2.5e-3, torch.float32: 5e-6}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_agree_with_float64(name, dtype, poisoned):
    T0, T, sizes = SHAPES[name]
    sizes = dict(sizes)
    options = {"window": sizes.pop("window", None)}
    inputs = path_attention_inputs(
        **{"B": 1, "T": T0 + T, "H": 2, **sizes}, dtype=dtype, device="cuda"
    )
    actual = differentiate(after, T0, inputs, impl="triton", **options)
    again = differentiate(after, T0, inputs, impl="triton", **options)
    torch.use_deterministic_algorithms(False)
    expected = differentiate(whole, T0, inputs, torch.float64, impl="chunk", **options)
    for label, e in expected.items():
        assert torch.equal(actual[label], again[label]), label
        if e.numel() and e.any():
            assert relative_error(actual[label], e) < LIMITS[dtype], label
        else:
            assert not actual[label].any(), label


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["wide", "narrow", "wide, grouped heads, sinks"])
def test_portable_kernels_agree_with_float64(name, poisoned, monkeypatch):
    pytest.importorskip("triton")
    from householder.ops.path_attention.triton import problem

    monkeypatch.setattr(problem, "is_hopper", lambda _: False)
    test_kernels_agree_with_float64(name, torch.bfloat16, None)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [None, 0.1])
def test_kernels_compile_into_one_graph(decay):
    inputs = path_attention_inputs(1, 700, 2, 64, 64, decay=decay, dtype=torch.bfloat16)
    inputs = {n: x.cuda() if x is not None else x for n, x in inputs.items()}
    compiled = torch.compile(after, fullgraph=True)
    actual = differentiate(compiled, 333, inputs)
    for name, e in differentiate(after, 333, inputs).items():
        assert torch.equal(actual[name], e), name


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [None, 0.1])
def test_kernels_are_captured_in_a_graph(decay):
    inputs = path_attention_inputs(1, 700, 2, 128, 128, decay=decay, dtype=torch.bfloat16)
    inputs = {n: x.cuda() if x is not None else x for n, x in inputs.items()}
    expected = differentiate(after, 450, inputs)  # compiles the kernels
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if x is not None}
    do = draw(expected["o"].shape, expected["o"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = after(450, leaves)
        found = torch.autograd.grad(o, leaves.values(), do)
    graph.replay()
    for x, e in zip((o, *found), expected.values(), strict=True):
        assert torch.equal(x, e)
