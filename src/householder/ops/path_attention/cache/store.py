"""The tensors of a `PathCache`, and the arithmetic of decoding on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from householder.ops.path_attention.cache.records import (
    BLOCK,
    MAX_NEW,
    Group,
    Held,
    Options,
    Tokens,
)
from householder.ops.path_attention.chunk.outputs import Softmax, climb
from householder.ops.path_attention.chunk.tree import (
    Heads,
    chunk_tokens,
    join,
    levels,
    make_chunks,
)
from householder.ops.wy import compute_dtype, inverse_unit_lower

# Elements and columns of one tile of logits of several tokens against blocks.
TILE_ELEMENTS = 1 << 20
MAX_TILE_COLUMNS = 1024
# Elements of half-precision keys or values that a CPU converts at a time: they stay in its cache.
CONVERTED_ELEMENTS = 1 << 17
MAX_INT16 = torch.iinfo(torch.int16).max
FLOAT16_MAX = torch.finfo(torch.float16).max
# What the Triton kernels for new tokens hold in registers.
MAX_HEAD_DIM = 256
MAX_RECENT = 272

# Where tokens are counted along.
TOKEN_AXIS = {
    "keys": 2,
    "values": 2,
    "block_decay": 3,
    "w": 2,
    "beta": 2,
    "g": 3,
}


_OF_BLOCKS = ("products", "paths", "path_scales", "decays", "path_decays")


class Store:
    """The tensors of a cache. G query heads share one of H key heads.

    Memory is made outside of inference mode, or nothing could be appended but in it.
    """

    @torch.inference_mode(False)
    def __init__(self, tokens: Tokens, options: Options, max_rollback: int) -> None:
        q, k, v, w, beta, g = tokens
        self.options = options
        B, _, H, K = k.shape
        G = q.shape[2] // H
        self.dtype = dtype = compute_dtype(q, k, v, w, beta)
        self.shape = (B, H, G, K, v.shape[-1])
        # Of all tokens. Keys: in blocks turned to the end of their block, recent ones as they came.
        # They are rounded once per doubling, and so in half precision in float16 in any case.
        self.keys = k.new_empty(
            B, H, 0, K, dtype=torch.float16 if k.dtype == torch.bfloat16 else k.dtype
        )
        self.values = v.new_empty(B, H, 0, v.shape[-1])
        # Of recent tokens, as they came.
        self.w = w.new_empty(B, H, 0, K)
        self.beta = beta.new_empty(B, H, 0)
        # Of recent tokens, from their compact WY form with Y = tril(W Kᵀ, −1), the products T W and
        # T Y. A token adds a row to both, and what is taken back loses its rows; above the diagonal
        # of T Y there are zeros, and remain. In float64 beside full-precision keys, or the blocks
        # made from them would be less exact than those of a prompt; except on a GPU, where these
        # are made anew.
        self.recent_room = room = -(-(BLOCK + max_rollback + MAX_NEW) // 16) * 16
        half = k.dtype.itemsize == 2
        self.made_anew = k.is_cuda and dtype == torch.float32 and not half
        self.exact = torch.float32 if half or self.made_anew else torch.float64
        self.tw = k.new_zeros(B, H, room, K, dtype=self.exact)
        self.ty = k.new_zeros(B, H, room, room, dtype=self.exact)
        # Of blocks: the product F of each, by level, and what brings a query from the end of the
        # newest block to the end of the next but i. The kernels read the latter at every token:
        # beside keys in half precision it has 16 bits of fixed point and a scale for each column,
        # which for products of reflectors is nearer than float16 by two bits or three.
        self.products = k.new_zeros(0, B, H, K, K, dtype=dtype)
        scaled = half and self.has_kernels()
        self.paths = k.new_zeros(0, B, H, K, K, dtype=torch.int16 if scaled else dtype)
        self.path_scales = k.new_zeros(0, B, H, K, dtype=torch.float32) if scaled else None
        # For the kernels: two counters, in cache lines of their own, of programs that have come
        # to where others wait for them. Zero between calls.
        self.ready = torch.zeros(B, H, 2, 32, dtype=torch.int32, device=k.device)
        # The log gates likewise, for each query head. They are summed in the dtype of the keys'
        # computation: all have one sign.
        self.gated = g is not None
        if self.gated:
            self.block_decay = k.new_empty(B, H, G, 0, dtype=dtype)
            self.g = k.new_empty(B, H, G, 0, dtype=dtype)
            self.decays = k.new_zeros(0, B, H, G, dtype=dtype)
            self.path_decays = k.new_zeros(0, B, H, G, dtype=dtype)

    @torch.inference_mode(False)
    def select(self, rows: Tensor) -> Store:
        """Return a store of some rows of the batch; nothing is shared with this one."""
        chosen = copy.copy(self)
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                # What belongs to blocks has their levels in front of the batch.
                setattr(chosen, name, x.index_select(1 if name in _OF_BLOCKS else 0, rows))
        chosen.shape = (rows.shape[0], *self.shape[1:])
        return chosen

    def has_kernels(self) -> bool:
        """Return whether the Triton kernels take new tokens, at most `MAX_NEW` of each row.

        It depends on device and sizes.
        """
        small = max(self.shape[3:]) <= MAX_HEAD_DIM and self.recent_room <= MAX_RECENT
        return self.keys.is_cuda and self.dtype == torch.float32 and small

    def decode(
        self,
        tokens: Tokens,
        options: Options,
        counts: Tensor,
        new: Tensor | None,
        num_tokens: int,
    ) -> Tensor:
        """Write N tokens `[B, N, …]` behind each row's and attend with them, on a GPU.

        `counts` is int32 `[2, B]`, the tokens in blocks and the recent ones, the latter counted up;
        `new` int32 `[B]` says how many tokens a row gets, None that all get N; `num_tokens` bounds
        the tokens in blocks.
        """
        from householder.ops.path_attention.cache import triton as kernels

        gated = self.gated
        held = Held(
            self.keys, self.values, self.w, self.beta, self.g if gated else None, self.tw, self.ty,
            self.paths, self.path_scales, self.block_decay if gated else None,
            self.path_decays if gated else None, self.ready,
        )  # fmt: skip
        return kernels.decode(counts, tokens, options, held, new, num_tokens)

    def room(self) -> int:
        """Return for how many tokens there is room."""
        return self._room("keys")

    def addresses(self) -> tuple[int, ...]:
        """Return where the memory is that single tokens are written to."""
        return tuple(x.data_ptr() for x in (self.keys, self.values, self.w, self.paths))

    def check(self, tokens: Tokens, options: Options) -> None:
        """Raise unless new tokens are like the ones held, and attend as they did."""
        B, H, G, K, V = self.shape
        shapes = {"q": (H * G, K), "k": (H, K), "v": (H, V)}
        for (name, shape), x in zip(shapes.items(), tokens[:3], strict=True):
            if tuple(x.shape[2:]) != shape or x.device != self.keys.device:
                raise ValueError(
                    f"PathCache.append: `{name}` must be [{B}, T, {shape[0]}, {shape[1]}] on "
                    f"{self.keys.device} as in the first call, got shape {list(x.shape)} on "
                    f"{x.device}; use one cache per layer"
                )
        first = self.options
        for name in ("scale", "window"):
            before, now = getattr(first, name), getattr(options, name)
            if before != now:
                raise ValueError(
                    f"PathCache.append: `{name}` must be {before} as in the first call, got {now}; "
                    "make another cache for it"
                )
        if (options.sinks is None) != (first.sinks is None):
            raise ValueError(
                f"PathCache.append: `sinks` must {'not ' if first.sinks is None else ''}be given "
                f"as in the first call, got {None if options.sinks is None else 'a tensor'}; "
                "make another cache for it"
            )
        if (tokens.g is not None) != self.gated:
            raise ValueError(
                f"PathCache.append: `g` must {'' if self.gated else 'not '}be given as in the "
                f"first call, got {None if tokens.g is None else 'a tensor'}; "
                "zeros are gates that forget nothing"
            )

    def reserve(self, tokens: int, recent: int) -> None:
        """Make room for so many tokens in all, and so many recent ones."""
        for name in ("keys", "values", *(("block_decay",) if self.gated else ())):
            room = self._room(name)
            if room < tokens:
                # Room doubles, so that each token is copied about once.
                self._resize(name, max(tokens, 2 * room))
        if self._room("w") < recent:
            self.resize_recent(recent)
        num_levels = (self._room("keys") // BLOCK).bit_length()
        if self.products.shape[0] < num_levels:
            for name in _OF_BLOCKS:
                if getattr(self, name, None) is not None:
                    self._resize(name, num_levels)

    def resize_recent(self, room: int) -> None:
        """Set the room for recent tokens; what lies behind it is lost."""
        room = max(room, self.recent_room)
        for name in ("w", "beta", *(("g",) if self.gated else ())):
            self._resize(name, room)

    def _room(self, name: str) -> int:
        return getattr(self, name).shape[TOKEN_AXIS[name]]

    @torch.inference_mode(False)
    def _resize(self, name: str, room: int) -> None:
        """Make room for as many tokens, or levels of blocks, along the axis that counts them."""
        x, dim = getattr(self, name), TOKEN_AXIS.get(name, 0)
        shape = list(x.shape)
        shape[dim] = room
        resized, kept = x.new_zeros(shape), min(room, x.shape[dim])
        resized.narrow(dim, 0, kept).copy_(x.narrow(dim, 0, kept))
        setattr(self, name, resized)

    def write(self, at: Group, tokens: Tokens) -> None:
        """Put new tokens `[rows, new, …]` behind the ones held, as they come."""
        _, k, v, w, beta, g = tokens
        rows, first = at.rows, at.old + at.recent
        everywhere, recent = slice(first, first + at.new), slice(at.recent, at.recent + at.new)
        self.keys[rows, :, everywhere] = self._as_held(k.transpose(1, 2))
        self.values[rows, :, everywhere] = v.transpose(1, 2)
        self.w[rows, :, recent] = w.transpose(1, 2)
        self.beta[rows, :, recent] = beta.transpose(1, 2)
        if g is not None:
            _, H, G, _, _ = self.shape
            self.g[rows, :, :, recent] = g.unflatten(2, (H, G)).permute(0, 2, 3, 1)

    def _as_held(self, keys: Tensor) -> Tensor:
        """Return keys in the dtype they are held in, and what is beyond its range at its end."""
        keys = keys.to(self.keys.dtype)
        return keys.clamp(-FLOAT16_MAX, FLOAT16_MAX) if keys.dtype == torch.float16 else keys

    def attend_one(self, at: Group, q: Tensor, options: Options) -> Tensor:
        """Advance by the one token written last, and return what its query sees."""
        scale, sinks, window = options
        _, H, G, K, V = self.shape
        rows, t, r = at.rows, at.old + at.recent, at.recent
        first = 0 if window is None else max(0, t + 1 - window)
        q = q.to(self.dtype).mul(scale).reshape(-1, H, G, K)
        logits = q.new_empty(q.shape[0], H, G, t + 1)
        logits[..., at.old :], q = self._attend_recent(at, q)
        decay = None
        if self.gated:
            g = self.g[rows, :, :, : r + 1]
            logits[..., at.old :] += sum_after(g)
            decay = g.sum(-1, keepdim=True)

        blocks = list(at.blocks())
        queries = [q, *(q @ self._paths(len(blocks) - 1, rows))]
        for i, (level, start) in enumerate(blocks):
            seen = slice(max(start, first), start + (BLOCK << level))
            if seen.start >= seen.stop:
                break
            self._block_logits(logits, rows, seen, queries[i])
            if decay is not None:
                before = decay if i == 0 else decay + self.path_decays[i - 1, rows, :, :, None]
                logits[..., seen] += self.block_decay[rows, :, :, seen] + before
        logits = logits[..., first:]
        if sinks is not None:
            sink = sinks.to(self.dtype).view(H, G, 1).expand(q.shape[0], -1, -1, -1)
            logits = torch.cat([logits, sink], dim=-1)
        weights = logits.softmax(-1)[..., : t + 1 - first]
        return self._weigh_values(weights, rows, slice(first, t + 1)).reshape(-1, 1, H * G, V)

    def _attend_recent(self, at: Group, q: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest token's rows to T W and T Y.

        Returns:
            The logits of its query `[b, H, G, K]` against recent keys, without gates, and the query
            brought to the end of the newest block.
        """
        rows, r = at.rows, at.recent
        w = self.w[rows, :, : r + 1].to(self.exact)
        k = self.keys[rows, :, at.old : at.old + r + 1].to(self.exact)
        tw, ty = self.tw[rows, :, : r + 1], self.ty[rows, :, : r + 1, : r + 1]
        beta = self.beta[rows, :, r, None, None].to(self.exact)
        newest, before = w[:, :, r:], w[:, :, :r]
        # The row of T is −β (w Wᵀ) T, and β on the diagonal.
        along = newest @ before.mT
        tw[:, :, r:] = (newest - along @ tw[:, :, :r]) * beta
        ty[:, :, r:, :r] = (newest @ k[:, :, :r].mT - along @ ty[:, :, :r, :r]) * beta
        ty[:, :, r:, r:] = 0
        q = q.to(self.exact)
        along = q @ w.mT
        logits, q = q @ k.mT - along @ ty, q - along @ tw
        return logits.to(self.dtype), q.to(self.dtype)

    def _block_logits(self, logits: Tensor, rows: slice, seen: slice, q: Tensor) -> None:
        """Fill in the logits of queries against the keys of a block."""
        for columns in self._tiles(seen):
            logits[..., columns] = q @ self.keys[rows, :, columns].to(self.dtype).mT

    def _weigh_values(self, weights: Tensor, rows: slice, seen: slice) -> Tensor:
        """Return the sum of the values seen, weighted."""
        first, o = seen.start, None
        for columns in self._tiles(seen):
            values = self.values[rows, :, columns].to(self.dtype)
            part = weights[..., columns.start - first : columns.stop - first] @ values
            o = part if o is None else o.add_(part)
        assert o is not None  # a query sees its own token
        return o

    def _tiles(self, seen: slice) -> Iterator[slice]:
        """Cut tokens into as many as are converted at once: all, if nothing is to convert."""
        size = seen.stop - seen.start
        if not self.keys.is_cuda and self.keys.dtype != self.dtype:
            B, H, _, K, V = self.shape
            size = max(BLOCK, CONVERTED_ELEMENTS // (B * H * max(K, V)))
        for start in range(seen.start, seen.stop, size):
            yield slice(start, min(seen.stop, start + size))

    def attend_many(self, at: Group, q: Tensor, options: Options) -> Tensor:
        """Return what the queries of the tokens written last see; `make_triangles` follows."""
        scale, sinks, window = options
        _, H, G, K, V = self.shape
        rows, last = at.rows, at.recent + at.new
        C = chunk_tokens(K)
        missing = -last % C
        tokens = slice(at.old, at.old + last)

        def flat(x: Tensor) -> Tensor:
            x = x.to(self.dtype).flatten(0, 1)
            return torch.nn.functional.pad(x, (0, 0, 0, missing)).contiguous()

        # Recent tokens come first. Their queries are not asked for: zeros stand in.
        q = q.to(self.dtype).mul(scale).unflatten(2, (H, G)).transpose(1, 2).flatten(0, 1)
        queries = q.new_zeros(q.shape[0], last + missing, G, K)
        queries[:, at.recent : last] = q
        g = None
        if self.gated:
            g = flat(self.g[rows, :, :, :last].transpose(2, 3)).double()
        if sinks is not None:
            sinks = sinks.to(self.dtype).view(H, G).repeat(rows.stop - rows.start, 1)
        x = Heads(
            q=queries.flatten(1, 2),
            k=flat(self.keys[rows, :, tokens]),
            v=flat(self.values[rows, :, tokens]),
            w=flat(self.w[rows, :, :last]),
            beta=flat(self.beta[rows, :, :last, None]),
            g=g,
            sinks=sinks,
            window=window,
        )
        softmax, q = climb(x, to_start=True)
        asked = slice(at.recent * G, last * G)
        softmax = Softmax(*(y[:, asked].contiguous() for y in softmax))
        decay = None if g is None else g.cumsum(1).to(self.dtype).flatten(1)[:, asked, None]
        self._attend_blocks(at, softmax, q[:, asked], decay, window)
        o, _ = softmax.end_(sinks)
        return o.view(-1, H, at.new, G, V).transpose(1, 2).flatten(2, 3)

    def _attend_blocks(
        self, at: Group, softmax: Softmax, q: Tensor, decay: Tensor | None, window: int | None
    ) -> None:
        """Let queries at the end of the last block `[n·H, new·G, K]` see all blocks."""
        G, rows = self.shape[2], at.rows
        height = G * max(1, TILE_ELEMENTS // (q.shape[0] * G * MAX_TILE_COLUMNS))
        positions = torch.arange(at.new, device=q.device).repeat_interleave(G)[:, None]
        positions = positions + at.old + at.recent
        first = 0 if window is None else max(0, at.old + at.recent + 1 - window)
        for level, start in at.blocks():
            stop = start + (BLOCK << level)
            for left in range(max(start, first), stop, MAX_TILE_COLUMNS):
                columns = slice(left, min(stop, left + MAX_TILE_COLUMNS))
                k = self.keys[rows, :, columns].to(self.dtype).flatten(0, 1)
                v = self.values[rows, :, columns].to(self.dtype).flatten(0, 1)
                keys = torch.arange(columns.start, columns.stop, device=q.device)
                for top in range(0, q.shape[1], height):
                    some = slice(top, top + height)
                    logits = q[:, some] @ k.mT
                    if decay is not None:
                        along = self.block_decay[rows, :, :, columns].flatten(0, 1)
                        logits.unflatten(1, (-1, G)).add_(along.unsqueeze(1))
                    if window is not None:
                        logits.masked_fill_(positions[some] - keys >= window, -math.inf)
                    shift = 0.0 if decay is None else decay[:, some]
                    softmax.rows(some).add_(logits, v, shift)
            if start <= first:
                break
            q = q @ self.products[level, rows].flatten(0, 1)
            if decay is not None:
                more = self.decays[level, rows].flatten(0, 1)
                decay = decay + more.repeat(1, at.new).unsqueeze(-1)

    def make_blocks(self, at: Group, count: int) -> None:
        """Make blocks of the first recent tokens."""
        _, H, _, K, _ = self.shape
        rows, size = at.rows, count * BLOCK
        tokens = slice(at.old, at.old + size)
        shape = (-1, BLOCK, K)
        keys, f = turn(
            self.keys[rows, :, tokens].to(self.dtype).reshape(shape),
            self.w[rows, :, :size].to(self.dtype).reshape(shape),
            self.beta[rows, :, :size].to(self.dtype).reshape(-1, BLOCK, 1),
        )
        self._make_blocks(at, count, keys.view(-1, H, size, K), f.view(-1, H, count, K, K))

    def make_block(self, at: Group) -> None:
        """Make a block of the first recent tokens, from T W and T Y, and drop them there."""
        rows, rest = at.rows, at.recent + at.new - BLOCK
        if self.made_anew:
            self.make_blocks(at, 1)
            self.make_triangles(Group(rows, at.old + BLOCK, rest, 0))
            return
        w = self.w[rows, :, :BLOCK].to(self.exact)
        k = self.keys[rows, :, at.old : at.old + BLOCK].to(self.exact)
        keys = k - self.ty[rows, :, :BLOCK, :BLOCK].mT @ w
        f = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        f = f - w.mT @ self.tw[rows, :, :BLOCK]
        self._make_blocks(at, 1, keys, f.to(self.dtype).unsqueeze(2))
        if rest:
            self.make_triangles(Group(rows, at.old + BLOCK, rest, 0))

    def _make_blocks(self, at: Group, count: int, keys: Tensor, f: Tensor) -> None:
        rows, size = at.rows, count * BLOCK
        tokens = slice(at.old, at.old + size)
        self.keys[rows, :, tokens] = self._as_held(keys)
        totals = None
        if self.gated:
            g = self.g[rows, :, :, :size].unflatten(-1, (count, BLOCK))
            self.block_decay[rows, :, :, tokens] = sum_after(g).flatten(-2)
            totals = g.sum(-1)
        for i in range(count):
            total = None if totals is None else totals[..., i]
            self._add_block(rows, at.old + i * BLOCK, f[:, :, i], total)
        self._drop_recent(at, size)
        self._make_paths(Group(rows, at.old + size, 0, 0))

    def _add_block(self, rows: slice, start: int, f: Tensor, total: Tensor | None) -> None:
        """Join the smallest block, which begins at `start`, with those of its size before it."""
        count, level = start // BLOCK, 0
        while count % 2:
            left = slice(start - (BLOCK << level), start)
            keys = self.keys[rows, :, left].to(self.dtype) @ f.mT
            self.keys[rows, :, left] = self._as_held(keys)
            f = f @ self.products[level, rows]
            if total is not None:
                self.block_decay[rows, :, :, left] += total.unsqueeze(-1)
                total = total + self.decays[level, rows]
            start, count, level = left.start, count // 2, level + 1
        self.products[level, rows] = f
        if total is not None:
            self.decays[level, rows] = total

    def _make_paths(self, at: Group) -> None:
        """Multiply the products of the newest blocks, each with those before it."""
        levels = [level for level, _ in at.blocks()][:-1]
        if not levels:
            return
        paths = [self.products[levels[0], at.rows]]
        for level in levels[1:]:
            paths.append(paths[-1] @ self.products[level, at.rows])
        path, count = torch.stack(paths), len(levels)
        if self.path_scales is not None:
            largest = path.abs().amax(-2)
            scales = largest.clamp_min(torch.finfo(path.dtype).tiny) / MAX_INT16
            self.path_scales[:count, at.rows] = scales
            path = (path / scales.unsqueeze(-2)).round_()
        self.paths[:count, at.rows] = path.to(self.paths.dtype)
        if self.gated:
            decays = torch.stack([self.decays[level, at.rows] for level in levels])
            self.path_decays[:count, at.rows] = decays.cumsum(0)

    def _paths(self, count: int, rows: slice) -> Tensor:
        """Return the first paths `[count, b, H, K, K]` as they are multiplied with."""
        paths = self.paths[:count, rows].to(self.dtype)
        if self.path_scales is not None:
            paths = paths * self.path_scales[:count, rows].unsqueeze(-2)
        return paths

    def _drop_recent(self, at: Group, size: int) -> None:
        rest = at.recent + at.new - size
        for name in ("w", "beta", *(("g",) if self.gated else ())):
            x, dim = getattr(self, name)[at.rows], TOKEN_AXIS[name]
            x.narrow(dim, 0, rest).copy_(x.narrow(dim, size, rest).clone())

    def make_triangles(self, at: Group) -> None:
        """Make T W and T Y of the recent tokens anew."""
        rows, r = at.rows, at.recent
        w = self.w[rows, :, :r].to(self.exact)
        k = self.keys[rows, :, at.old : at.old + r].to(self.exact)
        beta = self.beta[rows, :, :r].to(self.exact)
        gram = (w @ w.mT * beta.unsqueeze(-1)).flatten(0, 1)
        inverse = inverse_unit_lower(gram).unflatten(0, w.shape[:2])
        ut = inverse.tril() * beta.unsqueeze(-2)
        self.tw[rows, :, :r] = ut @ w
        self.ty[rows, :, :r, :r] = ut @ (w @ k.mT).tril(-1)


def turn(k: Tensor, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys turned to the end of their tokens `[b, n, K]`, and the product F `[b, K, K]`."""
    b, n, K = k.shape
    C = size = chunk_tokens(K)
    while size < n:
        size *= 2
    # Tokens without reflectors change nothing, and make the tree a full one.
    k, w, beta = (
        torch.nn.functional.pad(x, (0, 0, 0, size - n)).contiguous() for x in (k, w, beta)
    )
    # Queries and values are not needed: the keys stand in.
    x = Heads(k, k, k, w, beta, None, None, None)
    chunks = make_chunks(x)
    keys, q, f = chunks.keys_at_end().view_as(k), k.clone(), chunks.products().view(b, -1, K, K)
    for pairs in levels(size, C):
        f = join(pairs, x, q, keys, f)
    return keys[:, :n], f[:, 0]


def sum_after(g: Tensor) -> Tensor:
    """Return for each entry of the last dimension the sum of those after it."""
    return torch.nn.functional.pad(g[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
