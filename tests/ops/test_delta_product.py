"""`delta_product` on the CPU: the chunked form against the definition, in values and gradients."""

import functools
import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from householder import delta_product, delta_product_step
from householder.ops import _dispatch
from householder.ops.delta_product import chunk, op
from householder.testing import delta_product_inputs, relative_error

from .agreement import cast, check_chunk

NAMES = ("q", "k", "v", "beta", "g", "initial_state")


def run(inputs, impl, **options):
    """Return outputs and all gradients, by name, for fixed random cotangents."""
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in inputs.items()
        if name in NAMES and x is not None
    }
    arguments = {**inputs, **leaves, **options}
    o, state = delta_product(**arguments, output_final_state=True, impl=impl)
    generator = torch.Generator().manual_seed(1)
    do, dstate = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for x in (o, state)
    )
    torch.autograd.backward([o, state], [do, dstate])
    results = {"o": o, "final_state": state}
    return results | {f"d{name}": x.grad for name, x in leaves.items()}


check = functools.partial(check_chunk, run)


@pytest.fixture(params=["many segments", "one segment"])
def segments(request, monkeypatch):
    """Run with chunks worked through one at a time, and all together."""
    elements = 1 if request.param == "many segments" else 1 << 30
    monkeypatch.setattr(chunk, "SEGMENT_ELEMENTS", {"cpu": elements, "cuda": elements})


@pytest.mark.usefixtures("segments")
@pytest.mark.parametrize("N", [1, 2, 3, 4])
@pytest.mark.parametrize("decay", [None, 0.1])
def test_equals_the_definition(N, decay):
    check(delta_product_inputs(T=83, N=N, decay=decay, HV=4))


@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 63, 64, 65, 129])
@pytest.mark.parametrize("N", [1, 3])
def test_any_length(T, N):
    inputs = delta_product_inputs(T=T, N=N)
    if T:
        check(inputs)
    else:
        o, state = delta_product(**inputs, output_final_state=True)
        assert o.shape == (2, 0, 2, 6)
        assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("impl", ["chunk", "reference"])
def test_an_empty_batch(impl):
    results = run(delta_product_inputs(B=0, T=70), impl)
    assert results["o"].shape == (0, 70, 2, 6)
    assert results["dk"].shape == (0, 70, 2, 2, 8)
    assert results["dinitial_state"].shape == results["final_state"].shape == (0, 2, 8, 6)


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("decay", [None, 0.01])
def test_identities_projections_and_reflections(strength, decay):
    check(delta_product_inputs(T=70, strength=strength, decay=decay))


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_repeated_and_nearly_parallel_keys(strength):
    inputs = delta_product_inputs(T=100, N=2, strength=strength, decay=None, dtype=torch.float32)
    direction = inputs["k"][:, :1, :1]
    inputs["k"] = torch.nn.functional.normalize(direction + 1e-4 * inputs["k"], dim=-1)
    inputs["k"][:, 50:] = direction
    # All reflectors of a chunk nearly parallel, β = 2: the entries of its inverse triangle are ±2
    # instead of decaying, and each of its rounding errors counts once per reflector.
    check(inputs, factor=10.0 if strength == 2.0 else 2.0)


def test_zero_keys_change_nothing():
    inputs = delta_product_inputs(T=70, decay=None)
    inputs["k"] = torch.zeros_like(inputs["k"])
    _, state = delta_product(**inputs, output_final_state=True)
    assert torch.equal(state, inputs["initial_state"])
    check(inputs)


@pytest.mark.parametrize(("K", "V"), [(5, 16), (16, 5), (64, 96)])
def test_any_key_and_value_dimensions(K, V):
    check(delta_product_inputs(T=70, K=K, V=V))


def test_scalar_keys_and_values():
    inputs = delta_product_inputs(T=70, K=1, V=1)
    actual, expected = run(inputs, "chunk"), run(inputs, "reference")
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-12, name


@pytest.mark.parametrize("N", [7, 40, 70])
def test_many_reflectors_a_token(N):
    # A chunk is at least one token, however many rows that is.
    check(delta_product_inputs(T=9, N=N, H=1, K=64), factor=4.0 if N > 64 else 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [None, 0.1])
def test_accuracy_in_every_dtype(dtype, decay):
    inputs = delta_product_inputs(T=150, K=32, V=32, dtype=dtype, decay=decay)
    o, state = delta_product(**inputs, output_final_state=True)
    assert o.dtype == dtype
    assert state.dtype == torch.float32
    check(inputs)


@pytest.mark.parametrize("decay", [2.0, 20.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strong_gates_neither_overflow_nor_lose_gradients(decay, dtype):
    """At the mildest the gates of one chunk sum to about −128."""
    inputs = delta_product_inputs(T=200, N=1, decay=decay, dtype=dtype)
    assert inputs["g"][:, :64].sum(1).max() < -50
    check(inputs)


def test_weak_gates_after_a_strong_one_keep_their_precision():
    inputs = delta_product_inputs(T=120, N=1, decay=0.05, dtype=torch.float32)
    inputs["g"][:, 10] = -3000.0
    check(inputs)


def test_a_gate_of_minus_infinity_resets_the_state():
    inputs = delta_product_inputs(T=100)
    inputs["g"][:, 40] = -math.inf
    o, _ = delta_product(**inputs)
    tail = {name: None if x is None else x[:, 40:] for name, x in inputs.items() if name in "qkvg"}
    fresh, _ = delta_product(**tail, beta=inputs["beta"][:, 40:])
    torch.testing.assert_close(o[:, 40:], fresh, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("segments")
@pytest.mark.parametrize(("N", "HV", "decay"), [(1, 2, 0.1), (2, 4, None), (3, 2, 0.1)])
def test_packed_equals_separate(N, HV, decay):
    packed = delta_product_inputs(B=1, T=300, N=N, HV=HV, num_sequences=7, decay=decay)
    actual = run(packed, "chunk")
    bounds = packed["cu_seqlens"].tolist()
    assert bounds[0] == bounds[1] == 0  # an empty sequence
    check(packed)
    for s, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        alone = {
            name: x if x is None else x[s : s + 1] if name == "initial_state" else x[:, lo:hi]
            for name, x in packed.items()
            if name != "cu_seqlens"
        }
        o, state = delta_product(**alone, output_final_state=True)
        torch.testing.assert_close(actual["o"][:, lo:hi], o, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(actual["final_state"][s], state[0], rtol=1e-12, atol=1e-12)


def test_hundreds_of_short_sequences():
    check(delta_product_inputs(B=1, T=500, H=1, num_sequences=300))


@pytest.mark.parametrize("cut", [1, 37, 64, 100])
def test_segmented_equals_whole(cut):
    inputs = delta_product_inputs(T=130)
    o, state = delta_product(**inputs, output_final_state=True)
    sequences = ("q", "k", "v", "beta", "g")
    first = {name: inputs[name][:, :cut] for name in sequences}
    second = {name: inputs[name][:, cut:] for name in sequences}
    o1, between = delta_product(
        **first, initial_state=inputs["initial_state"], output_final_state=True
    )
    o2, end = delta_product(**second, initial_state=between, output_final_state=True)
    torch.testing.assert_close(torch.cat([o1, o2], 1), o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, state, rtol=1e-12, atol=1e-12)


def test_a_step_from_a_state_in_half_precision_is_computed_in_float32():
    inputs = cast(delta_product_inputs(T=1), torch.bfloat16)
    token, state = {name: inputs[name][:, 0] for name in NAMES[:5]}, inputs["initial_state"]
    o, actual = delta_product_step(**token, state=state)
    assert (o.dtype, actual.dtype) == (torch.bfloat16, torch.float32)
    wide = {name: x.double() for name, x in token.items()}
    _, expected = delta_product_step(**wide, state=state.double())
    assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("decay", [None, 0.1])
def test_step_by_step_equals_whole(decay):
    inputs = delta_product_inputs(T=70, N=3, HV=4, decay=decay)
    whole, final = delta_product(**inputs, output_final_state=True)
    state = inputs["initial_state"]
    for t in range(70):
        token = {
            name: None if inputs[name] is None else inputs[name][:, t]
            for name in ("q", "k", "v", "beta", "g")
        }
        before = state.clone()
        o, after = delta_product_step(**token, state=state)
        assert torch.equal(state, before)  # the given state is not changed
        state = after
        torch.testing.assert_close(o, whole[:, t], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)


def test_a_batch_row_does_not_depend_on_the_others():
    inputs = delta_product_inputs(B=3, T=90, dtype=torch.float32)
    whole, _ = delta_product(**inputs)
    alone, _ = delta_product(**{n: None if x is None else x[1:2] for n, x in inputs.items()})
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-5, atol=1e-6)


def test_same_bits_every_time():
    inputs = delta_product_inputs(T=200, dtype=torch.float32)
    first, second = run(inputs, "chunk"), run(inputs, "chunk")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides_do_not_matter():
    inputs = delta_product_inputs(T=70)
    expected, _ = delta_product(**inputs)
    strided = {
        name: None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1)
        for name, x in inputs.items()
    }
    assert not strided["k"].is_contiguous()
    assert torch.equal(delta_product(**strided)[0], expected)
    check(strided)


def test_autocast_does_not_reach_inside():
    inputs = delta_product_inputs(T=70, dtype=torch.float32)
    expected = run(inputs, "chunk")
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(inputs, "chunk")
        reference, _ = delta_product(**inputs, impl="reference")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(reference, delta_product(**inputs, impl="reference")[0])


def test_scale():
    inputs = delta_product_inputs(T=20, K=16)
    default, _ = delta_product(**inputs)
    doubled, _ = delta_product(**inputs, scale=0.5)
    torch.testing.assert_close(doubled, 2 * default, rtol=1e-13, atol=1e-13)
    check(inputs, scale=-3.0)


def test_only_the_final_state_is_used():
    inputs = delta_product_inputs(T=70)
    grads = []
    for impl in ("chunk", "reference"):
        k = inputs["k"].clone().requires_grad_()
        _, state = delta_product(**{**inputs, "k": k}, output_final_state=True, impl=impl)
        grads.append(torch.autograd.grad(state.square().sum(), k)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_state_drift_of_orthogonal_reflections_is_rounding():
    """100,000 float32 reflections of an orthogonal state stay where exact arithmetic puts them.

    Rounding errors of independent steps add like a random walk, eps·√(steps); a systematic loss
    would show as eps·steps, 300 times more. The float64 run has the same float32 coefficients,
    whose own rounding leaves each factor orthogonal only to eps.
    """
    T, K = 100_000, 16
    inputs = delta_product_inputs(
        B=1, T=T, N=1, H=1, K=K, V=K, strength=2.0, decay=None, dtype=torch.float32
    )
    # The reflection of a float32 vector is orthogonal only with the β of that vector.
    inputs["beta"] = 2 / inputs["k"].square().sum(-1)
    inputs["v"] = torch.zeros_like(inputs["v"])
    inputs["initial_state"] = torch.eye(K).expand(1, 1, K, K)
    _, state = delta_product(**inputs, output_final_state=True)
    _, exact = delta_product(**cast(inputs, torch.float64), output_final_state=True)
    eps = torch.finfo(torch.float32).eps
    assert eps < relative_error(state, exact) < 4 * eps * math.sqrt(T)
    assert relative_error(state[0, 0].mT @ state[0, 0], torch.eye(K)) < 16 * eps * math.sqrt(T)


def test_the_cost_of_queries_is_paid_once_a_token(monkeypatch):
    """With N reflectors the attention of a chunk is [C, C·N], and not [C·N, C·N]."""
    shapes = []
    mask = chunk.Rows.mask_attention_

    def spy(self, x):
        shapes.append(tuple(x.shape[1:]))
        return mask(self, x)

    monkeypatch.setattr(chunk.Rows, "mask_attention_", spy)
    delta_product(**delta_product_inputs(T=70, N=4))
    C = chunk.chunk_tokens(4, 8)
    assert shapes
    assert set(shapes) == {(C, 4 * C)}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 50),
    N=st.integers(1, 5),
    H=st.integers(1, 3),
    group=st.integers(1, 3),
    K=st.integers(3, 9),
    V=st.integers(1, 9),
    gated=st.booleans(),
    packed=st.booleans(),
    with_state=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(B, T, N, H, group, K, V, gated, packed, with_state, seed):
    check(
        delta_product_inputs(
            1 if packed else B,
            T,
            N,
            H,
            K,
            V,
            HV=H * group,
            decay=0.3 if gated else None,
            num_sequences=B + 1 if packed else None,
            with_initial_state=with_state,
            seed=seed,
        ),
        # Rounding of tiny problems is a lottery of few draws.
        factor=10.0,
    )


class TestTransforms:
    """`torch.vmap` over what may be packed, `torch.compile`, the registration; more in
    test_function_transforms.py.
    """

    def setup_method(self):
        self.inputs = delta_product_inputs(T=40, HV=4)
        self.args = tuple(self.inputs[name] for name in NAMES)

    def test_vmap_over_packed_sequences(self):
        inputs = delta_product_inputs(B=1, T=60, num_sequences=4, HV=4)
        k = torch.stack([inputs["k"], inputs["k"].flip(1)])

        def f(k):
            return delta_product(**{**inputs, "k": k})[0]

        torch.testing.assert_close(torch.func.vmap(f)(k), torch.stack([f(k[0]), f(k[1])]))

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("num_sequences", [None, 4])
    def test_compiles_without_graph_breaks(self, num_sequences):
        inputs = delta_product_inputs(B=1, T=60, num_sequences=num_sequences)
        compiled = torch.compile(delta_product, fullgraph=True, backend="aot_eager")
        o, _ = compiled(**inputs)
        assert torch.equal(o, delta_product(**inputs)[0])
        k = inputs["k"].clone().requires_grad_()
        traced = torch.autograd.grad(compiled(**{**inputs, "k": k})[0].sin().sum(), k)
        eager = torch.autograd.grad(delta_product(**{**inputs, "k": k})[0].sin().sum(), k)
        assert torch.equal(traced[0], eager[0])

    def test_registration(self):
        args = (*self.args[:5], 0.3, self.args[5], None)
        saved = torch.ops.householder.delta_product.default(*args, True, "chunk")
        do, dstate = torch.ones_like(saved[0]), torch.ones_like(saved[1])
        torch.library.opcheck(torch.ops.householder.delta_product.default, (*args, True, "chunk"))
        torch.library.opcheck(
            torch.ops.householder.delta_product_backward.default,
            (do, dstate, *args, *saved[2:], "chunk"),
        )

        torch.library.opcheck(
            torch.ops.householder.delta_product_backward_anew.default,
            (do, dstate, *args, "chunk"),
            test_utils=("test_schema", "test_faketensor"),
        )

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_forward_mode_is_refused_with_gradients_off_too(self):
        inputs = delta_product_inputs(B=1, T=3, N=2, H=1, K=2, V=2)
        with torch.no_grad(), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(inputs[name], inputs[name]) for name in NAMES}
            with pytest.raises(NotImplementedError, match=r'forward-mode .* use impl="reference"'):
                delta_product(**duals)

    def test_forward_mode_of_transforms_is_refused(self):
        inputs = delta_product_inputs(B=1, T=3, N=2, H=1, K=2, V=2)
        v = inputs.pop("v")
        for transform in (torch.func.jacfwd, lambda f: torch.func.vmap(torch.func.jacfwd(f))):
            batch = v if transform is torch.func.jacfwd else torch.stack([v, v])
            with pytest.raises(NotImplementedError, match="delta_product: this form has no forw"):
                transform(lambda x: delta_product(v=x, **inputs)[0])(batch)


def kept_for_the_gradient(call):
    """Return what `call` gives, and how many numbers it keeps that are not its inputs'."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = call()
    return outputs, kept


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("num_sequences", [None, 4])
def test_recomputing_keeps_the_inputs_alone_and_changes_no_bit(num_sequences, compiled):
    inputs = {
        name: x.requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in delta_product_inputs(
            B=1, T=130, HV=4, decay=0.1, num_sequences=num_sequences
        ).items()
    }
    inputs = {name: x for name, x in inputs.items() if x is not None}
    leaves = [x for x in inputs.values() if x.requires_grad]
    storages = {x.untyped_storage().data_ptr() for x in inputs.values()}
    call = delta_product
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager_decomp_partition")
    results = []
    for recompute in (False, True):
        (o, state), kept = kept_for_the_gradient(
            lambda again=recompute: call(**inputs, output_final_state=True, recompute=again)
        )
        beside = sum(size for place, size in kept.items() if place not in storages)
        assert (beside == 0) == recompute
        results.append((o, state, *torch.autograd.grad(o.sin().sum() + state.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_gradient_asked_for_saves_nothing(monkeypatch):
    seen = []
    inner = op.delta_product_op
    monkeypatch.setattr(op, "delta_product_op", lambda *a: seen.append(a[-2]) or inner(*a))
    inputs = delta_product_inputs()
    delta_product(**inputs)
    delta_product(**{**inputs, "v": inputs["v"].clone().requires_grad_()})
    assert seen == [False, True]


class TestErrors:
    """Each names the argument, what was required, what came and the remedy."""

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"k": torch.zeros(2, 37, 2, 8)}, ValueError, r"`k` must be \[B, T, N, H, K\]"),
            ({"k": torch.zeros(2, 37, 3, 2, 8)}, ValueError, r"`k` must be .* got shape"),
            ({"v": torch.zeros(2, 37, 2, 6)}, ValueError, r"`v` must be .* v\.unsqueeze\(2\)"),
            ({"v": torch.zeros(2, 37, 2, 3, 6)}, ValueError, "multiple of the key heads"),
            ({"q": torch.zeros(2, 36, 2, 8)}, ValueError, r"`q` must be \[B, T, H, K\]"),
            ({"beta": torch.zeros(2, 37, 2)}, ValueError, r"`beta` must be \[B, T, N, HV\]"),
            ({"g": torch.zeros(2, 37, 1)}, ValueError, r"`g` must be \[B, T, HV\]"),
            ({"initial_state": torch.zeros(1, 2, 8, 6)}, ValueError, "`initial_state` must be"),
            (
                {"v": torch.zeros(2, 36, 2, 2, 6)},
                ValueError,
                r"`k` must be .* come from `v` \[2, 36, 2, 2, 6\] and `k` \[2, 37, 2, 2, 8\]",
            ),
            (
                {"k": torch.zeros(2, 37, 0, 2, 8), "v": torch.zeros(2, 37, 0, 2, 6)},
                ValueError,
                "N ≥ 1 values a token",
            ),
            ({"k": torch.zeros(2, 37, 2, 2, 0)}, ValueError, "`k` must have K ≥ 1 entries"),
            ({"scale": "1"}, TypeError, "`scale` must be a number, got '1'; give a float"),
            ({"scale": torch.ones(())}, TypeError, "`scale` must be a number, got a tensor"),
            ({"q": [1.0]}, TypeError, "`q` must be a tensor, got list"),
            ({"q": None}, TypeError, "`q` must be a tensor, got None; give one"),
            ({"q": torch.zeros(2, 37, 2, 8, dtype=torch.long)}, TypeError, "`q` must be real"),
            ({"impl": "fast"}, ValueError, '`impl` must be one of "auto", "triton"'),
            ({"g": torch.zeros(2, 37, 2, device="meta")}, ValueError, "one device"),
            ({"cu_seqlens": torch.tensor([0, 37])}, ValueError, "int32"),
            ({"cu_seqlens": torch.tensor([0, 37], dtype=torch.int32)}, ValueError, "B = 1"),
        ],
    )
    def test_wrong_argument(self, change, error, match):
        with pytest.raises(error, match=match):
            delta_product(**{**delta_product_inputs(), **change})

    @pytest.mark.parametrize("bounds", [[0, 5], [1, 9], [0, 6, 4, 9]])
    def test_wrong_bounds(self, bounds):
        inputs = delta_product_inputs(B=1, T=9, with_initial_state=False)
        inputs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(ValueError, match="must rise from 0 to T = 9"):
            delta_product(**inputs)

    def test_step_checks_too(self):
        inputs = delta_product_inputs(T=1)
        token = {name: inputs[name][:, 0] for name in ("q", "k", "v", "beta", "g")}
        with pytest.raises(ValueError, match=r"`state` must be \[B, HV, K, V\]"):
            delta_product_step(**token, state=torch.zeros(2, 2, 6, 8))
        state = inputs["initial_state"]
        with pytest.raises(TypeError, match="`scale` must be a number"):
            delta_product_step(**token, state=state, scale=torch.ones(()))
        none = {name: token[name][:, :0] for name in ("k", "v", "beta")}
        with pytest.raises(ValueError, match="N ≥ 1 values a token"):
            delta_product_step(**{**token, **none}, state=state)
        token["k"] = token["k"][:, 0]
        with pytest.raises(ValueError, match=r"`k` must be \[B, N, H, K\]"):
            delta_product_step(**token, state=state)

    def test_a_state_in_place_has_memory_of_its_own(self):
        inputs = delta_product_inputs(T=1)
        token = {name: inputs[name][:, 0] for name in ("q", "k", "v", "beta", "g")}
        state = inputs["initial_state"][:1]
        with torch.no_grad(), pytest.raises(ValueError, match=r"give state\.clone\(\)"):
            delta_product_step(**token, state=state.expand(2, -1, -1, -1), inplace=True)


class TestChoiceOfForm:
    """An explicit choice runs or says why it cannot."""

    @pytest.fixture(autouse=True)
    def _not_interpreted(self, monkeypatch):
        monkeypatch.setattr(_dispatch, "INTERPRETING", False)
        monkeypatch.setattr(_dispatch, "HAS_TRITON", True)

    def make(self, K=16, V=16, N=2, dtype=torch.float32, device="cuda"):
        class Like:  # all that the choice may look at
            def __init__(self, *shape):
                self.shape, self.dtype, self.device = shape, dtype, torch.device(device)

        return Like(1, 5, 2, K), Like(1, 5, N, 2, K), Like(1, 5, N, 2, V)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({}, None),
            ({"K": 256, "V": 16, "N": 8, "dtype": torch.bfloat16}, None),
            ({"dtype": torch.float64}, "got `q` in torch.float64"),
            ({"K": 24}, "K must be a multiple of 16 up to 256, got 24"),
            ({"V": 272}, "V must be a multiple of 16 up to 256, got 272"),
            ({"N": 9}, "N must be at most 8, got 9"),
            ({"device": "cpu"}, "CUDA device, got cpu"),
        ],
    )
    def test_what_the_kernels_take(self, change, reason):
        actual = op.why_not_triton(*self.make(**change))
        assert actual is None if reason is None else reason in actual

    def test_without_triton(self, monkeypatch):
        monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
        assert "not installed" in op.why_not_triton(*self.make())

    def test_explicit_choice_raises_with_the_reason(self):
        inputs = delta_product_inputs()
        with pytest.raises(NotImplementedError, match='impl="triton" cannot run: it needs'):
            delta_product(**inputs, impl="triton")
        token = {name: inputs[name][:, 0] for name in ("q", "k", "v", "beta", "g")}
        state = inputs["initial_state"]
        with pytest.raises(NotImplementedError, match="gradients are on"):
            delta_product_step(**token, state=state, impl="triton")
        with torch.no_grad(), pytest.raises(NotImplementedError, match="CUDA device"):
            delta_product_step(**token, state=state, impl="triton")


def test_every_argument_is_documented():
    for function in (delta_product, delta_product_step):
        documentation = inspect.getdoc(function)
        for name in inspect.signature(function).parameters:
            assert f"{name}: " in documentation
