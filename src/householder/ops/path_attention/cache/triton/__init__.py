"""New tokens on a GPU, one or a few: Triton kernels over the tensors of a `Store`.

Three kernels. `enter` puts the tokens behind the recent ones and brings their queries to the end of
the newest block; `attend` lets them meet recent keys, and brings them on to the block of each span
of tokens and lets them meet its keys, side by side; `finish` joins the parts of the softmax and
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

# New tokens of a sequence at most.
MAX_NEW = 16
TILE = 32
STAGES = 3
OVERLAP = True
# Query heads of a key head for which sums are faster than tiles.
MAX_SUMMED = 4
ENTER_BC, ENTER_WARPS, ENTER_REGS = 64, 8, None
PATH_COLUMNS = 64
RECENT_TILE = 32
ATTEND_WARPS, ATTEND_REGS, FINISH_WARPS = 4, None, 4
# Keys and values that are brought to the L2 cache before the queries are there, in bytes: as much
# as fits it together, and at most so much for each program.
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
    # Blocks that any row may have, but the newest.
    num_paths = max(0, (num_tokens // BLOCK).bit_length() - 1)
    size = keys.element_size()
    BK, BV = power_of_two(K), power_of_two(V)
    # More queries at a time would not fit the registers.
    BG = power_of_two(N * G, most=32 if max(BK, BV) > 128 else 64)
    chunks = -(-N * G // BG)
    SPAN = span(N * G)
    levels = (SPAN // BLOCK).bit_length() - 1
    num_parts = 1 + num_tokens // SPAN + levels
    # From Hopper on a kernel can start while the one before it ends, and wait inside for it.
    overlap = OVERLAP and q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    early = {"launch_pdl": True} if overlap else {}
    fetched = 0
    if overlap and BLOCK * min(K, V) * size >= 512:
        fetched = min(SPAN * min(K, V) * size, FETCHED // (2 * B * H * chunks * num_parts))
        fetched = 1 << fetched.bit_length() - 1 if fetched >= 512 else 0
    memory = partial(q.new_empty, dtype=torch.float32)
    num_queries = 2 + num_paths
    queries = memory(B, H, num_queries, N * G, K)
    wk = memory(B, H, 16, triangle_room)
    along = memory(2 if gated else 1, B, H, N * G, triangle_room)
    parts = memory(B, H, N * G, num_parts, V)
    tops = memory(2, B, H, N * G, num_parts)
    decays = along[1] if gated else None
    shifts = memory(B, H, N * G) if gated else None
    o = v.new_empty(B, N, HQ, V)
    shape = {"G": G, "V": V, "BV": BV, "BLOCK": BLOCK, "OVERLAP": overlap}
    single = N == 1 and MAX_SUMMED >= G
    enter, programs = (enter_one_kernel, 3) if single else (enter_kernel, -(-N * G // 16) + 2)
    enter[(B * H, programs)](
        q, k, v, w, beta, g, counts, new,
        keys, values, store["w"], store["beta"], store.get("g"), store["tw"], store["ty"],
        queries, along, wk, decays, shifts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride()[:3], *beta.stride(),
        *((0, 0, 0) if g is None else g.stride()),
        scale * LOG2_E, B, H, N, num_queries, room, recent_room, triangle_room,
        G=G, K=K, V=V, BK=BK, BV=BV, BC=ENTER_BC, BR=power_of_two(triangle_room),
        GATED=gated, FETCHED=BLOCK * BK * w.element_size() if fetched else 0, OVERLAP=overlap,
        **({} if single else {"SINGLE": N == 1}),
        num_warps=ENTER_WARPS, num_stages=1, maxnreg=ENTER_REGS,
    )  # fmt: skip
    if num_paths:
        paths_kernel[(B * H * -(-N * G // 16), num_paths * -(-K // PATH_COLUMNS))](
            paths, counts, new, queries, B, H, N, num_queries,
            G=G, K=K, BK=BK, KC=PATH_COLUMNS, BLOCK=BLOCK, PRECISION=precision(paths),
            OVERLAP=overlap, num_warps=4, **early,
        )  # fmt: skip
    tile_bytes = TILE * (BK + BV) * size
    attend_kernel[(num_parts, B * H * chunks)](
        keys, values, store.get("block_decay"), store["ty"], store.get("path_decays"),
        counts, new, queries, along, wk, decays, shifts, parts, tops,
        0 if window is None else window, B, H, N, num_queries, num_parts, room, triangle_room,
        **shape, K=K, BK=BK, BG=BG, BC=RECENT_TILE, SPAN=SPAN, LEVELS=levels, TILE=TILE,
        FETCHED=fetched, GATED=gated, WINDOWED=window is not None,
        PRECISION=precision(keys), VALUE_PRECISION=precision(values),
        STAGES=STAGES if tile_bytes <= 1 << 15 else 2,
        num_warps=ATTEND_WARPS, num_stages=1, maxnreg=ATTEND_REGS, **early,
    )  # fmt: skip
    finish_kernel[(B * HQ * N,)](
        parts, tops, sinks, counts, new, o, B, H, N, num_parts,
        **shape, PARTS=(1 << 13) // BV, SPAN=SPAN, WITH_SINKS=sinks is not None,
        num_warps=FINISH_WARPS, **early,
    )  # fmt: skip
    return o
