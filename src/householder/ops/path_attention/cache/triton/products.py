"""Products of a decoded step that are to cost nothing of their operands' digits."""

from __future__ import annotations

import triton
import triton.language as tl

from householder.ops._triton import dot


@triton.jit
def halves(x):
    """Split float32 into two float16 parts, 22 bits together; cut off at the ends of the range."""
    x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def dot_whole(a, b, HALVES: tl.constexpr):
    """Multiply float32 tiles in parts, all but the small ones' product.

    Beside 16-bit keys two float16 parts of each are more than enough, and twice as fast as TF32's.
    """
    if HALVES:
        high_a, low_a = halves(a)
        high_b, low_b = halves(b)
        product = tl.dot(high_a, low_b, tl.dot(low_a, high_b))
        return tl.dot(high_a, high_b, product)
    else:
        return dot(a, b, "tf32x3")


@triton.jit
def pack(high, low):
    """Put eight rows above eight others."""
    C: tl.constexpr = high.shape[1]
    is_high = (tl.arange(0, 2) == 0)[:, None, None]
    return tl.reshape(tl.where(is_high, high[None, :, :], low[None, :, :]), (16, C))


@triton.jit
def fold(x):
    """Add the last eight of sixteen rows to the first."""
    return tl.sum(tl.reshape(x, (2, 8, x.shape[1])), 0)


@triton.jit
def split_query(q, PACKED: tl.constexpr, HALF: tl.constexpr):
    """Split queries into what `dot_query` takes: they keep the digits that a prompt's have.

    PACKED says that there are eight: both parts fit into the sixteen rows of one product.
    """
    if PACKED:
        high, low = halves(q)
        return pack(high, low), 0.0
    elif HALF:
        high, low = halves(q)
        return high, low
    else:
        return q, 0.0


@triton.jit
def dot_query(high, low, keys, less, PACKED: tl.constexpr, HALF: tl.constexpr):
    """Return `q keysᵀ − less` of split queries and keys as they lie in the cache."""
    if PACKED:
        return fold(tl.dot(high, tl.trans(keys).to(tl.float16)) - less)
    elif HALF:
        keys = tl.trans(keys).to(tl.float16)
        return tl.dot(high, keys, tl.dot(low, keys)) - less
    else:
        return dot(high, tl.trans(keys), "tf32x3") - less


@triton.jit
def dot_path(q, path, HALF: tl.constexpr):
    """Return `q path` of float32 queries and a path as it lies in the cache, without its scales."""
    if HALF:
        # Sixteen bits of fixed point, each eight of them exact in float16.
        high, low = halves(q)
        upper, lower = (path >> 8).to(tl.float16), (path & 255).to(tl.float16)
        product = tl.dot(high, upper, tl.dot(low, upper))
        return product * 256.0 + tl.dot(high, lower)
    else:
        return dot(q, path.to(tl.float32), "tf32x3")
