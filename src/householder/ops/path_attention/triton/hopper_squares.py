"""Squares of 64 × 64 in shared memory, which kernels for Hopper copy to and multiply from."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from householder.ops._gluon import barrier, copy_tile, row_layout
from householder.ops.path_attention.triton.hopper_roles import REINTERPRET


@gluon.jit
def squares(NUMBER: gl.constexpr, dtype: gl.constexpr):
    """Allocate shared memory for squares of 64 × 64 that tensor cores read."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    return gl.allocate_shared_memory(dtype, [NUMBER, 64, 64], layout)


@gluon.jit
def in_float16(tile):
    """Take a square, or several, for float16."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    if REINTERPRET:
        return tile.reinterpret(gl.float16, tile.shape, layout)
    else:
        return tile._reinterpret(gl.float16, tile.shape, layout)


@gluon.jit
def turn_into_float16(tiles, NUMBER: gl.constexpr):
    """Make squares of float16 in the places of others: every thread writes where it has read."""
    layout: gl.constexpr = row_layout(64, 8, gl.num_warps())
    for i in gl.static_range(NUMBER):
        b_x = tiles.index(i).load(layout)
        in_float16(tiles.index(i)).store(b_x.to(gl.float16))


@gluon.jit
def copy_square(to, pointer, n, stride, start, D: gl.constexpr):
    """Start to copy 64 columns of the first `n` of 64 rows; the rest gets zero."""
    layout: gl.constexpr = row_layout(64, 8, gl.num_warps())
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    copy_tile(to, pointer, rows, rows * stride, n, start, D, 64, layout)


@gluon.jit
def copy_squares(to, pointer, n, stride, D: gl.constexpr, NUMBER: gl.constexpr):
    """Start to copy the first `n` of 64 rows into squares; the rest gets zero."""
    for i in gl.static_range(NUMBER):
        copy_square(to.index(i), pointer, n, stride, 64 * i, D)


@gluon.jit
def load_part(pointer, n, stride, start, D: gl.constexpr, layout: gl.constexpr):
    """Load 64 columns of the first `n` of 64 rows from memory; the rest are zero."""
    o_r = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    o_d = start + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    mask = (o_r < n)[:, None]
    if D % 64 != 0:
        mask = mask & (o_d < D)[None, :]
    return gl.load(pointer + o_r[:, None] * stride + o_d[None, :], mask=mask, other=0.0)


@gluon.jit
def round_squares(to, pointer, n, stride, D: gl.constexpr, NUMBER: gl.constexpr):
    """Do what `copy_squares` does by way of registers, rounding on the way."""
    layout: gl.constexpr = row_layout(64, 8, gl.num_warps())
    for i in gl.static_range(NUMBER):
        to.index(i).store(load_part(pointer, n, stride, 64 * i, D, layout).to(to.dtype))


@gluon.jit
def split_squares(to, rest, pointer, n, stride, D: gl.constexpr, NUMBER: gl.constexpr):
    """Do what `round_squares` does with float32, and put what is lost into `rest`."""
    layout: gl.constexpr = row_layout(64, 8, gl.num_warps())
    for i in gl.static_range(NUMBER):
        b_x = load_part(pointer, n, stride, 64 * i, D, layout)
        b_high = b_x.to(to.dtype)
        to.index(i).store(b_high)
        rest.index(i).store((b_x - b_high.to(gl.float32)).to(rest.dtype))


@gluon.jit
def publish():
    """Make what threads stored and copied visible to the products of all of them."""
    fence_async_shared()
    barrier()


@gluon.jit
def start(a, b, layout: gl.constexpr):
    """Start a product of squares."""
    none = gl.full([64, 64], 0.0, gl.float32, layout=layout)
    return warpgroup_mma(a, b, none, use_acc=False, is_async=True)


@gluon.jit
def add(a, b, acc):
    """Start adding a product of squares."""
    return warpgroup_mma(a, b, acc, is_async=True)
