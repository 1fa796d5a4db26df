"""`short_convolution`, `gated_rms_norm`, `swiglu`, `swiglu_linear`: kernels beside definitions.

As a script, in a process where Triton interprets, it runs the kernels on the CPU in float32; on a
GPU the tests run them in every dtype.
"""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from householder.nn.short_convolution import ShortConvolution
from householder.ops import (
    gated_rms_norm,
    short_convolution,
    short_convolution_step_,
    swiglu,
    swiglu_linear,
)
from householder.ops._dispatch import INTERPRETING
from householder.testing import assert_as_accurate

# B, T, D, W; what comes before: nothing, a history, or bounds of packed sequences; SiLU or not.
CONVOLUTIONS = {
    "plain": ((2, 20, 10, 4), None, False),
    "silu": ((2, 17, 10, 4), None, True),
    "history": ((1, 5, 136, 4), "history", True),
    "packed": ((1, 40, 8, 4), (0, 5, 5, 6, 30, 40), True),
    "three wide": ((1, 17, 5, 3), "history", False),
    "one wide": ((2, 5, 8, 1), None, True),
    "one token": ((1, 1, 8, 4), "history", True),
    "several parts of the weight's gradient": ((1, 270, 4, 4), None, True),
}
NORMS = {"narrow": (2, 3, 5), "heads": (20, 128), "one": (3, 1), "wide": (2, 300)}
GATED = {"few": (2, 3, 5), "more than a block": (3, 1001)}
# The hidden vectors, and how wide the product is.
MULTIPLIED = {"multiplied": ((2, 3, 5), 4), "a block multiplied": ((7, 311), 16)}


def convolution(name, dtype, device):
    """Return the tensors that need gradients, the options, and the gradient of y."""
    (B, T, D, W), before, silu = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    tensors = [draw(B, T, D), draw(D, 1, W)]
    options = {"silu": silu}
    if before == "history":
        tensors.append(draw(B, W - 1, D))
    elif before is not None:
        options["cu_seqlens"] = torch.tensor(before, dtype=torch.int32, device=device)
    return short_convolution, tensors, options, draw(B, T, D)


def norm(name, dtype, device):
    shape = NORMS[name]
    generator = torch.Generator().manual_seed(0)
    x, gate, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for _ in range(3)
    )
    weight = torch.rand(shape[-1], generator=generator).to(device) + 0.5
    return gated_rms_norm, [x, gate, weight], {}, dy


def gated(name, dtype, device):
    return draw_gated(GATED[name], dtype, device)


def draw_gated(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    gate, up, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        for _ in range(3)
    )
    return swiglu, [gate, up], {}, dy


def multiplied(name, dtype, device):
    shape, D = MULTIPLIED[name]
    _, (gate, up), _, _ = draw_gated(shape, dtype, device)
    generator = torch.Generator().manual_seed(1)
    weight, dy = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype)
        for s in ((D, shape[-1]), (*shape[:-1], D))
    )
    return swiglu_linear, [gate, up, weight], {}, dy


def differentiate(function, tensors, options, dy, impl, dtype=None):
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in tensors]
    y = function(*leaves, impl=impl, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def check(problem):
    actual = differentiate(*problem, "triton")
    plain = differentiate(*problem, "reference")
    expected = differentiate(*problem, "reference", torch.float64)
    for i, results in enumerate(zip(actual, plain, expected, strict=True)):
        assert_as_accurate(*results, name="y" if i == 0 else f"gradient {i - 1}")


def check_step(dtype, device):
    for W, silu in ((4, True), (3, False), (1, True)):
        x, state = (torch.randn(s, device=device).to(dtype) for s in ((3, 40), (3, W - 1, 40)))
        weight = torch.randn(40, 1, W, device=device)
        results = []
        for impl, wide in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
            moved = state.to(wide, copy=True)
            with torch.no_grad():
                y = short_convolution_step_(x.to(wide), weight, moved, silu=silu, impl=impl)
            torch.testing.assert_close(moved, torch.cat([state, x[:, None]], 1)[:, 1:].to(wide))
            results.append(y)
        assert_as_accurate(*results)


def check_transforms(device):
    """Hold vmap over inputs and weights, of values and gradients, to the definition's."""
    for function, tensors, options, _ in (
        convolution("three wide", torch.float32, device),
        norm("heads", torch.float32, device),
        gated("few", torch.float32, device),
        multiplied("multiplied", torch.float32, device),
    ):

        def loss(*leaves, function=function, options=options, impl="triton"):
            return function(*leaves, impl=impl, **options).sin().sum()

        def definition(*leaves, loss=loss):
            return loss(*leaves, impl="reference")

        several = [torch.stack([x, 2 * x - 1]) for x in tensors]
        order = tuple(range(len(tensors)))
        for dims in ((0,) * len(tensors), (0, *[None] * (len(tensors) - 1))):
            batch = [several[i] if dim == 0 else tensors[i] for i, dim in enumerate(dims)]
            found = [
                torch.vmap(torch.func.grad(f, order), dims)(*batch) for f in (loss, definition)
            ]
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def check_registration(device):
    """Let PyTorch compare the ops with their schemas and fakes, strides included."""
    ops = torch.ops.householder
    _, (x, weight, history), _, dy = convolution("three wide", torch.float32, device)
    _, (y, gate, scale), _, dnormed = norm("narrow", torch.float32, device)
    _, hidden, _, dgated = gated("few", torch.float32, device)
    for op, args in (
        (ops.short_convolution, (x, weight, history, None, True)),
        (ops.short_convolution_backward, (dy, x, weight, history, None, True)),
        (ops.short_convolution_backward, (dy, x, weight, None, None, False)),
        (ops.short_convolution_step_, (x[:, 0], weight, history, True)),
        (ops.gated_rms_norm, (y, gate, scale, 1e-5)),
        (ops.gated_rms_norm_backward, (dnormed, y, gate, scale, 1e-5)),
        (ops.swiglu, hidden),
        (ops.swiglu_backward, (dgated, *hidden)),
        (ops.swiglu_backward_and_forward, (dgated, *hidden)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def check_second_order(device):
    cases = ((convolution, "silu"), (norm, "heads"), (gated, "few"), (multiplied, "multiplied"))
    for make, name in cases:
        problem = make(name, torch.float32, device)
        function, (x, *rest), options, _ = problem
        x.requires_grad_()
        y = function(x, *rest, impl="triton", **options)
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match='impl="reference"'):
            dx.sum().backward()


def check_kept(device):
    """Compiled or not, nothing is kept for the gradient of the product but what came in."""
    function, tensors, options, dy = multiplied("a block multiplied", torch.float32, device)
    leaves = [x.requires_grad_() for x in tensors]
    given = {x.untyped_storage().data_ptr() for x in leaves}
    # Its partitioner decides what a compiled forward pass keeps.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager_decomp_partition")
    results = []
    for call in (function, compiled):
        kept = []

        def pack(x, kept=kept):
            kept.append(x.untyped_storage().data_ptr())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = call(*leaves, impl="triton", **options)
        assert kept
        assert set(kept) <= given
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    torch.testing.assert_close(*results)


def check_checkpointed(device):
    """What is made anew gives the same gradients, and is asked for once."""
    cases = ((convolution, "history"), (norm, "heads"), (gated, "few"), (multiplied, "multiplied"))
    for make, name in cases:
        function, tensors, options, dy = make(name, torch.float32, device)
        leaves = [x.requires_grad_() for x in tensors]
        plain = torch.autograd.grad(function(*leaves, impl="triton", **options), leaves, dy)
        for early in (True, False):
            with set_checkpoint_early_stop(early):
                y = checkpoint(function, *leaves, impl="triton", use_reentrant=False, **options)
            again = torch.autograd.grad(y, leaves, dy)
            assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def check_frozen_weight(device):
    function, (gate, up, weight), _, dy = multiplied("multiplied", torch.float32, device)
    gate.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(function(gate, up, weight, impl="reference"), gate, dy)
    for call in (function, compiled):
        y = call(gate, up, weight, impl="triton")
        torch.testing.assert_close(torch.autograd.grad(y, gate, dy), plain)


def check_autocast(device):
    """As PyTorch's own product, it is made in autocast's dtype of whatever weight there is."""
    _, (gate, up, weight), _, dy = multiplied("a block multiplied", torch.bfloat16, device)
    weight = weight.float().requires_grad_()
    results = []
    for impl in ("triton", "reference"):
        with torch.autocast(device, torch.bfloat16):
            y = swiglu_linear(gate, up, weight, impl=impl)
        (dweight,) = torch.autograd.grad(y, weight, dy)
        results.append((y, dweight))
        assert (y.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-1)
    with (
        torch.autocast(device, torch.bfloat16),
        pytest.raises(NotImplementedError, match="all must have the product's dtype"),
    ):
        swiglu_linear(gate.float(), up.float(), weight, impl="triton")


def test_convolution_is_that_of_pytorch():
    x, weight = torch.randn(2, 9, 5), torch.randn(5, 1, 4)
    plain = F.conv1d(x.mT, weight, padding=3, groups=5)[..., :9].mT
    torch.testing.assert_close(short_convolution(x, weight), plain)
    torch.testing.assert_close(short_convolution(x, weight, silu=True), F.silu(plain))


def test_packed_sequences_are_convolved_apart():
    _, (x, weight), options, _ = convolution("packed", torch.float64, "cpu")
    bounds = options["cu_seqlens"].tolist()
    parts = [
        short_convolution(x[:, lo:hi], weight, silu=True) for lo, hi in itertools.pairwise(bounds)
    ]
    torch.testing.assert_close(short_convolution(x, weight, **options), torch.cat(parts, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x, w: short_convolution(x[0], w),
            ValueError,
            r"`x` must be \[B, T, D\], got shape \[4, 3\]",
        ),
        (lambda x, w: short_convolution(x, w[:2]), ValueError, "`weight` must be"),
        (lambda x, w: short_convolution(x, w, x), ValueError, "`history` must be"),
        (
            lambda x, w: short_convolution(
                x[:1], w, x[:1, :3], cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)
            ),
            ValueError,
            "`history` must be None with `cu_seqlens`",
        ),
        (
            lambda x, w: short_convolution(x, w, impl="triton"),
            NotImplementedError,
            "it needs tensors on a CUDA device",
        ),
        (
            lambda x, w: short_convolution_step_(x[:, 0], w, x[:, :3]),
            ValueError,
            "`state` must be contiguous",
        ),
        (
            lambda x, w: short_convolution_step_(x[:, 0], w, x[:, :3].contiguous()),
            NotImplementedError,
            "gradients are on",
        ),
        (lambda x, w: gated_rms_norm(x, x[0], w[0, 0]), ValueError, "`gate` must be"),
        (lambda x, w: gated_rms_norm(x, x, w[0]), ValueError, "`weight` must be"),
        (lambda x, w: gated_rms_norm(x.long(), x, w), TypeError, "must be real floating point"),
        (lambda x, w: swiglu_linear(x, x[0], w[0]), ValueError, "`up` must be"),
        (lambda x, w: swiglu_linear(x, x, w[0]), ValueError, r"`weight` \[D, width\], got shapes"),
        (
            lambda x, w: swiglu_linear(x, x, x[0], impl="triton"),
            NotImplementedError,
            "it needs tensors on a CUDA device",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 4, 3), torch.randn(3, 1, 4))


def compute() -> dict[str, str]:
    assert INTERPRETING
    checks = {f"convolution, {n}": (convolution, n) for n in CONVOLUTIONS}
    checks |= {f"norm, {n}": (norm, n) for n in NORMS}
    jobs = {
        name: lambda make=make, n=n: check(make(n, torch.float32, "cpu"))
        for name, (make, n) in checks.items()
    }
    jobs |= {f"gated, {n}": lambda n=n: check(gated(n, torch.float32, "cpu")) for n in GATED}
    for n in MULTIPLIED:
        jobs[n] = lambda n=n: check(multiplied(n, torch.float32, "cpu"))
    jobs["kept"] = lambda: check_kept("cpu")
    jobs["checkpointed"] = lambda: check_checkpointed("cpu")
    jobs["frozen weight"] = lambda: check_frozen_weight("cpu")
    jobs["step"] = lambda: check_step(torch.float32, "cpu")
    jobs["transforms"] = lambda: check_transforms("cpu")
    jobs["registration"] = lambda: check_registration("cpu")
    jobs["second order"] = lambda: check_second_order("cpu")
    broken = {}
    for name, job in jobs.items():
        try:
            job()
        except Exception as error:  # whatever it is, the test names it
            broken[name] = f"{type(error).__name__}: {error}"
    return broken


def test_interpreted_kernels_are_as_accurate_as_the_definitions(interpreted):
    pytest.importorskip("triton")
    assert interpreted(__file__) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *NORMS, *GATED, *MULTIPLIED])
def test_kernels_are_as_accurate_as_the_definitions(name, dtype):
    kinds = ((CONVOLUTIONS, convolution), (NORMS, norm), (GATED, gated), (MULTIPLIED, multiplied))
    make = next(make for names, make in kinds if name in names)
    check(make(name, dtype, "cuda"))


@pytest.mark.gpu
def test_checkpointed_on_a_gpu():
    check_checkpointed("cuda")


@pytest.mark.gpu
def test_product_behind_swiglu_on_a_gpu():
    check_kept("cuda")
    check_frozen_weight("cuda")
    check_autocast("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_token_on_a_gpu(dtype):
    torch.manual_seed(0)
    check_step(dtype, "cuda")


@pytest.mark.gpu
def test_function_transforms_on_a_gpu():
    check_transforms("cuda")
    check_second_order("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("make", [convolution, norm])
def test_kernels_repeat(make):
    name = "silu" if make is convolution else "heads"
    function, tensors, options, dy = make(name, torch.bfloat16, "cuda")
    first, second = (differentiate(function, tensors, options, dy, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_packed_sequences_stay_apart_when_compiled():
    """PyTorch 2.11 compiles a search in a slice of the bounds as one in all of them."""
    bounds = torch.tensor([0, 0, 3, 70, 71, 200], dtype=torch.int32, device="cuda")
    x = torch.randn(1, 200, 64, device="cuda")
    op_weight, layer = torch.randn(64, 1, 4, device="cuda"), ShortConvolution(64, 4, device="cuda")
    state = torch.randn(5, 3, 64, device="cuda")

    def convolve(x, bounds):
        return short_convolution(x, op_weight, cu_seqlens=bounds), *layer(x, state, bounds)

    with torch.no_grad():
        compiled = torch.compile(convolve, fullgraph=True)(x, bounds)
        for a, b in zip(compiled, convolve(x, bounds), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_ops_are_registered_as_pytorch_wants_them_on_a_gpu():
    check_registration("cuda")


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(compute()))
