"""The tree of blocks: products, queries and keys of every level, from the chunks' own.

Two neighbours of 2^l chunks, left and right, join:

    Q_r ← Q_r F_left        K_l ← K_l F_rightᵀ        F = F_right F_left

and the sums of gates on the way gain those of the block that is crossed. A chunk's queries change
at the levels where it is in a right block, and its keys where it is in a left one, and only there
are they used: so each level keeps one of the two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import cast_operand, dot, load_tile, store_tile
from householder.ops.path_attention.triton import config
from householder.ops.path_attention.triton.prepare import prepare_kernel
from householder.ops.path_attention.triton.problem import (
    Problem,
    block_slot,
    has_right,
    locate_tile,
    lowest_bit,
    strides,
)


@triton.jit
def join_kernel(
    f, gate_sums, cu_seqlens, tile_sequence, first_tile, T, H, chunks, level,
    GROUP: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write columns `[BN]` of the product of one full block of `level` ≥ 1 and one key head."""
    num_n: tl.constexpr = (K + BN - 1) // BN
    i_n = (tl.program_id(0) % num_n) * BN
    i_h = ((tl.program_id(0) // num_n) % H).to(tl.int64)
    i_block = tl.program_id(0) // (num_n * H)
    if PACKED:
        # One program per tile, of which only a block's first one works.
        _, _, length, tile = locate_tile(i_block, T, cu_seqlens, tile_sequence, first_tile, PACKED)
        chunk = 2 * (i_block - tile)
    else:
        per_row = tl.cdiv(T, 64 << level)
        length = T
        tile = (i_block // per_row) * tl.cdiv(T, 128)
        chunk = (i_block % per_row) << level
    # The last block has no right neighbour, and so nothing asks for its product.
    if ((chunk & ((1 << level) - 1)) != 0) | (((chunk + (1 << level)) * 64) >= length):
        return
    block = chunk >> level
    left = block_slot(2 * tile, level - 1, 2 * block).to(tl.int64)
    right = block_slot(2 * tile, level - 1, 2 * block + 1).to(tl.int64)
    joined = block_slot(2 * tile, level, block).to(tl.int64)
    num_slots = tl.cast(chunks, tl.int64) * 2
    p_f = f + i_h * num_slots * (K * K)
    o_k = tl.arange(0, BK)
    b_right = load_tile(p_f + right * (K * K), o_k * K, o_k < K, 0, K, BK)
    b_left = load_tile(p_f + left * (K * K), o_k * K, o_k < K, i_n, K, BN)
    b_f = dot(cast_operand(b_right, PRECISION), cast_operand(b_left, PRECISION), PRECISION)
    store_tile(p_f + joined * (K * K), o_k * K, o_k < K, i_n, b_f, K, BN)
    if GATED and i_n == 0:
        for i in range(GROUP):
            p_sums = gate_sums + (i_h * GROUP + i) * num_slots
            tl.store(p_sums + joined, tl.load(p_sums + left) + tl.load(p_sums + right))


@triton.jit
def climb_kernel(
    q_levels, k_levels, f, decay, gate_sums, cu_seqlens, tile_sequence, first_tile, T, H, rows,
    GROUP: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Take one chunk's queries of one head, or its keys, up the tree from their first level.

    They are carried in float32 and multiplied by one product at each level where they change.
    """
    HQ = H * GROUP
    i_chunk = tl.program_id(0) // (HQ + H)
    i = (tl.program_id(0) % (HQ + H)).to(tl.int64)
    _, _, length, tile = locate_tile(i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED)
    chunk = i_chunk - 2 * tile
    if (chunk // 2) * 128 >= length:
        return
    num_chunks = tl.cdiv(length, 64)
    num_rows = tl.cast(rows, tl.int64)
    row = i_chunk.to(tl.int64) * 64
    num_slots = num_rows // 32
    o_c = tl.arange(0, 64)
    o_k = tl.arange(0, BK)
    everywhere = o_c >= 0
    if i < HQ:
        if GATED:
            p_decay = decay + i * num_rows + row + o_c
            p_sums = gate_sums + i * num_slots
        p_f = f + (i // GROUP) * num_slots * (K * K)
        if chunk > 0:
            level = lowest_bit(chunk)
            p_q = q_levels + (i * num_rows + row) * K
            of_level = HQ * num_rows
            b_q = load_tile(p_q + level * of_level * K, o_c * K, everywhere, 0, K, BK).to(
                tl.float32
            )
            if GATED:
                b_decay = tl.load(p_decay + level * of_level)
            rest = chunk & (chunk - 1)
            while rest > 0:
                slot = block_slot(2 * tile, level, (chunk >> level) - 1).to(tl.int64)
                b_f = load_tile(p_f + slot * (K * K), o_k * K, o_k < K, 0, K, BK)
                b_q = dot(cast_operand(b_q, PRECISION), cast_operand(b_f, PRECISION), PRECISION)
                level = lowest_bit(rest)
                rest = rest & (rest - 1)
                store_tile(p_q + level * of_level * K, o_c * K, everywhere, 0, b_q, K, BK)
                if GATED:
                    b_decay += tl.load(p_sums + slot)
                    tl.store(p_decay + level * of_level, b_decay)
        if GATED:
            rest = -1 - chunk
            level = lowest_bit(rest)
            if has_right(chunk, level, num_chunks):
                of_level = HQ * num_rows
                b_decay = tl.load(p_decay + level * of_level)
                rest = rest & (rest - 1)
                above = lowest_bit(rest)
                while has_right(chunk, above, num_chunks):
                    slot = block_slot(2 * tile, level, (chunk >> level) + 1)
                    b_decay += tl.load(p_sums + slot)
                    tl.store(p_decay + above * of_level, b_decay)
                    level = above
                    rest = rest & (rest - 1)
                    above = lowest_bit(rest)
    else:
        i_h = i - HQ
        p_f = f + i_h * num_slots * (K * K)
        p_k = k_levels + (i_h * num_rows + row) * K
        of_level = H * num_rows * K
        rest = -1 - chunk
        level = lowest_bit(rest)
        if has_right(chunk, level, num_chunks):
            b_k = load_tile(p_k + level * of_level, o_c * K, everywhere, 0, K, BK).to(tl.float32)
            rest = rest & (rest - 1)
            above = lowest_bit(rest)
            # Where the keys are needed once more, the right neighbour is full and has a product.
            while has_right(chunk, above, num_chunks):
                slot = block_slot(2 * tile, level, (chunk >> level) + 1).to(tl.int64)
                b_f = load_tile(p_f + slot * (K * K), o_k * K, o_k < K, 0, K, BK)
                b_f = tl.trans(cast_operand(b_f, PRECISION))
                b_k = dot(cast_operand(b_k, PRECISION), b_f, PRECISION)
                store_tile(p_k + above * of_level, o_c * K, everywhere, 0, b_k, K, BK)
                level = above
                rest = rest & (rest - 1)
                above = lowest_bit(rest)


class Tree(NamedTuple):
    """Queries, keys and products of all levels, over the tiles' rows (see `problem.py`).

    At level l a chunk has queries if it is in a right block, and keys if in a left one that has a
    right neighbour; what it has not is undefined. Rows behind a sequence's end are zero. Queries
    have `scale` in them.
    """

    q: Tensor  # [levels, HQ, rows, K]
    k: Tensor  # [levels, H, rows, K]; the same tensor as q without groups
    f: Tensor  # [H, 2 · chunks, K, K]: products of blocks (`block_slot`), but for the last ones
    inverse: Tensor | None  # [H, chunks, 64, 64]: (I + M)⁻¹ of every chunk
    # Sums of gates: of a query's, from its block's start up to and including its own token; of a
    # key's, from after its token to its block's end.
    decay: Tensor | None  # [levels, HQ, rows], float32
    gate_sums: Tensor | None  # [HQ, 2 · chunks], float32: of all tokens of a block


class Softmax(NamedTuple):
    """The softmax of every row over the keys of its own chunk."""

    o: Tensor  # [HQ, rows, V], float32: values, weighted by exp2(logit − top)
    top: Tensor  # [HQ, rows], float32: the largest logit, to the base 2
    total: Tensor  # [HQ, rows], float32: the sum of exp2(logit − top)


def build_tree(p: Problem, inverse: bool = False) -> Tree:
    """Make the tree alone, for the gradient; with `inverse` keep the chunks' triangles."""
    tree, _ = _build(p, inverse, diagonal=False)
    return tree


def build_tree_and_begin(p: Problem) -> tuple[Tree, Softmax]:
    """Make the tree, and begin the softmax inside the chunks."""
    tree, softmax = _build(p, inverse=False, diagonal=True)
    assert softmax is not None
    return tree, softmax


def _build(p: Problem, inverse: bool, diagonal: bool) -> tuple[Tree, Softmax | None]:
    H, K = p.k.shape[2:]
    HQ, V, L, device = p.heads, p.v.shape[-1], p.num_levels, p.q.device

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    q = room(L, HQ, p.rows, K, dtype=p.operand)
    tree = Tree(
        q=q,
        k=q if H == HQ else room(L, H, p.rows, K, dtype=p.operand),
        f=room(H, 2 * p.chunks if L else 0, K, K, dtype=p.product),
        inverse=room(H, p.chunks, 64, 64, dtype=p.product) if inverse else None,
        decay=None if p.g is None else room(L, HQ, p.rows),
        gate_sums=None if p.g is None else room(HQ, 2 * p.chunks),
    )
    softmax = None
    if diagonal:
        softmax = Softmax(room(HQ, p.rows, V), room(HQ, p.rows), room(HQ, p.rows))
    if p.num_tiles == 0:
        return tree, softmax
    T = p.q.shape[1]
    block, launch = config.prepare_launch(p.precision)
    g = {"g_b": 0, "g_t": 0, "g_h": 0} if p.g is None else strides("g", p.g)
    prepare_kernel[(p.chunks * H,)](
        p.q, p.k, p.v, p.w, p.beta, p.g, tree.q, tree.k, tree.f, tree.inverse, tree.decay,
        tree.gate_sums, *((None,) * 3 if softmax is None else softmax), *p.packing, p.scale,
        p.window, T, H, p.rows, L, **strides("q", p.q), **strides("k", p.k), **strides("v", p.v),
        **strides("w", p.w), **strides("beta", p.beta), **g,
        **(p.constants | {"BK": min(p.constants["BK"], block)}), V=V,
        BV=min(config.key_block(V, p.precision), block), WINDOWED=p.window is not None,
        DIAGONAL=diagonal, **launch.options,
    )  # fmt: skip
    join(p, tree)
    if L > 1:
        launch = config.climb_launch(K, p.precision)
        climb_kernel[(p.chunks * (HQ + H),)](
            tree.q, tree.k, tree.f, tree.decay, tree.gate_sums, *p.packing, T, H, p.rows,
            **p.constants, **launch.options,
        )  # fmt: skip
    return tree, softmax


def join(p: Problem, tree: Tree) -> None:
    """Multiply the products of blocks level by level, and add their gates."""
    H, K = p.k.shape[2:]
    B, T = p.q.shape[:2]
    block, launch = config.join_launch(K, p.precision)
    # Nothing asks for the products of the last level's blocks.
    for level in range(1, p.num_levels - 1):
        blocks = p.num_tiles
        if p.cu_seqlens is None:
            blocks = B * -(-T // (config.CHUNK_TOKENS << level))
        join_kernel[(blocks * H * -(-K // block),)](
            tree.f, tree.gate_sums, *p.packing, T, H, p.chunks, level, **p.constants, BN=block,
            **launch.options,
        )  # fmt: skip
