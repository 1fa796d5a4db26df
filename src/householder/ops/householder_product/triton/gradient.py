"""The gradients of reflectors and coefficients from the sums over rows.

With A = Vᵀ X, where V = dY Kᵀ, and B = Pᵀ dY, where P = X Kᵀ, nothing else of X and dY is needed:
dT = −Vᵀ P = −A Kᵀ, and with T = (I + L)⁻¹ diag(β) and L = strict_lower(diag(β) K Kᵀ),

    H = (I + L)⁻ᵀ dT        dL = −strict_lower(H Tᵀ)        dβ = diag(H) + Σ_cols dL ⊙ K Kᵀ
    E = diag(β) dL          dK = −Tᵀ A − T B + (E + Eᵀ) K

For the transpose A and B change places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from householder.ops._dispatch import contiguous_like
from householder.ops._triton import dot_add
from householder.ops.householder_product.triton import config
from householder.ops.householder_product.triton.config import cdiv
from householder.ops.householder_product.triton.launch import launch
from householder.ops.householder_product.triton.prepare import Triangles, cross
from householder.ops.householder_product.triton.tiles import (
    load_rows,
    on_diagonal,
    store_rows,
    strictly_lower,
    sum_parts,
    tile_at,
    transposed_tile_at,
)


@triton.jit
def triangle_back_kernel(
    parts, inverse, gram, beta, h, symmetric, dbeta, N,
    BLOCKS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Write E + Eᵀ of a block, and dβ; `h` is room to work in.

    Where β is 2 / ‖k‖², its gradient goes to k: dβ (−β²) k, on the diagonal of E + Eᵀ.
    """
    tiles: tl.constexpr = R // TILE
    i_block = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, TILE)
    parts += i_block * SPLITS * R * R
    square = i_block * R * R
    inverse += square
    gram += square
    h += square
    symmetric += square
    beta += i_block * R + o_t
    for i in range(tiles):
        for j in range(i + 1):
            total = tl.zeros((TILE, TILE), dtype=tl.float32)
            for m in range(i, tiles):
                b_s = sum_parts(parts + tile_at(m, j, R, TILE), SPLITS, R)
                b_inverse = tl.load(inverse + transposed_tile_at(m, i, R, TILE))
                total = dot_add(b_inverse, b_s, total, "tf32x3")
            tl.store(h + tile_at(i, j, R, TILE), -total)
    # What the threads of this program have stored, they read.
    tl.debug_barrier()
    for i in range(tiles):
        b_beta = tl.load(beta + i * TILE)
        db = on_diagonal(tl.load(h + tile_at(i, i, R, TILE)), TILE)
        for j in range(i + 1):
            total = tl.zeros((TILE, TILE), dtype=tl.float32)
            for m in range(j + 1):
                b_h = tl.load(h + tile_at(i, m, R, TILE)) * tl.load(beta + m * TILE)[None, :]
                b_inverse = tl.load(inverse + transposed_tile_at(j, m, R, TILE))
                total = dot_add(b_h, b_inverse, total, "tf32x3")
            dl = -total
            if i == j:
                dl = strictly_lower(dl, TILE)
            db += tl.sum(dl * tl.load(gram + tile_at(i, j, R, TILE)), axis=1)
            e = b_beta[:, None] * dl
            if i == j:
                e += tl.trans(e)
                if not GIVEN:
                    own = o_t[:, None] == o_t[None, :]
                    e -= tl.where(own, (db * b_beta * b_beta)[None, :], 0.0)
            else:
                tl.store(symmetric + transposed_tile_at(j, i, R, TILE), e)
            tl.store(symmetric + tile_at(i, j, R, TILE), e)
        if GIVEN:
            o_n = (i_block % BLOCKS) * R + i * TILE + o_t
            p_dbeta = dbeta + i_block // BLOCKS * N + o_n
            tl.store(p_dbeta, db.to(dbeta.dtype.element_ty), mask=o_n < N)


@triton.jit
def sum_rows(p, rows, o_d, N, D, stride, SUMS: tl.constexpr):
    """Return a tile of rows of a sum of parts."""
    total = tl.zeros((rows.shape[0], o_d.shape[0]), dtype=tl.float32)
    stride = tl.cast(stride, tl.int64)
    for i in range(SUMS // 4):
        for j in tl.static_range(4):
            total += load_rows(p + (4 * i + j) * stride, rows, o_d, N, D, D)
    for i in tl.static_range(SUMS // 4 * 4, SUMS):
        total += load_rows(p + i * stride, rows, o_d, N, D, D)
    return total


@triton.jit
def reflector_back_kernel(
    a, b, k, inverse, beta, symmetric, dk, N, D, a_s, b_s, k_g, k_n,
    BLOCKS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
    SUMS_A: tl.constexpr, SUMS_B: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write one tile of rows and columns of dK."""
    tiles: tl.constexpr = R // TILE
    i_block = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles
    i_g = i_block // BLOCKS
    o_t = tl.arange(0, TILE)
    first = (i_block % BLOCKS) * R + o_t
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    a += i_g * N * D
    b += i_g * N * D
    k += i_g * k_g
    inverse += i_block * R * R
    symmetric += i_block * R * R
    beta += i_block * R + o_t
    total = tl.zeros((TILE, BD), dtype=tl.float32)
    for j in range(i, tiles):
        b_inverse = tl.load(inverse + transposed_tile_at(j, i, R, TILE))
        b_a = sum_rows(a, first + j * TILE, o_d, N, D, a_s, SUMS_A)
        total = dot_add(b_inverse, b_a, total, "tf32x3")
    total *= tl.load(beta + i * TILE)[:, None]
    for j in range(i + 1):
        b_inverse = tl.load(inverse + tile_at(i, j, R, TILE))
        b_b = sum_rows(b, first + j * TILE, o_d, N, D, b_s, SUMS_B)
        b_b *= tl.load(beta + j * TILE)[:, None]
        total = dot_add(b_inverse, b_b, total, "tf32x3")
    total = -total
    for j in range(tiles):
        b_e = tl.load(symmetric + tile_at(i, j, R, TILE))
        b_k = load_rows(k, first + j * TILE, o_d, N, D, k_n)
        total = dot_add(b_e, b_k, total, "tf32x3")
    store_rows(dk + i_g * N * D, first + i * TILE, o_d, N, D, D, total)


def reflector_gradients(
    a: Tensor,
    b: Tensor,
    k: Tensor,
    triangles: Triangles,
    beta: Tensor | None,
    parts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the reflectors `k [G, N, D]` and of β, if that was given.

    `a` and `b` are float32 `[sums, G, N, D]`, in parts to be added up; `parts` are those of
    `cross(a, k)`, if they are there already.
    """
    G, N, D = k.shape
    R, blocks = config.block_size(N), config.num_blocks(N)
    tile = config.tile_size(R)
    parts = cross(a, k) if parts is None else parts
    h, symmetric = torch.empty_like(triangles.inverse), torch.empty_like(triangles.inverse)
    dbeta = None if beta is None else contiguous_like(beta)
    dk = contiguous_like(k)
    launch(
        triangle_back_kernel, (G * blocks,), parts, triangles.inverse, triangles.gram,
        triangles.beta, h, symmetric, dbeta, N=N, BLOCKS=blocks, R=R, TILE=tile,
        SPLITS=parts.shape[2], GIVEN=beta is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
    tiling = config.square_launch()
    launch(
        reflector_back_kernel, (G * blocks * (R // tile), cdiv(D, tiling.tiles["BD"])),
        a, b, k, triangles.inverse, triangles.beta, symmetric, dk, N=N, D=D,
        a_s=a.stride(0), b_s=b.stride(0), k_g=k.stride(0), k_n=k.stride(1),
        BLOCKS=blocks, R=R, TILE=tile, SUMS_A=a.shape[0], SUMS_B=b.shape[0], **tiling.options,
    )  # fmt: skip
    return dk, dbeta
