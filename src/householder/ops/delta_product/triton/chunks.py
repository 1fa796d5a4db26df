"""Where chunks lie and how they decay: what the kernels of `delta_product` share.

A chunk is C tokens with R = C·N ≤ `CHUNK_ROWS` reflector rows r = (t, j). Chunks of all sequences
are numbered through; the kernels that work on chunks in parallel start from a chunk's number, the
ones that walk along a sequence from the number of its first chunk. For a packed batch both come
from small tables made on the device, so that nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._dispatch import remember
from householder.ops._triton import (
    Launcher,
    addressable,
    aligned,
    cast_operand,
    dot,
    dot_precision,
    has_wide_rows,
    is_hopper,
    operand_dtype,
    power_of_two,
)
from householder.ops.delta_product.triton import config
from householder.ops.delta_product.triton.config import (
    CHUNK_ROWS,
    chunk_tokens,
    max_chunks,
    token_block,
)

# Rows of the table of coefficients that `table_kernel` writes for every chunk and value head, each
# `CHUNK_ROWS` wide. All but the last go by reflector row, the last by token; without gates there
# is only the first.
BETA = tl.constexpr(0)
LOG_HIGH = tl.constexpr(1)
LOG_LOW = tl.constexpr(2)
FROM_START = tl.constexpr(3)
TO_END = tl.constexpr(4)
TOKEN_FROM_START = tl.constexpr(5)
# Arguments of which one value is as good as another: kernels are not compiled again where they are
# 1, or become multiples of 16. Strides of rows of the batch are among them where a token has one
# number for every head.
SIZES = ("T", "beta_b", "g_b")
# U / β is the residual that a reflector writes, as long as β is not zero.
LEAST_BETA = tl.constexpr(2.0**-40)
# exp(-128) is zero in float32, so a stronger gate acts the same.
MIN_LOG_GATE = tl.constexpr(-128.0)
# Log gates are split at multiples of 2⁻¹⁰: sums of 64 high parts are exact in float32.
LOG_STEPS = tl.constexpr(1024.0)
# exp(-88) is below the least normal float32: what has decayed so far is gone.
NOTHING = tl.constexpr(-88.0)
# The least part of a chunk in a sum of such logarithms. Less would cost the sum its digits
# and change nothing.
LEAST_PART = tl.constexpr(-256.0)


@triton.constexpr_function
def carried(precision):
    """Return the precision of products that a state passes through, one chunk after the other.

    Where every step reflects nothing fades, and what the tensor cores cut off their sums adds up.
    """
    return "bf16x6" if precision == "tf32x3" else precision


@triton.jit
def locate_chunk(
    i_chunk, T, cu_seqlens, chunk_sequence, first_chunk, C: tl.constexpr, PACKED: tl.constexpr
):
    """Return a chunk's batch row, its first token in that row and how many tokens it has.

    Numbers past the last chunk of a packed batch get no tokens.
    """
    if PACKED:
        i_s = tl.load(chunk_sequence + i_chunk)
        batch = 0
        start = tl.load(cu_seqlens + i_s) + (i_chunk - tl.load(first_chunk + i_s)) * C
        n = tl.minimum(tl.load(cu_seqlens + i_s + 1) - start, C)
    else:
        per_row = tl.cdiv(T, C)
        batch = i_chunk // per_row
        start = (i_chunk % per_row) * C
        n = tl.minimum(T - start, C)
    return tl.cast(batch, tl.int64), start.to(tl.int64), n


@triton.jit
def own_chunk(
    T, HV, cu_seqlens, chunk_sequence, first_chunk, C: tl.constexpr, PACKED: tl.constexpr
):
    """Return the chunk and value head that a program has, and what `locate_chunk` says of it.

    Heads run side by side: together they read whole rows of memory.
    """
    i_chunk = (tl.program_id(0) // HV).to(tl.int64)
    i_h = (tl.program_id(0) % HV).to(tl.int64)
    batch, start, n = locate_chunk(i_chunk, T, cu_seqlens, chunk_sequence, first_chunk, C, PACKED)
    return i_chunk, i_h, batch, start, n


@triton.jit
def own_columns(HV, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first column that a program has, and its sequence and value head.

    Before these two comes the number of both among all.
    """
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    column = (tl.program_id(0) % blocks) * BLOCK
    i_sh = (tl.program_id(0) // blocks).to(tl.int64)
    return column, i_sh, i_sh // HV, i_sh % HV


@triton.jit
def locate_sequence(
    i_s, T, cu_seqlens, first_chunk, C: tl.constexpr, PACKED: tl.constexpr, SEGMENT: tl.constexpr
):
    """Return a sequence's batch row, first token, number of tokens and first chunk.

    With SEGMENT, a number of chunks, it is a segment of a sequence (see `segments.py`).
    """
    if PACKED:
        batch = 0
        start = tl.load(cu_seqlens + i_s)
        length = tl.load(cu_seqlens + i_s + 1) - start
        chunk = tl.load(first_chunk + i_s)
    elif SEGMENT:
        per_row = tl.cdiv(T, SEGMENT * C)
        batch = i_s // per_row
        index = i_s % per_row
        start = index * (SEGMENT * C)
        length = tl.minimum(T - start, SEGMENT * C).to(tl.int32)
        chunk = batch * tl.cdiv(T, C) + index * SEGMENT
    else:
        batch = i_s
        start = 0
        length = T
        chunk = i_s * tl.cdiv(T, C)
    return tl.cast(batch, tl.int64), tl.cast(start, tl.int64), length, tl.cast(chunk, tl.int64)


@triton.jit
def row_offsets(R: tl.constexpr, N: tl.constexpr, stride_t, stride_n):
    """Return the offsets of a chunk's reflector rows from its first one."""
    o_r = tl.arange(0, R)
    if N == 1:
        return o_r * stride_t
    else:
        return (o_r // N) * stride_t + (o_r % N) * stride_n


@triton.jit
def pair_decay(table, later, earlier, causal, R: tl.constexpr):
    """Return Γ between rows `later` and `earlier` of a chunk, zero where not `causal`."""
    high = tl.load(table + LOG_HIGH * R + later) - tl.load(table + LOG_HIGH * R + earlier)
    low = tl.load(table + LOG_LOW * R + later) - tl.load(table + LOG_LOW * R + earlier)
    return tl.exp(tl.where(causal, high + low, -float("inf")))


@triton.jit
def attention(
    b_k, b_q, table, scale, N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return Aᵀ `[R, BC]` of a chunk in float32: what tokens read of the rows up to their own."""
    o_r = tl.arange(0, R)[:, None]
    o_c = tl.arange(0, BC)[None, :]
    seen = o_r // N <= o_c
    b_a = dot(b_k, tl.trans(b_q), PRECISION) * scale
    if GATED:
        # A query's gates are those of its token's rows; past the chunk's end there is no query.
        b_a *= pair_decay(table, tl.minimum(o_c, C - 1) * N, o_r, seen, R)
    return tl.where(seen, b_a, 0.0)


@triton.jit
def writes(residual, beta, b_ut, PRECISION: tl.constexpr):
    """Return Uᵀ = (T diag(β) R)ᵀ in float32, of residuals Rᵀ `[BV, R]` and T."""
    if PRECISION == "tf32x3":
        # A row of T diag(β) is as small as its β from end to end, and so keeps its digits: the
        # gradient of β is made of U / β.
        return dot(residual, tl.trans(b_ut * beta[None, :]), carried(PRECISION))
    else:
        return dot(cast_operand(residual * beta[None, :], PRECISION), tl.trans(b_ut), PRECISION)


@triton.jit
def sum_log_gates(log):
    """Return the running sums of log gates along axis 0, in two parts.

    A sum of log gates loses the low digits of a weak gate beside a strong one, which differences
    of sums would return as an error of the decay. So each gate is split in a multiple of 2⁻¹⁰,
    summed and subtracted without any rounding, and a small rest.
    """
    log = tl.maximum(log, MIN_LOG_GATE)
    high = tl.floor(log * LOG_STEPS) / LOG_STEPS
    return tl.cumsum(high, axis=0), tl.cumsum(log - high, axis=0)


@triton.jit(do_not_specialize=SIZES)
def table_kernel(
    beta, g, table, cu_seqlens, chunk_sequence, first_chunk, T, HV,
    beta_b, beta_t, beta_n, beta_h, g_b, g_t, g_h,
    N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write β and, with gates, sums of log gates and decays of one chunk, for `BH` value heads."""
    i_chunk = tl.program_id(0).to(tl.int64)
    batch, start, n = locate_chunk(i_chunk, T, cu_seqlens, chunk_sequence, first_chunk, C, PACKED)
    if n <= 0:
        return
    o_h = (tl.program_id(1) * BH + tl.arange(0, BH)[None, :]).to(tl.int64)
    o_r = tl.arange(0, R)[:, None].to(tl.int64)
    token = o_r // N
    m_r = (o_r < n * N) & (o_h < HV)
    width: tl.constexpr = 6 * R if GATED else R
    p_table = table + (i_chunk * HV + o_h) * width + o_r

    p_beta = beta + batch * beta_b + start * beta_t + o_h * beta_h
    b_beta = tl.load(p_beta + token * beta_t + (o_r % N) * beta_n, mask=m_r, other=0.0)
    b_beta = b_beta.to(tl.float32)
    b_beta = tl.where(tl.abs(b_beta) < LEAST_BETA, LEAST_BETA, b_beta)
    tl.store(p_table + BETA * R, b_beta, mask=o_h < HV)
    if GATED:
        p_g = g + batch * g_b + start * g_t + o_h * g_h
        b_g = tl.load(p_g + token * g_t, mask=m_r & (o_r % N == 0), other=0.0).to(tl.float32)
        high, low = sum_log_gates(b_g)
        last = o_r == R - 1
        high_end = tl.sum(tl.where(last, high, 0.0), axis=0)[None, :]
        low_end = tl.sum(tl.where(last, low, 0.0), axis=0)[None, :]
        tl.store(p_table + LOG_HIGH * R, high, mask=o_h < HV)
        tl.store(p_table + LOG_LOW * R, low, mask=o_h < HV)
        tl.store(p_table + FROM_START * R, tl.exp(high + low), mask=o_h < HV)
        decay = tl.exp((high_end - high) + (low_end - low))
        tl.store(p_table + TO_END * R, decay, mask=o_h < HV)
        o_c = tl.arange(0, BC)[:, None].to(tl.int64)
        b_g = tl.load(p_g + o_c * g_t, mask=(o_c < n) & (o_h < HV), other=0.0).to(tl.float32)
        high, low = sum_log_gates(b_g)
        p_token = table + (i_chunk * HV + o_h) * width + TOKEN_FROM_START * R + o_c
        tl.store(p_token, tl.exp(high + low), mask=o_h < HV)


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Return the strides of `x [B, T, H, D]` or `[B, T, N, H, D]` by their names in the kernels.

    Those of tokens and reflectors are constants of the kernel: offsets inside a tile then need no
    registers.
    """
    letters = "bth" if x.dim() == 4 else "btnh"
    return {
        f"{name}_{letter}": stride for letter, stride in zip(letters, x.stride()[:-1], strict=True)
    }


# Plans that were asked for, by the inputs' layouts.
PLANS: dict[Any, Plan] = {}


class Plan:
    """What calls have in common whose inputs agree in shapes, strides, dtypes and alignment.

    Among it are the launchers of their kernels, found by what those depend on besides.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, packed: int | None
    ) -> None:
        B, T, N, HV, V = v.shape
        H, K = k.shape[3:]
        self.precision = dot_precision(q, k, v)
        self.operand = operand_dtype(self.precision)
        self.num_sequences = B if packed is None else packed
        self.num_chunks = max_chunks(B, T, N, packed)
        self.sizes = {
            "N": N, "K": K, "V": V, "GROUP": HV // H,
            "C": chunk_tokens(N), "R": CHUNK_ROWS, "BC": token_block(N, self.precision),
        }  # fmt: skip
        self.constants = {
            **self.sizes,
            "GATED": g is not None,
            "PACKED": packed is not None,
            "PRECISION": self.precision,
        }
        tiles = [addressable(x) for x in (q, k, v)]
        self.copies = [a is not x for a, x in zip(tiles, (q, k, v), strict=True)]
        self.wide_rows = [has_wide_rows(x) for x in tiles]
        self.launchers: dict[Any, Launcher] = {}

    def launcher(self, key: Any, make: Callable[[], Launcher]) -> Launcher:
        """Return the launcher of this key, made when it is first asked for."""
        launcher = self.launchers.get(key)
        if launcher is None:
            launcher = self.launchers[key] = make()
        return launcher


def find_plan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, packed: int | None
) -> Plan:
    """Return the plan of calls with such inputs; `packed` is their number of sequences, if so."""
    key = packed, v.device, *(
        None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)
        for x in (q, k, v, beta, g)
    )  # fmt: skip
    plan = PLANS.get(key)
    if plan is None:
        plan = Plan(q, k, v, g, packed)
        remember(PLANS, key, plan)
    return plan


class Problem(NamedTuple):
    """The op's inputs as the kernels read them, and what follows from their shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    cu_seqlens: Tensor | None
    chunk_sequence: Tensor | None
    first_chunk: Tensor | None
    num_sequences: int
    num_chunks: int
    plan: Plan

    @property
    def packing(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Tables of the packed batch; all None otherwise."""
        return self.cu_seqlens, self.chunk_sequence, self.first_chunk

    @property
    def precision(self) -> str:
        return self.plan.precision

    @property
    def operand(self) -> torch.dtype:
        return self.plan.operand

    @property
    def sizes(self) -> dict[str, int]:
        """Constants of every kernel."""
        return self.plan.sizes

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that the kernels of matrix products share.

        Walks take all of them, in the forms for Hopper as in the portable ones, which then differ
        in nothing for who launches them.
        """
        return self.plan.constants

    @property
    def heads(self) -> int:
        """Value heads, HV."""
        return self.v.shape[3]


class Saved(NamedTuple):
    """What the forward keeps for the backward, all chunks and value heads side by side."""

    states: Tensor  # [chunks·HV, V, K], at the chunks' starts
    ut: Tensor  # [chunks·HV, R·R], the triangles T
    u: Tensor  # [B, T, N, HV, V], the writes
    maps: Tensor  # of long sequences' segments; see `make_maps`
    growth: Tensor
    table: Tensor  # [chunks, HV, 6 or 1, R], coefficients


class Gradients(NamedTuple):
    """Where gradients are written; those of q and k have a head for every value head."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None


def make_problem(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None
) -> Problem:
    """Bring the inputs to what the kernels can read and number the chunks."""
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    plan = find_plan(q, k, v, beta, g, packed)
    if any(plan.copies):
        q, k, v = (
            addressable(x) if copy else x for x, copy in zip((q, k, v), plan.copies, strict=True)
        )
    chunk_sequence = first_chunk = None
    if cu_seqlens is not None:
        C = plan.sizes["C"]
        cu_seqlens = cu_seqlens.contiguous()
        first_chunk = torch.zeros_like(cu_seqlens)
        torch.cumsum((cu_seqlens.diff() + (C - 1)) // C, 0, dtype=torch.int32, out=first_chunk[1:])
        numbers = torch.arange(plan.num_chunks, device=v.device, dtype=torch.int32)
        chunk_sequence = torch.searchsorted(first_chunk[1:], numbers, right=True, out_int32=True)
        chunk_sequence.clamp_(max=plan.num_sequences - 1)
    return Problem(
        q=q,
        k=k,
        v=v,
        # A value per row: their last dimension is heads, whatever its stride.
        beta=aligned(beta),
        g=None if g is None else aligned(g),
        cu_seqlens=cu_seqlens,
        chunk_sequence=chunk_sequence,
        first_chunk=first_chunk,
        num_sequences=plan.num_sequences,
        num_chunks=plan.num_chunks,
        plan=plan,
    )


def kind_of_call(
    k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, *others: Hashable
) -> Hashable:
    """Return what the programs of a call depend on, whatever its length and batch."""
    shape = v.shape
    may_be_cut, packed = shape[1] > config.SEGMENT_TOKENS, cu_seqlens is not None
    return (
        k.device, k.dtype, v.dtype, k.shape[3:], shape[2:], g is None, packed, may_be_cut, *others
    )  # fmt: skip


def suits_hopper(p: Problem, do: Tensor | None = None) -> bool:
    """Return whether forms for Hopper take these inputs, of which they copy 16 bytes at a time."""
    return (
        is_hopper(p.v.device)
        and p.precision == "bf16"
        and p.sizes["K"] <= config.MOST_HOPPER_KEYS
        and all(p.plan.wide_rows)
        and (do is None or has_wide_rows(do))
    )


def empty_table(p: Problem) -> Tensor:
    """Return room for the table of coefficients, in float32."""
    shape = p.num_chunks, p.heads, 1 if p.g is None else 6, CHUNK_ROWS
    return torch.empty(shape, dtype=torch.float32, device=p.v.device)


def steps_of_coefficients(p: Problem) -> dict[str, int]:
    """Return the strides of β and g by their names in the kernels."""
    names = "beta_b", "beta_t", "beta_n", "beta_h", "g_b", "g_t", "g_h"
    steps = *p.beta.stride(), *((0, 0, 0) if p.g is None else p.g.stride())
    return dict(zip(names, steps, strict=True))


def make_table(p: Problem) -> Tensor:
    """Run `table_kernel` for all chunks."""
    table = empty_table(p)
    if p.num_chunks:
        p.plan.launcher("table", lambda: _table_launcher(p))(p.beta, p.g, table, *p.packing)
    return table


def _table_launcher(p: Problem) -> Launcher:
    BH = power_of_two(p.heads, least=1, most=16)
    sizes = {name: p.constants[name] for name in ("N", "C", "R", "BC", "GATED", "PACKED")}
    return Launcher(
        table_kernel, (p.num_chunks, -(-p.heads // BH)), T=p.v.shape[1], HV=p.heads,
        **steps_of_coefficients(p), **sizes, BH=BH, num_warps=4,
    )  # fmt: skip
