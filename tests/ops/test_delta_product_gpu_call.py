"""`delta_product` on a GPU as users call it: compiled, captured, very long, packed."""

import itertools

import pytest
import torch

from householder import delta_product, delta_product_step
from householder.testing import delta_product_inputs, relative_error

pytestmark = pytest.mark.gpu

ORDER = ("q", "k", "v", "beta", "g")


def arrange(*sizes, dtype=torch.bfloat16, **options):
    inputs = delta_product_inputs(*sizes, dtype=dtype, device="cuda", **options)
    return {
        name: x.requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def call(inputs, impl="triton"):
    keywords = {n: x for n, x in inputs.items() if n not in ORDER}
    return delta_product(
        *(inputs[n] for n in ORDER), **keywords, output_final_state=True, impl=impl
    )


def leaves(inputs):
    """Return by name what has a gradient."""
    return {n: x for n, x in inputs.items() if x is not None and x.requires_grad}


def gradients(outputs, inputs):
    o, state = outputs
    given = list(leaves(inputs).values())
    return torch.autograd.grad([o, state], given, [torch.ones_like(o), torch.ones_like(state)])


@pytest.mark.parametrize("decay", [None, 0.1], ids=["no gate", "gate"])
def test_compiles_into_one_graph(decay):
    inputs = arrange(2, 200, 2, 2, 64, 64, HV=4, decay=decay)
    eager, compiled = call(inputs), torch.compile(call, fullgraph=True)(inputs)
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(compiled, inputs), gradients(eager, inputs), strict=True):
        assert torch.equal(a, b)


def test_a_training_step_is_captured_without_waiting_for_the_host():
    given = arrange(1, 700, 2, 2, 64, 64, num_sequences=9)

    def step():
        # Leaves of their own: autograd remembers the stream that a leaf was first used on.
        inputs = {
            n: x.detach().requires_grad_() if x.is_floating_point() else x for n, x in given.items()
        }
        outputs = call(inputs)
        return [*outputs, *gradients(outputs, inputs)]

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.detach().zero_()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("decay", [None, 0.1], ids=["no gate", "gate"])
@pytest.mark.parametrize("N", [1, 3])
def test_a_second_pass_through_a_kept_graph_gives_the_same(N, decay):
    """The last pass may leave its gradient where the forward saved something; others may not."""
    inputs = arrange(2, 200, N, 2, 64, 128, HV=4, decay=decay)
    outputs = call(inputs)
    given = [x for x in inputs.values() if x is not None and x.requires_grad]
    ones = [torch.ones_like(x) for x in outputs]
    first, second, last = (
        torch.autograd.grad(outputs, given, ones, retain_graph=keep) for keep in (True, True, False)
    )
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("decay", [None, 0.1], ids=["no gate", "gate"])
def test_gradients_take_the_place_of_what_was_saved(decay):
    """Of what is as large as v, only o and the gradients of q, k and v are there at the end."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel that does this is for Hopper")
    B, T, H, D = 4, 2048, 16, 128
    inputs = arrange(B, T, 1, H, D, D, decay=decay, with_initial_state=False)
    do = torch.ones(B, T, H, D, device="cuda", dtype=torch.bfloat16)

    def peak(keep):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o, _ = delta_product(*(inputs[n] for n in ORDER))
        given = [inputs[n] for n in ORDER if inputs[n] is not None]
        gradients = torch.autograd.grad(o, given, do, retain_graph=keep)
        del o, gradients
        return (torch.cuda.max_memory_allocated() - before) / (2 * B * T * H * D)

    peak(False)
    # States count twice v, triangles half of it, coefficients of gates a tenth.
    assert peak(False) < 6.65
    assert peak(True) > 7.4


@pytest.mark.parametrize("decay", [None, 0.1], ids=["no gate", "gate"])
def test_the_op_that_writes_over_what_was_saved_says_so(decay):
    """Its schema names all it changes, and its fake kernel gives shapes and dtypes of its own."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel that does this is for Hopper")
    ops = torch.ops.householder
    inputs = {n: x if x is None else x.detach() for n, x in arrange(2, 70, 2, 2, 64, 64).items()}
    given = [*(inputs[n] for n in ORDER), 0.3, inputs["initial_state"], None]
    if decay is None:
        given[4] = None
    with torch.no_grad():
        o, state, *saved = ops.delta_product.default(*given, True, "triton")
    arguments = (torch.ones_like(o), torch.ones_like(state), *given, *saved, "triton")
    torch.library.opcheck(
        ops.delta_product_backward_over_u.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def requested_bytes():
    """Return what tensors take; blocks of the allocator may be larger, by which ones were free."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("N", [1, 2])
def test_recomputing_keeps_the_inputs_alone_and_changes_no_bit(N, compiled):
    B, T, H, D = 2, 1000, 4, 128
    inputs = arrange(B, T, N, H, D, D, decay=0.1, with_initial_state=False)
    given = [inputs[n] for n in ORDER]
    function = torch.compile(delta_product, fullgraph=True) if compiled else delta_product
    results = []
    for recompute, least, most in ((False, 3.4 * N, 5.0 * N), (True, 0.0, 0.1)):
        function(*given, recompute=recompute)
        before = requested_bytes()
        o, _ = function(*given, recompute=recompute)
        kept = (requested_bytes() - before) / (o.numel() * o.element_size()) - 1
        assert least <= kept <= most
        results.append((o, *torch.autograd.grad(o.float().sin().sum(), given)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_packed_sequences_are_those_alone():
    inputs = arrange(1, 900, 2, 2, 64, 64, num_sequences=7)
    together, bounds = call(inputs), inputs["cu_seqlens"].tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone = {n: None if inputs[n] is None else inputs[n][:, start:end] for n in ORDER}
        alone["initial_state"] = inputs["initial_state"][i : i + 1]
        o, state = call(alone)
        assert torch.equal(o, together[0][:, start:end])
        assert torch.equal(state, together[1][i : i + 1])


@pytest.mark.parametrize("N", [1, 2, 3, 8])
def test_lengths_around_a_chunk(N):
    C = 64 // N
    for T in (2, C - 1, C, C + 1, 2 * C - 1, 2 * C + 1):
        inputs = arrange(2, T, N, 2, 64, 64)
        wide = {
            n: x if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()
        }
        actual, expected = (
            gradients(call(x, impl), x) for x, impl in ((inputs, "triton"), (wide, "chunk"))
        )
        for name, a, e in zip(leaves(inputs), actual, expected, strict=True):
            assert relative_error(a, e) < 1.2e-2, f"{name}, {T} tokens"


@pytest.mark.parametrize(
    ("T", "num_sequences", "N", "decay"),
    [(900, 7, 2, 0.1), (900, 7, 1, None), (11_000, 3, 1, 0.02), (11_000, 3, 2, None)],
)
def test_gradients_of_packed_sequences_are_those_alone(T, num_sequences, N, decay):
    """Long ones are cut into segments, and whether they are packed must not show."""
    inputs = arrange(1, T, N, 2, 128, 64, HV=4, num_sequences=num_sequences, decay=decay)
    bounds = inputs["cu_seqlens"].tolist()
    assert bounds[1] == 0, "an empty sequence must be among them"
    if T > 4096:
        # Of the two that are left, one in three parts and one that is one part.
        inputs["cu_seqlens"][2] = bounds[2] = 9000
    together = dict(zip(leaves(inputs), gradients(call(inputs), inputs), strict=True))
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone = {
            n: None if inputs[n] is None else inputs[n][:, start:end].detach().requires_grad_()
            for n in ORDER
        }
        state = inputs["initial_state"][i : i + 1].detach().requires_grad_()
        alone["initial_state"] = state
        for name, x in zip(leaves(alone), gradients(call(alone), alone), strict=True):
            part = slice(i, i + 1) if name == "initial_state" else (slice(None), slice(start, end))
            assert torch.equal(x, together[name][part]), name


@pytest.mark.parametrize("T", [300, 9000])
def test_gradients_of_a_row_do_not_depend_on_the_batch(T):
    inputs = arrange(3, T, 1, 2, 128, 128, decay=0.02)
    together = gradients(call(inputs), inputs)
    row = {
        n: None if x is None else x[1:2].detach().clone().requires_grad_()
        for n, x in inputs.items()
    }
    for a, b in zip(together, gradients(call(row), row), strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("T", [300, 9000])
def test_cotangents_that_are_views_count_as_what_they_show(T):
    """A sum's gradient is one number with strides of zero; others come transposed."""
    inputs = arrange(1, T, 1, 2, 128, 128)
    o, state = call(inputs)
    given = list(leaves(inputs).values())

    def differentiate(do, dstate):
        return torch.autograd.grad([o, state], given, [do, dstate], retain_graph=True)

    views = [
        [x.new_ones(()).expand_as(x) for x in (o, state)],
        [torch.randn_like(x).mT.contiguous().mT for x in (o, state)],
    ]
    for do, dstate in views:
        assert not do.is_contiguous()
        plain = differentiate(do.contiguous(), dstate.contiguous())
        for a, b in zip(differentiate(do, dstate), plain, strict=True):
            # Hopper's kernels copy rows of 16 bytes; others may take their place.
            assert relative_error(a, b.double()) < 1e-2


@pytest.mark.parametrize("T", [300, 9000])
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-6, 1e5])
def test_any_scale(scale, T):
    """Some kernels divide by it.

    Where it is next to nothing, gradients come from the last state alone: through all chunks, and
    rounded at each.
    """
    limit = 1.2e-2 if abs(scale) > 1e-3 else 3e-2
    inputs = arrange(1, T, 2, 1, 64, 64, decay=0.01)
    wide = {n: x if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()}
    (o, state), (exact, exact_state) = (
        delta_product(
            *(x[n] for n in ORDER), scale=scale, initial_state=x["initial_state"],
            output_final_state=True, impl=impl,
        )
        for x, impl in ((inputs, "triton"), (wide, "chunk"))
    )  # fmt: skip
    assert relative_error(o, exact) < 1.2e-2
    actual, expected = gradients((o, state), inputs), gradients((exact, exact_state), wide)
    for a, e in zip(actual, expected, strict=True):
        # Gates may leave less than float32 has.
        floor = torch.finfo(torch.float32).tiny
        assert (a.double() - e).norm() <= limit * e.norm() + floor


@pytest.mark.parametrize("N", [1, 2])
def test_function_transforms(N):
    """Per-sample gradients, and a gradient through a batched call, are those one by one."""
    inputs = {
        n: x.detach() for n, x in arrange(2, 130, N, 2, 64, 64, HV=4).items() if x is not None
    }
    given = tuple(inputs[n] for n in (*ORDER, "initial_state"))

    def loss(q, k, v, beta, g, initial_state):
        o, state = delta_product(
            q, k, v, beta, g, initial_state=initial_state, output_final_state=True, impl="triton"
        )
        return o.float().sin().sum() + state.sin().sum()

    each = torch.func.grad(loss, argnums=tuple(range(6)))
    stacked = [torch.stack([x, x.flip(0)]) for x in given]
    together = torch.func.vmap(each)(*stacked)
    for i in range(2):
        for a, b in zip(together, each(*(x[i] for x in stacked)), strict=True):
            assert relative_error(a[i], b.double()) < 1e-2
    through = torch.func.grad(lambda k: torch.func.vmap(loss)(stacked[0], k, *stacked[2:]).sum())
    assert relative_error(through(stacked[1]), together[1].double()) < 1e-2


def test_packed_options_compile_into_one_graph():
    """What a layer calls in training on documents, with the gradients of its parameters."""
    inputs = arrange(1, 700, 2, 2, 64, 64, num_sequences=9, decay=0.5)
    parameters = [torch.randn(2, device="cuda").requires_grad_() for _ in range(2)]

    def call_all(q, k, v, beta, g, A_log, dt_bias):
        return delta_product(
            q, k, v, beta, g, A_log=A_log, dt_bias=dt_bias, qk_norm="l2",
            beta_activation="2sigmoid", gate_activation="softplus", recompute=True,
            cu_seqlens=inputs["cu_seqlens"], output_final_state=True,
        )  # fmt: skip

    given = [*(inputs[n] for n in ORDER), *parameters]
    compiled = torch.compile(call_all, fullgraph=True)
    results = []
    for function in (call_all, compiled):
        o, state = function(*given)
        ones = [torch.ones_like(o), torch.ones_like(state)]
        results.append([o, state, *torch.autograd.grad([o, state], given, ones)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "H", "K", "V"),
    [(1_048_576, 17, 128, 16), (262_144, 33, 128, 128), (131_072, 17, 256, 256)],
)
def test_more_than_two_to_the_31_elements(T, H, K, V):
    """The second half alone, from the first half's state, is the second half of the whole.

    So many numbers are in k, or in the states that are kept for the gradient, in either form.
    """
    assert max(T * H * K, T // 64 * H * K * V) > 2**31
    draw, half = torch.Generator("cuda").manual_seed(0), T // 2

    def normal(*shape):
        x = torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)
        return x.requires_grad_()

    inputs = {"q": normal(1, T, H, K), "v": normal(1, T, 1, H, V), "beta": normal(1, T, 1, H)}
    with torch.no_grad():
        k = torch.nn.functional.normalize(normal(1, T, 1, H, K), dim=-1)
        inputs["beta"].sigmoid_().mul_(2)
        inputs["g"] = -0.05 * torch.rand(1, T, H, generator=draw, device="cuda")
    inputs["k"] = k.requires_grad_()
    o, state = call(inputs)
    first = {n: None if x is None else x[:, :half].detach() for n, x in inputs.items()}
    second = {
        n: None if x is None else x[:, half:].detach().requires_grad_() for n, x in inputs.items()
    }
    _, middle = call(first)
    tail, end = call(second | {"initial_state": middle})
    assert relative_error(tail, o[:, half:]) < 1e-2
    assert relative_error(end, state) < 1e-2
    # A gradient that enters at the end reaches the second half as it does there alone.
    do = torch.randn(tail.shape, generator=draw, device="cuda", dtype=torch.bfloat16)
    names = ("q", "k", "v", "beta")
    ours = torch.autograd.grad(o[:, half:], [inputs[n] for n in names], do)
    alone = torch.autograd.grad(tail, [second[n] for n in names], do)
    for name, a, b in zip(names, ours, alone, strict=True):
        assert relative_error(a[:, half:], b) < 1e-2, name


def test_a_generated_token_continues_the_sequence():
    inputs = arrange(2, 130, 3, 2, 64, 64)
    o, state = call(inputs)
    with torch.no_grad():
        before = {n: None if inputs[n] is None else inputs[n][:, :-1] for n in ORDER}
        _, middle = call(before | {"initial_state": inputs["initial_state"]})
        last = [None if inputs[n] is None else inputs[n][:, -1] for n in ORDER]
        token, end = delta_product_step(*last, state=middle, impl="triton")
    assert relative_error(token, o[:, -1]) < 1e-2
    assert relative_error(end, state) < 1e-2


def test_empty_sequences_and_batches():
    inputs = arrange(2, 0, 2, 2, 64, 64)
    o, state = call(inputs)
    assert o.shape == (2, 0, 2, 64)
    assert torch.equal(state, inputs["initial_state"])
    o, _ = call(arrange(0, 5, 2, 2, 64, 64))
    assert o.shape == (0, 5, 2, 64)


@pytest.mark.parametrize(
    ("K", "dtype", "form"),
    [
        (64, torch.bfloat16, "triton"),
        (64, torch.float32, "triton"),
        (64, torch.float64, "chunk"),
        (24, torch.float32, "chunk"),
    ],
)
def test_auto_runs_the_kernels_where_they_can(K, dtype, form):
    inputs = arrange(2, 70, 2, 2, K, 64, dtype=dtype)
    for a, b in zip(call(inputs, impl="auto"), call(inputs, impl=form), strict=True):
        assert torch.equal(a, b)


def test_auto_differentiates_one_token_and_generates_without_gradients():
    inputs = arrange(2, 1, 2, 2, 64, 64)
    token = [None if inputs[n] is None else inputs[n][:, 0] for n in ORDER]
    o, state = delta_product_step(*token, state=inputs["initial_state"])
    (gradient,) = torch.autograd.grad(o.float().sum() + state.sum(), inputs["v"])
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        generated = delta_product_step(*token, state=inputs["initial_state"])
        expected = delta_product_step(*token, state=inputs["initial_state"], impl="triton")
    for a, b in zip(generated, expected, strict=True):
        assert torch.equal(a, b)
