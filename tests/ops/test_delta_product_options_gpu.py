"""Options of `delta_product` on a GPU: the kernels against their steps in PyTorch and float64."""

import pytest
import torch
import torch.nn.functional as F

from householder import delta_product, delta_product_step
from householder.nn import DeltaProductMixer
from householder.ops.delta_product import activations
from householder.testing import relative_error

pytestmark = pytest.mark.gpu

ALL = {"qk_norm": "l2", "beta_activation": "2sigmoid", "gate_activation": "softplus"}
LEAVES = ("q", "k", "v", "beta", "g", "A_log", "dt_bias")
# As in the tests of the recurrence; long products of reflections with β near 2 come near them.
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 3e-6}
# B, T, N, H, HV, K, V
SHAPES = {
    "one reflection": (2, 300, 1, 2, 2, 128, 128),
    "two reflections, grouped heads": (2, 300, 2, 2, 4, 64, 64),
    "many heads": (1, 200, 1, 70, 70, 16, 16),
    "wide, not a power of two": (1, 200, 3, 1, 3, 192, 48),
    "one token": (3, 1, 4, 2, 2, 32, 32),
}
# The recurrence's own configurations have their own tests; here it is one of each kind.
CALLS = {
    "bfloat16": ("one reflection", torch.bfloat16, True),
    "bfloat16, no gate": ("one reflection", torch.bfloat16, False),
    "float16": ("two reflections, grouped heads", torch.float16, True),
    "float32": ("two reflections, grouped heads", torch.float32, True),
}


def projections(shape, dtype, gated=True, seed=0):
    B, T, N, H, HV, K, V = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to("cuda", dtype)

    x = {
        "q": 3 * normal(B, T, H, K),
        "k": 2 * normal(B, T, N, H, K),
        "v": normal(B, T, N, HV, V),
        "beta": 2 * normal(B, T, N, HV),
    }
    if gated:
        # Parameters stay in float32, as under autocast.
        parameters = {"A_log": normal(HV).float() - 1, "dt_bias": normal(HV).float()}
        x |= {"g": 2 * normal(B, T, HV), **parameters}
    return x


def options_for(x):
    return {n: o for n, o in ALL.items() if n != "gate_activation" or "g" in x}


def composed(x):
    """Do the options' steps in plain PyTorch, in float64, and leave the rest to the caller."""
    x = dict(x)
    for name in "qk":
        x[name] = x[name] / (x[name].square().sum(-1, keepdim=True) + 1e-6).sqrt()
    x["beta"] = 2 * x["beta"].sigmoid()
    if "g" in x:
        x["g"] = -x.pop("A_log").exp() * F.softplus(x["g"] + x.pop("dt_bias"))
    return x


def differentiate(call, x):
    leaves = {n: y.detach().clone().requires_grad_() for n, y in x.items()}
    o, state = call(leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.device, y.dtype)
        for y in (o, state)
    ]
    torch.autograd.backward([o, state], cotangents)
    return {"o": o, "final_state": state, **{f"d{n}": y.grad for n, y in leaves.items()}}


def fused(impl="triton"):
    return lambda x: delta_product(**x, **options_for(x), output_final_state=True, impl=impl)


def exact(x):
    wide = {n: y.double() for n, y in x.items()}
    return differentiate(
        lambda y: delta_product(**composed(y), output_final_state=True, impl="chunk"), wide
    )


def cancellation(label, x, expected):
    """Return how far the terms of a gradient that sums over all tokens cancel: by this factor."""
    if label not in ("dA_log", "ddt_bias"):
        return 1.0
    a = (x["g"] + x["dt_bias"]).double()
    terms = expected["dg"] if label == "ddt_bias" else expected["dg"] * F.softplus(a) / a.sigmoid()
    return (terms.abs().sum((0, 1)).norm() / expected[label].norm()).item()


@pytest.mark.parametrize("name", CALLS)
def test_outputs_and_gradients_agree_with_float64(name):
    shape, dtype, gated = CALLS[name]
    x = projections(SHAPES[shape], dtype, gated)
    actual, again, expected = differentiate(fused(), x), differentiate(fused(), x), exact(x)
    for label, e in expected.items():
        assert actual[label].dtype == (x.get(label[1:], actual[label])).dtype, label
        limit = LIMITS[dtype] * cancellation(label, x, expected)
        assert relative_error(actual[label], e) < limit, label
        assert torch.equal(actual[label], again[label]), f"{label} changes from run to run"


def differentiate_activations(x, form):
    """Return what the options' steps give and their gradients, without the recurrence."""
    leaves = {n: y.detach().clone().requires_grad_() for n, y in x.items() if n != "v"}
    if form == "composed":
        steps = composed(leaves)
        outputs = [steps[n] for n in ("q", "k", "beta", "g") if n in steps]
    else:
        tensors = [leaves.get(n) for n in ("q", "k", "beta", "g", "A_log", "dt_bias")]
        outputs = [y for y in activations.activate(*tensors, 1e-6, 2.0, form) if y is not None]
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.device, y.dtype)
        for y in outputs
    ]
    torch.autograd.backward(outputs, cotangents)
    return [y.detach() for y in outputs], {n: y.grad for n, y in leaves.items()}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_agree_with_float64(name, dtype, gated):
    x = projections(SHAPES[name], dtype, gated)
    check_activations(x, dtype)


def check_activations(x, dtype):
    wide = {n: y.double() for n, y in x.items()}
    outputs, grads = differentiate_activations(x, "triton")
    expected, expected_grads = differentiate_activations(wide, "composed")
    step = 2 * torch.finfo(dtype).eps
    for a, e in zip(outputs, expected, strict=True):
        assert a.isfinite().all()
        assert relative_error(a, e) < step + 1e-6
    for label, e in expected_grads.items():
        assert grads[label].dtype == x[label].dtype, label
        assert grads[label].isfinite().all(), label
        assert relative_error(grads[label], e) < step + 2e-6, label


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_vectors_and_extreme_logits(dtype):
    x = projections((2, 100, 2, 2, 2, 64, 64), dtype)
    x["q"][:, ::3] = 0
    x["k"][:, ::2] = 0
    for name in ("beta", "g"):
        x[name][:, 3::5], x[name][:, 4::5] = 100, -100
    check_activations(x, dtype)


def test_strides_and_batch_do_not_matter():
    x = projections((3, 100, 2, 2, 2, 64, 64), torch.bfloat16)
    o, state = fused()(x)
    swapped = {
        n: y.transpose(0, 1).contiguous().transpose(0, 1) if y.dim() > 1 else y
        for n, y in x.items()
    }
    alone = {n: y[1:2].contiguous() if y.dim() > 1 else y for n, y in x.items()}
    for a, b in zip(fused()(swapped), (o, state), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(fused()(alone), (o, state), strict=True):
        assert torch.equal(a, b[1:2])


def test_offsets_beyond_32_bits():
    T = 1_100_000
    q = torch.randn(1, T, 16, 128, device="cuda", dtype=torch.bfloat16)
    k = q[:, -10:].unsqueeze(2).contiguous()
    logits = torch.zeros(1, T, 1, 16, device="cuda")
    unit, *_ = activations.activate_op(q, q.unsqueeze(2), logits, None, None, None, 1e-6, None)
    expected, *_ = activations.activate_op(
        q[:, -10:], k, logits[:, -10:], None, None, None, 1e-6, None
    )
    assert q.numel() > 2**31
    assert torch.equal(unit[:, -10:], expected)


def test_registration():
    x = projections((2, 40, 2, 2, 4, 32, 32), torch.bfloat16)
    tensors = [x[n] for n in ("q", "k", "beta", "g", "A_log", "dt_bias")]
    torch.library.opcheck(activations.activate_op, (*tensors, 1e-6, 2.0))
    outputs = activations.activate_op(*tensors, 1e-6, 2.0)
    saved = (*outputs[:2], *outputs[4:], *tensors[2:])
    torch.library.opcheck(activations.activate_backward_op, (*outputs[:4], *saved, 2.0))


def test_raw_queries_and_keys_are_not_kept():
    """The gradient needs the unit vectors, which the recurrence keeps; not what they came from."""
    x = projections((2, 100, 2, 2, 2, 64, 64), torch.bfloat16)
    for y in x.values():
        y.requires_grad_()
    kept = set()
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda y: kept.add(y.untyped_storage().data_ptr()) or y, lambda y: y
    )
    with hooks:
        fused()(x)
    for name in ("q", "k"):
        assert x[name].untyped_storage().data_ptr() not in kept


def test_captured_in_a_graph():
    x = projections((2, 300, 2, 2, 2, 64, 64), torch.bfloat16)
    expected = differentiate(fused(), x)
    leaves = {n: y.clone().requires_grad_() for n, y in x.items()}
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.device, y.dtype)
        for y in (expected["o"], expected["final_state"])
    ]

    def both():
        results = fused()(leaves)
        return [*results, *torch.autograd.grad(results, list(leaves.values()), cotangents)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = both()
    graph.replay()
    torch.cuda.synchronize()
    for (label, e), a in zip(expected.items(), captured, strict=True):
        assert torch.equal(a, e), label


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gated", [False, True])
def test_compiles_without_graph_breaks(gated):
    x = projections((2, 100, 2, 2, 2, 64, 64), torch.bfloat16, gated)
    compiled = torch.compile(fused(), fullgraph=True)
    actual, expected = differentiate(compiled, x), differentiate(fused(), x)
    for label, e in expected.items():
        assert torch.equal(actual[label], e), label


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("N", [1, 4])
def test_one_token(N, gated):
    x = projections((3, 1, N, 2, 4, 48, 80), torch.bfloat16, gated)
    token = {n: y[:, 0] if y.dim() > 1 else y for n, y in x.items()}
    state = torch.randn(3, 4, 48, 80, device="cuda")
    with torch.no_grad():
        o, new = delta_product_step(**token, **options_for(x), state=state, impl="triton")
    wide = {n: y.double() for n, y in token.items()}
    expected = delta_product_step(**wide, **options_for(x), state=state.double(), impl="reference")
    assert relative_error(o, expected[0]) < 4e-3
    assert relative_error(new, expected[1]) < LIMITS[torch.float32]


def test_mixer():
    torch.manual_seed(0)
    mixer = DeltaProductMixer(
        128, num_heads=2, num_householder=2, use_forget_gate=True, allow_neg_eigval=True,
        device="cuda",
    )  # fmt: skip
    x = torch.randn(2, 100, 128, device="cuda")
    results = []
    for impl in ("triton", "chunk"):
        mixer.impl = impl
        mixer.zero_grad()
        y = mixer(x)
        y.sin().sum().backward()
        results.append([y, *(p.grad for p in mixer.parameters())])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5
