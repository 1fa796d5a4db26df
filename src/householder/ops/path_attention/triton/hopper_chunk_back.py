"""The gradients inside the chunks for Hopper (compute capability 9.0), in Gluon.

The four kernels of `chunk_back.py` in one, for as many query as key heads: what is 64 × 64 stays in
shared memory and registers. Two programs fit on a multiprocessor, with fourteen squares of 64 × 64
each. What is needed twice, in the sums over K and in its columns, is copied twice; the second time
it comes from the cache.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma_wait,
)

from householder.ops._gluon import (
    barrier,
    exp2,
    row_layout,
    store_rows,
)
from householder.ops._triton import launch
from householder.ops.path_attention.triton.hopper_roles import locate_tile
from householder.ops.path_attention.triton.hopper_squares import (
    add,
    copy_square,
    copy_squares,
    in_float16,
    load_part,
    publish,
    round_squares,
    squares,
    start,
    turn_into_float16,
)
from householder.ops.path_attention.triton.problem import LOG2_E, SIZES, Problem, strides


@gluon.jit
def start_sum(a, b, NUMBER: gl.constexpr, layout: gl.constexpr):
    """Start the product of the rows of `a` and those of `b`."""
    acc = start(a.index(0), b.index(0).permute([1, 0]), layout)
    for i in gl.static_range(1, NUMBER):
        acc = add(a.index(i), b.index(i).permute([1, 0]), acc)
    return acc


@gluon.jit
def own_share(s_do, s_v, b_o, layout: gl.constexpr):
    """Return rowsum(dO ⊙ (V − O)) of 64 columns."""
    b_v = s_v.load(layout).to(gl.float32) - b_o.to(gl.float32)
    return gl.sum(s_do.load(layout).to(gl.float32) * b_v, axis=1)


@gluon.jit(do_not_specialize=SIZES)
def chunk_kernel(
    q, k, v, w, beta, o, do, lse, delta, inverse, dq_start, dk_end, dv_part, wdf, wdft, dq, dk, dv,
    dw, dbeta, cu_seqlens, tile_sequence, first_tile, scale, T, num_tiles, H, q_b, q_h, k_b, k_h,
    v_b, v_h, w_b, w_h, beta_b, beta_t, beta_h, o_b, o_h, do_b, do_h, q_t: gl.constexpr,
    k_t: gl.constexpr, v_t: gl.constexpr, w_t: gl.constexpr, o_t: gl.constexpr,
    do_t: gl.constexpr, K: gl.constexpr, V: gl.constexpr, PACKED: gl.constexpr,
    NK: gl.constexpr, NV: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Write the gradients of q, k, v, w and beta of one chunk and head.

    With the letters of `chunk_back.py`. NK and NV squares hold 64 rows of K and of V columns. WIDE
    says that W is float32: then the logits are made of float16, as they were in the forward pass.
    """
    warps: gl.constexpr = gl.num_warps()
    bf16: gl.constexpr = gl.bfloat16
    pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, pairs, 2)
    load: gl.constexpr = row_layout(64, 8, warps)
    down: gl.constexpr = gl.SliceLayout(1, pairs)
    along: gl.constexpr = gl.SliceLayout(0, pairs)

    # Heads run side by side: together they read whole rows of memory.
    H = gl.to_tensor(H)
    i_chunk = gl.program_id(0) // H
    i_h = (gl.program_id(0) % H).to(gl.int64)
    batch, first, length, tile = locate_tile(
        i_chunk // 2, T, cu_seqlens, tile_sequence, first_tile, PACKED
    )
    batch = batch.to(gl.int64)
    chunk = i_chunk - 2 * tile
    n = length - chunk * 64
    if n > 0:
        num_rows = gl.to_tensor(num_tiles).to(gl.int64) * 128
        begin = (first + chunk * 64).to(gl.int64)
        row = i_h * num_rows + i_chunk.to(gl.int64) * 64
        out = (batch * T + begin) * H + i_h
        p_q = q + batch * q_b + begin * q_t + i_h * q_h
        p_k = k + batch * k_b + begin * k_t + i_h * k_h
        p_v = v + batch * v_b + begin * v_t + i_h * v_h
        p_w = w + batch * w_b + begin * w_t + i_h * w_h
        p_o = o + batch * o_b + begin * o_t + i_h * o_h
        p_do = do + batch * do_b + begin * do_t + i_h * do_h
        p_beta = beta + batch * beta_b + begin * beta_t + i_h * beta_h
        # The first and the last chunk's products have no gradient.
        passed = gl.where((chunk > 0) & (chunk < (length + 63) // 64 - 1), 64, 0)
        # Fourteen squares, by what is in them first; most serve for other things later on.
        s_v = squares(2, bf16)
        s_do = squares(2, bf16)
        s_q = squares(2, bf16)
        s_k = squares(2, bf16)
        s_w = squares(2, bf16)
        s_inverse = squares(1, bf16).index(0)
        s_y = squares(1, bf16).index(0)
        s_c = squares(1, bf16).index(0)
        s_t = squares(1, bf16).index(0)
        copy_squares(s_v, p_v, n, v_t, V, NV)
        copy_squares(s_do, p_do, n, do_t, V, NV)
        copy_squares(s_q, p_q, n, q_t, K, NK)
        copy_squares(s_k, p_k, n, k_t, K, NK)
        if not WIDE:
            copy_squares(s_w, p_w, n, w_t, K, NK)
        copy_square(in_float16(s_inverse), inverse + row * 64, 64, 64, 0, 64)
        async_copy.commit_group()
        s_qx = s_q
        s_kx = s_k
        s_wx = s_w
        if WIDE:
            s_qx = in_float16(s_q)
            s_kx = in_float16(s_k)
            s_wx = in_float16(s_w)
            round_squares(s_wx, p_w, n, w_t, K, NK)
        b_o_0 = load_part(p_o, n, o_t, 0, V, load)
        b_o_1 = load_part(p_o, n if NV == 2 else 0, o_t, 64, V, load)
        o_r = gl.arange(0, 64, layout=down)
        o_c = gl.arange(0, 64, layout=along)
        below = o_r[:, None] > o_c[None, :]
        diagonal = o_r[:, None] == o_c[None, :]
        not_above = o_r[:, None] >= o_c[None, :]
        b_beta = gl.load(p_beta + o_r * beta_t, mask=o_r < n, other=0.0).to(gl.float32)
        b_beta_along = gl.load(p_beta + o_c * beta_t, mask=o_c < n, other=0.0).to(gl.float32)
        b_lse = gl.load(lse + out + o_r * H, mask=o_r < n, other=float("inf"))
        b_delta = gl.load(delta + row + o_r)

        # The attention inside the chunk: P and dA.
        async_copy.wait_group(0)
        if WIDE:
            turn_into_float16(s_q, NK)
            turn_into_float16(s_k, NK)
        publish()
        b_da = start_sum(s_do, s_v, NV, pairs)
        b_y = start_sum(s_wx, s_kx, NK, pairs)
        b_x = start_sum(s_qx, s_wx, NK, pairs)
        b_a = start_sum(s_qx, s_kx, NK, pairs)
        # A row that sees only itself has o = v and no gradient; as a difference of two inner
        # products that would be their rounding.
        b_own = own_share(s_do.index(0), s_v.index(0), b_o_0, load)
        if NV == 2:
            b_own += own_share(s_do.index(1), s_v.index(1), b_o_1, load)
        s_t.store(in_float16(s_inverse).load(load).to(bf16))
        b_da, b_y, b_x, b_a = warpgroup_mma_wait(0, [b_da, b_y, b_x, b_a])
        if WIDE:
            # Gradients are made of bfloat16.
            barrier()
            for i in gl.static_range(NK):
                s_w.index(i).store(s_wx.index(i).load(load).to(bf16))
        b_y = gl.where(below, b_y, 0.0)
        b_x = gl.where(not_above, b_x * scale, 0.0)
        in_float16(s_y).store((b_y * b_beta[:, None]).to(gl.float16))
        publish()
        # Nobody reads V and Q any more.
        copy_squares(s_v, dq_start + row * K, 64, K, K, NK)
        copy_squares(s_q, dv_part + row * V, 64, V, V, NV)
        async_copy.commit_group()
        b_e = start(in_float16(s_inverse), in_float16(s_y), pairs)
        b_e = warpgroup_mma_wait(0, [b_e])
        in_float16(s_c).store(b_e.to(gl.float16))
        barrier()
        s_e = s_y
        s_e.store(b_e.to(bf16))
        s_x = s_inverse
        s_x.store(b_x.to(bf16))
        publish()
        b_x = gl.convert_layout(b_x.to(gl.float16), operand)
        b_e = start(b_x, in_float16(s_c), pairs)
        b_e = warpgroup_mma_wait(0, [b_e])
        # The difference first: where it is small, it is exact.
        b_a = gl.where(not_above, (b_a * scale - b_e - b_lse[:, None]) * LOG2_E, float("-inf"))
        b_a = exp2(b_a)
        b_own = gl.convert_layout(b_own, down)
        b_da = b_a * gl.where(diagonal, b_own[:, None], b_da - b_delta[:, None])
        s_p = s_k.index(0)
        s_da = s_k.index(1)
        s_p.store(b_a.to(bf16))
        s_da.store(b_da.to(bf16))
        async_copy.wait_group(0)
        publish()
        for j in range(NV):
            s_dv = s_q.index(j)
            b_dv = add(s_p.permute([1, 0]), s_do.index(j), s_dv.load(pairs).to(gl.float32))
            b_dv = warpgroup_mma_wait(0, [b_dv])
            s_dv.store(b_dv.to(bf16))
        b_r = start_sum(s_v, s_w, NK, pairs)
        barrier()
        copy_squares(s_do, dk_end + row * K, 64, K, K, NK)
        for j in range(NV):
            p_dv = dv + out * V + 64 * j
            store_rows(p_dv, s_q.index(j), n, H * V, V - 64 * j, V, 64, 64, load)
        barrier()
        copy_squares(s_q, wdf + row * K, passed, K, K, NK)
        async_copy.commit_group()

        # The triangle: dX, D_E and N.
        b_r = warpgroup_mma_wait(0, [b_r])
        s_r = s_k.index(0)
        s_r.store(b_r.to(bf16))
        b_r = gl.convert_layout((b_r * b_beta_along[None, :]).to(bf16), operand)
        b_dx = start(b_r, s_t.permute([1, 0]), pairs)
        b_dx = add(s_da, s_e.permute([1, 0]), b_dx)
        b_dx = warpgroup_mma_wait(0, [b_dx])
        b_dx = gl.where(not_above, -b_dx, 0.0).to(bf16)
        async_copy.wait_group(0)
        publish()
        b_de = start_sum(s_w, s_do, NK, pairs)
        b_de = add(s_x.permute([1, 0]), s_da, b_de)
        b_zw = start_sum(s_q, s_w, NK, pairs)
        b_zw = add(s_x.permute([1, 0]), s_r, b_zw)
        b_dz_0 = add(s_x.permute([1, 0]), s_v.index(0), s_q.index(0).load(pairs).to(gl.float32))
        b_dz_1 = b_dz_0
        if NK == 2:
            b_dz_1 = s_q.index(1).load(pairs).to(gl.float32)
            b_dz_1 = add(s_x.permute([1, 0]), s_v.index(1), b_dz_1)
        b_de, b_zw, b_dz_0, b_dz_1 = warpgroup_mma_wait(0, [b_de, b_zw, b_dz_0, b_dz_1])
        barrier()
        s_q.index(0).store(b_dz_0.to(bf16))
        if NK == 2:
            s_q.index(1).store(b_dz_1.to(bf16))
        s_dx = s_k.index(0)
        s_dx.store(b_dx)
        s_zw = s_v.index(0)
        s_zw.store((-b_zw).to(bf16))
        s_c.store((-b_de).to(bf16))
        publish()
        b_de = start(s_t.permute([1, 0]), s_c, pairs)
        b_zw = start(s_t.permute([1, 0]), s_zw, pairs)
        b_ww = start_sum(s_w, s_w, NK, pairs)
        b_de, b_zw, b_ww = warpgroup_mma_wait(0, [b_de, b_zw, b_ww])
        b_de = gl.where(below, b_de, 0.0)
        b_dbeta = gl.sum(b_de * b_y + gl.where(diagonal, b_zw, 0.0), axis=1)
        b_zw = gl.convert_layout((b_zw * b_beta_along[None, :]).to(bf16), operand)
        b_n = start(gl.convert_layout(b_de.to(bf16), operand), s_e.permute([1, 0]), pairs)
        b_n = add(b_zw, s_t.permute([1, 0]), b_n)
        barrier()
        s_de = s_c
        s_de.store((b_de * b_beta[:, None]).to(bf16))
        b_n = warpgroup_mma_wait(0, [b_n])
        b_n = gl.where(below, -b_n, 0.0)
        b_dbeta += gl.sum(b_n * b_ww, axis=1)
        p_dbeta = dbeta + out + o_r * H
        gl.store(p_dbeta, b_dbeta.to(dbeta.dtype.element_ty), mask=o_r < n)
        s_n = s_v.index(1)
        s_n.store((b_n * b_beta[:, None]).to(bf16))

        # What has columns of K.
        for i in range(NK):
            s_qi = s_v.index(0)
            s_ki = s_inverse
            s_wi = s_w.index(i)
            s_dk = s_do.index(i)
            s_dz = s_q.index(i)
            copy_square(s_qi, p_q, n, q_t, 64 * i, K)
            copy_square(s_ki, p_k, n, k_t, 64 * i, K)
            async_copy.commit_group()
            b_dq = load_part(dq_start + row * K, 64, K, 64 * i, K, pairs).to(gl.float32)
            b_dft = load_part(wdft + row * K, passed, K, 64 * i, K, pairs).to(gl.float32)
            b_dft = (b_dft * b_beta[:, None]).to(bf16)
            async_copy.wait_group(0)
            publish()
            b_dk = start(s_da.permute([1, 0]), s_qi, pairs)
            b_dw = start(s_dx.permute([1, 0]), s_qi, pairs)
            b_dq = add(s_da, s_ki, b_dq)
            b_dq = add(s_dx, s_wi, b_dq)
            b_dk, b_dw, b_dq = warpgroup_mma_wait(0, [b_dk, b_dw, b_dq])
            barrier()
            s_qi.store(b_dft)
            publish()
            b_dk = b_dk * scale + s_dk.load(pairs).to(gl.float32)
            b_dk = add(s_de.permute([1, 0]), s_wi, b_dk)
            b_dw = add(s_de, s_ki, b_dw * scale)
            b_dw = add(s_n, s_wi, b_dw)
            b_dw = add(s_n.permute([1, 0]), s_wi, b_dw)
            b_less = start(s_e, s_dk, pairs)
            b_less = add(s_t, s_qi, b_less)
            b_dz = start(s_t.permute([1, 0]), s_dz, pairs)
            b_dk, b_dw, b_less, b_dz = warpgroup_mma_wait(0, [b_dk, b_dw, b_less, b_dz])
            b_dw -= b_less + b_dz * b_beta[:, None]
            # Squares that no product reads any more are the way out.
            barrier()
            s_dz.store((b_dq * scale).to(bf16))
            s_dk.store(b_dk.to(bf16))
            at = out * K + 64 * i
            if WIDE:
                p_dw = dw + at + o_r[:, None] * (H * K) + o_c[None, :]
                gl.store(p_dw, b_dw, mask=(o_r < n)[:, None] & (o_c < K - 64 * i)[None, :])
            else:
                s_wi.store(b_dw.to(bf16))
            barrier()
            store_rows(dq + at, s_dz, n, H * K, K - 64 * i, K, 64, 64, load)
            store_rows(dk + at, s_dk, n, H * K, K - 64 * i, K, 64, 64, load)
            if not WIDE:
                store_rows(dw + at, s_wi, n, H * K, K - 64 * i, K, 64, 64, load)


def finish(
    p: Problem, inverse: Tensor, delta: Tensor, o: Tensor, lse: Tensor, do: Tensor,
    rows: tuple[Tensor, ...], gradients: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Write the gradients of q, k, v, w and beta, from `rows` dQ←, dK→, dV, W dF and W dFᵀ."""
    H, K = p.k.shape[2:]
    V, T = p.v.shape[-1], p.q.shape[1]
    tensors = (("q", p.q), ("k", p.k), ("v", p.v), ("w", p.w), ("beta", p.beta), ("o", o))
    steps = {name: step for x in (*tensors, ("do", do)) for name, step in strides(*x).items()}
    launch(
        chunk_kernel, (p.chunks * H,),
        p.q, p.k, p.v, p.w, p.beta, o, do, lse, delta, inverse, *rows, *gradients, *p.packing,
        p.scale, T, p.num_tiles, H, **steps, K=K, V=V, PACKED=p.cu_seqlens is not None,
        NK=-(-K // 64), NV=-(-V // 64), WIDE=p.w.dtype != p.k.dtype, num_warps=4,
    )  # fmt: skip
