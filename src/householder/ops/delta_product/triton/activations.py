"""Unit queries and keys, β and log gates from a layer's projections: one kernel each way.

Both are bound by memory: every tensor is read once and written once, and a row stays in registers
in between. The programs of one launch share the work out by number: first tiles of q's rows, then
of k's, then tiles of tokens and value heads for β and the gates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._dispatch import contiguous_like
from householder.ops._triton import addressable, launch, on_its_device, power_of_two

# Entries of a tile of rows: 32 a thread, so that a thread has four 16-byte loads under way.
TILE_ENTRIES = 4096
# Entries of a tile of β or gates.
GATE_ENTRIES = 1024
# Arguments that follow the length. Specialised on their divisibility, as is Triton's habit, they
# would compile a kernel anew for many a length.
LENGTHS = ["T", "q_tiles", "k_tiles", "q_rows", "k_rows", "beta_b", "a_b"]


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(−x)); no x overflows, for 1 / ∞ is zero."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), to the last digits of its small values too.

    A gate that forgets little sums up over a long sequence, and log(1 + u) in float32 is zero for
    u below 2⁻²⁴. So it is taken as 2 artanh(s), s = u / (2 + u) ≤ 1/3, by its series.
    """
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    z = s * s
    series = 1.0 / 15.0
    for i in tl.static_range(7):
        series = series * z + 1.0 / (13.0 - 2.0 * i)
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def softplus_gate(a, A_log, dt_bias, o_h, m_h):
    """Return a + dt_bias, exp(A_log) for the heads `o_h`, and softplus of the former."""
    shift = tl.zeros_like(o_h).to(tl.float32)
    if dt_bias is not None:
        shift += tl.load(dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log + o_h, mask=m_h, other=0.0).to(tl.float32))
    x = a.to(tl.float32) + shift
    return x, rate, softplus(x)


@triton.jit
def normalize_rows(
    x, out, factor, i_tile, T, eps, x_b, x_t, x_n, x_h,
    N: tl.constexpr, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write a tile of rows of `x [B, T, N, H, K]` at unit length, and the factors to it."""
    per_batch = tl.cast(T, tl.int64) * (N * H)
    tiles = tl.cdiv(per_batch, ROWS)
    i_b = i_tile // tiles
    first = (i_tile % tiles) * ROWS
    o_r = tl.arange(0, ROWS)
    o_k = tl.arange(0, BK)
    # Only the tile's first row needs a 64-bit division.
    within = (first % (N * H)).to(tl.int32) + o_r
    token = first // (N * H) + within // (N * H)
    offsets = i_b * x_b + token * x_t + (within % (N * H) // H) * x_n + (within % H) * x_h
    rows = i_b * per_batch + first + o_r
    m_r = first + o_r < per_batch
    mask = m_r[:, None]
    if K != BK:
        mask = mask & (o_k[None, :] < K)
    b_x = tl.load(x + offsets[:, None] + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
    b_factor = tl.rsqrt(tl.sum(b_x * b_x, axis=1) + eps)
    b_x = (b_x * b_factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * K + o_k[None, :], b_x, mask=mask)
    tl.store(factor + rows, b_factor, mask=m_r)


@triton.jit
def normalize_rows_back(
    y, factor, dy, dx, i_tile, num_rows, K: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr
):
    """Write dx = r (dy − y (y · dy)) for a tile of unit rows y, all contiguous."""
    rows = i_tile * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, BK)
    m_r = rows < num_rows
    mask = m_r[:, None]
    if K != BK:
        mask = mask & (o_k[None, :] < K)
    offsets = rows[:, None] * K + o_k[None, :]
    b_y = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    b_factor = tl.load(factor + rows, mask=m_r, other=0.0)
    b_dx = b_factor[:, None] * (b_dy - b_y * tl.sum(b_y * b_dy, axis=1)[:, None])
    tl.store(dx + offsets, b_dx.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def locate_gates(i_tile, T, HV, BT: tl.constexpr, BH: tl.constexpr):
    """Return a tile's batch row, its number among the tiles of tokens, tokens and heads."""
    num_h = tl.cdiv(HV, BH)
    num_t = tl.cdiv(T, BT)
    i_bt = i_tile // num_h
    o_t = (i_bt % num_t) * BT + tl.arange(0, BT)[:, None]
    o_h = (i_tile % num_h) * BH + tl.arange(0, BH)[None, :]
    return i_bt // num_t, i_bt, o_t, o_h


@triton.jit(do_not_specialize=LENGTHS)
def activate_kernel(
    q, k, beta, a, A_log, dt_bias, q_out, k_out, beta_out, g_out, q_factor, k_factor,
    eps, T, HV, q_tiles, k_tiles,
    q_b, q_t, q_h, k_b, k_t, k_n, k_h, beta_b, beta_t, beta_n, beta_h, a_b, a_t, a_h,
    N: tl.constexpr, H: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    BETA_SCALE: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Write one tile of unit queries, of unit keys, or of β and log gates."""
    i_tile = tl.program_id(0).to(tl.int64)
    if i_tile >= q_tiles + k_tiles:
        i_b, _, o_t, o_h = locate_gates(i_tile - q_tiles - k_tiles, T, HV, BT, BH)
        mask = (o_t < T) & (o_h < HV)
        o_bt = i_b * T + o_t
        if BETA_SCALE is not None:
            for j in tl.static_range(N):
                p_beta = beta + i_b * beta_b + o_t * beta_t + j * beta_n + o_h * beta_h
                b_beta = sigmoid(tl.load(p_beta, mask=mask, other=0.0).to(tl.float32))
                tl.store(beta_out + (o_bt * N + j) * HV + o_h, BETA_SCALE * b_beta, mask=mask)
        if GATE:
            b_a = tl.load(a + i_b * a_b + o_t * a_t + o_h * a_h, mask=mask, other=0.0)
            _, rate, soft = softplus_gate(b_a, A_log, dt_bias, o_h, o_h < HV)
            tl.store(g_out + o_bt * HV + o_h, -rate * soft, mask=mask)
    elif NORM:
        if i_tile < q_tiles:
            normalize_rows(q, q_out, q_factor, i_tile, T, eps, q_b, q_t, 0, q_h, 1, H, K, ROWS, BK)
        else:
            i_tile -= q_tiles
            normalize_rows(
                k, k_out, k_factor, i_tile, T, eps, k_b, k_t, k_n, k_h, N, H, K, ROWS, BK
            )


@triton.jit(do_not_specialize=LENGTHS)
def activate_back_kernel(
    q, k, q_factor, k_factor, beta, a, A_log, dt_bias, dq, dk, dbeta, dg,
    dq_out, dk_out, dbeta_out, da, dA_log, ddt_bias,
    T, HV, q_rows, k_rows, q_tiles, k_tiles, beta_b, beta_t, beta_n, beta_h, a_b, a_t, a_h,
    N: tl.constexpr, K: tl.constexpr, BETA_SCALE: tl.constexpr, ROWS: tl.constexpr,
    BK: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Write one tile of the gradients; of A_log and dt_bias, their sums over the tile's tokens."""
    i_tile = tl.program_id(0).to(tl.int64)
    if i_tile >= q_tiles + k_tiles:
        i_b, i_bt, o_t, o_h = locate_gates(i_tile - q_tiles - k_tiles, T, HV, BT, BH)
        mask = (o_t < T) & (o_h < HV)
        o_bt = i_b * T + o_t
        if dbeta is not None:
            for j in tl.static_range(N):
                p_beta = beta + i_b * beta_b + o_t * beta_t + j * beta_n + o_h * beta_h
                b_x = tl.load(p_beta, mask=mask, other=0.0).to(tl.float32)
                o_out = (o_bt * N + j) * HV + o_h
                b_dbeta = tl.load(dbeta + o_out, mask=mask, other=0.0).to(tl.float32)
                # σ(−x) is 1 − σ(x) without its cancellation.
                b_dbeta *= BETA_SCALE * sigmoid(b_x) * sigmoid(-b_x)
                tl.store(dbeta_out + o_out, b_dbeta.to(dbeta_out.dtype.element_ty), mask=mask)
        if dg is not None:
            b_a = tl.load(a + i_b * a_b + o_t * a_t + o_h * a_h, mask=mask, other=0.0)
            b_dg = tl.load(dg + o_bt * HV + o_h, mask=mask, other=0.0).to(tl.float32)
            b_x, rate, soft = softplus_gate(b_a, A_log, dt_bias, o_h, o_h < HV)
            b_da = -b_dg * rate * sigmoid(b_x)
            tl.store(da + o_bt * HV + o_h, b_da.to(da.dtype.element_ty), mask=mask)
            p_sum = i_bt * HV + o_h
            # Outside the mask dg is zero, and so is all that follows from it.
            b_dA_log = tl.sum(-b_dg * rate * soft, axis=0)
            tl.store(dA_log + p_sum, b_dA_log[None, :], mask=o_h < HV)
            b_ddt_bias = tl.sum(b_da, axis=0)
            tl.store(ddt_bias + p_sum, b_ddt_bias[None, :], mask=o_h < HV)
    elif i_tile < q_tiles:
        if dq is not None:
            normalize_rows_back(q, q_factor, dq, dq_out, i_tile, q_rows, K, ROWS, BK)
    else:
        if dk is not None:
            i_tile -= q_tiles
            normalize_rows_back(k, k_factor, dk, dk_out, i_tile, k_rows, K, ROWS, BK)


class Tiles(NamedTuple):
    """How the work is cut up: tile sizes, and tiles of tokens with all or some value heads."""

    rows: int
    block_k: int
    tokens: int
    heads: int
    of_tokens: int
    of_gates: int

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BK": self.block_k, "BT": self.tokens, "BH": self.heads}


def make_tiles(B: int, T: int, HV: int, K: int) -> Tiles:
    """Choose tile sizes for these shapes."""
    block_k = power_of_two(K)
    heads = power_of_two(HV, least=1, most=64)
    tokens = GATE_ENTRIES // heads
    of_tokens = B * -(-T // tokens)
    return Tiles(
        rows=TILE_ENTRIES // block_k,
        block_k=block_k,
        tokens=tokens,
        heads=heads,
        of_tokens=of_tokens,
        of_gates=of_tokens * -(-HV // heads),
    )


@on_its_device
def activate(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    qk_eps: float | None,
    beta_scale: float | None,
) -> tuple[Tensor, ...]:
    """Return unit q and k, β and log gates, and the factors of q's and k's rows.

    Arguments as in `activations.definition`, of whole sequences. What is not asked for is an empty
    tensor; β, gates and factors are float32.
    """
    norm, gate = qk_eps is not None, A_log is not None
    B, T, N, H, K = k.shape
    HV = beta.shape[-1]

    def empty(there: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape if there else 0, dtype=dtype, device=q.device)

    unit_q, unit_k = empty(norm, *q.shape, dtype=q.dtype), empty(norm, *k.shape, dtype=k.dtype)
    q_factor, k_factor = empty(norm, B, T, H), empty(norm, B, T, N, H)
    active_beta = empty(beta_scale is not None, B, T, N, HV)
    log_gate = empty(gate, B, T, HV)
    if norm:
        q, k = addressable(q), addressable(k)
    A_log, dt_bias = (x if x is None else x.contiguous() for x in (A_log, dt_bias))
    tiles = make_tiles(B, T, HV, K)
    q_tiles = B * -(-T * H // tiles.rows) if norm else 0
    k_tiles = B * -(-T * N * H // tiles.rows) if norm else 0
    gates = tiles.of_gates if gate or beta_scale is not None else 0
    if q_tiles + k_tiles + gates:
        launch(
            activate_kernel, (q_tiles + k_tiles + gates,),
            q, k, beta, g, A_log, dt_bias,
            unit_q, unit_k, active_beta, log_gate, q_factor, k_factor,
            0.0 if qk_eps is None else qk_eps, T, HV, q_tiles, k_tiles,
            *q.stride()[:-1], *k.stride()[:-1], *beta.stride(),
            *((0, 0, 0) if g is None else g.stride()),
            N=N, H=H, K=K, NORM=norm, BETA_SCALE=beta_scale, GATE=gate, **tiles.constants,
            num_warps=4,
        )  # fmt: skip
    return unit_q, unit_k, active_beta, log_gate, q_factor, k_factor


def activate_backward(
    dq: Tensor | None,
    dk: Tensor | None,
    dbeta: Tensor | None,
    dg: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_factor: Tensor,
    k_factor: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    beta_scale: float | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, beta, g, A_log and dt_bias; empty where none is asked for.

    `q`, `k` and their factors are results of `activate`, the others its arguments.
    """

    def empty_like(x: Tensor, there: bool) -> Tensor:
        return contiguous_like(x) if there else x.new_empty(0)

    def rows_of(x: Tensor, dx: Tensor | None) -> int:
        return 0 if dx is None else x.numel() // x.shape[-1]

    B, T, N, HV = beta.shape
    K = 16 if dq is None and dk is None else (q if dk is None else k).shape[-1]
    gate = dg is not None and g is not None and A_log is not None
    dq, dk, dbeta, dg, A_log, dt_bias = (
        x if x is None else x.contiguous() for x in (dq, dk, dbeta, dg, A_log, dt_bias)
    )
    dq_out, dk_out = empty_like(q, dq is not None), empty_like(k, dk is not None)
    dbeta_out = empty_like(beta, dbeta is not None)
    da = empty_like(g, gate) if g is not None else beta.new_empty(0)

    tiles = make_tiles(B, T, HV, K)
    # One sum a tile, added up afterwards: the order of the sum is fixed.
    sums = torch.empty(
        2, tiles.of_tokens if gate else 0, HV, dtype=torch.float32, device=beta.device
    )
    q_rows, k_rows = rows_of(q, dq), rows_of(k, dk)
    q_tiles, k_tiles = -(-q_rows // tiles.rows), -(-k_rows // tiles.rows)
    gates = tiles.of_gates if gate or dbeta is not None else 0
    if q_tiles + k_tiles + gates:
        with torch.cuda.device_of(beta):
            launch(
                activate_back_kernel, (q_tiles + k_tiles + gates,),
                q, k, q_factor, k_factor, beta, g, A_log, dt_bias, dq, dk, dbeta, dg,
                dq_out, dk_out, dbeta_out, da, sums[0], sums[1],
                T, HV, q_rows, k_rows, q_tiles, k_tiles, *beta.stride(),
                *((0, 0, 0) if g is None else g.stride()),
                N=N, K=K, BETA_SCALE=beta_scale, **tiles.constants, num_warps=4,
            )  # fmt: skip
    dA_log, ddt_bias = (
        x.new_empty(0) if parameter is None or not gate else x.sum(0).to(parameter.dtype)
        for x, parameter in zip(sums, (A_log, dt_bias), strict=True)
    )
    return dq_out, dk_out, dbeta_out, da, dA_log, ddt_bias
