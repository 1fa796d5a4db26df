"""The outputs of `path_attention`, up the tree of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from householder.ops._dispatch import without_autocast
from householder.ops.path_attention.chunk.portions import make_problem
from householder.ops.path_attention.chunk.tree import (
    Heads,
    chunk_tokens,
    diagonal,
    join,
    levels,
    make_chunks,
    make_decay,
    rectangle,
    tiles,
)


def attend(x: Heads) -> tuple[Tensor, Tensor]:
    """Return `o [b, L·G, V]` and the logarithms of the softmax's denominators `[b, L·G, 1]`."""
    b, L, K = x.k.shape
    C, G = chunk_tokens(K), x.group
    chunks = make_chunks(x)
    logits = diagonal(chunks, x)
    top = logits.amax(-1, keepdim=True)
    attention = logits.sub_(top).exp_()
    total = attention.sum(-1, keepdim=True).view(b, L * G, 1)
    o = (attention @ x.v.view(-1, C, x.v.shape[-1])).view(b, L * G, -1)
    top = top.view(b, L * G, 1)

    q, k = chunks.queries_at_start().view_as(x.q), chunks.keys_at_end().view_as(x.k)
    f = chunks.products().view(b, -1, K, K)
    for pairs in levels(L, C):
        for pair in pairs:
            q_right = pair.split(q, G)[1].flatten(0, 1)
            k_left, v_left = (pair.split(y)[0].flatten(0, 1) for y in (k, x.v))
            carried = [pair.split(y, G)[1] for y in (o, top, total)]
            o_right, top_right, total_right = (y.clone().flatten(0, 1) for y in carried)
            decay = make_decay(pair, x)
            for tile in tiles(pair, x):
                rows = slice(tile.rows.start * G, tile.rows.stop * G)
                logits = rectangle(pair, tile, x, q_right, k_left, decay)
                shift = 0.0 if decay is None else decay.rows[:, rows]
                old = top_right[:, rows]
                new = torch.maximum(old, logits.amax(-1, keepdim=True) + shift)
                attention = logits.sub_(new - shift).exp_()
                rescale = (old - new).exp_()
                total_right[:, rows].mul_(rescale).add_(attention.sum(-1, keepdim=True))
                o_right[:, rows].mul_(rescale).add_(attention @ v_left[:, tile.columns])
                old.copy_(new)
            for target, y in zip(carried, (o_right, top_right, total_right), strict=True):
                target.copy_(y.view_as(target))
        if 2 * pairs[0].left < L:
            f = join(pairs, x, q, k, f)

    lse = total.log().add_(top)
    if x.sinks is not None:
        lse = torch.logaddexp(lse.view(b, L, G), x.sinks[:, None]).view_as(lse)
    return o.mul_((top - lse).exp_()), lse


@without_autocast
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend; arguments as in the public `path_attention`.

    Returns:
        o `[B, T, HQ, V]` and the logarithms of the softmax's denominators `[B, T, HQ]`, both in the
        dtype of the computation: `backward` subtracts what o says from the gradient, and o rounded
        to half precision would say it less exactly.
    """
    p = make_problem(q, k, v, w, beta, g, sinks, scale, window, cu_seqlens)
    B, T, HQ, _ = q.shape
    o = v.new_empty(B, T, HQ, v.shape[-1], dtype=p.dtype)
    lse = v.new_empty(B, T, HQ, 1, dtype=p.dtype)
    for portion in p.portions():
        o_rows, lse_rows = attend(p.load(portion))
        portion.scatter(o_rows, o, p.group)
        portion.scatter(lse_rows, lse, p.group)
    return o, lse.squeeze(-1)
