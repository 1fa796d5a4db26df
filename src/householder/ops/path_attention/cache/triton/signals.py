"""What programs of a decoded step tell one another, and early reads."""

from __future__ import annotations

import triton
import triton.language as tl

# From one counter to the next, in int32: they are asked for all the time, and lie in cache lines of
# their own.
COUNTER = tl.constexpr(32)


@triton.jit
def arrive(p_count):
    """Count this program as done with what others wait for; all it has stored is seen by them."""
    # Every thread's stores come before the one thread that counts.
    tl.debug_barrier()
    tl.atomic_add(p_count, 1, sem="release")


@triton.jit
def wait_for(p_count, target, EARLY: tl.constexpr):
    """Wait until so many programs have arrived, whose numbers must all be lower than this one's.

    A GPU starts programs in the order of their numbers: those waited for run already. With EARLY it
    is one instruction to the compiler, so that a loop around it can still be pipelined, and what it
    reads first is on its way before. One thread asks, and not all the time: hundreds of programs
    that do would be in the way of those they wait for.
    """
    if EARLY:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 x; mov.u32 x, %tid.x; setp.ne.u32 p, x, 0; @p bra DONE; "
            "ASK: ld.acquire.gpu.global.u32 x, [$1]; setp.ge.u32 p, x, $2; @p bra DONE; "
            "nanosleep.u32 32; bra ASK; DONE: bar.sync 0; mov.u32 $0, x; }",
            "=r,l,r", [p_count.to(tl.int64), target], tl.int32, False, 1,
        )  # fmt: skip
    else:
        while tl.atomic_add(p_count, 0, sem="acquire") < target:
            pass
        tl.debug_barrier()


@triton.jit
def fetch_to_l2(pointer, size, MOST: tl.constexpr):
    """Ask for `size` bytes at `pointer`, MOST at most, to be brought to the L2 cache."""
    # A cache line each; copies in bulk would be fewer, but threads ask for those one by one.
    offset = tl.arange(0, MOST // 128) * 128
    wanted = (offset < size).to(tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r", [pointer.to(tl.int64) + offset, wanted], tl.int32, False, 1,
    )  # fmt: skip
