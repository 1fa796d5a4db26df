"""`path_attention` backward: up the tree once more, and down it.

Nothing is kept from the forward pass but o and lse. The tree is built again; then come, in this
order, the rectangles of all levels (`attend_back.py`), the products of blocks (`descend.py`) and
the chunks (`chunk_back.py`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from householder.ops._recording import recorded, room, room_like
from householder.ops._triton import (
    addressable,
    compiled_together,
    has_wide_rows,
    launch,
    on_its_device,
)
from householder.ops.path_attention.inputs import Inputs
from householder.ops.path_attention.triton import gradient_config as config
from householder.ops.path_attention.triton.attend_back import key_kernel, query_kernel
from householder.ops.path_attention.triton.chunk_back import (
    columns_kernel,
    pairs_kernel,
    solve_kernel,
    values_kernel,
)
from householder.ops.path_attention.triton.config import CHUNK_TOKENS
from householder.ops.path_attention.triton.descend import (
    descend_kernel,
    leaf_kernel,
    rows_kernel,
    sum_kernel,
)
from householder.ops.path_attention.triton.gates_back import gate_kernel, totals_kernel
from householder.ops.path_attention.triton.problem import (
    Problem,
    arrange,
    has_near_heads,
    kind_of_call,
    make_problem,
    put_behind,
    strides,
    take_behind,
)
from householder.ops.path_attention.triton.tree import Tree, build_tree

# Chunks whose sums of the gates' gradients are loaded at once.
TOTALS_BLOCK = 128


class Rows(NamedTuple):
    """What the gradient needs of every row, over the tiles' rows (see `problem.py`)."""

    lse: Tensor  # [HQ, rows], to the base 2; ∞ behind a sequence's end
    delta: Tensor  # [HQ, rows]: rowsum(dO ⊙ O)
    dsinks: Tensor | None  # [HQ, rows]: what each row gives to the gradient of the sinks


class Climbed(NamedTuple):
    """Gradients of the rows of the tree, without what the chunks themselves give."""

    dq_levels: Tensor  # [levels, HQ, rows, K]: of queries behind the product that they pass
    dk_levels: Tensor  # [levels, H, rows, K]; the same tensor without groups
    dq: Tensor  # [HQ, rows, K]: of Q←
    dk: Tensor  # [H, rows, K]: of K→
    dv: Tensor  # [H, rows, V]
    sums: Tensor | None  # [levels, HQ, rows]: rows of dA, or columns, summed; with gates


def make_rows(p: Problem, o: Tensor, lse: Tensor, do: Tensor) -> Rows:
    """Bring lse to the tiles' rows, and make δ."""

    def numbers() -> Tensor:
        return room((p.heads, p.rows), torch.float32, o.device)

    rows = Rows(numbers(), numbers(), None if p.sinks is None else numbers())
    launch(
        rows_kernel, (p.chunks * p.heads,),
        o, do, lse, p.sinks, *rows, *p.packing, o.shape[1], p.num_tiles, p.heads, *o.stride()[:3],
        *do.stride()[:3], *lse.stride(), **p.value_constants, PACKED=p.cu_seqlens is not None,
        num_warps=4,
    )  # fmt: skip
    return rows


def climb_down(p: Problem, tree: Tree, rows: Rows, do: Tensor, dtype: torch.dtype) -> Climbed:
    """Run the kernels of the rectangles."""
    H, K = p.k.shape[2:]
    HQ, V, L, T = p.heads, p.v.shape[-1], p.num_levels, p.q.shape[1]

    def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return room(shape, dtype, do.device)

    dq_levels = numbers(L, HQ, p.rows, K)
    x = Climbed(
        dq_levels=dq_levels,
        dk_levels=dq_levels if H == HQ else numbers(L, H, p.rows, K),
        dq=numbers(HQ, p.rows, K),
        dk=numbers(H, p.rows, K),
        dv=numbers(H, p.rows, V),
        sums=None if p.g is None else numbers(L, HQ, p.rows, dtype=torch.float32),
    )
    if p.suits_roles and dtype == torch.bfloat16:
        from householder.ops.path_attention.triton import hopper_key_back, hopper_query_back

        given = p, tree.q, tree.k, tree.f, rows.lse, rows.delta, do
        hopper_query_back.differentiate_queries(*given, x.dq_levels, x.dq)
        hopper_key_back.differentiate_keys(*given, x.dk_levels, x.dk, x.dv)
        return x
    constants = {
        **p.constants, **p.value_constants, **strides("v", p.v), **strides("do", do),
        "WINDOWED": p.window is not None, "PRECISION": config.gradient_precision(p.precision),
    }  # fmt: skip
    rows_read = tree.q, tree.k, p.v, do, rows.lse, rows.delta, tree.decay, tree.f
    others = *p.packing, p.window, T, p.num_tiles, L, H, p.first_query
    tiles = config.query_tiles(K, V, p.precision)
    launch(
        query_kernel, (p.rows // tiles.rows * HQ,),
        *rows_read, x.dq_levels, x.dq, x.sums, *others, **constants,
        BM=tiles.rows, BN=tiles.columns, BP=tiles.inner, **tiles.launch.options,
    )  # fmt: skip
    tiles = config.key_tiles(K, V, p.precision)
    launch(
        key_kernel, (p.rows // tiles.columns * H,),
        *rows_read, x.dk_levels, x.dk, x.dv, x.sums, *others, **constants,
        BM=tiles.rows, BN=tiles.columns, BP=tiles.inner, **tiles.launch.options,
    )  # fmt: skip
    return x


def descend(p: Problem, tree: Tree, x: Climbed) -> tuple[Tensor, Tensor]:
    """Return W dF and W dFᵀ `[H, rows, K]` of all chunks whose product F has a gradient."""
    H, K = p.k.shape[2:]
    B, T, L = p.q.shape[0], p.q.shape[1], p.num_levels
    wdf, wdft = (room_like(x.dk) for _ in range(2))
    # Without three chunks no product has one between its ends.
    if L < 2:
        return wdf, wdft

    def constants(blocks: config.Blocks) -> dict[str, Any]:
        return {
            "K": K, "BK": p.constants["BK"], "PACKED": p.cu_seqlens is not None,
            "BP": blocks.first, "PRECISION": config.gradient_precision(p.precision),
            **blocks.launch.options,
        }  # fmt: skip

    blocks = config.product_blocks(K, p.precision)
    group = p.heads // H
    df = room((H, p.chunks, K, K), x.dk.dtype, x.dk.device)
    pieces = -(-K // blocks.first)
    at_level = [B * (-(-T // CHUNK_TOKENS) >> level) for level in range(L)]
    if p.cu_seqlens is not None:
        at_level = [p.num_tiles] * L
    rows = tree.q, tree.k, x.dq_levels, x.dk_levels
    number = p.chunks if p.cu_seqlens is not None else sum(at_level[1 : L - 1])
    if number:
        launch(
            sum_kernel, (number * H * pieces,),
            *rows, df, *p.packing, T, p.num_tiles, L, H, B, p.first_query, GROUP=group,
            **constants(blocks),
        )  # fmt: skip
    for level in range(L - 3, 0, -1):
        launch(
            descend_kernel, (at_level[level] * H * pieces,),
            tree.f, df, *p.packing, T, p.num_tiles, level, H, BR=blocks.second,
            **constants(blocks),
        )  # fmt: skip
    if p.fuses_chunks:
        from householder.ops.path_attention.triton import hopper_leaf

        hopper_leaf.finish_leaves(p, tree.q, x.dq_levels, tree.f, df, wdf, wdft)
        return wdf, wdft
    w = strides("w", p.w)
    blocks = config.leaf_blocks(K, p.precision)
    launch(
        leaf_kernel, (p.chunks * H,),
        *rows, p.w, tree.f, df, wdf, wdft, *p.packing, T, p.num_tiles, H, p.first_query, w["w_b"],
        w["w_h"], w_t=w["w_t"], GROUP=group, BR=blocks.second, **constants(blocks),
    )  # fmt: skip
    return wdf, wdft


def finish_chunks(
    p: Problem,
    tree: Tree,
    rows: Rows,
    x: Climbed,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """Write the gradients of q, k, v, w, beta and g."""
    dq, dk, dv, dw, dbeta, dg = gradients
    H, K = p.k.shape[2:]
    HQ, V, T = p.heads, p.v.shape[-1], p.q.shape[1]
    wdf, wdft = descend(p, tree, x)
    if p.fuses_chunks and tree.inverse is not None:
        from householder.ops.path_attention.triton import hopper_chunk_back

        rows_read = (x.dq, x.dk, x.dv, wdf, wdft)
        hopper_chunk_back.finish(
            p, tree.inverse, rows.delta, o, lse, do, rows_read, (dq, dk, dv, dw, dbeta)
        )
        return

    def pairs(heads: int) -> Tensor:
        return room((heads, p.rows, 64), x.dq.dtype, do.device)

    p_pairs, x_pairs, da_pairs, dx_pairs, r_pairs = (pairs(HQ) for _ in range(5))
    e_pairs, de_pairs, n_pairs = (pairs(H) for _ in range(3))
    blocks = config.chunk_blocks(K, V, p.precision)
    constants = {
        "GROUP": HQ // H, "PACKED": p.cu_seqlens is not None,
        "PRECISION": config.gradient_precision(p.precision),
    }  # fmt: skip
    exact = {"EXACT": p.constants["PRECISION"], "K": K, "BK": blocks.inner_k}
    # Logits are made anew as they were made: where w has more bits than k, in the tree's precision.
    reflectors = constants["PRECISION"] if p.w.dtype == p.k.dtype else exact["EXACT"]
    q, k, v, w, beta, do_strides = (
        strides(name, y)
        for name, y in zip(("q", "k", "v", "w", "beta", "do"), (*p[:5], do), strict=True)
    )
    g = {"g_b": 0, "g_t": 0, "g_h": 0} if p.g is None else strides("g", p.g)
    launch(
        pairs_kernel, (p.chunks * HQ,),
        p.q, p.k, p.v, p.w, p.beta, p.g, o, do, lse, rows.delta, tree.inverse, x.dq,
        p_pairs, x_pairs, da_pairs, dx_pairs, r_pairs, *p.packing, p.scale, p.window, T,
        p.num_tiles, HQ, **q, **k, **v, **w, **beta, **g, **strides("o", o), **do_strides,
        **constants, **exact, REFLECTORS=reflectors, V=V, BV=blocks.inner_v,
        GATED=p.g is not None, WINDOWED=p.window is not None, **blocks.pairs.options,
    )  # fmt: skip
    launch(
        solve_kernel, (p.chunks * H,),
        p.k, p.w, p.beta, tree.inverse, x.dk, wdf, x_pairs, da_pairs, r_pairs, e_pairs, de_pairs,
        n_pairs, dbeta, *p.packing, T, p.num_tiles, H, **k, **w, **beta, **constants, **exact,
        **blocks.pairs.options,
    )  # fmt: skip
    launch(
        columns_kernel, (p.chunks * H * -(-K // blocks.columns_k),),
        p.q, p.k, p.w, p.beta, tree.inverse, x.dq, x.dk, wdf, wdft, x_pairs, da_pairs, dx_pairs,
        e_pairs, de_pairs, n_pairs, dq, dk, dw, *p.packing, p.scale, T, p.num_tiles, H, **q, **k,
        **w, **beta, **constants, K=K, BK=blocks.columns_k, **blocks.columns.options,
    )  # fmt: skip
    launch(
        values_kernel, (p.chunks * H * -(-V // blocks.columns_v),),
        do, p_pairs, x.dv, dv, *p.packing, T, p.num_tiles, H, **do_strides, **constants, V=V,
        BV=blocks.columns_v, **blocks.columns.options,
    )  # fmt: skip
    if dg is not None and x.sums is not None:
        # Levels that a chunk has no sums of are not read.
        number = x.sums.numel() // CHUNK_TOKENS
        totals = room((number,), x.sums.dtype, x.sums.device)
        if number:
            launch(
                totals_kernel, (-(-number // TOTALS_BLOCK),),
                x.sums, totals, number, BLOCK=TOTALS_BLOCK, num_warps=4,
            )  # fmt: skip
        launch(
            gate_kernel, (p.chunks * HQ,),
            x.sums, totals, da_pairs, dg, *p.packing, T, p.num_tiles, p.num_levels, HQ,
            *dg.stride(), PACKED=p.cu_seqlens is not None, PRECISION=constants["PRECISION"],
            BLOCK=TOTALS_BLOCK, num_warps=4,
        )  # fmt: skip


@on_its_device
def backward(
    do: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, w, beta, g and sinks.

    `inputs` are those of `Inputs`, and then what `forward` returned for them.
    """
    *given, o, lse = inputs
    x = Inputs(*given)
    do, o = (put_behind(x.first_query, y) for y in (do, o))
    # Rows that ask nothing attend to nothing.
    lse = put_behind(x.first_query, lse.contiguous(), math.inf)
    dq, dk, dv, dw, dbeta, dg, by_row = _differentiate(do, o, lse, *arrange(x))
    dsinks = None
    if x.sinks is not None:
        dsinks = torch.zeros_like(x.sinks) if by_row is None else by_row.sum(1).to(x.sinks.dtype)
    return take_behind(x.first_query, dq), dk, dv, dw, dbeta, dg, dsinks


def _kind(do: Tensor, o: Tensor, lse: Tensor, *arranged: Any) -> Hashable:
    return kind_of_call(*arranged)


@recorded
@compiled_together(_kind)
def _differentiate(
    do: Tensor, o: Tensor, lse: Tensor, *arranged: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients, and in place of that of sinks what each row gives to it."""
    p = make_problem(*arranged)
    dq, dk, dv, dw, dbeta = (room_like(x) for x in arranged[:5])
    dg = None if p.g is None else room_like(p.g)
    if p.num_tiles == 0 or p.heads == 0:
        return dq, dk, dv, dw, dbeta, dg, None
    do, o = addressable(do), addressable(o)
    if p.suits_hopper:
        suitable = (has_wide_rows(x) and has_near_heads(x) for x in (do, o))
        do, o = (x if ok else x.contiguous() for x, ok in zip((do, o), suitable, strict=True))
    dtype = torch.bfloat16 if p.precision == "bf16" else torch.float32

    tree = build_tree(p)
    rows = make_rows(p, o, lse, do)
    x = climb_down(p, tree, rows, do, dtype)
    finish_chunks(p, tree, rows, x, o, lse, do, (dq, dk, dv, dw, dbeta, dg))
    return dq, dk, dv, dw, dbeta, dg, rows.dsinks
