"""What the Gluon forms of the kernels for Hopper share: layouts and tiles in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from householder.ops._gluon import exp2

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def tile_rows(R: gl.constexpr, N: gl.constexpr, stride_t, stride_n, layout: gl.constexpr):
    """Return the numbers of a tile's rows and their offsets."""
    o_r = gl.arange(0, R, layout=gl.SliceLayout(1, layout))
    if N == 1:
        return o_r, o_r * stride_t
    else:
        return o_r, (o_r // N) * stride_t + (o_r % N) * stride_n


@gluon.jit
def pick(table, row: gl.constexpr, R: gl.constexpr, SIZE: gl.constexpr, layout: gl.constexpr):
    """Load SIZE coefficients of one row of a chunk's table in shared memory."""
    return table.slice(row * R, SIZE).load(layout)


@gluon.jit
def buffers(NUMBER: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Allocate shared memory for tiles that tensor cores read."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], gl.bfloat16)
    return gl.allocate_shared_memory(gl.bfloat16, [NUMBER, ROWS, COLUMNS], layout)


@gluon.jit
def add(a, b):
    """Add, as scans want it."""
    return a + b


@gluon.jit
def exp(x):
    """Exponential by the same."""
    return exp2(x * LOG2_E)
