"""New tokens on a GPU, one or a few: Triton kernels over the tensors of a `Store`.

Four kernels. `enter` puts the tokens behind the recent ones and brings their queries to the end of
the newest block; `paths` brings these to the end of every other block; `attend` lets queries meet
recent keys, and those of blocks in spans side by side; `finish` joins the parts of the softmax and
counts the tokens. How many tokens there are is read from the device, so that a captured graph can
be replayed as the cache grows; and a span has the same tokens whatever the batch, so that a row's
output does not depend on the others.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from householder.ops._triton import dot_precision, on_its_device, power_of_two
from householder.ops.path_attention.cache.triton.attend import (
    attend_kernel,
    finish_kernel,
    paths_kernel,
)
from householder.ops.path_attention.cache.triton.enter import enter_kernel, enter_one_kernel

# Whether a kernel starts while the one before it ends, where a GPU can do so.
OVERLAP = True
# Query heads of a key head for which sums are faster than the sixteen rows of a product.
MAX_SUMMED = 4
# Recent tokens at a time, and warps, of `enter`; of a path's columns; of the others.
ENTER_BC, ENTER_WARPS = 64, 8
PATH_COLUMNS = 64
RECENT_TILE = 32
TILE, STAGES, ATTEND_WARPS, ATTEND_REGS = 32, 3, 4, 128
# Bytes of keys and values that are brought to the L2 cache before the queries are there, by all
# programs that can wait at a time.
FETCHED = 25 << 20
# Keys of the smallest block, as in the store.
BLOCK = 64
LOG2_E = 1.4426950408889634


def span(num_queries: int) -> int:
    """Return how many tokens' keys one program of `attend` sees, for so many queries a key head."""
    # What a program finds for a query goes to memory: more queries, fewer programs.
    return 256 if num_queries <= 4 else 512


def with_vectors(x: Tensor) -> Tensor:
    """Return `x`, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def precision(x: Tensor) -> str:
    """Return the precision of products with the cache's keys or values."""
    # Nothing here is far beyond their own range, so that float16 takes both operands.
    return "fp16" if x.dtype == torch.float16 else dot_precision(x)


@on_its_device
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    window: int | None,
    store: dict[str, Tensor],
    counts: Tensor,
    new: Tensor | None,
    num_tokens: int,
) -> Tensor:
    """Append N tokens to each row of a batch, or fewer, and return what they see.

    Args:
        q: `[B, N, HQ, K]`.
        k: `[B, N, H, K]`.
        v: `[B, N, H, V]`.
        w: `[B, N, H, K]`.
        beta: `[B, N, H]`.
        g: `[B, N, HQ]` or None.
        scale: factor on the inner products.
        sinks: `[HQ]` or None.
        window: how many tokens a query sees, or None.
        store: the store's tensors by name, contiguous, with room for N more tokens.
        counts: int32 `[2, B]`: tokens in blocks and tokens after them; the second is counted up.
        new: int32 `[B]`: how many of the N tokens a row gets; all if None.
        num_tokens: no row has more tokens in blocks.

    Returns:
        o `[B, N, HQ, V]` in v's dtype, zero where there is no token.
    """
    q, k, v, w = (with_vectors(x) for x in (q, k, v, w))
    B, N, HQ, K = q.shape
    H, V = k.shape[2], v.shape[3]
    G = HQ // H
    keys, values, paths = store["keys"], store["values"], store["paths"]
    room, recent_room, triangle_room = keys.shape[2], store["w"].shape[2], store["ty"].shape[2]
    gated = g is not None
    BK, BV = power_of_two(K), power_of_two(V)
    size = keys.element_size()
    # From Hopper on a kernel can start while the one before it ends, and wait inside for it.
    overlap = OVERLAP and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    early = {"launch_pdl": True} if overlap else {}

    SPAN = span(N * G)
    levels = (SPAN // BLOCK).bit_length() - 1
    num_parts = 1 + num_tokens // SPAN + levels
    # Blocks that any row may have, but the newest.
    num_paths = max(0, (num_tokens // BLOCK).bit_length() - 1)
    num_queries = 2 + num_paths
    # More queries at a time would not fit the registers.
    wide = max(BK, BV) > 128
    BG = power_of_two(N * G, most=16 if wide else 64)
    chunks, chunks_of_16 = -(-N * G // BG), -(-N * G // 16)
    fetched = FETCHED // (2 * B * H * chunks * num_parts)

    memory = partial(q.new_empty, dtype=torch.float32)
    queries = memory(B, H, num_queries, N * G, K)
    along = memory(2 if gated else 1, B, H, N * G, triangle_room)
    wk = memory(B, H, 16, triangle_room)
    decays, shifts = (along[1], memory(B, H, N * G)) if gated else (None, None)
    parts = memory(B, H, N * G, num_parts, V)
    tops = memory(2, B, H, N * G, num_parts)
    o = v.new_empty(B, N, HQ, V)

    single = N == 1 and MAX_SUMMED >= G
    enter, programs = (enter_one_kernel, 3) if single else (enter_kernel, chunks_of_16 + 2)
    enter[(B * H, programs)](
        q, k, v, w, beta, g, counts, new,
        keys, values, store["w"], store["beta"], store.get("g"), store["tw"], store["ty"],
        queries, along, wk, decays, shifts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride()[:3], *beta.stride(),
        *((0, 0, 0) if g is None else g.stride()),
        scale * LOG2_E, B, H, N, num_queries, room, recent_room, triangle_room,
        G=G, K=K, V=V, BK=BK, BV=BV, BC=ENTER_BC // 2 if wide else ENTER_BC,
        BR=power_of_two(triangle_room), GATED=gated, OVERLAP=overlap,
        **({} if single else {"SINGLE": N == 1}), num_warps=ENTER_WARPS, num_stages=1,
    )  # fmt: skip
    if num_paths:
        columns = PATH_COLUMNS // 2 if wide else PATH_COLUMNS
        paths_kernel[(B * H * chunks_of_16, num_paths * -(-K // columns))](
            paths, counts, new, queries, B, H, N, num_queries,
            G=G, K=K, BK=BK, KC=columns, BLOCK=BLOCK, PRECISION=precision(paths),
            OVERLAP=overlap, num_warps=4, **early,
        )  # fmt: skip
    attend_kernel[(num_parts, B * H * chunks)](
        keys, values, store.get("block_decay"), store["ty"], store.get("path_decays"),
        counts, new, queries, along, wk, decays, shifts, parts, tops,
        0 if window is None else window, fetched, B, H, N, num_queries, num_parts, room,
        triangle_room,
        G=G, K=K, V=V, BK=BK, BV=BV, BG=BG, BC=RECENT_TILE // 2 if wide else RECENT_TILE,
        SPAN=SPAN, LEVELS=levels, TILE=TILE, BLOCK=BLOCK, GATED=gated,
        WINDOWED=window is not None, PRECISION=precision(keys), VALUE_PRECISION=precision(values),
        OVERLAP=overlap, STAGES=STAGES if TILE * (BK + BV) * size <= 1 << 15 else 2,
        num_warps=2 * ATTEND_WARPS if wide else ATTEND_WARPS, num_stages=1,
        maxnreg=ATTEND_REGS if BG == 16 and size == 2 else None, **early,
    )  # fmt: skip
    finish_kernel[(B * HQ * N,)](
        parts, tops, sinks, counts, new, o, B, H, N, num_parts,
        G=G, V=V, BV=BV, PARTS=(1 << 13 if N * G <= 4 else 1 << 11) // BV, SPAN=SPAN, BLOCK=BLOCK,
        WITH_SINKS=sinks is not None, OVERLAP=overlap, num_warps=4, **early,
    )  # fmt: skip
    return o
