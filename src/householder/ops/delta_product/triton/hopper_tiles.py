"""What the Gluon forms of the kernels for Hopper share: layouts and tiles in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Renamed after Triton 3.6.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "thread_barrier", None) or gl.barrier


@gluon.constexpr_function
def row_layout(columns, vector, warps):
    """Return how `warps` warps load rows of `columns` elements, `vector` of them a thread."""
    across = min(32, columns // vector)
    return gl.BlockedLayout([1, vector], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def product_layout(rows, columns, warps):
    """Return the layout of a product, 16 rows a warp; warps to spare share its columns."""
    down = min(warps, rows // 16)
    across = warps // down
    return gl.NVMMADistributedLayout([3, 0], [down, across], [16, columns // across, 16])


@gluon.jit
def tile_rows(R: gl.constexpr, N: gl.constexpr, stride_t, stride_n, layout: gl.constexpr):
    """Return the numbers of a tile's rows and their offsets."""
    o_r = gl.arange(0, R, layout=gl.SliceLayout(1, layout))
    if N == 1:
        return o_r, o_r * stride_t
    else:
        return o_r, (o_r // N) * stride_t + (o_r % N) * stride_n


@gluon.jit
def copy_tile(
    to, pointer, rows, offsets, n, start, D: gl.constexpr, BLOCK: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Start to copy columns `start …` of the first `n` rows into shared memory; others get zero."""
    o_d = start + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    mask = (rows < n)[:, None]
    if D % BLOCK != 0:
        mask = mask & (o_d < D)[None, :]
    async_load(to, pointer + offsets[:, None] + o_d[None, :], mask=mask)


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
