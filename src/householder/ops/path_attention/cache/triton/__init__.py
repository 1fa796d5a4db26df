"""New tokens on a GPU, one or a few: Triton kernels over the tensors of a `Store`.

Three kernels. `enter_one` or `enter` brings the tokens' queries to the end of every block; `attend`
lets them meet recent keys, and those of blocks in spans side by side; `finish` joins the parts of
the softmax and counts the tokens. Several tokens are put behind the recent ones by `enter`, one
token beside those that attend. Programs that meet blocks wait on counters for those that bring them
their queries, not for a whole kernel. How many tokens there are is read from the device, so that a
captured graph can be replayed as the cache grows; and a span has the same tokens whatever the
batch, so that a row's output does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

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
    MAX_NEW,
    MAX_SUMMED,
    Held,
    Options,
    Tokens,
)
from householder.ops.path_attention.cache.triton.enter_one import enter_one_kernel
from householder.ops.path_attention.cache.triton.step import (
    attend_kernel,
    enter_kernel,
    finish_kernel,
)

# Whether a kernel starts while the one before it ends, and whether programs that wait for others
# read ahead: both from Hopper on.
OVERLAP = EARLY = True
# Of several tokens: recent ones that they enter beside at a time, and that they attend to; columns
# of a path; warps.
FEW_BC, FEW_RECENT, FEW_COLUMNS, ENTER_WARPS = 32, 32, 64, 4
# Of one token: recent ones that its queries meet at a time, with all of their rows in registers
# before it is known how many there are; columns of a path, and copies of them ahead in so much
# shared memory that the GPU sets aside enough for the programs that attend, which could else not
# start beside; about how many programs bring queries to blocks.
ONE_BC, ONE_COLUMNS, ONE_STAGES, PATH_PROGRAMS = 64, 128, 3, 256
# Recent tokens that one token attends to and is appended behind at a time; so many registers that
# three programs fit a multiprocessor; of how many heads the programs follow one another.
ONE_RECENT, ONE_REGISTERS, TOGETHER = 32, 168, 16
# Other keys that are attended to at a time.
TILE, STAGES, WARPS = 64, 3, 4
# Elements of a tile of parts, and warps: for few queries a key head, and for many.
FINISH_FEW, FINISH_MANY = (1 << 13, 4), (1 << 11, 1)
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
    if options.sinks is not None:
        options = options._replace(sinks=options.sinks.contiguous())
    (o,) = _decode(num_tokens, counts, new, *vectors, *tokens[4:], *options, *held)
    return o


class _Step(NamedTuple):
    """A decoded step's arguments, its tokens' vectors contiguous, and what follows from sizes."""

    num_tokens: int
    counts: Tensor
    new: Tensor | None
    tokens: Tokens
    options: Options
    held: Held

    @classmethod
    def of(cls, num_tokens: int, counts: Tensor, new: Tensor | None, *others: Any) -> _Step:
        """Put together what `decode` has taken apart."""
        tokens, options, held = Tokens(*others[:6]), Options(*others[6:9]), Held(*others[9:])
        return cls(num_tokens, counts, new, tokens, options, held)

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, N, H, G, K, V."""
        B, N, HQ, K = self.tokens.q.shape
        H, V = self.tokens.v.shape[2:]
        return B, N, H, HQ // H, K, V

    @property
    def rooms(self) -> tuple[int, int, int]:
        """For how many tokens there is room, for recent ones, and for those in triangles."""
        return self.held.keys.shape[2], self.held.w.shape[2], self.held.ty.shape[2]

    @property
    def last_row(self) -> int:
        """The last row of the triangles that this step's first token may get."""
        # There are `MAX_NEW` rows more for several tokens at once.
        rows = self.rooms[2]
        return rows - MAX_NEW - 1 if self.is_single else rows - self.tokens.q.shape[1]

    @property
    def head_blocks(self) -> tuple[int, int]:
        """The columns of tiles of keys and values."""
        # Of 16 columns Triton 3.6 reads some from other places (docs/log.md).
        return tuple(power_of_two(D, least=32) for D in self.sizes[4:])  # type: ignore[return-value]

    @property
    def is_half(self) -> bool:
        return self.held.keys.element_size() == 2

    @property
    def is_wide(self) -> bool:
        """Whether more queries or keys at a time would not fit the registers."""
        return max(self.head_blocks) > 128

    @property
    def is_single(self) -> bool:
        """Whether there is one token, with few queries a key head."""
        return self.tokens.q.shape[1] == 1 and self.sizes[3] <= MAX_SUMMED

    @property
    def num_paths(self) -> int:
        """How many blocks other than the newest any row may have."""
        return max(0, (self.num_tokens // BLOCK).bit_length() - 1)

    @property
    def num_queries(self) -> int:
        """For how many places a query is made: where it comes from, and the ends of blocks."""
        return 2 + self.num_paths

    @property
    def num_parts(self) -> int:
        """Of how many parts of the keys, at most, the outputs are joined."""
        return 1 + self.num_tokens // self.span + self.span_levels

    @property
    def span(self) -> int:
        return span(self.sizes[1] * self.sizes[3])

    @property
    def span_levels(self) -> int:
        """Of how many sizes there are blocks smaller than a span."""
        return (self.span // BLOCK).bit_length() - 1

    @property
    def scale(self) -> float:
        return self.options.scale * LOG2_E

    @property
    def overlap(self) -> bool:
        return OVERLAP and is_from_hopper_on(self.counts.device)

    @property
    def path_columns(self) -> int:
        """How many columns of a path are multiplied at a time."""
        one = self.is_single and self.is_half and self.sizes[3] == 1
        columns = ONE_COLUMNS if one else FEW_COLUMNS
        return min(columns // 2 if self.is_wide else columns, self.head_blocks[0])

    @property
    def path_programs(self) -> int:
        """How many programs for each head bring one token's queries to other blocks."""
        B, _, H, _, _, _ = self.sizes
        slices = self.num_paths * (self.head_blocks[0] // self.path_columns)
        return max(1, min(slices, PATH_PROGRAMS // (B * H)))

    @property
    def fused(self) -> bool:
        """Whether products and sums may be rounded together."""
        # A warp holds narrower heads' vectors with a number a lane. A product joined to the sum
        # with another lane's would be rounded otherwise there than here, and a sum that all lanes
        # hold be two sums, of which a change of layout would let either win.
        return self.head_blocks[0] > 32

    @property
    def shared(self) -> dict[str, Any]:
        """What `enter_kernel` and `attend_kernel` are both compiled for."""
        _, _, _, G, K, V = self.sizes
        BK, BV = self.head_blocks
        return {
            "G": G, "K": K, "V": V, "BK": BK, "BV": BV, "BLOCK": BLOCK,
            "GATED": self.tokens.g is not None, "HALF": self.is_half,
            "EARLY": EARLY and is_from_hopper_on(self.counts.device), "OVERLAP": self.overlap,
            "num_stages": 1, "enable_fp_fusion": self.fused,
        }  # fmt: skip

    @property
    def started_early(self) -> dict[str, bool]:
        """What a kernel is launched with that starts while the one before it runs."""
        return {"launch_pdl": True} if self.overlap else {}

    def memory(self, *shape: int) -> Tensor:
        """Allocate float32 for kernels to write to."""
        return room_for(shape, torch.float32, self.counts.device)


class _Scratch(NamedTuple):
    """What programs write for one another."""

    queries: Tensor
    along: Tensor | None
    wk: Tensor | None
    decays: Tensor | None
    shifts: Tensor | None


def _kind(*arguments: Any) -> Hashable:
    """Return what the programs of `_decode` depend on."""
    step = _Step.of(*arguments)
    _, N, _, G, K, V = step.sizes
    dtypes = tuple(None if x is None else x.dtype for x in (*step.tokens, step.options.sinks))
    num_rows = N if N == 1 or N * G <= 8 else power_of_two(N * G)
    sizes = (num_rows, N * G <= 4, G, K, V, *step.rooms[1:])
    return (step.counts.device, dtypes, sizes, step.options.window is None, step.new is None)


@recorded
@compiled_together(_kind)
def _decode(*arguments: Any) -> tuple[Tensor]:
    """Do what `decode` does, for tokens whose vectors are contiguous."""
    step = _Step.of(*arguments)
    B, N, H, G, _, V = step.sizes
    parts = step.memory(B, H, N * G, step.num_parts, V)
    tops = step.memory(2, B, H, N * G, step.num_parts)
    scratch = _enter(step)
    _attend(step, scratch, parts, tops)
    return (_finish(step, parts, tops),)


def _enter(step: _Step) -> _Scratch:
    """Bring queries to blocks, and append several tokens."""
    B, N, H, G, K, _ = step.sizes
    gated, room = step.tokens.g is not None, step.rooms[2]
    scratch = _Scratch(
        queries=step.memory(B, H, step.num_queries, N * G, K),
        along=None if step.is_single else step.memory(B, H, N * G, room),
        wk=None if step.is_single else step.memory(B, H, 16, room),
        decays=step.memory(B, H, N * G, room) if gated and not step.is_single else None,
        shifts=step.memory(B, H, N * G) if gated else None,
    )
    if step.is_single:
        _enter_one(step, scratch)
    else:
        _enter_few(step, scratch)
    return scratch


def _enter_one(step: _Step, scratch: _Scratch) -> None:
    """Bring one token's queries to blocks; it is appended beside those that attend."""
    B, _, H, G, K, _ = step.sizes
    (q, _, _, w, beta, g), held, BK = step.tokens, step.held, step.head_blocks[0]
    # Beside wider heads' and full-precision rows, or several queries, there is no room in registers
    # for as many.
    less = 2 if step.is_wide or not step.is_half or G > 1 else 1
    stages = ONE_STAGES if step.path_columns == ONE_COLUMNS else ONE_STAGES + 1
    launch(
        enter_one_kernel, (B * H * step.path_programs,),
        q, w, beta, g, step.counts, step.new, held.ready, held.w, held.g, held.tw, held.paths,
        held.path_scales, scratch.queries, scratch.shifts,
        *(s for x in (q, w, beta) for s in (x.stride(0), x.stride(2))),
        *((0, 0) if g is None else (g.stride(0), g.stride(2))),
        step.scale, B, H, step.path_programs, step.num_queries, *step.rooms, step.last_row,
        G=G, K=K, BK=BK, BC=ONE_BC // less, BR=power_of_two(step.last_row + 1),
        KC=step.path_columns, GP=power_of_two(G, least=1), BLOCK=BLOCK, GATED=g is not None,
        OVERLAP=step.overlap, STAGES=stages if BK >= 64 else 1, enable_fp_fusion=step.fused,
        num_warps=2 * ENTER_WARPS if step.is_wide else ENTER_WARPS,
    )  # fmt: skip


def _enter_few(step: _Step, scratch: _Scratch) -> None:
    """Append several tokens, and bring their queries to blocks."""
    B, N, H, G, _, _ = step.sizes
    (q, k, v, w, beta, g), held, wide = step.tokens, step.held, step.is_wide
    launch(
        enter_kernel, (B * H * (2 - (-N * G // 16)),),
        q, k, v, w, beta, g, step.counts, step.new, held.ready,
        held.keys, held.values, held.w, held.beta, held.g, held.tw, held.ty, held.paths,
        held.path_scales, *scratch,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride()[:3], *beta.stride(),
        *((0, 0, 0) if g is None else g.stride()),
        step.scale, B, H, N, step.num_queries, *step.rooms, **step.shared,
        BC=FEW_BC // 2 if wide else FEW_BC, BR=power_of_two(step.rooms[2]), KC=step.path_columns,
        # Narrower heads' tiles have fewer 16 bytes than there are threads to copy them ahead.
        STAGES=STAGES if step.head_blocks[0] >= 64 else 1,
        # For both halves of wider heads there is no room in registers.
        HALVES=step.is_half and not wide, num_warps=2 * ENTER_WARPS if wide else ENTER_WARPS,
    )  # fmt: skip


def _attend(step: _Step, scratch: _Scratch, parts: Tensor, tops: Tensor) -> None:
    """Let queries meet keys."""
    B, N, H, G, _, _ = step.sizes
    held, half, wide = step.held, step.is_half, step.is_wide
    narrower = wide or not half
    tile, warps = TILE // 2 if narrower else TILE, 2 * WARPS if wide else WARPS
    packed = half and N * G <= 8
    BG = 8 if packed else power_of_two(N * G, most=16 if wide else 64)
    recents = ONE_RECENT if step.is_single else FEW_RECENT
    bytes_of_tile = tile * sum(step.head_blocks) * held.keys.element_size()
    launch(
        attend_kernel, ((step.num_parts + 2 * step.is_single) * B * H * -(-N * G // BG),),
        *step.tokens, held.w, held.beta, held.g,
        held.keys, held.values, held.tw, held.ty, held.block_decay, held.path_decays,
        step.counts, step.new, held.ready, *scratch, parts, tops,
        *(x for y in step.tokens[:5] for x in (y.stride(0), y.stride(2))),
        *((0, 0) if step.tokens.g is None else (step.tokens.g.stride(0), step.tokens.g.stride(2))),
        step.scale, step.options.window or 0, B, H, N, step.path_programs,
        step.num_queries, step.num_parts, *step.rooms, step.last_row, **step.shared,
        BG=BG, BR=power_of_two(step.last_row + 1), RECENT=recents // 2 if narrower else recents,
        SPAN=step.span, LEVELS=step.span_levels, TILE=tile, SINGLE=step.is_single,
        WINDOWED=step.options.window is not None, PACKED=packed,
        SIDE=min(tile, 512 * warps // (step.head_blocks[0] * held.keys.element_size())),
        TOGETHER=TOGETHER, VALUE_PRECISION=value_precision(held.values),
        STAGES=STAGES if bytes_of_tile <= 1 << 15 else 2,
        num_warps=warps, maxnreg=ONE_REGISTERS if step.is_single and not wide else None,
        **step.started_early,
    )  # fmt: skip


def _finish(step: _Step, parts: Tensor, tops: Tensor) -> Tensor:
    """Return the outputs, joined from parts."""
    B, N, H, G, _, V = step.sizes
    v, held, sinks, BV = step.tokens.v, step.held, step.options.sinks, step.head_blocks[1]
    o = room_for((B, N, H * G, V), v.dtype, v.device)
    elements, warps = FINISH_FEW if N * G <= 4 else FINISH_MANY
    launch(
        finish_kernel, (B * H * G * N,),
        parts, tops, sinks, step.counts, step.new, held.ready, o, B, H, N, step.num_parts,
        G=G, V=V, BV=BV, PARTS=elements // BV, SPAN=step.span, BLOCK=BLOCK,
        WITH_SINKS=sinks is not None, OVERLAP=step.overlap, num_warps=warps, **step.started_early,
    )  # fmt: skip
    return o
