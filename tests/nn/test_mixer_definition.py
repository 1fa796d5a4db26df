"""The mixer against its definition, written out number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from householder.nn import DeltaProductMixer
from householder.ops.delta_product import chunk

from .mixer_cases import CASES, assert_agree, make_input, make_mixer


def causal_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, D], weight [D, 1, W]: one channel and one token at a time."""
    T, D = x.shape
    W = weight.shape[-1]
    rows = []
    for t in range(T):
        row = []
        for d in range(D):
            total = x.new_zeros(())
            for i in range(W):
                source = t - (W - 1) + i
                if source >= 0:
                    total = total + weight[d, 0, i] * x[source, d]
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


ACTIVATIONS = {
    "silu": silu,
    "relu": lambda x: x.clamp(min=0),
    "elu": lambda x: torch.where(x > 0, x + 1, torch.exp(x)),
    "identity": lambda x: x,
}
NORMS = {
    "l2": lambda x: x / math.sqrt((x * x).sum().item() + 1e-6),
    "sum": lambda x: x / max(x.sum().item(), 1e-6),
    "none": lambda x: x,
}


@torch.no_grad()
def run_definition(mixer: DeltaProductMixer, x: Tensor) -> Tensor:
    """x [T, d_model] -> y [T, d_model], from the parameters alone."""
    H, HV, N = mixer.num_heads, mixer.num_value_heads, mixer.num_householder
    K, V = mixer.head_dim, mixer.value_head_dim
    p = dict(mixer.named_parameters())
    q, k, v = (x @ p[f"{name}_proj.weight"].T for name in "qkv")
    if mixer.use_short_conv:
        q, k, v = (
            causal_convolution(z, p[f"{name}_conv1d.weight"])
            for name, z in zip("qkv", (q, k, v), strict=True)
        )
    activate, normalize = ACTIVATIONS[mixer.qk_activation], NORMS[mixer.qk_norm]
    beta = (2 if mixer.allow_neg_eigval else 1) / (1 + torch.exp(-x @ p["b_proj.weight"].T))

    S = x.new_zeros(HV, K, V)
    outputs = []
    for t in range(x.shape[0]):
        heads = []
        for hv in range(HV):
            h = hv // (HV // H)
            if mixer.use_forget_gate:
                a = (x[t] @ p["a_proj.weight"][hv] + p["dt_bias"][hv]).item()
                S[hv] *= math.exp(-math.exp(p["A_log"][hv].item()) * math.log1p(math.exp(a)))
            for n in range(N):
                k_n = normalize(activate(k[t, (n * H + h) * K : (n * H + h + 1) * K]))
                v_n = silu(v[t, (n * HV + hv) * V : (n * HV + hv + 1) * V])
                S[hv] += beta[t, n * HV + hv] * torch.outer(k_n, v_n - k_n @ S[hv])
            q_h = normalize(activate(q[t, h * K : (h + 1) * K]))
            o = q_h @ S[hv] / math.sqrt(K)
            o = o / math.sqrt((o * o).mean().item() + 1e-5) * p["o_norm.weight"]
            if mixer.use_output_gate:
                o = o * silu(x[t] @ p["g_proj.weight"][hv * V : (hv + 1) * V].T)
            heads.append(o)
        outputs.append(p["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(outputs)


@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_definition(case: str) -> None:
    mixer = make_mixer(case)
    x = make_input(2, 6)
    y = mixer(x)
    for b in range(2):
        # Ten times the bound for two orders of one computation: the outer norm divides by an
        # output that can be small, and the definition rounds along another path.
        assert_agree(y[b] / 10, run_definition(mixer, x[b]) / 10, name=case)


@pytest.mark.parametrize("case", CASES)
def test_no_parameter_is_idle(case: str) -> None:
    """A gradient that is not zero reaches every parameter, whole and token by token."""
    mixer = make_mixer(case)
    x = make_input(2, 9).requires_grad_()
    weight = make_input(2, 9, seed=2)
    (mixer(x) * weight).sum().backward()
    whole = {name: p.grad for name, p in mixer.named_parameters()}
    for name, grad in whole.items():
        assert grad is not None, name
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 1e-9, name
    assert x.grad is not None
    assert x.grad.abs().amax(-1).min() > 0, "a token without a gradient"

    mixer.zero_grad()
    from .mixer_cases import run_steps

    y, _ = run_steps(mixer, x.detach())
    (y * weight).sum().backward()
    for name, p in mixer.named_parameters():
        assert_agree(p.grad, whole[name], name=name)


def test_beta_and_gate_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large logits take beta to 2 or to 1, never beyond, and g from 0 to strong decay."""
    x = 100 * make_input(1, 50)
    # What the recurrence is given in the end, after the op's own activations.
    seen = []
    inner = chunk.forward
    monkeypatch.setattr(chunk, "forward", lambda *args: seen.append(args) or inner(*args))
    for case, limit in (("delta_net", 1.0), ("gated_delta_product", 2.0)):
        make_mixer(case)(x)
        beta = seen[-1][3]
        assert beta.min() >= 0
        assert 0.999 * limit < beta.max() <= limit
    g = seen[-1][4]
    assert g is not None
    assert g.max() <= 0
    assert g.max() > -1e-6
    assert g.min() < -50
