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

from householder.ops._recording import room
from householder.ops._triton import cast_operand, dot, dot_add, launch, load_tile, store_tile
from householder.ops.path_attention.triton import config
from householder.ops.path_attention.triton.gates import climb_gates_kernel, join_gates_kernel
from householder.ops.path_attention.triton.prepare import prepare_kernel
from householder.ops.path_attention.triton.problem import (
    SIZES,
    Problem,
    block_slot,
    has_right,
    locate_block,
    locate_tile,
    lowest_bit,
    strides,
)


@triton.jit
def multiply_rows(
    p_from, p_to, p_f, TRANSPOSED: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """Write 64 rows times a product, or times its transpose, for products too large to be held."""
    BLOCK: tl.constexpr = 64
    o_c = tl.arange(0, 64)
    o_b = tl.arange(0, BLOCK)
    tl.debug_barrier()  # other threads may have written what is read
    for i in range(0, K, BLOCK):
        acc = tl.zeros((64, BLOCK), tl.float32)
        for j in range(0, K, BLOCK):
            b_x = cast_operand(load_tile(p_from, o_c * K, o_c >= 0, j, K, BLOCK), PRECISION)
            if TRANSPOSED:
                b_f = tl.trans(load_tile(p_f, (i + o_b) * K, i + o_b < K, j, K, BLOCK))
            else:
                b_f = load_tile(p_f, (j + o_b) * K, j + o_b < K, i, K, BLOCK)
            acc = dot_add(b_x, cast_operand(b_f, PRECISION), acc, PRECISION)
        store_tile(p_to, o_c * K, o_c >= 0, i, acc, K, BLOCK)
    tl.debug_barrier()


@triton.jit
def multiply_products(
    p_f, first_chunk, level, block, K: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr
):
    """Write the product of a block, from those of its halves, and return it as an operand."""
    o_k = tl.arange(0, BK)
    left = block_slot(first_chunk, level - 1, 2 * block).to(tl.int64)
    right = block_slot(first_chunk, level - 1, 2 * block + 1).to(tl.int64)
    b_left = load_tile(p_f + left * (K * K), o_k * K, o_k < K, 0, K, BK)
    b_right = load_tile(p_f + right * (K * K), o_k * K, o_k < K, 0, K, BK)
    b_f = dot(cast_operand(b_right, PRECISION), cast_operand(b_left, PRECISION), PRECISION)
    joined = block_slot(first_chunk, level, block).to(tl.int64)
    store_tile(p_f + joined * (K * K), o_k * K, o_k < K, 0, b_f, K, BK)
    return cast_operand(b_f, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def join_kernel(
    f, cu_seqlens, tile_sequence, first_tile, T, H, rows, level, num_levels,
    K: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the product of one full block of `level` + 1 ≥ 2 and one key head, and of its halves.

    The last block has no right neighbour, and so nothing asks for its product.
    """
    i_h = (tl.program_id(0) % H).to(tl.int64)
    chunk, length, tile = locate_block(
        tl.program_id(0) // H, T, cu_seqlens, tile_sequence, first_tile, level + 1, PACKED
    )
    p_f = f + i_h * (tl.cast(rows, tl.int64) // 32) * (K * K)
    block = chunk >> level
    if (chunk + (1 << level)) * 64 < length:
        b_left = multiply_products(p_f, 2 * tile, level, block, K, PRECISION, BK)
        if (chunk + (2 << level)) * 64 < length:
            b_right = multiply_products(p_f, 2 * tile, level, block + 1, K, PRECISION, BK)
            if level + 2 < num_levels:
                b_f = dot(b_right, b_left, PRECISION)
                joined = block_slot(2 * tile, level + 1, block >> 1).to(tl.int64)
                o_k = tl.arange(0, BK)
                store_tile(p_f + joined * (K * K), o_k * K, o_k < K, 0, b_f, K, BK)


@triton.jit(do_not_specialize=SIZES)
def join_wide_kernel(
    f, cu_seqlens, tile_sequence, first_tile, T, H, rows, level,
    K: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write columns `[BN]` of the product of one full block of `level` ≥ 1 and one key head."""
    num_n: tl.constexpr = (K + BN - 1) // BN
    i_n = (tl.program_id(0) % num_n) * BN
    i_h = ((tl.program_id(0) // num_n) % H).to(tl.int64)
    i_block = tl.program_id(0) // (num_n * H)
    chunk, length, tile = locate_block(
        i_block, T, cu_seqlens, tile_sequence, first_tile, level, PACKED
    )
    if (chunk + (1 << level)) * 64 >= length:
        return
    block = chunk >> level
    p_f = f + i_h * (tl.cast(rows, tl.int64) // 32) * (K * K)
    p_left = p_f + block_slot(2 * tile, level - 1, 2 * block).to(tl.int64) * (K * K)
    p_right = p_f + block_slot(2 * tile, level - 1, 2 * block + 1).to(tl.int64) * (K * K)
    p_joined = p_f + block_slot(2 * tile, level, block).to(tl.int64) * (K * K)
    o_b = tl.arange(0, BN)
    for i in range(0, K, BN):
        b_f = tl.zeros((BN, BN), tl.float32)
        for j in range(0, K, BN):
            b_right = load_tile(p_right, (i + o_b) * K, i + o_b < K, j, K, BN)
            b_left = load_tile(p_left, (j + o_b) * K, j + o_b < K, i_n, K, BN)
            b_right = cast_operand(b_right, PRECISION)
            b_f = dot_add(b_right, cast_operand(b_left, PRECISION), b_f, PRECISION)
        store_tile(p_joined, (i + o_b) * K, i + o_b < K, i_n, b_f, K, BN)


@triton.jit(do_not_specialize=SIZES)
def climb_kernel(
    q_levels, k_levels, f, cu_seqlens, tile_sequence, first_tile, T, H, rows, programs,
    GROUP: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Take one chunk's keys of one head, or its queries, up the tree from their first level.

    They are multiplied by one product at each level where they change. Where a product can be held,
    they are carried in float32 on the way.
    """
    # Products of float32 are in six parts: with K = 128 most of them would be spilled.
    CARRIED: tl.constexpr = BK <= 64 or (BK <= 128 and PRECISION != "fp32")
    i_chunk = tl.program_id(0) // programs
    i_h = (tl.program_id(0) % programs).to(tl.int64)
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
    if i_h < H:
        p_f = f + i_h * num_slots * (K * K)
        p_k = k_levels + (i_h * num_rows + row) * K
        of_level = H * num_rows * K
        rest = -1 - chunk
        level = lowest_bit(rest)
        rest = rest & (rest - 1)
        above = lowest_bit(rest)
        # Where the keys are needed once more, the right neighbour is full and has a product.
        if has_right(chunk, above, num_chunks):
            if CARRIED:
                b_k = load_tile(p_k + level * of_level, o_c * K, everywhere, 0, K, BK).to(
                    tl.float32
                )
            while has_right(chunk, above, num_chunks):
                slot = block_slot(2 * tile, level, (chunk >> level) + 1).to(tl.int64)
                p_above = p_k + above * of_level
                if CARRIED:
                    b_f = load_tile(p_f + slot * (K * K), o_k * K, o_k < K, 0, K, BK)
                    b_f = tl.trans(cast_operand(b_f, PRECISION))
                    b_k = dot(cast_operand(b_k, PRECISION), b_f, PRECISION)
                    store_tile(p_above, o_c * K, everywhere, 0, b_k, K, BK)
                else:
                    p_left = p_k + level * of_level
                    multiply_rows(p_left, p_above, p_f + slot * (K * K), True, K, PRECISION)
                level = above
                rest = rest & (rest - 1)
                above = lowest_bit(rest)
    else:
        i_hq = i_h - H
        p_f = f + (i_hq // GROUP) * num_slots * (K * K)
        p_q = q_levels + (i_hq * num_rows + row) * K
        of_level = H * GROUP * num_rows * K
        rest = chunk & (chunk - 1)
        if rest > 0:
            level = lowest_bit(chunk)
            if CARRIED:
                b_q = load_tile(p_q + level * of_level, o_c * K, everywhere, 0, K, BK).to(
                    tl.float32
                )
            while rest > 0:
                slot = block_slot(2 * tile, level, (chunk >> level) - 1).to(tl.int64)
                above = lowest_bit(rest)
                rest = rest & (rest - 1)
                p_above = p_q + above * of_level
                if CARRIED:
                    b_f = load_tile(p_f + slot * (K * K), o_k * K, o_k < K, 0, K, BK)
                    b_f = cast_operand(b_f, PRECISION)
                    b_q = dot(cast_operand(b_q, PRECISION), b_f, PRECISION)
                    store_tile(p_above, o_c * K, everywhere, 0, b_q, K, BK)
                else:
                    p_right = p_q + level * of_level
                    multiply_rows(p_right, p_above, p_f + slot * (K * K), False, K, PRECISION)
                level = above


class Tree(NamedTuple):
    """Queries, keys and products of all levels, over the tiles' rows (see `problem.py`).

    At level l a chunk has queries if it is in a right block, and keys if in a left one that has a
    right neighbour; what it has not is undefined. Rows behind a sequence's end are zero. Queries
    have `scale` in them.
    """

    q: Tensor  # [levels, HQ, rows, K]
    k: Tensor  # [levels, H, rows, K]; the same tensor as q without groups
    f: Tensor  # [H, 2 · chunks, K, K]: products of blocks (`block_slot`), but for the last ones
    inverse: Tensor | None  # [H, chunks, 64, 64]: (I + M)⁻¹ of every chunk, for the gradient
    # Sums of gates: of a query's, from its block's start up to and including its own token; of a
    # key's, from after its token to its block's end.
    decay: Tensor | None  # [levels, HQ, rows], float32
    gate_sums: Tensor | None  # [HQ, 2 · chunks], float32: of all tokens of a block


def build_tree(p: Problem) -> Tree:
    """Make the tree alone, for the gradient, and keep the chunks' triangles."""
    return _build(p, None, None)


def build_tree_and_begin(p: Problem, weights: Tensor, lse: Tensor) -> Tree:
    """Make the tree with queries of the first levels only, and begin the attention.

    `weights [HQ, rows, 64]` become those of a softmax over the row's own chunk, `lse [B, T, HQ]`
    the logarithm of its denominator, to the base 2.
    """
    return _build(p, weights, lse)


def _build(p: Problem, weights: Tensor | None, lse: Tensor | None) -> Tree:
    H, K = p.k.shape[2:]
    HQ, L, device = p.heads, p.num_levels, p.q.device

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return room(shape, dtype, device)

    q = numbers(L, HQ, p.rows, K, dtype=p.operand)
    tree = Tree(
        q=q,
        k=q if H == HQ else numbers(L, H, p.rows, K, dtype=p.operand),
        f=numbers(H, 2 * p.chunks if L else 0, K, K, dtype=p.product),
        inverse=numbers(H, p.chunks, 64, 64, dtype=p.product) if weights is None else None,
        decay=None if p.g is None else numbers(L, HQ, p.rows),
        gate_sums=None if p.g is None else numbers(HQ, 2 * p.chunks),
    )
    if p.num_tiles:
        prepare(p, tree, weights, lse)
        join(p, tree)
        climb(p, tree, with_queries=weights is None)
    return tree


def prepare(p: Problem, tree: Tree, weights: Tensor | None, lse: Tensor | None) -> None:
    """Make what every chunk has to itself; `weights` and `lse`, if given, are of its attention."""
    T, H, K = p.k.shape[1:]
    L = p.num_levels
    tensors = (("q", p.q), ("k", p.k), ("w", p.w), ("beta", p.beta))
    steps = {name: step for x in tensors for name, step in strides(*x).items()}
    if p.suits_squares:
        from householder.ops.path_attention.triton import hopper_prepare

        parameters = config.hopper_prepare_launch(K)
        launch(
            hopper_prepare.prepare_kernel, (p.chunks * H,),
            p.q, p.k, p.w, p.beta, tree.q, tree.k, tree.f, tree.inverse, weights, lse, *p.packing,
            p.scale, T, H, p.rows, L, **steps, K=K, PACKED=p.cu_seqlens is not None,
            NK=-(-K // 64), WIDE=p.w.dtype != p.k.dtype, **parameters.options,
        )  # fmt: skip
        return
    block, parameters = config.prepare_launch(p.precision)
    steps |= {"g_b": 0, "g_t": 0, "g_h": 0} if p.g is None else strides("g", p.g)
    launch(
        prepare_kernel, (p.chunks * H,),
        p.q, p.k, p.w, p.beta, p.g, tree.q, tree.k, tree.f, tree.inverse, tree.decay,
        tree.gate_sums, weights, lse, *p.packing, p.scale, p.window, T, H, p.rows, L, **steps,
        **(p.constants | {"BK": min(p.constants["BK"], block)}), WINDOWED=p.window is not None,
        PRODUCTS=p.product_precision, **parameters.options,
    )  # fmt: skip


def join(p: Problem, tree: Tree) -> None:
    """Multiply the products of blocks level by level, and add their gates."""
    B, T, H, K = p.k.shape
    block, parameters = config.join_launch(K, p.precision)
    constants = {"K": K, "PACKED": p.cu_seqlens is not None, "PRECISION": p.product_precision}
    steps = 2 if block >= K else 1

    def blocks(level: int) -> int:
        return p.num_tiles if p.cu_seqlens is not None else B * -(-T // (64 << level))

    # Nothing asks for the products of the last level's blocks.
    for level in range(1, p.num_levels - 1, steps):
        where = *p.packing, T, H, p.rows, level
        if block >= K:
            launch(
                join_kernel, (blocks(level + 1) * H,),
                tree.f, *where, p.num_levels, **constants, BK=p.constants["BK"],
                **parameters.options,
            )  # fmt: skip
        else:
            launch(
                join_wide_kernel, (blocks(level) * H * -(-K // block),),
                tree.f, *where, **constants, BN=block, **parameters.options,
            )  # fmt: skip
    if p.g is not None:
        for level in range(1, p.num_levels - 1):
            launch(
                join_gates_kernel, (blocks(level) * p.heads,),
                tree.gate_sums, *p.packing, T, p.heads, p.rows, level,
                PACKED=p.cu_seqlens is not None, num_warps=1,
            )  # fmt: skip


def climb(p: Problem, tree: Tree, with_queries: bool) -> None:
    """Take keys, sums of gates and, if wanted, queries from their first levels to all others."""
    T, H, K = p.k.shape[1:]
    HQ = p.heads
    if p.num_levels < 2:
        return
    parameters = config.climb_launch(K, p.precision)
    programs = HQ + H if with_queries else H
    constants = {name: x for name, x in p.constants.items() if name != "GATED"}
    constants["PRECISION"] = p.product_precision
    launch(
        climb_kernel, (p.chunks * programs,),
        tree.q, tree.k, tree.f, *p.packing, T, H, p.rows, programs, **constants,
        **parameters.options,
    )  # fmt: skip
    if p.g is not None:
        launch(
            climb_gates_kernel, (p.chunks * HQ,),
            tree.decay, tree.gate_sums, *p.packing, T, HQ, p.rows,
            PACKED=p.cu_seqlens is not None, num_warps=1,
        )  # fmt: skip
