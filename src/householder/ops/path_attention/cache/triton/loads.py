"""Reading what a cache holds."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_vector(pointer, o_d, D: tl.constexpr):
    """Load a vector in float32."""
    return tl.load(pointer + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def load_tile(pointer, first, o_r, stop, o_d, D: tl.constexpr):
    """Load rows `first + o_r` below `stop` of `[·, D]` as they are held."""
    o_r += first
    mask = (o_r < stop)[:, None] & (o_d < D)[None, :]
    return tl.load(pointer + o_r[:, None] * D + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def seen_rows(tile, first, o_r, r):
    """Return a tile in float32, zero from row `r` on."""
    return tl.where((first + o_r < r)[:, None], tile.to(tl.float32), 0.0)


@triton.jit
def load_rows(pointer, first, o_r, stop, o_d, D: tl.constexpr):
    """Load rows `first + o_r` of `[·, D]` in float32, zero from row `stop` of `o_r` on."""
    rows = (first + o_r)[:, None] * D + o_d[None, :]
    x = tl.load(pointer + rows, mask=(o_r < stop)[:, None] & (o_d < D)[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def load_later(p_ty, first, o_l, o_j, stop, triangle_room):
    """Load rows `first + o_l` below `stop` of T Y as they are held, below the diagonal."""
    o_l += first
    mask = (o_l < stop)[:, None] & (o_j[None, :] < o_l[:, None])
    return tl.load(p_ty + o_l[:, None] * triangle_room + o_j[None, :], mask=mask, other=0.0)
