"""What kernels for Hopper share whose warps have roles, in Gluon.

Two groups of four warps multiply, each for a chunk of a tile; a warp of its own copies ahead of
both, with the chip's tensor memory accelerator. They meet at barriers in shared memory: a `full`
one completes when a copy has arrived, an `empty` one when all its readers are done. A barrier knows
only the parity of the phase that it is in. So whoever arrives at an `empty` one must have waited
for the `full` one before, even if it has no use for what was copied: it would get two phases ahead.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from householder.ops._gluon import barrier, row_layout

# Names that changed after Triton 3.6.
REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
copy_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
# Registers of a thread of the two groups, and of the warp that copies.
REGISTERS = gl.constexpr(240)
COPY_REGISTERS = gl.constexpr(24)
# Programs that run side by side on an H200, one a multiprocessor, as a power of two.
PLACES = gl.constexpr(128)


@gluon.jit
def lowest_bit(x):
    """Return the number of the lowest bit that is set in a 32-bit integer; negative if none is."""
    alone = (x & -x).to(gl.float32)
    return (alone.to(gl.int32, bitcast=True) >> 23) - 127


@gluon.jit
def highest_bit(x):
    """Return the number of the highest bit of an integer below 2²⁴; negative of zero."""
    return (x.to(gl.float32).to(gl.int32, bitcast=True) >> 23) - 127


@gluon.jit
def locate_tile(i_tile, T, cu_seqlens, tile_sequence, first_tile, PACKED: gl.constexpr):
    """Return, of a tile's sequence, the batch row, the first token there, tokens and first tile."""
    if PACKED:
        i_s = gl.load(tile_sequence + i_tile)
        first = gl.load(cu_seqlens + i_s)
        length = gl.load(cu_seqlens + i_s + 1) - first
        return gl.to_tensor(0), first, length, gl.load(first_tile + i_s)
    else:
        per_row = (gl.to_tensor(T) + 127) // 128
        row = i_tile // per_row
        return row, gl.to_tensor(0), gl.to_tensor(T), row * per_row


@gluon.jit
def lifted(tile):
    """Take a tile of rows for one of a batch of one."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, ROWS, COLUMNS], tile.dtype)
    if REINTERPRET:
        return tile.reinterpret(tile.dtype, [1, ROWS, COLUMNS], layout)
    else:
        return tile._reinterpret(tile.dtype, [1, ROWS, COLUMNS], layout)


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """Allocate barriers that complete after so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def copy_rows(desc, row, tile, bar):
    """Start to copy a tile of a matrix from `row` on; `bar` completes when it is there."""
    BYTES: gl.constexpr = tile.shape[0] * tile.shape[1] * 2
    mbarrier.expect(bar, BYTES)
    copy_block(desc, [row, 0], bar, tile)


@gluon.jit
def copy_values(desc, batch, token, column, tile, bar):
    """Start to copy a tile of `[B, T, H · V]`, with zeros behind the sequence's end."""
    BYTES: gl.constexpr = tile.shape[0] * tile.shape[1] * 2
    mbarrier.expect(bar, BYTES)
    copy_block(desc, [batch, token, column], bar, lifted(tile))


@gluon.jit
def store_through(tile, pointer, b_x, n, stride, D: gl.constexpr):
    """Store the first `n` of 64 whole rows by way of shared memory that nothing else reads.

    From the registers of a product every store would touch eight rows.
    """
    layout: gl.constexpr = row_layout(D, 8, gl.num_warps())
    o_r = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    tile.store(b_x.to(tile.dtype))
    barrier()
    p_x = pointer + o_r[:, None] * stride + o_d[None, :]
    gl.store(p_x, tile.load(layout), mask=(o_r < n)[:, None])


@gluon.jit
def copy_product(products, first, level, block, tile, full, empty, number):
    """Start to copy the product of a block, of those from row `first` on, once its place is free.

    It is the `number`-th that is copied there.
    """
    K: gl.constexpr = tile.shape[0]
    mbarrier.wait(empty, number & 1)
    copy_rows(products, (first + ((2 * block + 1) << level) - 1) * K, tile, full)


@gluon.jit
def leave_level(tile, pointer, b_x, empty, product, full, number, layout: gl.constexpr):
    """Write gradients of a level's rows, and return what they are behind the product they pass.

    The rows themselves have been read: their tile serves on the way out, and is free then.
    """
    K: gl.constexpr = tile.shape[1]
    store_through(tile, pointer, b_x, 64, K, K)
    fence_async_shared()
    barrier()
    mbarrier.arrive(empty, count=1)
    mbarrier.wait(full, (number & 1) ^ 1)
    return pass_product(b_x, product, layout)


@gluon.jit
def multiply(a, b, layout: gl.constexpr):
    """Start a product of tiles."""
    none = gl.full([a.shape[0], b.shape[1]], 0.0, gl.float32, layout=layout)
    return warpgroup_mma(a, b, none, use_acc=False, is_async=True)


@gluon.jit
def pass_product(b_d, product, layout: gl.constexpr):
    """Return d F for rows d of any size.

    A row's largest entry is brought between 1 and 2: in float16 the row keeps three bits more than
    in bfloat16, and F has no more either.
    """
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    top = gl.max(gl.maximum(b_d, -b_d), axis=1)
    power = gl.minimum(top.to(gl.int32, bitcast=True) >> 23, 253)
    down = ((254 - power) << 23).to(gl.float32, bitcast=True)
    up = (power << 23).to(gl.float32, bitcast=True)
    scaled = (b_d * gl.convert_layout(down, by_row)[:, None]).to(gl.float16)
    b_d = multiply(gl.convert_layout(scaled, operand), product, layout)
    return warpgroup_mma_wait(0, [b_d]) * gl.convert_layout(up, by_row)[:, None]


def describe_rows(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe copies of `rows` rows of a contiguous tensor, taken for a matrix."""
    shape = [x.numel() // x.shape[-1], x.shape[-1]]
    return describe(x, shape, [x.shape[-1], 1], [rows, x.shape[-1]])


def describe_tokens(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe copies of `rows` tokens of one head of `x [B, T, H, D]`; the head is a column."""
    B, T, H, D = x.shape
    steps = [step if n > 1 else 128 for step, n in zip(x.stride()[:2], (B, T), strict=True)]
    return describe(x, [B, T, (H - 1) * x.stride(2) + D], [*steps, 1], [1, rows, D])


def describe(x: Tensor, shape: list[int], steps: list[int], block: list[int]) -> TensorDescriptor:
    """Describe copies of a block of a tensor that has this shape and these strides."""
    dtype = {"torch.bfloat16": gl.bfloat16, "torch.float16": gl.float16}[str(x.dtype)]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, shape, steps, block, layout)
