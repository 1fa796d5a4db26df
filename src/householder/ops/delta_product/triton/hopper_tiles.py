"""What the Gluon forms of the kernels for Hopper share: tiles in shared memory, and products."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from householder.ops._gluon import async_load, barrier, copy_tile, exp2, row_layout
from householder.ops.delta_product.triton.chunks import LOG_HIGH

LOG2_E = gl.constexpr(1.4426950408889634)
# A name that changed after Triton 3.6.
REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


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


@gluon.jit
def hide(i):
    """Return a number whose origin the compiler does not see.

    It would keep one pointer for every access, counted on from chunk to chunk, in memory.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [i], gl.int32, True, 1)


@gluon.jit
def hidden_zero(i):
    """Return zero, which the compiler takes for something made of `i`.

    What is made of it is made anew in every chunk, where registers are rather for accumulators.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [i], gl.int32, True, 1)


@gluon.jit
def multiply(a, b, LAYOUT: gl.constexpr):
    """Start the product of two tiles."""
    zero = gl.full([a.shape[0], b.shape[1]], 0.0, gl.float32, layout=LAYOUT)
    return warpgroup_mma(a, b, zero, use_acc=False, is_async=True)


@gluon.jit
def multiply_add(a, b, acc):
    """Start adding the product of two tiles to `acc`."""
    return warpgroup_mma(a, b, acc, is_async=True)


@gluon.jit
def times(x, factor):
    """Multiply bfloat16 numbers by a float32 one, rounded once, without leaving pairs of them."""
    high = factor.to(gl.bfloat16)
    low = (factor - high.to(gl.float32)).to(gl.bfloat16)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }",
        "=r,r,r,r", [x, high, low], gl.bfloat16, True, 2,
    )  # fmt: skip


@gluon.jit
def in_pairs(x):
    """Round to bfloat16, two numbers to a register, where the compiler would keep them apart."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], gl.bfloat16, True, 2
    )


@gluon.jit
def publish():
    """Make what threads stored and copied visible to the products of all of them."""
    fence_async_shared()
    barrier()


@gluon.jit
def row_offsets(o_r, N: gl.constexpr, stride_t, stride_n):
    """Return the offsets of reflector rows, N to a token."""
    if N == 1:
        return o_r * stride_t
    else:
        return (o_r // N) * stride_t + (o_r % N) * stride_n


@gluon.jit
def reinterpret(smem, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Take shared memory for a tile of another shape."""
    if REINTERPRET:
        return smem.reinterpret(gl.bfloat16, [ROWS, COLUMNS], LAYOUT)
    else:
        return smem._reinterpret(gl.bfloat16, [ROWS, COLUMNS], LAYOUT)


@gluon.jit
def copy_rows(
    smem, pointer, valid, N: gl.constexpr, stride_t, stride_n, D: gl.constexpr,
    LAYOUT: gl.constexpr, z=0,
):  # fmt: skip
    """Start copying rows of D elements to a tile; zero beyond the first `valid` rows.

    `z` is zero, or what `hidden_zero` returns.
    """
    o_r = gl.arange(0, smem.shape[0], layout=gl.SliceLayout(1, LAYOUT)) + z
    o_d = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    mask = (o_r < valid)[:, None] & (o_d < D)[None, :]
    offsets = row_offsets(o_r, N, stride_t, stride_n)[:, None] + o_d[None, :]
    async_load(smem, pointer + offsets, mask=mask)


@gluon.jit
def copy_coefficients(smem, pointer, left, WIDTH: gl.constexpr, WARPS: gl.constexpr):
    """Start copying a chunk's table of coefficients, if `left` is not zero."""
    vector: gl.constexpr = 2 if smem.shape[0] == 64 else 4
    layout: gl.constexpr = gl.BlockedLayout([vector], [32], [WARPS], [0])
    o = gl.arange(0, smem.shape[0], layout=layout)
    async_load(smem, pointer + o, mask=o < gl.minimum(left, 1) * WIDTH)


@gluon.jit
def copy_query_logs(
    smem, p_table, left, C: gl.constexpr, N: gl.constexpr, R: gl.constexpr, WARPS: gl.constexpr
):
    """Start copying the sums of log gates, in two parts, that a chunk's queries have."""
    BC: gl.constexpr = smem.shape[0] // 2
    o = gl.arange(0, 2 * BC, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    # Those of its token's rows; past the chunk's end there is no query.
    o_log = (LOG_HIGH + o // BC) * R + gl.minimum(o % BC, C - 1) * N
    async_load(smem, p_table + o_log, mask=o < gl.minimum(left, 1) * (2 * BC))


@gluon.jit
def store_tile_rows(pointer, x, valid, stride, D: gl.constexpr, LAYOUT: gl.constexpr, z=0):
    """Store rows of a tile in `LAYOUT`."""
    o_r = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, LAYOUT)) + z
    o_d = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    mask = (o_r < valid)[:, None] & (o_d < D)[None, :]
    offsets = o_r[:, None] * stride + o_d[None, :]
    gl.store(pointer + offsets, x.to(pointer.dtype.element_ty), mask=mask)


@gluon.jit
def locate_walk(
    i_s, T, cu_seqlens, first_chunk, C: gl.constexpr, PACKED: gl.constexpr, SEGMENT: gl.constexpr
):
    """Return the batch row, first token, number of tokens and first chunk of what a walk takes.

    That is a sequence or, with SEGMENT, a number of chunks, a segment of one.
    """
    if PACKED:
        first = gl.load(cu_seqlens + i_s)
        length = gl.load(cu_seqlens + i_s + 1) - first
        chunk = gl.load(first_chunk + i_s).to(gl.int64)
        return i_s * 0, first.to(gl.int64), length, chunk
    elif SEGMENT:
        per_row = (T + (SEGMENT * C - 1)) // (SEGMENT * C)
        batch = i_s // per_row
        first = (i_s % per_row) * (SEGMENT * C)
        length = gl.minimum(T - first, SEGMENT * C).to(gl.int32)
        return batch, first, length, batch * ((T + C - 1) // C) + (i_s % per_row) * SEGMENT
    else:
        return i_s, i_s * 0, T, i_s * ((T + C - 1) // C)


@gluon.jit
def copy_triangle_and_table(
    stage, i_ch, there, ut, table, s_t, s_g, s_l, N: gl.constexpr, C: gl.constexpr,
    R: gl.constexpr, BC: gl.constexpr, GATED: gl.constexpr, LOGS: gl.constexpr,
):  # fmt: skip
    """Start copying a chunk's T, its coefficients and, with LOGS, its queries' sums of log gates.

    Nothing is read where no chunk is `there`.
    """
    warps: gl.constexpr = gl.num_warps()
    load_r: gl.constexpr = row_layout(R, 8, warps)
    width: gl.constexpr = 6 * R if GATED else R
    size_g: gl.constexpr = 8 * R if GATED else R
    t_rows, o_trows = tile_rows(R, 1, R, 0, load_r)
    left = gl.where(there, R, 0)
    copy_tile(s_t.index(stage), ut + i_ch * (R * R), t_rows, o_trows, left, 0, R, R, load_r)
    o_g = gl.arange(0, size_g, layout=gl.BlockedLayout([4], [32], [warps], [0]))
    left = gl.where(there, width, 0)
    async_load(s_g.index(stage), table + i_ch * width + o_g, mask=o_g < left)
    if LOGS:
        # A query's gates are those of its token's first row; past the chunk's end there is none.
        o_l = gl.arange(0, 2 * BC, layout=gl.BlockedLayout([1], [32], [warps], [0]))
        o_log = (LOG_HIGH + o_l // BC) * R + gl.minimum(o_l % BC, C - 1) * N
        async_load(s_l.index(stage), table + i_ch * width + o_log, mask=o_l < left)
