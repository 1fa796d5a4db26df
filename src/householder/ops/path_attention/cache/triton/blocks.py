"""Which blocks and spans of keys there are, by the binary digits of their number."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_ones(x):
    """Return how many bits of a number from 0 to 2³¹ − 1 are one."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    return (x + (x >> 16)) & 0x3F


@triton.jit
def count_newer(blocks, i_block):
    """Return how many blocks are newer than the one that has the `i_block`-th 64 tokens."""
    # As many as there are ones behind the first binary digit in which the numbers differ.
    behind = blocks ^ i_block
    for shift in tl.static_range(5):
        behind |= behind >> (1 << shift)
    return count_ones(blocks & (behind >> 1))


@triton.jit
def find_part(i_part, old, SPAN: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first token and the size of a part of the keys, 0 if there is none.

    Part 0 are the recent tokens, new ones included; then come spans of SPAN tokens, each inside one
    block; then, LEVELS at most, the blocks smaller than a span.
    """
    spans, blocks = old // SPAN, old // BLOCK
    first, size = (i_part - 1) * SPAN, SPAN
    if i_part > spans:
        rank = 0
        size = 0
        for bit in tl.static_range(LEVELS - 1, -1, -1):
            is_one = (blocks >> bit) & 1
            if (is_one == 1) & (rank == i_part - 1 - spans):
                size = BLOCK << bit
                first = (blocks >> (bit + 1) << (bit + 1)) * BLOCK
            rank += is_one
    return first, size
