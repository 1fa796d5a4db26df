"""Options, parameter layout and initial values of the mixers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from householder.nn import (
    MIXERS,
    DeltaNet,
    DeltaProduct,
    DeltaProductMixer,
    GatedDeltaNet,
    GatedDeltaProduct,
    MixerState,
)

# N, forget gate, output gate, beta up to 2, V / K, K at d_model = 96: the published defaults.
PUBLISHED = {
    "delta_net": (DeltaNet, 4, 1, False, False, False, 1, 24),
    "gated_delta_net": (GatedDeltaNet, 6, 1, True, True, False, 2, 12),
    "delta_product": (DeltaProduct, 4, 2, False, False, True, 1, 24),
    "gated_delta_product": (GatedDeltaProduct, 6, 2, True, True, True, 2, 12),
}


def test_every_published_layer_is_registered() -> None:
    assert {name: row[0] for name, row in PUBLISHED.items()} == dict(MIXERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_defaults(name: str) -> None:
    cls, num_heads, N, forget, gate, neg, expand_v, head_dim = PUBLISHED[name]
    mixer = cls(96)
    assert mixer.num_heads == mixer.num_value_heads == num_heads
    assert mixer.num_householder == N
    assert mixer.use_forget_gate is forget
    assert mixer.use_output_gate is gate
    assert mixer.allow_neg_eigval is neg
    assert (mixer.head_dim, mixer.value_head_dim) == (head_dim, expand_v * head_dim)
    assert mixer.use_short_conv
    assert mixer.conv_size == 4
    assert (mixer.qk_activation, mixer.qk_norm) == ("silu", "l2")


def test_published_head_dim_of_the_large_gated_layers() -> None:
    """Six heads of 256, as published for d_model = 2048."""
    mixer = GatedDeltaNet(2048, device="meta")
    assert (mixer.num_heads, mixer.head_dim, mixer.value_head_dim) == (6, 256, 512)


def test_parameter_layout() -> None:
    """Names and shapes, which checkpoints depend on."""
    mixer = GatedDeltaProduct(
        20, num_heads=2, head_dim=3, expand_v=5 / 3, num_householder=3, num_value_heads=4
    )
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    N, H, HV, K, V = 3, 2, 4, 3, 5
    assert shapes == {
        "q_proj.weight": (H * K, 20),
        "k_proj.weight": (N * H * K, 20),
        "v_proj.weight": (N * HV * V, 20),
        "b_proj.weight": (N * HV, 20),
        "a_proj.weight": (HV, 20),
        "A_log": (HV,),
        "dt_bias": (HV,),
        "g_proj.weight": (HV * V, 20),
        "q_conv1d.weight": (H * K, 1, 4),
        "k_conv1d.weight": (N * H * K, 1, 4),
        "v_conv1d.weight": (N * HV * V, 1, 4),
        "o_norm.weight": (V,),
        "o_proj.weight": (20, HV * V),
    }
    plain = DeltaNet(20, num_heads=2, use_short_conv=False)
    names = {name.removesuffix(".weight") for name, _ in plain.named_parameters()}
    assert names == {"q_proj", "k_proj", "v_proj", "b_proj", "o_norm", "o_proj"}


def test_state_layout() -> None:
    mixer = GatedDeltaProduct(20, num_heads=2, head_dim=3, num_householder=3, num_value_heads=4)
    state = mixer.init_state(5)
    assert state.matrix.shape == (5, 4, 3, 6)
    assert state.conv is not None
    assert [tuple(c.shape) for c in state.conv] == [(5, 3, 6), (5, 3, 18), (5, 3, 72)]
    assert all(not t.any() for t in (state.matrix, *state.conv))
    assert DeltaNet(20, use_short_conv=False).init_state(1).conv is None


def test_forget_gate_starts_as_published() -> None:
    mixer = GatedDeltaNet(64, num_heads=8, head_dim=2, num_value_heads=4096)
    A, dt = mixer.A_log.detach().exp(), F.softplus(mixer.dt_bias.detach())
    assert A.min() > 0
    assert A.max() <= 16
    # Means of U(0, 16) and of log-uniform [1e-3, 0.1], within six standard errors of 4096 draws.
    assert abs(A.mean() - 8) < 6 * 16 / math.sqrt(12 * 4096)
    assert dt.min() >= 0.999e-3
    assert dt.max() <= 0.1001
    log_dt = dt.log()
    width = math.log(100)
    assert abs(log_dt.mean() - math.log(1e-2)) < 6 * width / math.sqrt(12 * 4096)
    assert abs(log_dt.std() - width / math.sqrt(12)) < 0.1
    marked = {n for n, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "dt_bias"}


def test_initial_weights() -> None:
    options: dict[str, Any] = {"num_heads": 8, "head_dim": 32, "num_householder": 2}
    published = GatedDeltaProduct(256, init_std=0.02, num_layers=8, **options)
    for name, p in published.named_parameters():
        if name.endswith("_proj.weight") and not name.startswith("o_"):
            assert abs(p.std() / 0.02 - 1) < 0.05, name
            assert abs(p.mean()) < 1e-3, name
    for conv in (published.q_conv1d, published.k_conv1d, published.v_conv1d):
        assert abs(conv.weight.std() / 0.02 - 1) < 0.1
    # U(−b, b) with b = 1/√fan_in, over √(2 · 8).
    bound = 1 / math.sqrt(published.o_proj.in_features) / 4
    assert 0.99 * bound < published.o_proj.weight.abs().max() <= bound
    assert torch.equal(published.o_norm.weight, torch.ones(64))

    plain = DeltaProduct(256, **options)
    for name, p in plain.named_parameters():
        if name.endswith("_proj.weight"):
            bound = 1 / math.sqrt(p.shape[1])
            assert 0.99 * bound < p.abs().max() <= bound, name
    assert plain.q_conv1d.weight.abs().max() <= 0.5


def test_same_seed_same_parameters_and_reset_draws_all_of_them() -> None:
    torch.manual_seed(3)
    first = GatedDeltaProduct(24)
    torch.manual_seed(3)
    second = GatedDeltaProduct(24)
    pairs = list(zip(first.named_parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    with torch.no_grad():
        for p in second.parameters():
            p.fill_(torch.nan)
    second.reset_parameters()
    assert all(p.isfinite().all() for p in second.parameters())
    assert all(not torch.equal(a, b) for (n, a), b in pairs if n != "o_norm.weight")


def test_dtype_and_device_reach_every_parameter() -> None:
    mixer = GatedDeltaProduct(24, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in mixer.parameters()} == {("meta", torch.bfloat16)}
    assert mixer(torch.empty(2, 5, 24, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 24)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"d_model": 0}, ValueError, "`d_model` must be at least 1, got 0"),
        ({"d_model": 12.0}, TypeError, "`d_model` must be an int, got 12.0"),
        ({"num_heads": 0}, ValueError, "`num_heads` must be at least 1, got 0"),
        ({"num_heads": True}, TypeError, "`num_heads` must be an int, got True"),
        ({"num_heads": 5, "head_dim": None}, ValueError, "multiple of num_heads=5, got d_model=12"),
        ({"head_dim": -1}, ValueError, "`head_dim` must be at least 1, got -1"),
        ({"num_householder": 0}, ValueError, "`num_householder` must be at least 1, got 0"),
        ({"num_value_heads": 3}, ValueError, "a multiple of num_heads=2, got 3"),
        ({"num_value_heads": 1}, ValueError, "a multiple of num_heads=2, got 1"),
        ({"value_head_dim": 0}, ValueError, "`value_head_dim` must be at least 1, got 0"),
        ({"conv_size": 0}, ValueError, "`conv_size` must be at least 1, got 0"),
        ({"qk_activation": "gelu"}, ValueError, "'elu', 'identity', 'relu', 'silu', got 'gelu'"),
        ({"qk_norm": "max"}, ValueError, "'l2', 'none', 'sum', got 'max'"),
        ({"qk_norm": "sum"}, ValueError, "got qk_activation='silu'; use 'relu' or 'elu'"),
        ({"qk_norm_eps": 0.0}, ValueError, "`qk_norm_eps` must be greater than 0, got 0.0"),
        ({"norm_eps": -1.0}, ValueError, "`norm_eps` must be greater than 0, got -1.0"),
        ({"norm_eps": "1"}, TypeError, "`norm_eps` must be a number, got '1'"),
        ({"init_std": 0}, ValueError, "`init_std` must be greater than 0, got 0"),
        ({"num_layers": 0}, ValueError, "`num_layers` must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    valid: dict[str, Any] = {"d_model": 12, "num_heads": 2, "head_dim": 3}
    DeltaProductMixer(**valid)
    with pytest.raises(error, match=r"^DeltaProductMixer: ") as caught:
        DeltaProductMixer(**{**valid, **options})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeltaNet(12, num_householder=2), "DeltaNet: `num_householder` must be 1, got 2"),
        (
            lambda: GatedDeltaNet(48, num_householder=2),
            "GatedDeltaNet: `num_householder` must be 1, got 2",
        ),
        (
            lambda: DeltaProduct(12, use_forget_gate=True),
            "DeltaProduct: `use_forget_gate` must be False, got True",
        ),
        (
            lambda: GatedDeltaProduct(48, use_forget_gate=False),
            "GatedDeltaProduct: `use_forget_gate` must be True, got False",
        ),
        (lambda: GatedDeltaNet(20), "3/4 * d_model must be a multiple of num_heads=6"),
        (
            lambda: DeltaNet(12, expand_v=0.5),
            "head_dim=3 must be a whole number, got 0.5 * 3 = 1.5",
        ),
        (lambda: DeltaNet(12, expand_v=-1.0), "`expand_v` must be greater than 0, got -1.0"),
        (lambda: DeltaNet(12, num_heads=0), "DeltaNet: `num_heads` must be at least 1, got 0"),
    ],
)
def test_published_layers_refuse_what_they_are_not(build: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        build()
    assert message in str(caught.value)


def test_fixed_options_may_be_repeated() -> None:
    assert DeltaNet(12, num_householder=1, use_forget_gate=False).num_householder == 1


def call_with(**changed: Any) -> None:
    """Run a mixer on arguments of which some are changed from valid ones."""
    mixer = DeltaNet(12, num_heads=2)
    x, state = torch.randn(2, 5, 12), mixer.init_state(2)
    arguments: dict[str, Any] = {"x": x, "state": state, "cu_seqlens": None, **changed}
    mixer(arguments["x"], state=arguments["state"], cu_seqlens=arguments["cu_seqlens"])


def wrong_state(**changed: Any) -> MixerState:
    return DeltaNet(12, num_heads=2).init_state(2)._replace(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(5, 12)}, "`x` must be [B, T, 12], got shape [5, 12]"),
        ({"x": torch.randn(2, 5, 11)}, "`x` must be [B, T, 12], got shape [2, 5, 11]"),
        ({"x": torch.randn(3, 5, 12)}, "`state.matrix` must be [3, 2, 6, 6], got shape [2, 2,"),
        ({"state": wrong_state(conv=None)}, "`state.conv` must be three tensors"),
        (
            {"state": wrong_state(conv=(torch.zeros(2, 3, 12), *2 * [torch.zeros(2, 2, 12)]))},
            "`state.conv[1]` must be [2, 3, 12], got shape [2, 2, 12]",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
            "the batch must be packed as B = 1, got B = 2",
        ),
        (
            {"x": torch.randn(1, 5, 12), "cu_seqlens": torch.tensor([0, 5])},
            "`cu_seqlens` must be int32",
        ),
        (
            {
                "x": torch.randn(1, 5, 12),
                "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32),
            },
            "`cu_seqlens` must rise from 0 to T = 5",
        ),
        (
            {"x": torch.randn(1, 5, 12), "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
            "`state.matrix` must be [1, 2, 6, 6]",
        ),
    ],
)
def test_wrong_inputs_are_named(changed: dict[str, Any], message: str) -> None:
    call_with()
    with pytest.raises(ValueError, match=r"^DeltaNet: ") as caught:
        call_with(**changed)
    assert message in str(caught.value)


def test_step_wants_one_token_and_init_state_a_batch() -> None:
    mixer = DeltaNet(12, num_heads=2)
    with pytest.raises(ValueError, match=r"^DeltaNet.step: `x` must be \[B, d_model=12\]"):
        mixer.step(torch.randn(2, 1, 12), mixer.init_state(2))
    with pytest.raises(ValueError, match=r"^DeltaNet.init_state: `batch_size`"):
        mixer.init_state(0)
