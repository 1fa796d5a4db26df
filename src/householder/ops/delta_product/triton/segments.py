"""Long sequences in segments: how the state gets from one to the next without walking through all.

A walk along a sequence is a chain, and few heads make few chains. So a long sequence is cut into
segments of a fixed length, which the walks then take for sequences of their own. Through segment i
the state is mapped by S_{i+1} = Φ_i S_i + Δ_i, and its gradient by dS_i = Φ_iᵀ dS_{i+1} + Δ'_i:

    carry:  Δ_i, by a walk from S = 0 that writes nothing else, and the columns of Φ_i, by one from
            S = I without values; all segments at once
    chain:  the S_i of all segments, one after the other
    walk:   each segment from its S_i

The first segment's carry starts from the initial state and needs no Φ; the last has no carry. The
gradient goes the same way from the other end, with the Φ that the forward kept.

Under forget gates little of this is work. The norm of the map through some chunks is at most
exp(Σ g + Σ log max(1, |1 − β|k|²|)); where that is below what float32 holds, nothing that lies
before them can be seen behind them. A carry then begins at those chunks, and Φ is zero.

How a sequence is cut depends on its own length alone, never on the batch; a sequence of one segment
is walked as if there were none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import (
    Launcher,
    cast_operand,
    dot_add,
    load_tile_t,
    power_of_two,
    store_tile_t,
)
from householder.ops.delta_product.triton import config
from householder.ops.delta_product.triton.carry import carry_back_kernel, carry_kernel
from householder.ops.delta_product.triton.chunks import (
    SIZES,
    Problem,
    Saved,
    carried,
    own_columns,
    strides,
    suits_hopper,
)


class Segments(NamedTuple):
    """The segments of all sequences, for the walks: what `Problem` says of sequences.

    Numbered through like sequences, those of one sequence side by side. Past the last segment of a
    packed batch there may be some without tokens.
    """

    bounds: Tensor | None  # packed: [number + 1] int32
    first_chunk: Tensor | None  # packed: [number]
    sequence: Tensor | None  # packed: [number]
    first: Tensor | None  # packed: [sequences + 1], a sequence's first segment
    number: int
    chunks: int  # of one segment; 0 if sequences are not cut

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        return self.bounds, self.first_chunk, self.sequence, self.first


def make_segments(p: Problem) -> Segments:
    """Cut the sequences; nothing here waits for the device."""
    B, T, N, HV, V = p.v.shape
    chunks = config.segment_chunks(T, N, HV, V)
    if chunks == 0 or p.num_sequences == 0:
        return Segments(p.cu_seqlens, p.first_chunk, None, None, p.num_sequences, 0)
    tokens = chunks * config.chunk_tokens(N)
    if p.cu_seqlens is None or p.first_chunk is None:
        return Segments(None, None, None, None, B * -(-T // tokens), chunks)
    number = T // tokens + p.num_sequences
    counts = ((p.cu_seqlens.diff() + (tokens - 1)) // tokens).clamp_(min=1)
    first = torch.zeros_like(p.cu_seqlens)
    torch.cumsum(counts, 0, dtype=torch.int32, out=first[1:])
    numbers = torch.arange(number + 1, device=p.v.device, dtype=torch.int32)
    sequence = torch.searchsorted(first[1:], numbers, right=True, out_int32=True)
    sequence.clamp_(max=p.num_sequences - 1)
    index = torch.minimum(numbers - first[sequence], counts[sequence])
    bounds = torch.minimum(p.cu_seqlens[sequence] + index * tokens, p.cu_seqlens[sequence + 1])
    return Segments(
        bounds, p.first_chunk[sequence] + index * chunks, sequence, first, number, chunks
    )


@triton.jit
def load_map(p_map, rows, columns, limit, K: tl.constexpr, REVERSE: tl.constexpr):
    """Load the factor `[rows, columns]` of a transposed state (or gradient) from the map's Φᵀ."""
    mask = (rows < limit)[:, None] & (columns < K)[None, :]
    if REVERSE:
        offsets = columns[None, :] * K + rows[:, None]
    else:
        offsets = rows[:, None] * K + columns[None, :]
    return tl.load(p_map + offsets, mask=mask, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def chain_kernel(
    states, outer, maps, visible, bounds, first_segment, T, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, SEGMENT: tl.constexpr, REVERSE: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Turn what the carries left into the states of a sequence's segments, columns `[BV]`.

    `outer` is the initial state or, in reverse, the gradient of the final one.
    """
    num_k: tl.constexpr = (K + BK - 1) // BK
    tokens: tl.constexpr = SEGMENT * C
    way: tl.constexpr = -1 if REVERSE else 1
    i_v, i_sh, i_s, i_h = own_columns(HV, V, BV)
    if PACKED:
        first = tl.load(first_segment + i_s).to(tl.int64)
        count = tl.load(first_segment + i_s + 1) - first
        slot = tl.load(bounds + first).to(tl.int64) // tokens
    else:
        count = tl.cdiv(T, tokens)
        first = i_s * count
        slot = i_s * (T // tokens)
    if REVERSE:
        first += count - 1
        slot += count - 1
    o_k = tl.arange(0, BK)

    # Segments are counted from the one beside `outer`, 0.
    p_state = states + (first * HV + i_h) * K * V
    for i_k in tl.static_range(num_k):
        o_row = i_k * BK + o_k
        b_s = tl.zeros((BV, BK), tl.float32)
        if outer is not None:
            b_s += load_tile_t(outer + i_sh * K * V, o_row * V, o_row < K, i_v, V, BV)
        store_tile_t(p_state, o_row * V, o_row < K, i_v, b_s, V, BV)
    # The carry of segment 0 started from `outer`, and so state 1 is complete. So are the others
    # where no map lets anything through.
    if count <= 2:
        return
    slot = (slot + way) * HV + i_h
    p_state += way * HV * K * V
    if GATED:
        is_seen = 0.0
        for i in range(0, count - 2, 64):
            o_i = tl.cast(i + tl.arange(0, 64), tl.int64)
            flags = tl.load(visible + slot + way * HV * o_i, mask=o_i < count - 2, other=0.0)
            is_seen = tl.maximum(is_seen, tl.max(flags, axis=0))
        if is_seen == 0.0:
            return
    p_map = maps + slot * K * K
    if num_k == 1:
        # The state stays in registers, and maps are loaded one segment ahead.
        b_s = load_tile_t(p_state, o_k * V, o_k < K, i_v, V, BV)
        b_after = load_map(p_map, o_k, o_k, K, K, REVERSE)
        for i in range(2, count):
            p_state += way * HV * K * V
            p_map += way * HV * K * K
            b_map = cast_operand(b_after, PRECISION)
            limit = tl.where(i + 1 < count, K, 0)
            b_after = load_map(p_map, o_k, o_k, limit, K, REVERSE)
            b_here = load_tile_t(p_state, o_k * V, o_k < K, i_v, V, BV)
            b_s = dot_add(cast_operand(b_s, PRECISION), b_map, b_here, PRECISION)
            store_tile_t(p_state, o_k * V, o_k < K, i_v, b_s, V, BV)
    else:
        for _ in range(2, count):
            p_before = p_state
            p_state += way * HV * K * V
            for row in range(0, K, BK):
                o_row = row + o_k
                b_s = load_tile_t(p_state, o_row * V, o_row < K, i_v, V, BV)
                for column in range(0, K, BK):
                    o_col = column + o_k
                    b_before = load_tile_t(p_before, o_col * V, o_col < K, i_v, V, BV)
                    b_map = load_map(p_map, o_col, o_row, K, K, REVERSE)
                    b_map = cast_operand(b_map, PRECISION)
                    b_s = dot_add(cast_operand(b_before, PRECISION), b_map, b_s, PRECISION)
                store_tile_t(p_state, o_row * V, o_row < K, i_v, b_s, V, BV)
            p_map += way * HV * K * K
            # The next one reads what all threads stored.
            tl.debug_barrier()


def _chain(
    p: Problem,
    s: Segments,
    states: Tensor,
    outer: Tensor | None,
    maps: Tensor,
    visible: Tensor,
    reverse: bool,
) -> None:
    key = "chain", s.chunks, reverse, outer is None
    launch = p.plan.launcher(key, lambda: _chain_launcher(p, s, reverse))
    launch(states, outer, maps, visible, s.bounds, s.first)


def _chain_launcher(p: Problem, s: Segments, reverse: bool) -> Launcher:
    sizes = p.sizes
    K, V = sizes["K"], sizes["V"]
    launch = config.chain_launch(K)
    return Launcher(
        chain_kernel, (p.num_sequences * p.heads * -(-V // config.CHAIN_COLUMNS),),
        T=p.v.shape[1], HV=p.heads, K=K, V=V, C=sizes["C"],
        GATED=p.g is not None, PACKED=s.first is not None,
        # Between segments TF32 rounds far less than bfloat16 did at every chunk.
        PRECISION="tf32" if p.precision == "bf16" else carried(p.precision),
        SEGMENT=s.chunks, REVERSE=reverse, BK=launch.block, BV=config.CHAIN_COLUMNS,
        **launch.options,
    )  # fmt: skip


def _carry_constants(p: Problem, s: Segments) -> dict[str, Any]:
    K = p.sizes["K"]
    return {
        **p.constants,
        "T": p.v.shape[1],
        "HV": p.heads,
        "SEGMENT": s.chunks,
        "BS": power_of_two(s.chunks, least=1),
        "BK": config.key_block(K, p.precision),
    }


def make_maps(p: Problem, s: Segments) -> tuple[Tensor, Tensor]:
    """Return room for the segments' maps Φᵀ `[slots·HV, K, K]` and for growth.

    There are maps of segments between others; the slot of one is its first token divided by the
    length of a segment. Growth is the logarithm of the bound on each chunk's reflections `[chunks,
    HV]` and, behind it, for each slot and head whether anything is seen through the segment. Only
    gates need it. Where no sequence is cut, both are empty.
    """
    B, T, N, HV, V = p.v.shape
    if s.chunks == 0:
        K = p.sizes["K"]
        none = torch.empty(0, dtype=torch.float32, device=p.v.device)
        return none.new_empty(0, K, K), none
    packed = None if p.cu_seqlens is None else p.num_sequences
    shapes = config.segment_shapes(B, T, N, HV, p.sizes["K"], V, packed)
    maps, growth = (torch.empty(x, dtype=torch.float32, device=p.v.device) for x in shapes)
    return maps, growth


def segment_starts(
    p: Problem,
    s: Segments,
    table: Tensor,
    ut: Tensor,
    initial: Tensor | None,
    maps: Tensor,
    growth: Tensor,
) -> Tensor:
    """Return the state at every segment's start, `[number, HV, K, V]`; fill the maps."""
    K, V = p.sizes["K"], p.sizes["V"]
    starts = torch.empty(s.number, p.heads, K, V, dtype=torch.float32, device=p.v.device)
    visible = growth[p.num_chunks * p.heads :]
    for_hopper = suits_hopper(p)
    key = "carry", s.chunks, for_hopper, initial is None
    launch = p.plan.launcher(key, lambda: _carry_launcher(p, s, for_hopper))
    launch(p.k, p.v, table, ut, growth, initial, starts, maps, visible, *s.tables)
    _chain(p, s, starts, initial, maps, visible, reverse=False)
    return starts


def segment_ends(
    p: Problem,
    s: Segments,
    do: Tensor,
    scale: float,
    saved: Saved,
    dfinal: Tensor | None,
) -> Tensor:
    """Return the gradient of the state at every segment's end, `[number, HV, K, V]`."""
    K, V = p.sizes["K"], p.sizes["V"]
    dends = torch.empty(s.number, p.heads, K, V, dtype=torch.float32, device=p.v.device)
    # The form for Hopper divides by the scale.
    for_hopper = suits_hopper(p, do) and 1e-4 < abs(scale) < 1e4
    key = "carry back", s.chunks, scale, do.stride(), for_hopper, dfinal is None
    launch = p.plan.launcher(key, lambda: _carry_back_launcher(p, s, do, scale, for_hopper))
    launch(do, p.q, p.k, saved.table, saved.ut, saved.growth, dfinal, dends, *s.tables)
    visible = saved.growth[p.num_chunks * p.heads :]
    _chain(p, s, dends, dfinal, saved.maps, visible, reverse=True)
    return dends


def _carry_launcher(p: Problem, s: Segments, for_hopper: bool) -> Launcher:
    K, V = p.sizes["K"], p.sizes["V"]
    launch, kernel, ahead = config.carry_launch(K, V, p.precision), carry_kernel, {}
    if for_hopper:
        from householder.ops.delta_product.triton import hopper_carry

        launch, kernel = config.hopper_carry_launch(), hopper_carry.carry_kernel
        ahead = {"STAGES": launch.num_stages}
    return Launcher(
        kernel, (s.number * p.heads * -(-(V + K) // launch.block),),
        **strides("k", p.k), **strides("v", p.v), **_carry_constants(p, s),
        BV=launch.block, **ahead, **launch.options,
    )  # fmt: skip


def _carry_back_launcher(
    p: Problem, s: Segments, do: Tensor, scale: float, for_hopper: bool
) -> Launcher:
    K, V = p.sizes["K"], p.sizes["V"]
    launch, kernel, ahead = config.walk_launch(K, V, p.precision), carry_back_kernel, {}
    if for_hopper:
        from householder.ops.delta_product.triton import hopper_carry

        launch, kernel = config.hopper_carry_back_launch(V), hopper_carry.carry_back_kernel
        ahead = {"STAGES": launch.num_stages}
    return Launcher(
        kernel, (s.number * p.heads * -(-V // launch.block),), scale=scale,
        **strides("do", do), **strides("q", p.q), **strides("k", p.k),
        **_carry_constants(p, s), BV=launch.block, **ahead, **launch.options,
    )  # fmt: skip


def of_sequences(s: Segments, p: Problem, states: Tensor, last: bool) -> Tensor:
    """Pick the states of each sequence's last or first segment, `[sequences, HV, K, V]`."""
    if s.chunks == 0:
        return states
    if s.first is None:
        whole = states.unflatten(0, (p.num_sequences, -1))
        return whole[:, -1 if last else 0].contiguous()
    return states.index_select(0, s.first[1:] - 1 if last else s.first[:-1])
