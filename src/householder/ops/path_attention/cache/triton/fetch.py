"""What both kernel files use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fetch_to_l2(pointer, size, BYTES: tl.constexpr):
    """Ask for the first BYTES of `size` bytes at `pointer` to be brought to the L2 cache.

    In pieces of 512, each thread its own; a pointer that is not a multiple of 16 is rounded down.
    """
    offset = tl.minimum(tl.arange(0, BYTES // 512) * 512, size - 512)
    address = (pointer.to(tl.int64) + offset) & -16
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 512; mov.b32 $0, 0;",
        "=r,l", [address], tl.int32, False, 1,
    )  # fmt: skip
