"""The gradients of `path_attention` in closed form, up the tree of blocks and down again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from householder.ops._dispatch import contiguous_like, without_autocast
from householder.ops.path_attention.chunk.portions import cut, load
from householder.ops.path_attention.chunk.tree import (
    Chunks,
    Heads,
    Pairs,
    chunk_tokens,
    diagonal,
    join,
    keep_past_,
    levels,
    make_chunks,
    make_decay,
    rectangle,
    tiles,
)
from householder.ops.path_attention.inputs import Inputs


@without_autocast
def backward(
    do: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, w, beta, g and sinks.

    `inputs` are those of `Inputs`, and then what `forward` returned for them.
    """
    *given, o, lse = inputs
    x = Inputs(*given)
    dq, dk, dv, dw, dbeta = (contiguous_like(y) for y in x[:5])
    dg = None if x.g is None else contiguous_like(x.g)
    dsinks = None if x.sinks is None else torch.zeros_like(x.sinks, dtype=x.dtype)
    for portion in cut(x):
        o_rows, lse_rows, do_rows = (
            portion.gather(y, x.dtype, x.group, x.first_query) for y in (o, lse.unsqueeze(-1), do)
        )
        grads = attend_backward(load(x, portion), o_rows, lse_rows, do_rows)
        portion.scatter(grads.q.mul_(x.scale), dq, x.group, x.first_query)
        for rows, out in zip(grads[1:5], (dk, dv, dw, dbeta.unsqueeze(-1)), strict=True):
            portion.scatter(rows, out, 1)
        if dg is not None and grads.g is not None:
            rows = grads.g.reshape(-1, portion.length * x.group, 1)
            portion.scatter(rows, dg.unsqueeze(-1), x.group)
        if dsinks is not None and grads.sinks is not None:
            by_head = dsinks.view(-1, x.group)[portion.heads]
            by_head += grads.sinks.view(-1, *by_head.shape).sum(0)
    if dsinks is not None and x.sinks is not None:
        dsinks = dsinks.to(x.sinks.dtype)
    return dq, dk, dv, dw, dbeta, dg, dsinks


class Gradients(NamedTuple):
    """The gradients of the fields of `Heads` of the same names."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    g: Tensor | None
    sinks: Tensor | None


def attend_backward(x: Heads, o: Tensor, lse: Tensor, do: Tensor) -> Gradients:
    """Return the gradients, from the outputs of `attend` and the gradient of o.

    With the attention P and δ = rowsum(dO ⊙ O), the gradient of the logits is
    dA = P ⊙ (dO Vᵀ − δ). The way is that of `attend`, once up again and then down: at each level
    the gradients of Q← and K→ return from the bounds of the joined block to those of its parts,

        dQ← ← dQ← F_leftᵀ        dF_left  = Q←ᵀ dQ← + F_rightᵀ dF
        dK→ ← dK→ F_right         dF_right = dK→ᵀ K→ + dF F_leftᵀ

    and gain dA K→ and dAᵀ Q← of the level's own rectangles.
    """
    b, L, K = x.k.shape
    C, G = chunk_tokens(K), x.group
    delta = (do * o).sum(-1, keepdim=True)
    dg = None if x.g is None else torch.zeros_like(x.g, dtype=x.q.dtype)

    chunks = make_chunks(x)
    q, k = chunks.queries_at_start().view_as(x.q), chunks.keys_at_end().view_as(x.k)
    f = chunks.products().view(b, -1, K, K)
    climbed: list[tuple[list[Pairs], list[Tensor], list[Tensor], Tensor]] = []
    for pairs in levels(L, C, x.first_query):
        q_right = [pair.split(q, G)[1].clone() for pair in pairs]
        k_left = [pair.split(k)[0].clone() for pair in pairs]
        climbed.append((pairs, q_right, k_left, f))
        if 2 * pairs[0].left < L:
            f = join(pairs, x, q, k, f)

    dq, dk, dv = torch.zeros_like(x.q), torch.zeros_like(x.k), torch.zeros_like(x.v)
    df: Tensor | None = None  # nothing uses the product of the last blocks
    for pairs, q_right, k_left, f in reversed(climbed):
        if 2 * pairs[0].left < L:
            df = part(pairs, x, dq, dk, df, q_right, k_left, f)
        for pair, q_pair, k_pair in zip(pairs, q_right, k_left, strict=True):
            if not pair.has_queries(x.first_query):
                continue
            rectangle_backward(
                pair, x, q_pair.flatten(0, 1), k_pair.flatten(0, 1), lse, do, delta, dq, dk, dv, dg
            )

    logits = diagonal(chunks, x).sub_(lse.view(-1, C * G, 1)).exp_()
    do_chunks, v_chunks = do.view(-1, C * G, do.shape[-1]), x.v.view(-1, C, do.shape[-1])
    dv += (logits.mT @ do_chunks).view_as(dv)
    dlogits = (do_chunks @ v_chunks.mT).sub_(delta.view(-1, C * G, 1))
    # A row that sees only itself, as every first one, has o = v and no gradient; as a difference of
    # two inner products that would be their rounding.
    own = do.view(b, L, G, -1) * (x.v.unsqueeze(2) - o.view(b, L, G, -1))
    dlogits.view(-1, C, G, C).diagonal(0, 1, 3).copy_(own.sum(-1).view(-1, C, G).mT)
    dlogits.mul_(logits)
    if dg is not None:
        # The gate of token s is crossed by the pairs with j < s ≤ i.
        later = dlogits.view(-1, C, G, C).flip(1).cumsum(1).flip(1)
        before = torch.ones(C, C, dtype=later.dtype, device=later.device).tril_(-1)
        dg += (later * before.unsqueeze(1)).sum(-1).view_as(dg)
    df = torch.zeros_like(chunks.products()) if df is None else df.reshape(-1, K, K)
    dq, dk, dw, dbeta = chunks_backward(
        chunks, G, dlogits, dq.view_as(chunks.q), dk.view_as(chunks.k), df
    )
    dsinks = None
    if x.sinks is not None:
        seen = (x.sinks[:, None] - lse.view(b, L, G)).exp_()
        dsinks = seen.mul_(delta.view(b, L, G)).sum(1).neg_()
    return Gradients(
        dq.view_as(x.q), dk.view_as(x.k), dv, dw.view_as(x.w), dbeta.view_as(x.beta), dg, dsinks
    )


def part(
    pairs: list[Pairs],
    x: Heads,
    dq: Tensor,
    dk: Tensor,
    df: Tensor | None,
    q_right: list[Tensor],
    k_left: list[Tensor],
    f: Tensor,
) -> Tensor:
    """Undo `join` for the gradients: change dq and dk in place, return that of the products f."""
    G, parted = x.group, torch.zeros_like(f)
    for pair, q_pair, k_pair in zip(pairs, q_right, k_left, strict=True):
        f_left, f_right = pair.split_products(f)
        df_left, df_right = pair.split_products(parted)
        if pair.has_queries(x.first_query):
            dq_right = pair.split(dq, G)[1]
            df_left += q_pair.mT @ dq_right
            dq_right.copy_(dq_right @ f_left.mT)
        if pair.right == pair.left:
            dk_left = pair.split(dk)[0]
            df_right += dk_left.mT @ k_pair
            dk_left.copy_(dk_left @ f_right)
            if df is not None:
                at = pair.first // (2 * pair.left)
                df_joined = df[:, at : at + pair.p]
                df_left += f_right.mT @ df_joined
                df_right += df_joined @ f_left.mT
    return parted


def rectangle_backward(
    pair: Pairs,
    x: Heads,
    q_right: Tensor,
    k_left: Tensor,
    lse: Tensor,
    do: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dg: Tensor | None,
) -> None:
    """Add what the rectangles of `pair` give to the gradients."""
    G = x.group
    v_left = pair.split(x.v)[0].flatten(0, 1)
    lse_right, do_right, delta_right = (pair.split(y, G)[1].flatten(0, 1) for y in (lse, do, delta))
    dq_right, dk_left, dv_left = (torch.zeros_like(y) for y in (q_right, k_left, v_left))
    decay = make_decay(pair, x)
    dg_rows = dg_columns = None
    if decay is not None:
        dg_rows, dg_columns = torch.zeros_like(decay.rows), torch.zeros_like(decay.columns)
        lse_right = lse_right - decay.rows
    for tile in tiles(pair, x):
        rows, columns = slice(tile.rows.start * G, tile.rows.stop * G), tile.columns
        attention = rectangle(tile, x, q_right, k_left, decay)
        attention.sub_(lse_right[:, rows]).exp_()
        dv_left[:, columns].baddbmm_(attention.mT, do_right[:, rows])
        dlogits = do_right[:, rows] @ v_left[:, columns].mT
        dlogits.sub_(delta_right[:, rows]).mul_(attention)
        dq_right[:, rows].baddbmm_(dlogits, k_left[:, columns])
        dk_left[:, columns].baddbmm_(dlogits.mT, q_right[:, rows])
        if dg_rows is not None and dg_columns is not None:
            dg_rows[:, rows] += dlogits.sum(-1, keepdim=True)
            dg_columns[:, :, columns] += dlogits.unflatten(1, (-1, G)).sum(1)
    for target, y in (
        (pair.split(dq, G)[1], dq_right),
        (pair.split(dk)[0], dk_left),
        (pair.split(dv)[0], dv_left),
    ):
        target += y.view_as(target)
    if dg is not None and dg_rows is not None and dg_columns is not None:
        # A gate is crossed by the queries from its token on, and by the keys before it.
        dg_left, dg_right = pair.split(dg)
        dg_right += dg_rows.view_as(dg_right).flip(2).cumsum(2).flip(2)
        crossing = dg_columns.mT.cumsum(1)[:, :-1].reshape(*dg_left.shape[:2], -1, G)
        dg_left[:, :, 1:] += crossing


def chunks_backward(
    c: Chunks, G: int, da: Tensor, dq_start: Tensor, dk_end: Tensor, df: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dQ, dK, dW and dβ of the chunks, from dA (masked), dQ←, dK→ and dF.

    Both Z = T W and E = T Y solve a triangle (I + M) Z = diag(β) W. Its gradient is that of the
    right-hand side, D = (I + M)⁻ᵀ dZ, and dM = −strict_lower(D Zᵀ).
    """
    dqw = torch.baddbmm(dq_start @ c.tw.mT, da, c.twk.mT)
    dqw = keep_past_(dqw, G).neg_()
    dtw = torch.baddbmm(c.w @ df, c.qw.mT, dq_start).neg_()
    dtwk = torch.baddbmm(c.w @ dk_end.mT, c.qw.mT, da).neg_()
    d_w, d_wk = c.inverse.mT @ dtw, (c.inverse.mT @ dtwk).tril_(-1)
    dm = torch.baddbmm(d_w @ c.tw.mT, d_wk, c.twk.mT).tril_(-1).neg_()
    dww = dm * c.beta
    dwk = d_wk * c.beta

    dbeta = (d_w * c.w).sum(-1) + (d_wk * c.wk).sum(-1) + (dm * (c.w @ c.w.mT)).sum(-1)
    dw = (c.twk @ dk_end).add_(c.tw @ df.mT).neg_()
    dw.addcmul_(c.beta, d_w).baddbmm_(dww + dww.mT, c.w)
    dw.baddbmm_(dwk, c.k).baddbmm_(dqw.mT, c.q)
    dq = torch.baddbmm(dq_start, da, c.k).baddbmm_(dqw, c.w)
    dk = torch.baddbmm(dk_end, da.mT, c.q).baddbmm_(dwk.mT, c.w)
    return dq, dk, dw, dbeta
