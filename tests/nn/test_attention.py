"""The softmax attention layers: their definitions, and every way to run them."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F

from householder.nn import (
    ForgettingAttention,
    PaTHAttention,
    RotaryAttention,
    ShortConvolution,
)
from householder.nn.attention_baselines import rotate

D = 24
CASES = {
    "path": (PaTHAttention, {"num_heads": 3}),
    "path, forgetting": (PaTHAttention, {"num_heads": 3, "use_forget_gate": True}),
    "path, all options": (
        PaTHAttention,
        {
            "num_heads": 4,
            "num_key_heads": 2,
            "head_dim": 8,
            "qk_norm": True,
            "use_forget_gate": True,
            "w_rank": 5,
            "w_activation": "relu",
            "gate_scale": 0.3,
            "conv_size": 4,
            "max_rollback": 3,
            "use_sinks": True,
        },
    ),
    "path, window": (PaTHAttention, {"num_heads": 3, "window": 4, "use_sinks": True}),
    "path, no convolution": (PaTHAttention, {"num_heads": 3, "use_short_conv": False}),
    "path, convolution of one": (PaTHAttention, {"num_heads": 3, "conv_size": 1}),
    "rotary": (RotaryAttention, {"num_heads": 3}),
    "rotary, all options": (
        RotaryAttention,
        {"num_heads": 4, "num_key_heads": 2, "head_dim": 10, "qk_norm": True, "base": 100.0},
    ),
    "rotary, window": (RotaryAttention, {"num_heads": 4, "window": 4}),
    "forgetting": (ForgettingAttention, {"num_heads": 3}),
    "forgetting, window": (ForgettingAttention, {"num_heads": 3, "window": 3}),
    "forgetting, all options": (
        ForgettingAttention,
        {"num_heads": 4, "num_key_heads": 2, "head_dim": 7, "qk_norm": True},
    ),
}
every_layer = pytest.mark.parametrize("case", CASES)


def make(case, dtype=torch.float64):
    kind, options = CASES[case]
    torch.manual_seed(0)
    layer = kind(D, **options, init_std=0.5).to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("bias", "sinks")) or "norm" in name:
                parameter += torch.randn_like(parameter)
    return layer


def make_input(B, T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D, generator=generator, dtype=torch.float64)


def agree(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def expected_output(layer, x):
    """The layer of one sequence `[T, D]`, written out with loops and dense reflectors."""
    T, K = x.shape[0], layer.head_dim
    HQ, H = layer.num_heads, layer.num_key_heads
    q, k, v = (F.linear(x, p.weight) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = q.view(T, HQ, K), k.view(T, H, K), v.view(T, H, K)
    if layer.qk_norm:
        eps = layer.q_norm.eps
        q, k = (
            y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
            for y, norm in ((q, layer.q_norm), (k, layer.k_norm))
        )
    g = torch.zeros(T, HQ, dtype=x.dtype)
    if getattr(layer, "f_proj", None) is not None:
        g = (F.linear(x, layer.f_proj.weight, layer.f_proj.bias)).sigmoid().log()
        g = g * getattr(layer, "gate_scale", 1.0)
    between = torch.eye(K, dtype=x.dtype).expand(T, H, K, K)
    if isinstance(layer, PaTHAttention):
        w = x @ layer.w_down_proj.weight.T @ layer.w_up_proj.weight.T
        if layer.w_conv1d is not None:
            size = layer.w_conv1d.kernel_size
            padded = torch.cat([w.new_zeros(size - 1, w.shape[1]), w])
            w = sum(padded[i : i + T] * layer.w_conv1d.weight[:, 0, i] for i in range(size))
        w = getattr(F, layer.w_activation)(w).view(T, H, K)
        w = w / (w.square().sum(-1, keepdim=True) + layer.norm_eps).sqrt()
        beta = 2 * F.linear(x, layer.b_proj.weight, layer.b_proj.bias).sigmoid()
        between = between - beta[..., None, None] * w[..., None] * w[..., None, :]
    if isinstance(layer, RotaryAttention):
        angle = torch.arange(T)[:, None] * layer.base ** (-2 * torch.arange(K // 2).double() / K)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        q, k = (torch.complex(y[..., : K // 2], y[..., K // 2 :]) * turn for y in (q, k))
        q, k = (torch.cat([y.real, y.imag], dim=-1) for y in (q, k))
    o = []
    for i in range(T):
        for h in range(HQ):
            key_head = h // (HQ // H)
            query, decay, logits = q[i, h], 0.0, []
            for j in range(i, -1, -1):
                if j < i:
                    query = between[j + 1, key_head] @ query
                    decay = decay + g[j + 1, h]
                logits.append(k[j, key_head] @ query * K**-0.5 + decay)
            logits = logits[: layer.window]  # the nearest first; None keeps all
            values = v[: i + 1, key_head].flip(0)[: layer.window]
            if getattr(layer, "sinks", None) is not None:
                logits.append(layer.sinks[h])
                values = torch.cat([values, torch.zeros_like(values[:1])])
            o.append(torch.stack(logits).softmax(0) @ values)
    return torch.stack(o).view(T, HQ * K) @ layer.o_proj.weight.T


@every_layer
def test_definition(case):
    layer, x = make(case), make_input(2, 9)
    agree(layer(x), torch.stack([expected_output(layer, row) for row in x]))


@every_layer
def test_gradients(case):
    layer, x = make(case), make_input(1, 7)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(expected_output(layer, x[0]).sin().sum(), parameters)
    for a, b in zip(torch.autograd.grad(layer(x).sin().sum(), parameters), expected, strict=True):
        assert a.abs().max() > 1e-6
        agree(a, b)


@every_layer
@pytest.mark.parametrize("lengths", [[1] * 12, [5, 1, 1, 5], [0, 12], [70, 70, 1, 1]])
@torch.no_grad()
def test_segments_and_steps_are_the_whole(case, lengths):
    layer, x = make(case), make_input(2, sum(lengths))
    whole, _ = layer(x, return_state=True)
    agree(whole, layer(x))
    state, outputs = layer.init_state(2), []
    for segment in x.split(lengths, dim=1):
        if segment.shape[1] == 1:
            y, state = layer.step(segment.squeeze(1), state)
            outputs.append(y.unsqueeze(1))
        else:
            y, state = layer(segment, state=state, return_state=True)
            outputs.append(y)
    agree(torch.cat(outputs, dim=1), whole)


@every_layer
@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [4, 0, 2, 40], [0, 3, 0, 0, 1, 0]])
def test_packed_is_separate(case, lengths):
    layer, x = make(case), make_input(1, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = layer(x, cu_seqlens=bounds)
    agree(packed, torch.cat([layer(part) for part in x.split(lengths, dim=1)], dim=1))


@every_layer
def test_no_tokens(case):
    layer = make(case)
    assert layer(make_input(2, 0)).shape == (2, 0, D)
    assert layer(make_input(0, 5)).shape == (0, 5, D)
    nothing = torch.zeros(3, dtype=torch.int32)
    assert layer(make_input(1, 0), cu_seqlens=nothing).shape == (1, 0, D)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_lower_precision(case, dtype):
    layer, x = make(case, dtype), make_input(2, 40).to(dtype)
    exact = layer.double()(x.double())
    layer = layer.to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    state, outputs = layer.init_state(2), []
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        outputs.append(y_t)
    for actual in (y, torch.stack(outputs, dim=1)):
        error = (actual - exact).norm() / exact.norm()
        assert error < 40 * torch.finfo(dtype).eps


@every_layer
def test_the_future_cannot_reach_back(case):
    layer, x = make(case), make_input(1, 50)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer(x)[:, :20].sin().sum(), x)
    assert not dx[:, 20:].any()
    assert dx[:, :20].any(-1).all()


@pytest.mark.parametrize("max_rollback", [0, 4])
@pytest.mark.parametrize("conv_size", [1, 3])
@torch.no_grad()
def test_rollback(max_rollback, conv_size):
    layer = PaTHAttention(D, num_heads=3, conv_size=conv_size, max_rollback=max_rollback).double()
    x, guesses = make_input(2, 200), make_input(2, 200, seed=2)
    whole = layer(x)
    state, outputs = layer.init_state(2), []
    for t in range(0, 200, 5):
        y, state = layer(x[:, t : t + 5], state=state, return_state=True)
        outputs.append(y)
        wrong = guesses[:, t : t + max_rollback]
        _, state = layer(wrong, state=state, return_state=True)
        state = state.rollback(max_rollback)
    agree(torch.cat(outputs, dim=1), whole)


@torch.no_grad()
def test_too_long_a_rollback_is_refused():
    layer = PaTHAttention(D, num_heads=3, max_rollback=4)
    _, state = layer(torch.randn(2, 67, D), return_state=True)
    for most in (4, 2, 3):
        with pytest.raises(ValueError, match="larger max_rollback"):
            state.rollback(most + 1)
        state = state.rollback(2)
        if most == 2:
            _, state = layer(torch.randn(2, 3, D), state=state, return_state=True)


def test_a_refused_rollback_changes_nothing():
    layer = PaTHAttention(D, num_heads=3, max_rollback=4)
    with torch.no_grad():
        _, state = layer(torch.randn(2, 9, D), return_state=True)
    for num_tokens, error in (([1, 1], TypeError), (True, TypeError), (-1, ValueError)):
        with pytest.raises(error, match="`num_tokens` must be"):
            state.rollback(num_tokens)
    assert state.cache.lengths == [9, 9]


def test_reflectors_are_unit_vectors_whatever_the_dtype():
    layer = PaTHAttention(D, num_heads=3, use_forget_gate=True, dtype=torch.bfloat16)
    w, beta, g, _ = layer.transitions(torch.randn(2, 9, D, dtype=torch.bfloat16))
    assert w.dtype == beta.dtype == g.dtype == torch.float32
    torch.testing.assert_close(w.norm(dim=-1), torch.ones(2, 9, 3), rtol=1e-3, atol=1e-3)
    assert ((beta > 0) & (beta < 2)).all()
    assert (g < 0).all()


@torch.no_grad()
def test_weak_gates_count_after_a_strong_one():
    """The first gates sum to −3e6, beside which float32 does not see the others."""
    layer = ForgettingAttention(8, num_heads=2, init_std=1.0)
    layer.f_proj.weight.zero_()
    layer.f_proj.weight[:, 0] = 1.0
    x = torch.randn(1, 12, 8)
    x[:, :, 0] = torch.tensor([-1e6] * 3 + [0.0] * 9)
    exact = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(layer(x), exact.float(), rtol=1e-3, atol=1e-4)
    _, state = layer(x[:, :6], return_state=True)
    state, outputs = layer.reserve(state, 12), []
    for token in x[:, 6:].unbind(1):
        outputs.append(layer.step_(token, state))
    torch.testing.assert_close(torch.stack(outputs, 1), exact[:, 6:].float(), rtol=1e-3, atol=1e-4)


def test_rotation_keeps_lengths_and_sees_only_differences():
    q, k = torch.randn(2, 1, 5, 1, 8, dtype=torch.float64)
    position = torch.arange(5)
    agree(rotate(q, position).norm(dim=-1), q.norm(dim=-1))
    products = [
        torch.einsum("bihk,bjhk->ij", rotate(q, position + first), rotate(k, position + first))
        for first in (0, 1000)
    ]
    agree(*products)


def test_published_defaults():
    layer = PaTHAttention(64, num_heads=4, use_forget_gate=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "q_proj.weight": (64, 64),
        "k_proj.weight": (64, 64),
        "v_proj.weight": (64, 64),
        "o_proj.weight": (64, 64),
        "w_down_proj.weight": (32, 64),
        "w_up_proj.weight": (64, 32),
        "w_conv1d.weight": (64, 1, 3),
        "b_proj.weight": (4, 64),
        "b_proj.bias": (4,),
        "f_proj.weight": (4, 64),
        "f_proj.bias": (4,),
    }
    assert not layer.b_proj.bias.any()
    assert isinstance(layer.w_conv1d, ShortConvolution)


def test_the_output_projection_starts_smaller_in_deep_models():
    torch.manual_seed(0)
    alone = RotaryAttention(64, num_heads=4)
    torch.manual_seed(0)
    deep = RotaryAttention(64, num_heads=4, num_layers=8)
    torch.testing.assert_close(deep.o_proj.weight * 4, alone.o_proj.weight)
    assert torch.equal(deep.q_proj.weight, alone.q_proj.weight)


class TestErrors:
    @pytest.mark.parametrize(
        ("kind", "options", "error", "match"),
        [
            (PaTHAttention, {"num_heads": 5}, ValueError, "multiple of num_heads=5"),
            (PaTHAttention, {"num_heads": 3, "num_key_heads": 2}, ValueError, "num_key_heads=2"),
            (PaTHAttention, {"num_heads": 3, "w_rank": 0}, ValueError, "`w_rank`"),
            (PaTHAttention, {"num_heads": 3, "conv_size": 0}, ValueError, "`conv_size`"),
            (PaTHAttention, {"num_heads": 3, "max_rollback": -1}, ValueError, "`max_rollback`"),
            (PaTHAttention, {"num_heads": 3, "impl": "fast"}, ValueError, "`impl` must be one of"),
            (PaTHAttention, {"num_heads": 3.0}, TypeError, "`num_heads` must be an int"),
            (RotaryAttention, {"num_heads": 8}, ValueError, "`head_dim` must be even, got 3"),
            (RotaryAttention, {"num_heads": 3, "base": 0.0}, ValueError, "`base`"),
            (ForgettingAttention, {"num_heads": 3, "norm_eps": 0.0}, ValueError, "`norm_eps`"),
            (PaTHAttention, {"num_heads": 3, "window": 0}, ValueError, "`window` must be at least"),
            (RotaryAttention, {"num_heads": 4, "window": 2.0}, TypeError, "`window` must be an"),
        ],
    )
    def test_wrong_option(self, kind, options, error, match):
        with pytest.raises(error, match=match):
            kind(D, **options)

    @every_layer
    @torch.no_grad()
    def test_wrong_inputs(self, case):
        layer = make(case)
        with pytest.raises(ValueError, match=r"`x` must be \[B, T, 24\]"):
            layer(torch.zeros(2, 3, 25))
        with pytest.raises(ValueError, match=r"step: `x` must be \[B, d_model=24\]"):
            layer.step(make_input(2, 1), layer.init_state(2))
        with pytest.raises(ValueError, match=r"`state"):
            layer(make_input(2, 1), state=layer.init_state(3))
        other = make("rotary" if case.startswith("path") else "path").init_state(2)
        for state in (other, 3):
            got = type(state).__name__
            with pytest.raises(TypeError, match=f"`state` must be a .*State, got {got}; make it"):
                layer(make_input(2, 1), state=state)
        reserved = layer.reserve(layer.init_state(2), 4)
        assert isinstance(reserved, layer.reserved_state)
        with pytest.raises(TypeError, match=r"step_: `state` must be a .*, got .*State; make it"):
            layer.step_(make_input(2, 1)[:, 0], other)
        with pytest.raises(ValueError, match=r"step: `x` must be \[B, d_model=24\], got shape"):
            layer.step_(torch.zeros(2, 25), reserved)
        with pytest.raises(TypeError, match=r"`x` must be real floating point, got torch\.int64"):
            layer(torch.zeros(2, 3, 24, dtype=torch.int64))
        bounds = torch.tensor([0, 2], dtype=torch.int32)
        with pytest.raises(NotImplementedError, match="rows of a batch"):
            layer(make_input(1, 2), cu_seqlens=bounds, return_state=True)

    def test_decoding_with_gradients(self):
        layer = make("path")
        with pytest.raises(NotImplementedError, match="no_grad"):
            layer.step(make_input(2, 1)[:, 0], layer.init_state(2))


def test_every_option_is_documented():
    for kind in (PaTHAttention, RotaryAttention, ForgettingAttention):
        documentation = inspect.getdoc(kind)
        for name in inspect.signature(kind).parameters:
            assert f"{name}: " in documentation


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", ["path, all options", "rotary", "forgetting"])
def test_compiles_without_graph_breaks(case):
    layer, x = make(case), make_input(2, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    agree(compiled(x), layer(x))
    weight = layer.q_proj.weight
    traced = torch.autograd.grad(compiled(x).sin().sum(), weight)
    agree(traced, torch.autograd.grad(layer(x).sin().sum(), weight))


@torch.no_grad()
def test_a_compiled_step_is_not_compiled_again_for_every_token():
    layer, x = make("path, all options"), make_input(2, 40)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(layer.step, backend=counter)
    y, state = layer(x[:, :20], state=layer.init_state(2), return_state=True)
    outputs, compiled = [y], []
    for token in x[:, 20:].unbind(1):
        y, state = step(token, state)
        outputs.append(y.unsqueeze(1))
        compiled.append(counter.frame_count)
    agree(torch.cat(outputs, dim=1), layer(x))
    # The first state has fewer inputs of the convolution, all others as many.
    assert 0 < compiled[1] == compiled[-1] < 10


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("case", ["path, forgetting", "rotary", "forgetting"])
def test_exports_for_sequences_of_any_length(case):
    layer, sizes = make(case), {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(layer, (make_input(2, 40),), dynamic_shapes=(sizes,))
    x = make_input(3, 17)
    agree(program.module()(x), layer(x))


@every_layer
def test_a_copy_has_the_same_parameters(case):
    layer, copy = make(case), make(case)
    copy.reset_parameters()
    assert not torch.equal(copy.q_proj.weight, layer.q_proj.weight)
    copy.load_state_dict(layer.state_dict())
    x = make_input(1, 5)
    assert torch.equal(copy(x), layer(x))
