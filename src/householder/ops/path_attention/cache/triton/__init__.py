"""New tokens on a GPU, one or a few: Triton kernels over the tensors of a `Store`.

Three kernels. `enter` puts the tokens behind the recent ones and brings their queries to the end of
every block; `attend` lets queries meet recent keys, and those of blocks in spans side by side;
`finish` joins the parts of the softmax and counts the tokens. Programs of the first two wait for
one another on counters, not for whole kernels. How many tokens there are is read from the device,
so that a captured graph can be replayed as the cache grows; and a span has the same tokens whatever
the batch, so that a row's output does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from householder.ops._recording import recorded
from householder.ops._recording import room as room_for
from householder.ops._triton import (
    compiled_together,
    dot_precision,
    launch,
    on_its_device,
    power_of_two,
)
from householder.ops.path_attention.cache.records import (
    BLOCK,
    MAX_SUMMED,
    Held,
    Options,
    Tokens,
)
from householder.ops.path_attention.cache.triton.step import (
    append_one_kernel,
    attend_kernel,
    enter_kernel,
    enter_one_kernel,
    finish_kernel,
)

# Whether a kernel starts while the one before it ends, and whether programs that wait for others
# read ahead: both from Hopper on.
OVERLAP = EARLY = True
# Tiles and warps: recent tokens that one token, and several, enter beside at a time; columns of a
# path; recent tokens, and others, that are attended to at a time.
ONE_BC, FEW_BC = 32, 32
ONE_COLUMNS, FEW_COLUMNS = 64, 64
ONE_WARPS, ENTER_WARPS = 8, 4
ONE_REGISTERS: int | None = 64
APPEND_LAST = True
PATH_PROGRAMS = 512  # about so many bring one token's queries to other blocks than the newest
RECENT_TILE, TILE, STAGES, WARPS = 32, 64, 3, 4
ONE_FINISH, ONE_FINISH_WARPS = 1 << 13, 4
FINISH_WARPS = 1  # of queries of several tokens
LOG2_E = 1.4426950408889634


def span(num_queries: int) -> int:
    """Return how many tokens' keys one program of `attend` sees, for so many queries a key head."""
    # What a program finds for a query goes to memory: more queries, fewer programs.
    return 256 if num_queries <= 4 else 512


def is_from_hopper_on(device: torch.device) -> bool:
    """Return whether a device has what `OVERLAP` and `EARLY` need."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def with_vectors(x: Tensor) -> Tensor:
    """Return `x`, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_by_head(*tensors: Tensor | None) -> list[int]:
    """Return how far it is to the next row of the batch and to the next head, of each tensor."""
    return [x for y in tensors for x in ((0, 0) if y is None else (y.stride(0), y.stride(2)))]


def value_precision(x: Tensor) -> str:
    """Return the precision of products with the cache's values."""
    # Weights are at most 1, so that float16 takes both operands.
    return "fp16" if x.dtype == torch.float16 else dot_precision(x)


@on_its_device
def decode(
    counts: Tensor,
    tokens: Tokens,
    options: Options,
    held: Held,
    new: Tensor | None,
    num_tokens: int,
) -> Tensor:
    """Append N tokens to each row of a batch, or fewer, and return what they see.

    Args:
        counts: int32 `[2, B]`: tokens in blocks and tokens after them; the second is counted up.
        tokens: q `[B, N, HQ, K]`, k and w `[B, N, H, K]`, v `[B, N, H, V]`, beta `[B, N, H]`, and g
            `[B, N, HQ]` or None.
        options: how they attend.
        held: the store's tensors, contiguous, with room for N more tokens.
        new: int32 `[B]`: how many of the N tokens a row gets; all if None.
        num_tokens: no row has more tokens in blocks. With the same number calls cost the host less.

    Returns:
        o `[B, N, HQ, V]` in v's dtype, zero where there is no token.
    """
    vectors = [with_vectors(x) for x in tokens[:4]]
    (o,) = _decode(num_tokens, counts, new, *vectors, *tokens[4:], *options, *held)
    return o


def _unflatten(arguments: tuple[Any, ...]) -> tuple[Tokens, Options, Held]:
    """Put together again what `decode` takes apart."""
    return Tokens(*arguments[:6]), Options(*arguments[6:9]), Held(*arguments[9:])


def _kind(num_tokens: int, counts: Tensor, new: Tensor | None, *others: Any) -> Hashable:
    """Return what the programs of `_decode` depend on."""
    tokens, options, held = _unflatten(others)
    N, HQ, K = tokens.q.shape[1:]
    H, V = tokens.v.shape[2:]
    dtypes = tuple(None if x is None else x.dtype for x in (*tokens, options.sinks))
    num_rows = N if N == 1 or N * (HQ // H) <= 8 else power_of_two(N * (HQ // H))
    sizes = (num_rows, N * (HQ // H) <= 4, HQ // H, K, V, held.ty.shape[2], held.w.shape[2])
    return (counts.device, dtypes, sizes, options.window is None, new is None)


@recorded
@compiled_together(_kind)
def _decode(num_tokens: int, counts: Tensor, new: Tensor | None, *others: Any) -> tuple[Tensor]:
    """Do what `decode` does, for tokens whose vectors are contiguous."""
    (q, k, v, w, beta, g), (scale, sinks, window), held = _unflatten(others)
    B, N, HQ, K = q.shape
    H, V = k.shape[2], v.shape[3]
    G = HQ // H
    keys, values, ty = held.keys, held.values, held.ty
    room, recent_room, triangle_room = keys.shape[2], held.w.shape[2], ty.shape[2]
    gated, half = g is not None, keys.element_size() == 2
    # For tiles of 16 columns Triton 3.6 counts the columns of a product wrongly: see docs/log.md.
    BK, BV = power_of_two(K, least=32), power_of_two(V, least=32)
    hopper = is_from_hopper_on(q.device)
    overlap = OVERLAP and hopper

    SPAN = span(N * G)
    levels = (SPAN // BLOCK).bit_length() - 1
    num_parts = 1 + num_tokens // SPAN + levels
    # More queries or keys at a time would not fit the registers.
    wide = max(BK, BV) > 128
    tile, recent_tile = TILE, RECENT_TILE
    if wide or not half:
        tile, recent_tile = TILE // 2, RECENT_TILE // 2
    packed = half and N * G <= 8
    BG = 8 if packed else power_of_two(N * G, most=16 if wide else 64)
    chunks = -(-N * G // BG)

    single = N == 1 and MAX_SUMMED >= G
    recents, columns = (ONE_BC, ONE_COLUMNS) if single else (FEW_BC, FEW_COLUMNS)
    columns = min(columns // 2 if wide else columns, BK)
    recents = recents // 2 if wide else recents
    # The queries as they come, for the newest block, and for others that any row may have.
    num_paths = max(0, (num_tokens // BLOCK).bit_length() - 1)
    num_queries = 2 + num_paths

    def memory(*shape: int) -> Tensor:
        return room_for(shape, torch.float32, q.device)

    parts = memory(B, H, N * G, num_parts, V)
    tops = memory(2, B, H, N * G, num_parts)
    o = room_for((B, N, HQ, V), v.dtype, v.device)
    queries = wk = decays = shifts = None

    sizes: dict[str, Any] = {
        "G": G, "K": K, "V": V, "BK": BK, "BV": BV, "BLOCK": BLOCK, "GATED": gated,
        "EARLY": EARLY and hopper, "OVERLAP": overlap, "num_stages": 1,
    }  # fmt: skip
    early = {"launch_pdl": True} if overlap else {}
    BR = power_of_two(triangle_room)
    if single:
        along = memory(B, H, G + 1, 2, triangle_room)
        # Programs of small batches run at once, one for each path.
        path_programs = min(num_paths, max(1, PATH_PROGRAMS // (B * H)))
        one: dict[str, Any] = {
            "G": G, "K": K, "BK": BK, "BC": recents, "BR": BR, "GATED": gated, "OVERLAP": overlap,
            "num_warps": ONE_WARPS,
        }  # fmt: skip
        launch(
            enter_one_kernel, (B * H * (1 + path_programs * (BK // columns)),),
            q, w, beta, g, counts, new, held.steps, held.mail, held.w, held.g, held.tw,
            held.paths, held.path_scales, *strides_by_head(q, w, beta, g),
            scale * LOG2_E, B, H, path_programs, room, recent_room, triangle_room, **one,
            KC=columns, BLOCK=BLOCK, EARLY=EARLY and hopper,
            maxnreg=ONE_REGISTERS if half and not wide else None,
        )  # fmt: skip

        def append() -> None:
            launch(
                append_one_kernel, (B * H * 3,),
                q, k, v, w, beta, g, counts, new, keys, values, held.w, held.beta, held.g,
                held.tw, ty, along, parts, tops, *strides_by_head(q, k, v, w, beta, g),
                scale * LOG2_E, 0 if window is None else window, B, H, num_parts,
                room, recent_room, triangle_room, **one, V=V, BV=BV,
                BL=min(recents, (1 << 13) // BR), WINDOWED=window is not None, **early,
            )  # fmt: skip

        if not APPEND_LAST:
            append()
    else:
        queries = memory(B, H, num_queries, N * G, K)
        along = memory(B, H, N * G, triangle_room)
        wk = memory(B, H, 16, triangle_room)
        if gated:
            decays, shifts = memory(B, H, N * G, triangle_room), memory(B, H, N * G)
        launch(
            enter_kernel, (B * H * (2 - (-N * G // 16)),),
            q, k, v, w, beta, g, counts, new, held.ready,
            keys, values, held.w, held.beta, held.g, held.tw, ty, held.paths, held.path_scales,
            queries, along, wk, decays, shifts,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride()[:3], *beta.stride(),
            *((0, 0, 0) if g is None else g.stride()),
            scale * LOG2_E, B, H, N, num_queries, room, recent_room, triangle_room, **sizes,
            HALF=half, BC=recents, BR=BR, KC=columns,
            # Narrower heads' tiles have fewer 16 bytes than there are threads to copy them ahead.
            STAGES=STAGES if BK >= 64 else 1,
            # For both halves of wider heads there is no room in registers.
            HALVES=half and not wide, num_warps=2 * ENTER_WARPS if wide else ENTER_WARPS,
        )  # fmt: skip
    launch(
        attend_kernel, (num_parts, B * H * chunks),
        keys, values, ty, held.block_decay, held.path_decays, counts, new, held.ready, held.steps,
        held.mail, queries, along, wk, decays, shifts, parts, tops,
        0 if window is None else window, B, H, N, num_queries, num_parts, room, triangle_room,
        **sizes, SINGLE=single, HALF=half, BG=BG, RECENT=recent_tile, SPAN=SPAN, LEVELS=levels,
        TILE=tile, WINDOWED=window is not None, PACKED=packed,
        VALUE_PRECISION=value_precision(values),
        STAGES=STAGES if tile * (BK + BV) * keys.element_size() <= 1 << 15 else 2,
        num_warps=2 * WARPS if wide else WARPS, **early,
    )  # fmt: skip
    if single and APPEND_LAST:
        append()
    launch(
        finish_kernel, (B * HQ * N,),
        parts, tops, sinks, counts, new, held.ready, held.steps, o, B, H, N, num_parts,
        G=G, V=V, BV=BV, PARTS=(ONE_FINISH if N * G <= 4 else 1 << 11) // BV,
        SPAN=SPAN, BLOCK=BLOCK, WITH_SINKS=sinks is not None, OVERLAP=overlap,
        num_warps=ONE_FINISH_WARPS if N * G <= 4 else FINISH_WARPS,
        **early,
    )  # fmt: skip
    return (o,)
