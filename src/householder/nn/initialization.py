"""How parameters start, shared by the mixers and the models."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from householder.ops.wy import compute_dtype


def init_weight(weight: Tensor, std: float | None) -> None:
    """Fill a weight matrix or a depthwise kernel in place.

    Args:
        weight: `[out, in]` or `[channels, 1, width]`, any floating dtype.
        std: draw from N(0, std²); `None` draws from U(−1/√fan_in, 1/√fan_in), PyTorch's own rule.
    """
    if std is None:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    else:
        nn.init.normal_(weight, std=std)


def init_bias(bias: Tensor | None, fan_in: int) -> None:
    """Fill a bias in place from U(−1/√fan_in, 1/√fan_in), PyTorch's own rule; `None` is none."""
    if bias is not None:
        bound = 1 / math.sqrt(fan_in)
        if bias.is_complex():  # torch draws no complex uniform numbers
            with torch.no_grad():
                torch.view_as_real(bias).uniform_(-bound, bound)
        else:
            nn.init.uniform_(bias, -bound, bound)


def init_residual_weight(weight: Tensor, std: float | None, num_layers: int | None) -> None:
    """Fill in place a weight whose output is added to the residual stream.

    A model of `num_layers` blocks adds 2 · num_layers such outputs. Dividing PyTorch's rule by
    √(2 · num_layers) keeps the variance of their sum independent of the depth, as in "Language
    Models are Unsupervised Multitask Learners" (Radford et al., 2019).

    Args:
        weight: `[out, in]`.
        std: as in `init_weight`; used only where `num_layers` is `None`.
        num_layers: blocks in the model, or `None` where the depth is unknown.
    """
    if num_layers is None:
        init_weight(weight, std)
        return
    init_weight(weight, None)
    with torch.no_grad():
        weight /= math.sqrt(2 * num_layers)


def init_forget_gate(A_log: Tensor, dt_bias: Tensor) -> None:
    """Fill in place the two parameters of the forget gate g = −exp(A_log) · softplus(a + dt_bias).

    A = exp(A_log) is drawn from U(0, 16), and the step dt = softplus(dt_bias) at a = 0
    log-uniformly from [0.001, 0.1]: heads start out forgetting at very different rates.

    Args:
        A_log: `[HV]`.
        dt_bias: `[HV]`.

    References:
        Mamba: Linear-Time Sequence Modeling with Selective State Spaces (Gu, Dao, 2023),
        https://arxiv.org/abs/2312.00752
    """
    dt_min, dt_max, dt_floor, A_max = 1e-3, 0.1, 1e-4, 16.0
    with torch.no_grad():
        # Drawn in float32 at least: half precision would round most of the interval away. The lower
        # bound only keeps an exact 0 (one draw in 2^24) from becoming log 0.
        A = torch.empty_like(A_log, dtype=compute_dtype(A_log))
        A_log.copy_(A.uniform_(0, A_max).clamp_(min=1e-6).log())
        log_dt = torch.empty_like(A).uniform_(math.log(dt_min), math.log(dt_max))
        dt = log_dt.exp().clamp_(min=dt_floor)
        # The inverse of softplus, log(exp(dt) − 1), in the form that keeps its digits at small dt.
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
