"""Options of `delta_product` that stand for a layer's own steps, against those steps in PyTorch.

The kernels are tested under Triton's interpreter, in a process of their own in which this file runs
as a script: whether kernels are interpreted is settled when they are imported.
"""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from householder import delta_product, delta_product_step
from householder.testing import assert_as_accurate, delta_product_inputs, relative_error

OPTIONS = {
    "qk_norm": {"qk_norm": "l2"},
    "large eps": {"qk_norm": "l2", "qk_norm_eps": 0.5},
    "sigmoid": {"beta_activation": "sigmoid"},
    "2sigmoid": {"beta_activation": "2sigmoid"},
    "softplus": {"gate_activation": "softplus"},
    "softplus without a bias": {"gate_activation": "softplus", "with_bias": False},
    "all": {"qk_norm": "l2", "beta_activation": "2sigmoid", "gate_activation": "softplus"},
    "all but the gate": {"qk_norm": "l2", "beta_activation": "sigmoid"},
}
# A chunk solves for many rows at once what the plain recurrence does one by one, and the gradients
# of A_log and dt_bias are a few sums of many terms, of which the plain ones may be right by luck.
FACTOR = 4.0
LEAVES = ("q", "k", "v", "beta", "g", "A_log", "dt_bias", "initial_state")


def projections(options, dtype=torch.float64, device="cpu", spread=2.0, **shape):
    """Return arguments of `delta_product` as a layer's projections would be, with the options."""
    options = dict(options)
    with_bias = options.pop("with_bias", True)
    gate = "gate_activation" in options
    inputs = delta_product_inputs(**{"T": 23, "HV": 4, "decay": 0.1 if gate else None, **shape})
    generator = torch.Generator().manual_seed(7)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if "qk_norm" in options:
        inputs["q"], inputs["k"] = 3 * normal(*inputs["q"].shape), 2 * normal(*inputs["k"].shape)
    if "beta_activation" in options:
        inputs["beta"] = spread * normal(*inputs["beta"].shape)
    if gate:
        HV = inputs["g"].shape[-1]
        inputs["g"] = spread * normal(*inputs["g"].shape)
        inputs["A_log"] = normal(HV) - 1
        inputs["dt_bias"] = normal(HV) if with_bias else None
    state = inputs.pop("initial_state")
    inputs = {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype) if x is not None else None
        for name, x in inputs.items()
    }
    state = None if state is None else state.to(device, torch.promote_types(dtype, torch.float32))
    return {**inputs, "initial_state": state, **options}


def composed(arguments, impl):
    """Call `delta_product` with the options' steps done outside, in plain PyTorch."""
    x = dict(arguments)
    wide = torch.promote_types(x["v"].dtype, torch.float32)
    eps = x.pop("qk_norm_eps", 1e-6)
    if x.pop("qk_norm", None):
        for name in "qk":
            y = x[name].to(wide)
            x[name] = (y / (y.pow(2).sum(-1, keepdim=True) + eps).sqrt()).to(x[name].dtype)
    if activation := x.pop("beta_activation", None):
        x["beta"] = {"sigmoid": 1, "2sigmoid": 2}[activation] * torch.sigmoid(x["beta"].to(wide))
    A_log, dt_bias = x.pop("A_log", None), x.pop("dt_bias", None)
    if x.pop("gate_activation", None):
        bias = 0 if dt_bias is None else dt_bias.to(wide)
        x["g"] = -torch.exp(A_log.to(wide)) * F.softplus(x["g"].to(wide) + bias)
    return delta_product(**x, output_final_state=True, impl=impl)


def fused(arguments, impl):
    return delta_product(**arguments, output_final_state=True, impl=impl)


def differentiate(call, arguments, impl, dtype=None):
    """Return outputs and all gradients for fixed cotangents, computed in `dtype` if given."""
    arguments = {
        name: x.to(dtype) if dtype and torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    leaves = {
        name: arguments[name].detach().clone().requires_grad_()
        for name in LEAVES
        if arguments.get(name) is not None
    }
    o, state = call({**arguments, **leaves}, impl)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.device, y.dtype)
        for y in (o, state)
    ]
    for result, cotangent in zip((o, state), cotangents, strict=True):
        if result.requires_grad:  # without tokens, o depends on nothing
            result.backward(cotangent, retain_graph=True)
    results = {"o": o.detach(), "final_state": state.detach()}
    return results | {
        f"d{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()
    }


@pytest.mark.parametrize("impl", ["chunk", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_the_composition(name, impl):
    arguments = projections(OPTIONS[name])
    actual = differentiate(fused, arguments, impl)
    expected = differentiate(composed, arguments, "reference")
    assert actual.keys() == expected.keys()
    for label, e in expected.items():
        assert relative_error(actual[label], e) < 1e-12, label


@pytest.mark.parametrize("impl", ["chunk", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_as_accurate_as_the_composition(dtype, impl):
    arguments = projections(OPTIONS["all"], dtype)
    actual = differentiate(fused, arguments, impl)
    plain = differentiate(composed, arguments, "reference")
    expected = differentiate(composed, arguments, "reference", torch.float64)
    for label, e in expected.items():
        assert_as_accurate(actual[label], plain[label], e, name=label, factor=FACTOR)


@pytest.mark.parametrize("name", OPTIONS)
def test_step_agrees_with_the_composition(name):
    arguments = projections(OPTIONS[name], T=1)
    o, state = composed(arguments, "reference")
    options = {n: x for n, x in arguments.items() if n not in ("cu_seqlens", "initial_state")}
    for label in ("q", "k", "v", "beta", "g"):
        options[label] = None if options[label] is None else options[label][:, 0]
    actual = delta_product_step(**options, state=arguments["initial_state"])
    assert relative_error(actual[0], o[:, 0]) < 1e-13
    assert relative_error(actual[1], state) < 1e-13


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_gradients_of_every_order():
    arguments = projections(OPTIONS["all"], B=1, T=2, H=1, HV=2, K=3, V=2)
    names = [name for name in LEAVES if arguments[name] is not None]
    leaves = [arguments[name].requires_grad_() for name in names]

    def f(impl):
        return lambda *x: fused({**arguments, **dict(zip(names, x, strict=True))}, impl)

    assert torch.autograd.gradcheck(f("chunk"), leaves)
    assert torch.autograd.gradcheck(f("reference"), leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f("reference"), leaves)


@pytest.mark.parametrize("impl", ["chunk", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_vectors_and_extreme_logits(dtype, impl):
    arguments = extreme(dtype)
    actual = differentiate(fused, arguments, impl)
    for label, x in actual.items():
        assert x.isfinite().all(), label
    plain = differentiate(composed, arguments, "reference")
    expected = differentiate(composed, arguments, "reference", torch.float64)
    for label, e in expected.items():
        assert_as_accurate(actual[label], plain[label], e, name=label, factor=FACTOR)


def extreme(dtype, **shape):
    """Return projections with zero queries and keys and logits of ±100."""
    arguments = projections(OPTIONS["all"], dtype, **shape)
    arguments["q"][:, ::3] = 0
    arguments["k"][:, ::2] = 0
    for name in ("beta", "g"):
        arguments[name][:, 3::5], arguments[name][:, 4::5] = 100, -100
    return arguments


def test_beta_reaches_two_and_zero_vectors_write_nothing():
    arguments = extreme(torch.float32)
    arguments["k"] = torch.zeros_like(arguments["k"])
    del arguments["gate_activation"], arguments["A_log"], arguments["dt_bias"]
    _, state = fused({**arguments, "g": None}, "chunk")
    assert torch.equal(state, arguments["initial_state"])
    unit = {"q": torch.ones(1, 1, 1, 1), "k": torch.ones(1, 1, 1, 1, 1)}
    v, logits = torch.ones(1, 1, 1, 1, 1), torch.full((1, 1, 1, 1), 100.0)
    o, _ = delta_product(**unit, v=v, beta=logits, beta_activation="2sigmoid")
    assert o.item() == 2


@pytest.mark.parametrize("name", ["all", "qk_norm"])
def test_packed_equals_separate(name):
    arguments = projections(OPTIONS[name], B=1, T=60, num_sequences=4)
    o, state = fused(arguments, "chunk")
    bounds = arguments["cu_seqlens"].tolist()
    for s, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        part = {
            n: x[:, lo:hi] if n in ("q", "k", "v", "beta", "g") and x is not None else x
            for n, x in arguments.items()
        }
        part |= {"cu_seqlens": None, "initial_state": arguments["initial_state"][s : s + 1]}
        o_part, state_part = fused(part, "chunk")
        torch.testing.assert_close(o[:, lo:hi], o_part)
        torch.testing.assert_close(state[s : s + 1], state_part)


def test_transforms():
    arguments = projections(OPTIONS["all"])
    names = ("k", "g", "A_log")

    def loss(*x):
        return fused({**arguments, **dict(zip(names, x, strict=True))}, "chunk")[0].sin().sum()

    x = [arguments[name] for name in names]
    expected = torch.func.grad(loss, argnums=(0, 1, 2))(*x)
    stacked = [torch.stack([y, 0.5 * y]) for y in x]
    actual = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*stacked)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[0], e)


@pytest.mark.parametrize("step", [False, True])
def test_compiles_without_graph_breaks(step):
    torch.compiler.reset()  # What other tests compiled counts towards the limit of recompilations.
    arguments = projections(OPTIONS["all"], torch.float32)
    k = arguments["k"].clone().requires_grad_()
    if step:
        arguments["state"] = arguments.pop("initial_state")
        del arguments["cu_seqlens"]
        for label in ("q", "k", "v", "beta", "g"):
            arguments[label] = arguments[label][:, 0]
        k = arguments["k"].clone().requires_grad_()
    function = delta_product_step if step else delta_product
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    traced, eager = (f(**{**arguments, "k": k})[0] for f in (compiled, function))
    assert torch.equal(traced, eager)
    grads = [torch.autograd.grad(y.sin().sum(), k)[0] for y in (traced, eager)]
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"qk_norm": "sum"}, ValueError, "`qk_norm` must be None or one of \"l2\", got 'sum'"),
        ({"qk_norm": "l2", "qk_norm_eps": 0}, ValueError, "`qk_norm_eps` must be greater than 0"),
        ({"qk_norm": "l2", "qk_norm_eps": "1"}, TypeError, "`qk_norm_eps` must be a number"),
        ({"beta_activation": "tanh"}, ValueError, '"sigmoid", "2sigmoid", got \'tanh\''),
        ({"gate_activation": "relu"}, ValueError, 'one of "softplus"'),
        ({"g": None}, ValueError, "needs `g` and `A_log`, got `g` None"),
        ({"A_log": None}, ValueError, "needs `g` and `A_log`, got `A_log` None"),
        ({"gate_activation": None}, ValueError, "`A_log` must come with gate_activation"),
        ({"gate_activation": None, "A_log": None}, ValueError, "`dt_bias` must come with"),
        ({"A_log": torch.zeros(2)}, ValueError, r"`A_log` must be \[HV\] = \[4\]"),
        ({"dt_bias": torch.zeros(1, 4)}, ValueError, r"`dt_bias` must be \[HV\]"),
        ({"A_log": 1.0}, TypeError, "`A_log` must be a tensor, got float"),
        ({"dt_bias": torch.zeros(4, dtype=torch.int)}, TypeError, "`dt_bias` must be real"),
        ({"A_log": torch.zeros(4, device="meta")}, ValueError, "one device"),
    ],
)
def test_wrong_options(change, error, match):
    arguments = {**projections(OPTIONS["all"], torch.float32), **change}
    with pytest.raises(error, match=match):
        delta_product(**arguments)
    arguments["state"] = arguments.pop("initial_state")
    del arguments["cu_seqlens"]
    for label in ("q", "k", "v", "beta", "g"):
        arguments[label] = None if arguments[label] is None else arguments[label][:, 0]
    with pytest.raises(error, match=match):
        delta_product_step(**arguments)


# Under the interpreter, which is slow: the recurrence only at tiny sizes, and the kernels of the
# options by themselves at sizes with several tiles, of 4096 / K rows and of 1024 / HV tokens.
TINY = {"B": 1, "T": 7, "N": 2, "H": 1, "HV": 2, "K": 16, "V": 16}
SHAPES = {
    "several tiles of rows and tokens": {"B": 2, "T": 140, "N": 2, "H": 2, "HV": 8, "K": 48},
    "tiles that end inside a token": {"B": 2, "T": 25, "N": 1, "H": 3, "HV": 3, "K": 256},
    "more heads than a tile": {"B": 2, "T": 37, "N": 3, "H": 1, "HV": 67, "K": 16},
    "no tokens": {"B": 2, "T": 0, "N": 2, "H": 1, "HV": 2, "K": 16},
}


def compute_kernels() -> dict[str, str]:
    """Return what breaks the accuracy rule, by case and tensor."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # so that memory comes filled with NaN
    broken = {}
    for case, options in OPTIONS.items():
        arguments = projections(options, torch.float32, **TINY)
        results = [
            differentiate(fused, arguments, "triton"),
            differentiate(composed, arguments, "reference"),
            differentiate(composed, arguments, "reference", torch.float64),
        ]
        broken |= compare(case, *results) | compute_step(case, arguments)
    cases = {
        name: projections(OPTIONS["all"], torch.float32, **shape) for name, shape in SHAPES.items()
    }
    cases |= {name: projections(options, torch.float32, K=16) for name, options in OPTIONS.items()}
    cases["extreme"] = extreme(torch.float32, K=16)
    cases["strided"] = extreme(torch.float32, K=16)
    for name in ("q", "k", "beta", "g"):
        x = cases["strided"][name]
        cases["strided"][name] = x.transpose(0, 1).contiguous().transpose(0, 1)
    for case, arguments in cases.items():
        results = [
            differentiate_activations(arguments, "triton"),
            differentiate_activations(arguments, "chunk"),
            differentiate_activations(arguments, "chunk", torch.float64),
        ]
        broken |= compare(f"{case}, alone", *results)
    return broken | compute_softplus() | compute_transforms()


def compare(case, actual, plain, expected) -> dict[str, str]:
    broken = {}
    for label, e in expected.items():
        try:
            assert_as_accurate(actual[label], plain[label], e, name=label, factor=FACTOR)
        except AssertionError as error:
            broken[f"{case}: {label}"] = str(error)
    return broken


def differentiate_activations(arguments, form, dtype=None):
    """Return what the options' steps give, and their gradients for fixed cotangents."""
    from householder.ops.delta_product.activations import BETA_SCALES, activate

    leaves = {
        name: arguments[name].detach().to(dtype).requires_grad_()
        for name in ("q", "k", "beta", "g", "A_log", "dt_bias")
        if arguments.get(name) is not None
    }
    eps = arguments.get("qk_norm_eps", 1e-6) if "qk_norm" in arguments else None
    scale = BETA_SCALES.get(arguments.get("beta_activation"))
    tensors = [leaves.get(name) for name in ("q", "k", "beta", "g", "A_log", "dt_bias")]
    outputs = activate(*tensors, eps, scale, form)
    generator = torch.Generator().manual_seed(1)
    results = {}
    for name, x in zip(("q", "k", "beta", "g"), outputs, strict=True):
        if x is not None:
            results[name] = x.detach()
            x.backward(torch.randn(x.shape, generator=generator).to(x.dtype), retain_graph=True)
    return results | {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}


def compute_step(case, arguments) -> dict[str, str]:
    def token(dtype):
        cast = {n: x.to(dtype) if torch.is_tensor(x) else x for n, x in arguments.items()}
        cast["state"] = cast.pop("initial_state")
        del cast["cu_seqlens"]
        for label in ("q", "k", "v", "beta", "g"):
            cast[label] = None if cast[label] is None else cast[label][:, -1]
        return cast

    with torch.no_grad():
        actual = delta_product_step(**token(torch.float32), impl="triton")
        plain = delta_product_step(**token(torch.float32), impl="reference")
        expected = delta_product_step(**token(torch.float64), impl="reference")
    try:
        for a, p, e in zip(actual, plain, expected, strict=True):
            assert_as_accurate(a, p, e, name=f"{case}: step")
    except AssertionError as error:
        return {f"{case}: step": str(error)}
    return {}


def compute_softplus() -> dict[str, str]:
    """Gates that hardly forget keep their digits: each one is right, not only their sum."""
    from householder.ops.delta_product.triton import activate

    a = torch.linspace(-60, 60, 481).view(1, -1, 1)
    k = torch.zeros(1, a.shape[1], 1, 1, 16)
    logits = torch.zeros(1, a.shape[1], 1, 1)
    g = activate(k[:, :, 0], k, logits, a, torch.zeros(1), None, None, None)[3]
    exact = -torch.log1p(torch.exp(a.double()))
    error = ((g - exact) / exact).abs().max().item()
    return {} if error < 1e-6 else {"softplus": f"relative error {error}"}


def compute_transforms() -> dict[str, str]:
    """Hold the registration, `torch.func` and the refusal of a second order to their promises."""
    from householder.ops.delta_product import activations

    broken = {}
    for name in ("all", "softplus without a bias"):
        arguments = projections(OPTIONS[name], torch.float32, **TINY)
        tensors = [arguments.get(n) for n in ("q", "k", "beta", "g", "A_log", "dt_bias")]
        eps = 1e-6 if "qk_norm" in arguments else None
        scale = activations.BETA_SCALES.get(arguments.get("beta_activation"))
        torch.library.opcheck(activations.activate_op, (*tensors, eps, scale))
        outputs = activations.activate_op(*tensors, eps, scale)
        grads = [x if x.numel() else None for x in outputs[:4]]
        saved = (*outputs[:2], *outputs[4:], *tensors[2:])
        torch.library.opcheck(activations.activate_backward_op, (*grads, *saved, scale))

        present = [n for n in LEAVES if arguments.get(n) is not None]

        def loss(impl, arguments=arguments, present=present):
            def f(*leaves):
                given = dict(zip(present, leaves, strict=True))
                o, state = fused({**arguments, **given}, impl)
                return o.sin().sum() + state.cos().sum()

            return f

        x = [arguments[n] for n in present]
        every = tuple(range(len(x)))
        stacked = [torch.stack([y, 0.5 * y]) for y in x]
        actual = torch.func.vmap(torch.func.grad(loss("triton"), argnums=every))(*stacked)
        for i, part in enumerate(zip(*stacked, strict=True)):
            expected = torch.func.grad(loss("reference"), argnums=every)(*part)
            for label, a, e in zip(present, actual, expected, strict=True):
                if not relative_error(a[i], e) < 2e-5:
                    broken[f"vmap of grad, {name}: {label}"] = str(relative_error(a[i], e))

        def rows(impl, x=x, loss=loss):
            # Only k is batched; the others are shared.
            return lambda k: torch.func.vmap(lambda k: loss(impl)(x[0], k, *x[2:]))(k)

        a, e = (torch.func.jacrev(rows(impl))(stacked[1]) for impl in ("triton", "reference"))
        if not relative_error(a, e) < 2e-5:
            broken[f"jacrev, {name}"] = str(relative_error(a, e))
    return broken | compute_saved() | compute_second_order() | compute_unasked()


def compute_saved() -> dict[str, str]:
    """The gradient needs the unit vectors, which the recurrence keeps, not what they came from."""
    arguments = projections(OPTIONS["all"], torch.float32, **TINY)
    kept = set()
    raw = {name: arguments[name].requires_grad_() for name in ("q", "k")}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.data_ptr()) or x, id):
        fused(arguments, "triton")
    return {f"{name} is kept": "" for name, x in raw.items() if x.data_ptr() in kept}


def compute_second_order() -> dict[str, str]:
    arguments = projections(OPTIONS["softplus"], torch.float32, **TINY)
    leaf = arguments["g"].clone().requires_grad_()
    o, _ = fused({**arguments, "g": leaf}, "triton")
    (dg,) = torch.autograd.grad(o.sin().sum(), leaf, create_graph=True)
    try:
        dg.sum().backward()
    except NotImplementedError as error:
        return {} if 'impl="reference"' in str(error) else {"second order": str(error)}
    return {"second order": "was not refused"}


def compute_unasked() -> dict[str, str]:
    """A compiled backward pass gives zeros as gradients of what the options leave out."""
    from householder.ops.delta_product.activations import Activate

    broken = {}
    for case, (qk_eps, beta_scale) in {"no gate": (1e-6, 2.0), "unit rows": (1e-6, None)}.items():
        x = projections({}, torch.float32, **TINY)
        leaves = [x[name].requires_grad_() for name in ("q", "k", "beta")]
        outputs = Activate.apply(*leaves, None, None, None, qk_eps, beta_scale)[:4]
        zeros = [torch.zeros_like(y) for y in outputs]
        try:
            grads = torch.autograd.grad(outputs, leaves, zeros, allow_unused=True)
        except Exception as error:  # whatever a kernel raises that reads what is not there
            broken[f"{case}, unasked"] = f"{type(error).__name__}: {error}"
            continue
        if any(x is not None and x.any() for x in grads):
            broken[f"{case}, unasked"] = "a gradient is not zero"
    return broken


def test_kernels_are_as_accurate_as_the_definition(interpreted):
    pytest.importorskip("triton")
    assert interpreted(__file__) == {}


def test_interpreted_kernels_are_not_trivially_right():
    """The rule that judges the kernels notices a gate without its bias."""
    arguments = projections(OPTIONS["softplus"], torch.float32)
    expected = differentiate(composed, arguments, "reference", torch.float64)
    plain = differentiate(composed, arguments, "reference")
    wrong = differentiate(fused, {**arguments, "dt_bias": None}, "reference")
    with pytest.raises(AssertionError):
        assert_as_accurate(wrong["o"], plain["o"], expected["o"], factor=FACTOR)
    assert math.isfinite(relative_error(wrong["o"], expected["o"]))


if __name__ == "__main__":
    print(json.dumps(compute_kernels()))
