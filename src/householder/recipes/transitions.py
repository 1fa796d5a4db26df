"""A picture of what a PaTH layer has learnt: its coefficients and its attention on one sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from householder.nn import PaTHAttention
from householder.ops import path_attention
from householder.train.evaluation import evaluation_mode
from householder.train.plot import COLORS, FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Transitions(NamedTuple):
    """What one layer does with one sequence of T tokens, on the CPU.

    Attributes:
        attention: weights `[HQ, T, T]`, of a query (row) for every key.
        beta: coefficients `[T, H]`.
        overlap: `|w_iᵀ w_j|` `[H, T, T]`, 1 where two tokens have the same reflector.
    """

    attention: Tensor
    beta: Tensor
    overlap: Tensor


def record_transitions(model: nn.Module, tokens: Tensor, layer: int = 0) -> Transitions:
    """Run a model on one sequence and return what a PaTH layer of it did.

    Args:
        model: any model of tokens int64 `[B, T]`.
        tokens: `[T]`, on the model's device.
        layer: which of its `PaTHAttention` layers.

    Raises:
        ValueError: it has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, PaTHAttention)]
    if not -len(layers) <= layer < len(layers):
        raise ValueError(
            f"record_transitions: `layer` must be one of the model's {len(layers)} PaTH layers, "
            f"got {layer}; count them from 0"
        )
    attention = layers[layer]
    inputs: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        with evaluation_mode(model), torch.no_grad():
            model(tokens[None])
            q, k, v = attention.project(inputs[0])
            w, beta, g, _ = attention.transitions(inputs[0])
            # Values that are unit vectors come back as the weights they were given.
            T = len(tokens)
            units = torch.eye(T, dtype=v.dtype, device=v.device)[None, :, None]
            units = units.expand(-1, -1, v.shape[2], -1)
            sinks, window = attention.sinks, attention.window
            weights = path_attention(
                q, k, units, w, beta, g, sinks=sinks, window=window, impl="chunk"
            )
    finally:
        hook.remove()
    overlap = torch.einsum("ihk,jhk->hij", w[0], w[0]).abs()
    return Transitions(
        weights[0].transpose(0, 1).float().cpu(), beta[0].float().cpu(), overlap.float().cpu()
    )


def transitions_figure(found: Transitions, labels: list[str], title: str) -> Figure:
    """Draw the attention of each query head, and below it β of its key head over time.

    Args:
        found: of one layer and sequence.
        labels: a character or two for each token.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    HQ, T, _ = found.attention.shape
    group = HQ // found.beta.shape[1]
    figure = Figure(figsize=(5.2 * HQ, 6.6), layout="constrained")
    axes = figure.subplots(2, HQ, squeeze=False, height_ratios=(3.4, 1))
    for head in range(HQ):
        above, below = axes[0, head], axes[1, head]
        # The square root shows small weights too.
        above.imshow(found.attention[head].sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
        above.set_title(f"head {head}: attention (query ↓, key →)", fontsize=10, color=INK)
        _draw_beta(below, found.beta[:, head // group], labels)
        for ax in (above, below):
            _name_tokens(ax, labels)
        above.set_yticks(range(T), labels)
        above.tick_params(axis="y", labelsize=6, length=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure


def _draw_beta(axes: Axes, beta: Tensor, labels: list[str]) -> None:
    kinds = sorted(set(labels))
    colors = {kind: COLORS[i % len(COLORS)] for i, kind in enumerate(kinds)}
    axes.bar(range(len(beta)), beta.tolist(), color=[colors[label] for label in labels])
    axes.axhline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(-0.5, len(beta) - 0.5)
    axes.set_ylim(0, 2)
    axes.set_yticks([0, 1, 2], ["0", "1 projects", "2 reflects"])
    axes.set_ylabel("β", color=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _name_tokens(axes: Axes, labels: list[str]) -> None:
    axes.set_xticks(range(len(labels)), labels)
    axes.tick_params(axis="x", labelsize=6, length=0)
    axes.tick_params(axis="y", labelsize=8, color=FAINT)
