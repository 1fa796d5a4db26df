"""`path_attention` on the CPU: the blocked form against the definition, in values and gradients."""

import functools
import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize, scaled_dot_product_attention

from householder import path_attention
from householder.ops.path_attention.chunk import gradients, outputs, portions, tree
from householder.testing import path_attention_inputs, relative_error

from .agreement import cast, check_chunk, compare

NAMES = ("q", "k", "v", "w", "beta", "g", "sinks")


def run(inputs, impl, **options):
    """Return outputs and all gradients, by name, for fixed random cotangents."""
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in inputs.items()
        if name in NAMES and x is not None
    }
    o = path_attention(**{**inputs, **leaves, **options}, impl=impl)
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)
    o.backward(do)
    return {"o": o} | {f"d{name}": x.grad for name, x in leaves.items()}


check = functools.partial(check_chunk, run)


@pytest.fixture(params=["small portions and tiles", "one portion"])
def sizes(request, monkeypatch):
    """Run with one head and a few rows at a time, and all together."""
    small = request.param != "one portion"
    elements = 1 if small else 1 << 30
    for module, name in ((portions, "PORTION_ELEMENTS"), (tree, "TILE_ELEMENTS")):
        monkeypatch.setattr(module, name, {"cpu": elements, "cuda": elements})
    if small:
        monkeypatch.setattr(tree, "MIN_TILE_ROWS", 5)
        monkeypatch.setattr(tree, "MAX_TILE_COLUMNS", 7)


def logits_from_dense_products(inputs, scale):
    """Write the definition once more, with every product of reflectors as a dense matrix."""
    q, k, w, beta = (inputs[name] for name in ("q", "k", "w", "beta"))
    T, K = k.shape[1], k.shape[-1]
    logits = torch.full((T, T), -math.inf, dtype=q.dtype)
    for i in range(T):
        vector, decay = q[0, i, 0], 0.0
        for j in range(i, -1, -1):
            logits[i, j] = scale * k[0, j, 0] @ vector + decay
            reflector = torch.eye(K, dtype=q.dtype) - beta[0, j, 0] * torch.outer(
                w[0, j, 0], w[0, j, 0]
            )
            vector = reflector @ vector
            decay = decay + inputs["g"][0, j, 0]
            if j == i:
                # The reflector of the query's own token acts on it, that of the key's does not.
                assert torch.equal(reflector @ q[0, i, 0], vector)
    return logits


@pytest.mark.parametrize("impl", ["reference", "chunk"])
def test_the_definition(impl):
    inputs = path_attention_inputs(B=1, T=20, H=1, K=4)
    logits = logits_from_dense_products(inputs, 0.3)
    expected = logits.softmax(-1) @ inputs["v"][0, :, 0]
    actual = path_attention(**inputs, scale=0.3, impl=impl)[0, :, 0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("HQ", [2, 6])
@pytest.mark.parametrize("decay", [None, 0.1])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_equals_the_definition(HQ, decay, with_sinks):
    check(path_attention_inputs(T=83, HQ=HQ, decay=decay, with_sinks=with_sinks))


@pytest.mark.parametrize("T", [0, 1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 129])
@pytest.mark.parametrize("K", [8, 32])
def test_any_length(T, K):
    inputs = path_attention_inputs(T=T, K=K)
    if T:
        check(inputs, factor=10.0 if T < 3 else 2.0)
    else:
        assert path_attention(**inputs).shape == (2, 0, 2, 6)
        assert all(x.shape[1] == 0 for name, x in run(inputs, "chunk").items() if name != "o")


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("decay", [None, 0.01])
def test_identities_projections_and_reflections(strength, decay):
    check(path_attention_inputs(T=70, K=16, strength=strength, decay=decay))


def test_no_reflectors_is_plain_attention():
    inputs = path_attention_inputs(T=100, HQ=6, strength=0.0, decay=None)
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(path_attention(**inputs).transpose(1, 2), expected)


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_repeated_and_nearly_parallel_reflectors(strength):
    inputs = path_attention_inputs(T=100, K=32, strength=strength, dtype=torch.float32)
    direction = inputs["w"][:, :1, :1]
    inputs["w"] = normalize(direction + 1e-4 * inputs["w"], dim=-1)
    inputs["w"][:, 50:] = direction
    # All reflectors of a chunk nearly parallel, β = 2: the entries of its inverse triangle are ±2
    # instead of decaying, and each of its rounding errors counts once per reflector.
    check(inputs, factor=10.0 if strength == 2.0 else 2.0)


def test_zero_reflectors_change_nothing():
    inputs = path_attention_inputs(T=70)
    inputs["w"] = torch.zeros_like(inputs["w"])
    without = path_attention(**{**inputs, "beta": torch.zeros_like(inputs["beta"])})
    torch.testing.assert_close(path_attention(**inputs), without, rtol=1e-13, atol=1e-13)
    check(inputs)


@pytest.mark.parametrize(("K", "V"), [(5, 16), (16, 5), (64, 96), (1, 1)])
def test_any_key_and_value_dimensions(K, V):
    check(path_attention_inputs(T=70, K=K, V=V), factor=4.0 if K == 1 else 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [None, 0.1])
def test_accuracy_in_every_dtype(dtype, decay):
    inputs = path_attention_inputs(
        T=150, H=4, HQ=8, K=32, V=32, dtype=dtype, decay=decay, with_sinks=True
    )
    results = run(inputs, "chunk")
    assert {x.dtype for x in results.values()} == {dtype}
    check(inputs)


@pytest.mark.parametrize("decay", [2.0, 20.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strong_gates_neither_overflow_nor_lose_gradients(decay, dtype):
    check(path_attention_inputs(T=200, decay=decay, dtype=dtype))


def test_weak_gates_after_a_strong_one_keep_their_precision():
    inputs = path_attention_inputs(T=120, decay=0.05, dtype=torch.float32)
    inputs["g"][:, 10] = -3000.0
    check(inputs)


@pytest.mark.usefixtures("sizes")
def test_a_gate_of_minus_infinity_hides_all_earlier_tokens():
    inputs = path_attention_inputs(T=100)
    inputs["g"][:, 40] = -math.inf
    inputs["g"][:, 52] = -math.inf
    o = path_attention(**inputs)
    tail = {name: x[:, 52:] for name, x in inputs.items() if name in NAMES and x is not None}
    torch.testing.assert_close(o[:, 52:], path_attention(**tail), rtol=1e-12, atol=1e-12)
    check(inputs)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_large_logits(scale):
    # The gradient makes the logits anew, and their rounding grows with them.
    inputs = path_attention_inputs(T=100, dtype=torch.float32)
    check(inputs, factor=4.0 if scale > 1 else 2.0, scale=scale)


def test_scale_does_not_act_on_gates():
    inputs = path_attention_inputs(T=60, K=16, decay=0.5)
    expected = path_attention(**{**inputs, "q": inputs["q"] * 0.25}, scale=1.0)
    torch.testing.assert_close(path_attention(**inputs), expected, rtol=1e-12, atol=1e-12)
    check(inputs, scale=-3.0)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("window", [1, 2, 5, 8, 11, 16, 17, 40, 99, 100, 1000])
def test_window(window):
    check(
        path_attention_inputs(T=100, HQ=4, with_sinks=True),
        # Of one value little is left but rounding.
        factor=4.0 if window < 3 else 2.0,
        window=window,
    )


def test_a_window_over_all_tokens_changes_no_bit():
    inputs = path_attention_inputs(T=100)
    assert torch.equal(path_attention(**inputs, window=100), path_attention(**inputs))


def test_a_window_does_not_pay_for_what_it_hides(logits_of):
    inputs = path_attention_inputs(B=1, T=2000, H=1)
    computed = logits_of(outputs)
    path_attention(**inputs)
    whole = sum(computed)
    assert 0.95 < whole / (2000 * 2000 / 2) < 1.0  # every pair once
    computed.clear()
    path_attention(**inputs, window=50)
    assert sum(computed) < 2 * 50 * 2000


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(("HQ", "decay", "window"), [(2, 0.1, None), (4, None, None), (4, 0.1, 9)])
def test_packed_equals_separate(HQ, decay, window):
    packed = path_attention_inputs(B=1, T=300, HQ=HQ, num_sequences=7, decay=decay)
    o = path_attention(**packed, window=window)
    bounds = packed["cu_seqlens"].tolist()
    assert bounds[0] == bounds[1] == 0  # an empty sequence
    check(packed, window=window)
    for lo, hi in itertools.pairwise(bounds):
        alone = {n: x[:, lo:hi] for n, x in packed.items() if n in NAMES and x is not None}
        expected = path_attention(**alone, window=window)
        torch.testing.assert_close(o[:, lo:hi], expected, rtol=1e-12, atol=1e-12)


def test_hundreds_of_short_sequences():
    check(path_attention_inputs(B=1, T=500, H=1, num_sequences=300))


def test_another_sequence_cannot_reach_in():
    packed = path_attention_inputs(B=1, T=200, num_sequences=5)
    expected = path_attention(**packed)
    lo, hi = packed["cu_seqlens"].tolist()[2:4]
    assert lo < hi
    packed["v"][:, lo:hi] = math.nan
    packed["w"][:, lo:hi] = math.nan
    o = path_attention(**packed)
    others = torch.cat([torch.arange(lo), torch.arange(hi, 200)])
    assert torch.equal(o[:, others], expected[:, others])


def test_the_future_cannot_reach_back():
    inputs = path_attention_inputs(T=100)
    expected = path_attention(**inputs)[:, :50]
    for name in ("k", "v", "w", "beta", "g"):
        inputs[name][:, 50:] = 1e6
    torch.testing.assert_close(path_attention(**inputs)[:, :50], expected, rtol=1e-13, atol=1e-13)


def test_a_batch_row_does_not_depend_on_the_others():
    inputs = path_attention_inputs(B=3, T=90, dtype=torch.float32)
    whole = path_attention(**inputs)
    alone = path_attention(**{n: None if x is None else x[1:2] for n, x in inputs.items()})
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-5, atol=1e-6)


def test_same_bits_every_time():
    inputs = path_attention_inputs(T=200, dtype=torch.float32, with_sinks=True)
    first, second = run(inputs, "chunk"), run(inputs, "chunk")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides_do_not_matter():
    inputs = path_attention_inputs(T=70, HQ=4)
    expected = path_attention(**inputs)
    strided = {
        name: None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1)
        for name, x in inputs.items()
    }
    assert not strided["k"].is_contiguous()
    assert torch.equal(path_attention(**strided), expected)
    check(strided)


def test_autocast_does_not_reach_inside():
    inputs = path_attention_inputs(T=70, dtype=torch.float32)
    expected = run(inputs, "chunk")
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(inputs, "chunk")
        reference = path_attention(**inputs, impl="reference")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(reference, path_attention(**inputs, impl="reference"))


def test_dims_of_one_gradient_do_not_need_the_others():
    inputs = path_attention_inputs(T=70, HQ=4, with_sinks=True)
    every = run(inputs, "chunk")
    for name in NAMES:
        leaf = inputs[name].clone().requires_grad_()
        o = path_attention(**{**inputs, name: leaf})
        generator = torch.Generator().manual_seed(1)
        o.backward(torch.randn(o.shape, generator=generator, dtype=torch.float64))
        assert torch.equal(leaf.grad, every[f"d{name}"])


def test_error_does_not_grow_with_the_sequence():
    """2,048 orthogonal reflections apart, float32 logits are as good as 32 apart.

    A vector is multiplied log₂(T / C) times, not once per chunk.
    """
    errors = []
    for T in (64, 2048):
        inputs = path_attention_inputs(B=1, T=T, H=1, K=32, strength=2.0, decay=None)
        inputs = cast(inputs, torch.float32)
        inputs["beta"] = 2 / inputs["w"].square().sum(-1)
        exact = path_attention(**cast(inputs, torch.float64))
        errors.append(relative_error(path_attention(**inputs), exact))
    assert errors[1] < 4 * errors[0] < 1e-5


def test_memory_of_both_passes_is_linear(monkeypatch):
    """No tensor has more than a fixed multiple of T elements, but for the tiles' fixed size."""
    monkeypatch.setattr(tree, "TILE_ELEMENTS", {"cpu": 1})
    inputs = path_attention_inputs(B=1, T=4096, H=1, K=8, V=8, dtype=torch.float32)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest.append(x.untyped_storage().nbytes())
            return out

    p = tuple(inputs[name] for name in NAMES)
    with Watch():
        o, lse = outputs.forward(*p, 0.3, None, None)
        gradients.backward(torch.ones_like(o), *p, 0.3, None, None, o, lse)
    assert max(largest) <= 4 * 4096 * 8 * 4


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 60),
    H=st.integers(1, 3),
    group=st.integers(1, 3),
    K=st.integers(2, 9),
    V=st.integers(1, 9),
    gated=st.booleans(),
    with_sinks=st.booleans(),
    packed=st.booleans(),
    window=st.none() | st.integers(1, 60),
    seed=st.integers(0, 2**16),
)
def test_any_shape(B, T, H, group, K, V, gated, with_sinks, packed, window, seed):
    inputs = path_attention_inputs(
        1 if packed else B,
        T,
        H,
        K,
        V,
        HQ=H * group,
        decay=0.3 if gated else None,
        with_sinks=with_sinks,
        num_sequences=B + 1 if packed else None,
        seed=seed,
    )
    results = (run(inputs, impl, window=window) for impl in ("chunk", "reference"))
    compare(*results)


class TestTransforms:
    """`torch.vmap` without what is optional, `torch.compile`, the registration; more in
    test_function_transforms.py.
    """

    def setup_method(self):
        self.inputs = path_attention_inputs(T=40, HQ=4, with_sinks=True)
        self.args = tuple(self.inputs[name] for name in NAMES)

    def test_vmap_without_gates_and_sinks(self):
        inputs = path_attention_inputs(B=1, T=60, num_sequences=4, HQ=4, decay=None)
        stacked = torch.stack([inputs["k"], inputs["k"].flip(1)])

        def f(k):
            return path_attention(**{**inputs, "k": k}, window=20)

        expected = torch.stack([f(stacked[0]), f(stacked[1])])
        torch.testing.assert_close(torch.func.vmap(f)(stacked), expected)

        def of(f):
            return torch.func.grad(lambda k: f(k).sin().sum())

        expected = torch.stack([of(f)(stacked[0]), of(f)(stacked[1])])
        torch.testing.assert_close(torch.func.vmap(of(f))(stacked), expected)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("num_sequences", [None, 4])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_compiles_without_graph_breaks(self, num_sequences, dtype):
        inputs = path_attention_inputs(B=1, T=60, num_sequences=num_sequences, dtype=dtype)
        compiled = torch.compile(path_attention, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**inputs, window=30), path_attention(**inputs, window=30))
        w = inputs["w"].clone().requires_grad_()
        traced = torch.autograd.grad(compiled(**{**inputs, "w": w}).sin().sum(), w)
        eager = torch.autograd.grad(path_attention(**{**inputs, "w": w}).sin().sum(), w)
        assert torch.equal(traced[0], eager[0])

    @pytest.mark.parametrize("optional", [True, False])
    def test_registration(self, optional):
        args = (*self.args[:5], *(self.args[5:] if optional else (None, None)), 0.3, 9, None)
        op = torch.ops.householder
        o, lse = op.path_attention.default(*args, "chunk")
        torch.library.opcheck(op.path_attention.default, (*args, "chunk"))
        torch.library.opcheck(
            op.path_attention_backward.default, (torch.ones_like(o), *args, o, lse, "chunk")
        )


class TestErrors:
    """Each names the argument, what was required, what came and the remedy."""

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"q": torch.zeros(2, 37, 8)}, ValueError, r"`q` must be \[B, T, HQ, K\]"),
            ({"v": torch.zeros(2, 37, 2, 1, 6)}, ValueError, r"`v` must be \[B, T, H, V\]"),
            ({"v": torch.zeros(2, 36, 2, 6)}, ValueError, r"`v` must be \[B, T, H, V\]"),
            ({"k": torch.zeros(2, 37, 1, 8)}, ValueError, r"`k` must be \[B, T, H, K\]"),
            ({"w": torch.zeros(2, 37, 2, 7)}, ValueError, r"`w` must be \[B, T, H, K\]"),
            ({"q": torch.zeros(2, 37, 3, 8)}, ValueError, "HQ = 3 and H = 2"),
            ({"beta": torch.zeros(2, 37)}, ValueError, r"`beta` must be \[B, T, H\]"),
            ({"g": torch.zeros(2, 37, 1)}, ValueError, r"`g` must be \[B, T, HQ\]"),
            ({"sinks": torch.zeros(3)}, ValueError, r"`sinks` must be \[HQ\]"),
            ({"w": [1.0]}, TypeError, "`w` must be a tensor, got list"),
            ({"q": torch.zeros(2, 37, 2, 8, dtype=torch.long)}, TypeError, "`q` must be real"),
            ({"impl": "fast"}, ValueError, '`impl` must be one of "auto", "triton"'),
            ({"window": 0}, ValueError, "`window` must be at least 1, got 0"),
            ({"window": 2.0}, TypeError, "`window` must be an int"),
            ({"scale": torch.ones(())}, TypeError, "`scale` must be a number, got a tensor"),
            ({"k": torch.zeros(2, 36, 2, 8)}, ValueError, r"come from `q` \[2, 37, 2, 8\] and `v`"),
            ({"q": torch.zeros(2, 37, 2, 0)}, ValueError, "`q` must have K ≥ 1 entries a head"),
            ({"g": torch.zeros(2, 37, 2, device="meta")}, ValueError, "one device"),
            ({"cu_seqlens": torch.tensor([0, 37])}, ValueError, "int32"),
            ({"cu_seqlens": torch.tensor([0, 37], dtype=torch.int32)}, ValueError, "B = 1"),
        ],
    )
    def test_wrong_argument(self, change, error, match):
        with pytest.raises(error, match=match):
            path_attention(**{**path_attention_inputs(), **change})

    @pytest.mark.parametrize("bounds", [[0, 5], [1, 9], [0, 6, 4, 9]])
    def test_wrong_bounds(self, bounds):
        inputs = path_attention_inputs(B=1, T=9)
        inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(ValueError, match="must rise from 0 to T = 9"):
            path_attention(**inputs)


def test_options_are_checked_by_type_whatever_was_called_before():
    inputs = path_attention_inputs()
    for known, other in ((2, 2.0), (1, True)):
        path_attention(**inputs, window=known)
        with pytest.raises(TypeError, match="`window` must be an int"):
            path_attention(**inputs, window=other)


def test_forward_mode_is_refused_with_the_remedy():
    inputs = path_attention_inputs(B=1, T=3, H=1, K=2, V=2)
    v = inputs.pop("v")
    with pytest.raises(NotImplementedError, match="path_attention: this form has no forward-mode"):
        torch.func.jvp(lambda x: path_attention(v=x, **inputs), (v,), (v,))


def test_every_argument_is_documented():
    documentation = inspect.getdoc(path_attention)
    for name in inspect.signature(path_attention).parameters:
        assert f"{name}: " in documentation
