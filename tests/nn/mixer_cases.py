"""Small mixers that between them use every option, and what several test files need of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from householder.nn import (
    DeltaNet,
    DeltaProduct,
    DeltaProductMixer,
    GatedDeltaNet,
    GatedDeltaProduct,
    MixerState,
)

D_MODEL = 12

# The published layers at their defaults and away from them; odd sizes, so that no two axes agree.
CASES: dict[str, Callable[..., DeltaProductMixer]] = {
    "delta_net": lambda **o: DeltaNet(D_MODEL, num_heads=2, **o),
    "delta_net-no_conv-elu-sum": lambda **o: DeltaNet(
        D_MODEL, num_heads=3, use_short_conv=False, qk_activation="elu", qk_norm="sum", **o
    ),
    "gated_delta_net": lambda **o: GatedDeltaNet(D_MODEL, num_heads=3, **o),
    "gated_delta_net-grouped": lambda **o: GatedDeltaNet(
        D_MODEL, num_heads=2, head_dim=3, num_value_heads=4, conv_size=3, **o
    ),
    "delta_product": lambda **o: DeltaProduct(D_MODEL, num_heads=2, head_dim=5, **o),
    "delta_product-n3-grouped": lambda **o: DeltaProduct(
        D_MODEL, num_heads=2, head_dim=4, num_householder=3, num_value_heads=6, conv_size=1, **o
    ),
    "gated_delta_product": lambda **o: GatedDeltaProduct(D_MODEL, num_heads=3, **o),
    "gated_delta_product-n3-grouped": lambda **o: GatedDeltaProduct(
        D_MODEL, num_heads=2, head_dim=3, num_householder=3, num_value_heads=4, **o
    ),
    "mixer-relu-gate": lambda **o: DeltaProductMixer(
        D_MODEL, num_heads=1, head_dim=7, value_head_dim=2, num_householder=2, conv_size=5,
        use_forget_gate=True, qk_activation="relu", **o,
    ),
    "mixer-identity-no_norm": lambda **o: DeltaProductMixer(
        D_MODEL, num_heads=2, use_short_conv=False, use_output_gate=True, init_std=0.1,
        qk_activation="identity", qk_norm="none", **o,
    ),
}  # fmt: skip


def make_mixer(case: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> DeltaProductMixer:
    """A mixer whose every parameter matters: norms away from one, gates that forget by halves."""
    torch.manual_seed(seed)
    mixer = CASES[case](dtype=torch.float64)
    with torch.no_grad():
        mixer.o_norm.weight.uniform_(0.5, 1.5)
        if mixer.use_forget_gate:
            mixer.A_log.uniform_(-1, 1)
            mixer.dt_bias.uniform_(-2, 0)
    return mixer.to(dtype)


def make_input(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)


def run_steps(
    mixer: DeltaProductMixer, x: Tensor, state: MixerState | None = None
) -> tuple[Tensor, MixerState]:
    """Run `x [B, T, D]` token by token."""
    state = mixer.init_state(x.shape[0]) if state is None else state
    outputs = []
    for x_t in x.unbind(1):
        y_t, state = mixer.step(x_t, state)
        outputs.append(y_t)
    return torch.stack(outputs, dim=1), state


def run_segments(
    mixer: DeltaProductMixer, x: Tensor, lengths: list[int]
) -> tuple[Tensor, MixerState]:
    """Run `x [B, T, D]` in segments of the given lengths."""
    state, outputs = None, []
    for segment in x.split(lengths, dim=1):
        y, state = mixer(segment, state=state, return_state=True)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def state_tensors(state: MixerState) -> list[Tensor]:
    return [state.matrix, *(state.conv or ())]


def assert_agree(
    actual: Tensor, expected: Tensor, exact: Tensor | None = None, name: str = ""
) -> None:
    """Check that two orders of the same computation agree to rounding.

    In float64 to 64 roundings of the largest number; in float32, where `exact` is the float64
    result, `actual` may err at most twice as much as `expected` does, plus 16 roundings of the
    largest number: the worst of a hundred errors is a noisy measure of what an error may be.
    """
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps
    if exact is None:
        assert actual.dtype == torch.float64, "narrow dtypes are judged against a float64 result"
        error = (actual - expected).abs().max()
        allowed = 64 * rounding * max(1.0, expected.abs().max().item())
    else:
        error = (actual.double() - exact).abs().max()
        allowed = 2 * (expected.double() - exact).abs().max() + 16 * rounding * exact.abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_states_agree(
    actual: MixerState, expected: MixerState, exact: MixerState | None = None
) -> None:
    assert (actual.conv is None) == (expected.conv is None)
    exacts = [None] * 4 if exact is None else state_tensors(exact)
    for i, (a, e) in enumerate(zip(state_tensors(actual), state_tensors(expected), strict=True)):
        assert_agree(a, e, exacts[i], f"state tensor {i}")


def float64_copy(mixer: DeltaProductMixer) -> DeltaProductMixer:
    return copy.deepcopy(mixer).double()
