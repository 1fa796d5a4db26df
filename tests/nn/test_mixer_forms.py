"""Whole, packed, in segments and token by token: one computation, to rounding."""

from __future__ import annotations

import pytest
import torch

from householder.nn import DeltaProduct, MixerState

from .mixer_cases import (
    CASES,
    assert_agree,
    assert_states_agree,
    float64_copy,
    make_input,
    make_mixer,
    run_segments,
    run_steps,
    state_tensors,
)

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 5, 19])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_whole(case: str, T: int, dtype: torch.dtype) -> None:
    mixer = make_mixer(case, dtype)
    x = make_input(2, T, dtype=dtype)
    exact = (None, None) if dtype == torch.float64 else run_steps(float64_copy(mixer), x.double())
    y, state = mixer(x, return_state=True)
    y_steps, state_steps = run_steps(mixer, x)
    assert torch.equal(y, mixer(x)), "asking for the state changes the output"
    assert_agree(y_steps, y, exact[0])
    assert_states_agree(state_steps, state, exact[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[1, 1, 11], [2, 0, 9, 2], [7, 6]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_segments_are_the_whole(case: str, lengths: list[int], dtype: torch.dtype) -> None:
    mixer = make_mixer(case, dtype)
    x = make_input(3, sum(lengths), dtype=dtype)
    exact = (None, None)
    if dtype != torch.float64:
        exact = float64_copy(mixer)(x.double(), return_state=True)
    y, state = mixer(x, return_state=True)
    y_segments, state_segments = run_segments(mixer, x, lengths)
    assert_agree(y_segments, y, exact[0])
    assert_states_agree(state_segments, state, exact[1])


def packed_inputs(lengths: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """cu_seqlens, and one input [1, t, D] per sequence."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return cu_seqlens, [make_input(1, t, seed=10 + s) for s, t in enumerate(lengths)]


# Sequences shorter than the kernel, of one token, and empty ones at every place.
PACKINGS = [[5], [1, 1, 1], [4, 0, 2, 7], [0, 3, 0, 0, 1, 0], [6, 5, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", PACKINGS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_packed_is_separate(case: str, lengths: list[int], dtype: torch.dtype) -> None:
    """Twice in a row, so that the second run continues every sequence from its own state."""
    mixer = make_mixer(case, dtype)
    exact_mixer = float64_copy(mixer)
    cu_seqlens, sequences = packed_inputs(lengths)
    sequences = [x.to(dtype) for x in sequences]
    packed = torch.cat(sequences, dim=1)
    state, states, exact_states = None, [None] * len(lengths), [None] * len(lengths)
    for _ in range(2):
        y, state = mixer(packed, state=state, cu_seqlens=cu_seqlens, return_state=True)
        for s, x in enumerate(sequences):
            y_s, states[s] = mixer(x, state=states[s], return_state=True)
            exact, exact_states[s] = exact_mixer(
                x.double(), state=exact_states[s], return_state=True
            )
            rows = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
            wide = dtype == torch.float64
            assert_agree(y[:, rows], y_s, None if wide else exact, f"sequence {s}")
            state_s = MixerState(
                state.matrix[s : s + 1],
                None if state.conv is None else tuple(c[s : s + 1] for c in state.conv),
            )
            assert_states_agree(state_s, states[s], None if wide else exact_states[s])


@pytest.mark.parametrize("case", CASES)
def test_packed_gradients_are_separate_gradients(case: str) -> None:
    mixer = make_mixer(case)
    cu_seqlens, sequences = packed_inputs([4, 0, 2, 7])
    packed = torch.cat(sequences, dim=1).requires_grad_()
    weight = make_input(1, packed.shape[1], seed=3)
    (mixer(packed, cu_seqlens=cu_seqlens) * weight).sum().backward()
    packed_grads = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    mixer.zero_grad()

    separate = [x.clone().requires_grad_() for x in sequences]
    for x, w in zip(separate, weight.split([x.shape[1] for x in sequences], dim=1), strict=True):
        (mixer(x) * w).sum().backward()
    assert_agree(packed.grad, torch.cat([x.grad for x in separate], dim=1))
    for name, p in mixer.named_parameters():
        assert_agree(packed_grads[name], p.grad, name=name)


@pytest.mark.parametrize("case", CASES)
def test_nothing_crosses_a_border(case: str) -> None:
    """NaN in one packed sequence leaves the others untouched, to the bit."""
    mixer = make_mixer(case)
    cu_seqlens, sequences = packed_inputs([3, 2, 5])
    packed = torch.cat(sequences, dim=1)
    clean = mixer(packed, cu_seqlens=cu_seqlens)
    poisoned = packed.clone()
    poisoned[:, 3:5] = torch.nan
    y = mixer(poisoned, cu_seqlens=cu_seqlens)
    assert y[:, 3:5].isnan().all()
    assert torch.equal(y[:, :3], clean[:, :3])
    assert torch.equal(y[:, 5:], clean[:, 5:])


@pytest.mark.parametrize("case", CASES)
def test_output_depends_on_the_past_only(case: str) -> None:
    mixer = make_mixer(case)
    x = make_input(1, 8)
    changed = x.clone()
    changed[:, 5:] += 1
    y, y_changed = mixer(x), mixer(changed)
    assert_agree(y_changed[:, :5], y[:, :5])
    assert (y_changed[:, 5:] - y[:, 5:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_the_given_state_is_not_changed(case: str) -> None:
    mixer = make_mixer(case)
    x = make_input(2, 5)
    _, state = mixer(x, return_state=True)
    before = [t.clone() for t in state_tensors(state)]
    first, _ = mixer(x, state=state, return_state=True)
    y_t, next_state = mixer.step(x[:, 0], state)
    y_t.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(state_tensors(state), before, strict=True))
    assert not torch.equal(next_state.matrix, state.matrix)
    assert torch.equal(mixer(x, state=state), first)


@pytest.mark.parametrize("case", CASES)
def test_a_state_carries_gradients_between_segments(case: str) -> None:
    """Cutting a sequence in two changes no gradient."""
    mixer = make_mixer(case)
    x = make_input(2, 9).requires_grad_()
    weight = make_input(2, 9, seed=2)
    (whole,) = torch.autograd.grad((mixer(x) * weight).sum(), x)
    y, _ = run_segments(mixer, x, [4, 5])
    (cut,) = torch.autograd.grad((y * weight).sum(), x)
    assert_agree(cut, whole)


@pytest.mark.parametrize("case", CASES)
def test_batch_rows_do_not_depend_on_one_another(case: str) -> None:
    mixer = make_mixer(case)
    x = make_input(3, 7)
    assert_agree(mixer(x[1:2]), mixer(x)[1:2])


@pytest.mark.parametrize("case", CASES)
def test_no_tokens(case: str) -> None:
    """An empty segment leaves the state as it is, and an empty batch gives nothing."""
    mixer = make_mixer(case)
    y, state = mixer(make_input(0, 5).requires_grad_(), return_state=True)
    assert y.shape == (0, 5, mixer.d_model)
    assert len(state.matrix) == 0
    y.sum().backward()
    assert not mixer.o_proj.weight.grad.any()
    _, state = mixer(make_input(2, 3), return_state=True)
    y, same = mixer(make_input(2, 0), state=state, return_state=True)
    assert y.shape == (2, 0, mixer.d_model)
    assert_states_agree(same, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_half_precision_modules_run_with_wide_states(case: str, dtype: torch.dtype) -> None:
    mixer = make_mixer(case, dtype)
    x = make_input(2, 9, dtype=dtype)
    y, state = mixer(x, return_state=True)
    y_steps, state_steps = run_steps(mixer, x)
    assert y.dtype == y_steps.dtype == dtype
    assert state.matrix.dtype == state_steps.matrix.dtype == torch.float32
    assert mixer.init_state(2).matrix.dtype == torch.float32
    exact = float64_copy(mixer)(x.double())
    # Some ten roundings between input and output.
    for form in (y, y_steps):
        assert (form.double() - exact).abs().max() < 10 * torch.finfo(dtype).eps * exact.abs().max()
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("case", CASES)
def test_autocast(case: str) -> None:
    mixer = make_mixer(case, torch.float32)
    x = make_input(2, 9, dtype=torch.float32)
    exact = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(x, return_state=True)
        more, _ = mixer(x, state=state, return_state=True)
        y_t, _ = mixer.step(x[:, 0], state)
    assert y.dtype == torch.bfloat16
    assert state.matrix.dtype == torch.float32
    assert (y.float() - exact).abs().max() < 0.06 * exact.abs().max()
    assert (more[:, 0] - y_t).abs().max() < 0.06 * more.abs().max()
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.slow
# PyTorch's own tracer instantiates autograd.Function, which PyTorch warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", ["delta_net-no_conv-elu-sum", "gated_delta_product-n3-grouped"])
def test_compile_without_graph_breaks(case: str) -> None:
    mixer = make_mixer(case)
    x, state = make_input(2, 3), mixer.init_state(2)
    torch.compiler.reset()
    forward = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, new_state = mixer(x, state=state, return_state=True)
    y_compiled, state_compiled = forward(x, state=state, return_state=True)
    assert_agree(y_compiled, y)
    assert_states_agree(state_compiled, new_state)
    y_compiled.sum().backward()
    compiled_grads = [p.grad.clone() for p in mixer.parameters()]
    mixer.zero_grad()
    y.sum().backward()
    for compiled, p in zip(compiled_grads, mixer.parameters(), strict=True):
        assert_agree(compiled, p.grad)

    step = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
    y_t, next_state = step(x[:, 0], state)
    expected, expected_state = mixer.step(x[:, 0], state)
    assert_agree(y_t, expected)
    assert_states_agree(next_state, expected_state)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_exports_for_sequences_of_any_length() -> None:
    mixer, sizes = (
        make_mixer("gated_delta_product"),
        {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},
    )
    program = torch.export.export(mixer, (make_input(2, 40),), dynamic_shapes=(sizes,))
    x = make_input(3, 17)
    assert_agree(program.module()(x), mixer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_packed_without_graph_breaks() -> None:
    mixer = make_mixer("gated_delta_product")
    cu_seqlens, sequences = packed_inputs([4, 0, 2])
    packed = torch.cat(sequences, dim=1)
    torch.compiler.reset()
    forward = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    assert_agree(forward(packed, cu_seqlens=cu_seqlens), mixer(packed, cu_seqlens=cu_seqlens))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_under_autocast() -> None:
    mixer = make_mixer("gated_delta_product", torch.float32)
    x = make_input(2, 5, dtype=torch.float32)
    torch.compiler.reset()
    forward = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, compiled = mixer(x), forward(x)
    assert compiled.dtype == torch.bfloat16
    assert_agree(compiled, y, float64_copy(mixer)(x.double()))


def test_impl_reaches_the_op() -> None:
    mixer = DeltaProduct(16, num_heads=2, num_householder=2, impl="reference")
    x = torch.randn(2, 5, 16)
    expected = mixer(x)
    mixer.impl = "chunk"
    torch.testing.assert_close(mixer(x), expected)
    mixer.impl = "triton"
    with pytest.raises(NotImplementedError, match="CUDA device"):
        mixer(x)
