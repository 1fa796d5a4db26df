"""What a chunk of `path_attention` has to itself, for Hopper (compute capability 9.0), in Gluon.

The algorithm of `prepare.py`. A chunk's tiles are copied into shared memory once and multiplied
from there; what is computed goes there in float16, in squares of 64 × 64.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from householder.ops._gluon import (
    barrier,
    invert_blocks,
    join,
    product_layout,
    row_layout,
    store_rows,
)
from householder.ops.path_attention.triton.hopper_roles import lowest_bit
from householder.ops.path_attention.triton.hopper_squares import (
    copy_squares,
    in_float16,
    split_squares,
    squares,
    turn_into_float16,
)
from householder.ops.path_attention.triton.problem import LOG2_E, SIZES


@gluon.jit
def product(a, b, NUMBER: gl.constexpr, layout: gl.constexpr):
    """Start to multiply the rows of `a` by those of `b`, which both lie in squares."""
    return add_product(a, b, gl.zeros([64, 64], gl.float32, layout=layout), NUMBER)


@gluon.jit
def add_product(a, b, acc, NUMBER: gl.constexpr):
    """Start to add that product."""
    for i in gl.static_range(NUMBER):
        acc = warpgroup_mma(a.index(i), b.index(i).permute([1, 0]), acc, is_async=True)
    return acc


@gluon.jit
def multiply(a, b, layout: gl.constexpr):
    """Return a b for squares."""
    acc = gl.zeros([64, 64], gl.float32, layout=layout)
    return warpgroup_mma(a, b, acc, use_acc=False)


@gluon.jit
def invert_unit_lower(minus):
    """Return (I − m)⁻¹ in shared memory, in float16, for the strictly lower part m of `minus`.

    `minus [64, 64]` is a product, in float32. The diagonal blocks of 16 are inverted in registers,
    one a warp, and joined in shared memory. What lies above the diagonal is never looked at.
    """
    R: gl.constexpr = 64
    B: gl.constexpr = R // 16
    warps: gl.constexpr = gl.num_warps()
    by_row: gl.constexpr = product_layout(R, R, warps)
    row = gl.arange(0, R, layout=gl.SliceLayout(1, by_row))
    col = gl.arange(0, R, layout=gl.SliceLayout(0, by_row))
    on_diagonal = (row // 16)[:, None] == (col // 16)[None, :]
    blocks = gl.sum(gl.where(on_diagonal, minus, 0.0).reshape([B, 16, B, 16]), axis=2)
    wide: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    narrow: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 2, [1, 0])
    square: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [warps, 1], [1, 0])
    s_minus = gl.allocate_shared_memory(gl.float16, [R, R], wide, minus.to(gl.float16))
    s_x = gl.allocate_shared_memory(gl.float16, [R, R], wide)
    s_x.store(gl.zeros([R, R], gl.float16, layout=row_layout(R, 8, warps)))
    blocks = invert_blocks(blocks).to(gl.float16).reshape([R, 16])
    s_blocks = gl.allocate_shared_memory(gl.float16, [R, 16], narrow, blocks)
    for i in gl.static_range(B):
        block = s_blocks.slice(16 * i, 16, 0).load(square)
        s_x.slice(16 * i, 16, 0).slice(16 * i, 16, 1).store(block)
    for i in gl.static_range(B // 2):
        join(s_x, s_minus, 32 * i, 16)
    join(s_x, s_minus, 0, 32)
    return s_x


@gluon.jit
def refine(s_x, minus, o_r, o_c, layout: gl.constexpr):
    """Return (I − m)⁻¹ in float32, for m strictly lower, from one in float16 in shared memory.

    One step of Newton's iteration, X + X (I − X + m X) with both halves of m's bits. Joins in
    float16 alone are off by 1e-2 where reflectors are nearly parallel and β is 2.
    """
    b_x = s_x.load(layout)
    s_n = squares(1, gl.float16).index(0)
    s_n.store(b_x)
    b_x = b_x.to(gl.float32)
    s_m = squares(2, gl.float16)
    high = minus.to(gl.float16)
    s_m.index(0).store(high)
    s_m.index(1).store((minus - high.to(gl.float32)).to(gl.float16))
    fence_async_shared()
    barrier()
    rest = gl.where(o_r[:, None] == o_c[None, :], 1.0, 0.0) - b_x
    rest = warpgroup_mma(s_m.index(0), s_n, rest)
    rest = warpgroup_mma(s_m.index(1), s_n, rest)
    s_m.index(0).store(rest.to(gl.float16))
    fence_async_shared()
    barrier()
    return warpgroup_mma(s_n, s_m.index(0), b_x)


@gluon.jit
def rest_in_float16(x):
    """Return what is lost where a float32 tile is rounded to float16, in float16."""
    return (x - x.to(gl.float16).to(gl.float32)).to(gl.float16)


@gluon.jit(do_not_specialize=SIZES)
def prepare_kernel(
    q, k, w, beta, q_levels, k_levels, f, inverse, weights, lse,
    cu_seqlens, tile_sequence, first_tile, scale, T, H, rows, num_levels,
    q_b, q_h, k_b, k_h, w_b, w_h, beta_b, beta_t, beta_h,
    q_t: gl.constexpr, k_t: gl.constexpr, w_t: gl.constexpr,
    K: gl.constexpr, PACKED: gl.constexpr, NK: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Write what one chunk and head has to itself, without gates, windows and groups.

    NK squares hold 64 rows of K columns. WIDE says that reflectors are float32 beside half keys and
    queries: then all of them are multiplied in float16.

    Errors of F add up along the sequence: whatever it is made of, reflectors if WIDE, the triangle
    and Z, is multiplied in two float16 halves.
    """
    warps: gl.constexpr = gl.num_warps()
    half: gl.constexpr = q_levels.dtype.element_ty
    pairs: gl.constexpr = product_layout(64, 64, warps)
    operand: gl.constexpr = gl.DotOperandLayout(0, pairs, 2)
    load: gl.constexpr = row_layout(64, 8, warps)
    down: gl.constexpr = gl.SliceLayout(1, pairs)

    # Heads run side by side: together they read whole rows of memory.
    i_chunk = gl.program_id(0) // H
    i_h = (gl.program_id(0) % H).to(gl.int64)
    if PACKED:
        i_s = gl.load(tile_sequence + i_chunk // 2)
        batch = gl.to_tensor(0).to(gl.int64)
        first = gl.load(cu_seqlens + i_s)
        length = gl.load(cu_seqlens + i_s + 1) - first
        tile = gl.load(first_tile + i_s)
    else:
        per_row = (gl.to_tensor(T) + 127) // 128
        batch = (i_chunk // 2 // per_row).to(gl.int64)
        first = gl.to_tensor(0)
        length = gl.to_tensor(T)
        tile = (i_chunk // 2 // per_row) * per_row
    chunk = i_chunk - 2 * tile
    if (chunk // 2) * 128 < length:
        n = length - chunk * 64
        num_rows = gl.to_tensor(rows).to(gl.int64)
        row = i_h * num_rows + i_chunk.to(gl.int64) * 64
        start = (first + chunk * 64).to(gl.int64)
        p_w = w + batch * w_b + start * w_t + i_h * w_h
        p_k = k + batch * k_b + start * k_t + i_h * k_h
        p_q = q + batch * q_b + start * q_t + i_h * q_h
        s_w = squares(NK, gl.float16 if WIDE else half)
        s_k = squares(NK, half)
        s_q = squares(NK, half)
        copy_squares(s_k, p_k, n, k_t, K, NK)
        copy_squares(s_q, p_q, n, q_t, K, NK)
        if WIDE:
            async_copy.commit_group()
            s_rest = squares(NK, gl.float16)
            split_squares(s_w, s_rest, p_w, n, w_t, K, NK)
        else:
            copy_squares(s_w, p_w, n, w_t, K, NK)
            async_copy.commit_group()
        o_r = gl.arange(0, 64, layout=down)
        o_c = gl.arange(0, 64, layout=gl.SliceLayout(0, pairs))
        below = o_r[:, None] > o_c[None, :]
        not_above = o_r[:, None] >= o_c[None, :]
        p_beta = beta + batch * beta_b + start * beta_t + i_h * beta_h
        o_line = gl.arange(0, 64, layout=gl.BlockedLayout([2], [32], [warps], [0]))
        b_beta = gl.load(p_beta + o_line * beta_t, mask=o_line < n, other=0.0).to(gl.float32)

        async_copy.wait_group(0)
        s_kx = s_k
        s_qx = s_q
        if WIDE:
            turn_into_float16(s_k, NK)
            turn_into_float16(s_q, NK)
            s_kx = in_float16(s_k)
            s_qx = in_float16(s_q)
        fence_async_shared()
        barrier()
        b_m = product(s_w, s_w, NK, pairs)
        if WIDE:
            b_m = add_product(s_w, s_rest, b_m, NK)
            b_m = add_product(s_rest, s_w, b_m, NK)
        b_y = product(s_w, s_kx, NK, pairs)
        b_x = product(s_qx, s_w, NK, pairs)
        b_a = product(s_qx, s_kx, NK, pairs)
        # In float16, which has three bits more than bfloat16.
        s_wh = s_w
        if not WIDE:
            s_wh = squares(NK, gl.float16)
            for i in gl.static_range(NK):
                s_wh.index(i).store(s_w.index(i).load(load).to(gl.float16))
        b_m, b_y, b_x, b_a = warpgroup_mma_wait(0, [b_m, b_y, b_x, b_a])
        s_y = squares(1, gl.float16).index(0)
        s_y.store(gl.where(below, b_y, 0.0).to(gl.float16))
        b_x = gl.convert_layout(gl.where(not_above, b_x, 0.0).to(gl.float16), operand)
        b_m *= -gl.convert_layout(b_beta, down)[:, None]
        b_t = refine(invert_unit_lower(b_m), gl.where(below, b_m, 0.0), o_r, o_c, pairs)
        if inverse is not None:
            s_inverse = squares(1, gl.float16).index(0)
            s_inverse.store(b_t.to(gl.float16))
            p_inverse = inverse + (row // 64) * 4096
            store_rows(p_inverse, s_inverse, 64, 64, 64, 64, 64, 64, load)
        b_t = gl.convert_layout(b_t, operand)
        b_t *= gl.convert_layout(b_beta, gl.SliceLayout(0, operand))[None, :]
        b_t_rest = rest_in_float16(b_t)
        b_t = b_t.to(gl.float16)

        fence_async_shared()
        barrier()
        s_e = squares(1, gl.float16).index(0)
        s_z = squares(NK, gl.float16)
        s_z_rest = squares(NK, gl.float16)
        s_e.store(multiply(b_t, s_y, pairs).to(gl.float16))
        for i in gl.static_range(NK):
            b_z = multiply(b_t, s_wh.index(i), pairs)
            b_z = warpgroup_mma(b_t_rest, s_wh.index(i), b_z)
            if WIDE:
                b_z = warpgroup_mma(b_t, s_rest.index(i), b_z)
            s_z.index(i).store(b_z.to(gl.float16))
            s_z_rest.index(i).store(rest_in_float16(b_z))
        fence_async_shared()
        barrier()

        if weights is not None:
            b_a = (b_a - multiply(b_x, s_e, pairs)) * (scale * LOG2_E)
            b_a = gl.where(not_above, b_a, float("-inf"))
            b_top = gl.max(b_a, axis=1)
            b_p = gl.exp2(b_a - b_top[:, None])
            b_total = gl.sum(b_p, axis=1)
            p_lse = lse + (batch * T + start) * H + i_h + o_r * H
            gl.store(p_lse, b_top + gl.log2(b_total), mask=o_r < n)
            s_p = squares(1, half).index(0)
            s_p.store((b_p / b_total[:, None]).to(half))
            store_rows(weights + row * 64, s_p, 64, 64, 64, 64, 64, 64, load)

        # Bits of `chunk` that are zero, and one: where its keys and its queries are used first.
        query_level = lowest_bit(chunk).to(gl.int64)
        key_level = lowest_bit(-1 - chunk)
        right = ((chunk >> key_level) + 1) << key_level
        of_level = num_rows * H
        p_qs = q_levels + (query_level * of_level + row) * K
        p_ks = k_levels + (key_level.to(gl.int64) * of_level + row) * K
        n_q = gl.where((chunk > 0) & (num_levels > 0), 64, 0)
        n_k = gl.where(right * 64 < length, 64, 0)
        p_f = f + (i_h * (num_rows // 32) + 2 * i_chunk) * (K * K)
        n_f = gl.where(num_levels > 0, K, 0)
        for i in gl.static_range(NK):
            b_q = s_qx.index(i).load(pairs).to(gl.float32) - multiply(b_x, s_z.index(i), pairs)
            s_q.index(i).store((b_q * scale).to(half))
            b_k = s_kx.index(i).load(pairs).to(gl.float32)
            b_k -= multiply(s_e.permute([1, 0]), s_wh.index(i), pairs)
            s_k.index(i).store(b_k.to(half))
            store_rows(p_qs + 64 * i, s_q.index(i), n_q, K, K - 64 * i, K, 64, 64, load)
            store_rows(p_ks + 64 * i, s_k.index(i), n_k, K, K - 64 * i, K, 64, 64, load)
        s_f = squares(1, gl.float16).index(0)
        for j in gl.static_range(NK):
            for i in gl.static_range(NK):
                b_f = multiply(s_wh.index(j).permute([1, 0]), s_z.index(i), pairs)
                b_f = warpgroup_mma(s_wh.index(j).permute([1, 0]), s_z_rest.index(i), b_f)
                if WIDE:
                    b_f = warpgroup_mma(s_rest.index(j).permute([1, 0]), s_z.index(i), b_f)
                if i == j:
                    b_f = gl.where(o_r[:, None] == o_c[None, :], 1.0 - b_f, -b_f)
                else:
                    b_f = -b_f
                s_f.store(b_f.to(gl.float16))
                p_square = p_f + 64 * j * K + 64 * i
                store_rows(p_square, s_f, n_f - 64 * j, K, K - 64 * i, K, 64, 64, load)
