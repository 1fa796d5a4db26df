"""Products of matrices in float32, to float32's rounding, whatever TensorFloat-32 is set to."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from householder.ops._triton import cast_operand
from householder.ops.householder_product.triton import config
from householder.ops.householder_product.triton.config import cdiv
from householder.ops.householder_product.triton.launch import launch
from householder.ops.householder_product.triton.tiles import multiply_add


@triton.jit
def product_kernel(
    a, b, c0, c, M, N, K, a_g, a_m, a_k, b_g, b_k, b_n, c0_g, c0_m, c0_n, c_s, c_g, c_m, c_n,
    SPLITS: tl.constexpr, MINUS: tl.constexpr, IDENTITY: tl.constexpr,
    TRIANGLE: tl.constexpr, LOWER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write one tile of C = ±A B + C₀, where C₀ may be absent or the identity.

    With SPLITS, C comes in as many parts over K. With TRIANGLE, row blocks of that size of A end
    before their diagonal block; with LOWER, only what lies below such diagonal blocks of C is
    written.
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    i_n = tl.program_id(0) % num_n
    i_m = tl.program_id(0) // num_n % num_m
    i_g = (tl.program_id(0) // (num_n * num_m)).to(tl.int64)
    o_m = (i_m * BM + tl.arange(0, BM)).to(tl.int64)
    o_n = (i_n * BN + tl.arange(0, BN)).to(tl.int64)
    if LOWER > 0:  # noqa: SIM102 (known at compile time, and then there is nothing to ask)
        if (i_n * BN) // LOWER >= (i_m * BM) // LOWER:
            return
    length = tl.cdiv(tl.cdiv(K, SPLITS), BK) * BK
    begin = tl.program_id(1) * length
    end = tl.minimum(K, begin + length)
    if TRIANGLE > 0:
        end = tl.minimum(K, (i_m * BM) // TRIANGLE * TRIANGLE)
    p_a = a + i_g * a_g + o_m[:, None] * a_m
    p_b = b + i_g * b_g + o_n[None, :] * b_n
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(begin, end, BK):
        o_k = (start + tl.arange(0, BK)).to(tl.int64)
        m_k = o_k < end
        b_a = tl.load(p_a + o_k[None, :] * a_k, mask=(o_m < M)[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b + o_k[:, None] * b_k, mask=m_k[:, None] & (o_n < N)[None, :], other=0.0)
        b_a, b_b = cast_operand(b_a, "tf32x3"), cast_operand(b_b, "tf32x3")
        total = multiply_add(b_a, b_b, total, "tf32x3")
    if MINUS:
        total = -total
    mask = (o_m < M)[:, None] & (o_n < N)[None, :]
    if IDENTITY:
        total += tl.where(o_m[:, None] == o_n[None, :], 1.0, 0.0)
    elif c0 is not None:
        p_c0 = c0 + i_g * c0_g + o_m[:, None] * c0_m + o_n[None, :] * c0_n
        total += tl.load(p_c0, mask=mask, other=0.0).to(tl.float32)
    p_c = (
        c
        + tl.program_id(1).to(tl.int64) * c_s
        + i_g * c_g
        + o_m[:, None] * c_m
        + o_n[None, :] * c_n
    )
    tl.store(p_c, total.to(c.dtype.element_ty), mask=mask)


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    minus: bool = False,
    plus: Tensor | None = None,
    plus_identity: bool = False,
    triangle: int = 0,
    lower: int = 0,
) -> Tensor:
    """Write `±a b + plus` to `out`, for `a [G, M, K]` and `b [G, K, N]` of any strides.

    Args:
        a: left factor, of any dtype.
        b: right factor.
        out: `[G, M, N]`, which may be `plus`; or `[parts, G, M, N]` for as many parts over K, to be
            added up.
        minus: subtract the product.
        plus: what to add.
        plus_identity: add the identity.
        triangle: rows m of `a` end before column `m // triangle * triangle`.
        lower: write only what lies below the diagonal blocks of that size.
    """
    G, M, K = a.shape
    N = b.shape[2]
    tiling = config.product_launch(M, N, K)
    parts = out if out.dim() == 4 else out.unsqueeze(0)
    tiles = cdiv(N, tiling.tiles["BN"]) * cdiv(M, tiling.tiles["BM"])
    a_g, a_m, a_k = a.stride()
    b_g, b_k, b_n = b.stride()
    c0_g, c0_m, c0_n = (0, 0, 0) if plus is None else plus.stride()
    c_s, c_g, c_m, c_n = parts.stride()
    launch(
        product_kernel, (G * tiles, parts.shape[0]), a, b, plus, out, M=M, N=N, K=K,
        a_g=a_g, a_m=a_m, a_k=a_k, b_g=b_g, b_k=b_k, b_n=b_n,
        c0_g=c0_g, c0_m=c0_m, c0_n=c0_n, c_s=c_s, c_g=c_g, c_m=c_m, c_n=c_n,
        SPLITS=parts.shape[0], MINUS=minus, IDENTITY=plus_identity,
        TRIANGLE=triangle, LOWER=lower, **tiling.options,
    )  # fmt: skip
    return out
