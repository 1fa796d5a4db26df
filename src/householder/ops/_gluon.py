"""What Gluon kernels of more than one op share: layouts, copies of tiles, and 16 × 16 triangles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

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
def store_rows(
    pointer, tile, rows, stride, columns, D: gl.constexpr, ROWS: gl.constexpr,
    BLOCK: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Store a tile's first `rows` rows and `columns` columns, of D that blocks cover."""
    o_r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    mask = (o_r < rows)[:, None]
    if D % BLOCK != 0:
        mask = mask & (o_d < columns)[None, :]
    value = tile.load(layout).to(pointer.dtype.element_ty)
    gl.store(pointer + o_r[:, None] * stride + o_d[None, :], value, mask=mask)


@gluon.jit
def exp2(x):
    """Power of two by the chip's own instruction, which takes what is next to nothing for zero."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def invert_blocks(minus):
    """Return (I − m)⁻¹ for `m [·, 16, 16]`, the strictly lower part of `minus`, by joins."""
    warps: gl.constexpr = gl.num_warps()
    blocks: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, blocks, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, blocks, 2)
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, blocks)))[None, :][:, :, None]
    col = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, blocks)))[None, :][:, None, :]
    minus = gl.where(row > col, gl.convert_layout(minus, blocks), 0.0)
    x = gl.where(row == col, 1.0, gl.where(row // 2 == col // 2, minus, 0.0))
    for level in gl.static_range(1, 4):
        same_pair = (row >> (level + 1)) == (col >> (level + 1))
        beside = gl.where(same_pair & ((row >> level) != (col >> level)), minus, 0.0)
        xh = x.to(gl.float16)
        xc = gl.zeros([minus.shape[0], 16, 16], gl.float32, layout=blocks)
        beside = gl.convert_layout(beside.to(gl.float16), right)
        xc = mma_v2(gl.convert_layout(xh, left), beside, xc).to(gl.float16)
        x = mma_v2(gl.convert_layout(xc, left), gl.convert_layout(xh, right), x)
    return x


@gluon.jit
def join(s_x, s_minus, START: gl.constexpr, SIZE: gl.constexpr):
    """Put −D⁻¹ C A⁻¹ beside the inverses A⁻¹, D⁻¹ of two diagonal blocks of SIZE, from START on."""
    product: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, product, 2)
    lower = s_x.slice(START + SIZE, SIZE, 0)
    d = lower.slice(START + SIZE, SIZE, 1).load(left)
    c = s_minus.slice(START + SIZE, SIZE, 0).slice(START, SIZE, 1).load(right)
    a = s_x.slice(START, SIZE, 0).slice(START, SIZE, 1).load(right)
    none = gl.zeros([SIZE, SIZE], gl.float32, layout=product)
    x = mma_v2(d, c, none).to(gl.float16)
    x = mma_v2(gl.convert_layout(x, left), a, none)
    lower.slice(START, SIZE, 1).store(x.to(gl.float16))
