"""Decoding with `path_attention`: the keys and values of the tokens so far.

Every new token turns all earlier keys by its reflector. To do so in the cache would cost a pass
over it per token, and round every key as often as there are tokens after it. Here keys are turned
lazily:

- Recent tokens are kept as they came, and beside them two products with the triangle T of their
  compact WY form, T W and T tril(W Kᵀ, −1), to which a token adds a row.
- Older tokens lie in blocks of 64, 128, 256, … tokens, one of a size at most, as the ones of a
  binary number. The keys of a block are turned up to its end, and its product F is kept. Two blocks
  of a size become one: the left one's keys are multiplied by the right one's F.
- A query is turned back instead: by recent reflectors to the end of the newest block, by that one's
  F to the end of the next, and so on.

So a key is turned, and rounded, once per doubling: log₂(T / 64) times. Recent tokens become a block
when they are 64 more than a roll-back may take away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import add, index
from typing import Any

import torch
from torch import Tensor

from householder.ops._checks import check_int, check_scale
from householder.ops._dispatch import autocast_off, examined
from householder.ops.path_attention.api import check_inputs, path_attention
from householder.ops.path_attention.cache.records import BLOCK, MAX_NEW, Group, Options, Tokens
from householder.ops.path_attention.cache.store import Store

# Grids of the kernels are made for a multiple of so many tokens, or all that there is room for.
BOUND_STEP = 1024


class PathCache:
    """Hold the tokens so far of a batch of sequences, for decoding with `path_attention`.

    `append` takes new tokens and returns what `path_attention` would over all of them. There are no
    gradients.

    Args:
        batch_size: B. The sequences may have different lengths.
        max_rollback: how many of the last tokens `rollback` can take back. As many more tokens are
            kept with their reflectors.

    Raises:
        TypeError: an argument is no int.
        ValueError: an argument is out of range.

    Examples:
        >>> import torch
        >>> from householder import PathCache, path_attention
        >>> B, T, HQ, H, K, V = 2, 9, 4, 2, 8, 5
        >>> q, k, v = torch.randn(B, T, HQ, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
        >>> w = torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1)
        >>> tokens = (q, k, v, w, 2 * torch.rand(B, T, H))
        >>> cache = PathCache(B)
        >>> prefilled = cache.append(*(x[:, :7] for x in tokens))
        >>> decoded = [cache.append(*(x[:, t : t + 1] for x in tokens)) for t in (7, 8)]
        >>> whole = torch.cat([prefilled, *decoded], dim=1)
        >>> torch.allclose(whole, path_attention(*tokens), atol=1e-5)
        True
        >>> cache.lengths
        [9, 9]

        Rows of different lengths, and two guesses of which a second row's one is not accepted:

        >>> cache = PathCache(B, max_rollback=2)
        >>> o = cache.append(*(x[:, :7] for x in tokens), lengths=[7, 4])
        >>> o = cache.append(*(x[:, 7:9] for x in tokens))
        >>> cache.rollback([0, 1])
        >>> cache.lengths
        [9, 5]
    """

    def __init__(self, batch_size: int, *, max_rollback: int = 0) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_rollback", max_rollback, 0),
        ):
            check_int("PathCache", name, value)
            if value < least:
                raise ValueError(
                    f"PathCache: `{name}` must be at least {least}, got {value}; give a larger one"
                )
        self.batch_size = batch_size
        self.max_rollback = max_rollback
        self._old = [0] * batch_size
        self._recent = [0] * batch_size
        self._rollback = [0] * batch_size  # what may be taken back now; never more than is recent
        self._store: Store | None = None
        self._known_calls: dict[Any, float] = {}  # whose arguments fit the store
        self._reserved = 0
        # For the kernels: what `_old` and `_recent` say, on the device, and whether it does.
        self._counts: Tensor | None = None
        self._counts_known = False
        # By how many tokens an append captured in a CUDA graph takes, where the store's memory was.
        self._captured: dict[int, tuple[int, ...]] = {}

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each sequence are held."""
        return [old + recent for old, recent in zip(self._old, self._recent, strict=True)]

    @property
    def has_kernels(self) -> bool:
        """Whether up to 16 tokens at a time run on kernels, which a CUDA graph can capture.

        Known from the first append on; before it False.
        """
        return self._store is not None and self._store.has_kernels()

    def append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        beta: Tensor,
        g: Tensor | None = None,
        *,
        scale: float | None = None,
        sinks: Tensor | None = None,
        window: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Add tokens and return what they attend to.

        Called once with a whole prompt or for parts of any size, down to single tokens: the outputs
        are those of `path_attention` over all tokens, to rounding. Options must be the same in all
        calls (of the sinks' values this is not checked), and gates be given in all calls or in
        none. `torch.compile` leaves it out of its graphs.

        Args:
            q: queries `[B, T, HQ, K]` of the T new tokens.
            k: keys `[B, T, H, K]`; they are held in the dtype that the first call brings, bfloat16
                in float16: of that three more bits, and entries beyond ±65,504 cut off there.
            v: values `[B, T, H, V]`, held in the dtype that the first call brings.
            w: reflectors `[B, T, H, K]`.
            beta: coefficients `[B, T, H]`.
            g: forget gates `[B, T, HQ]`, natural logarithm, ≤ 0, or None.
            scale: factor on the inner products; `K ** -0.5` if None.
            sinks: one more logit per query head, `[HQ]`, or None.
            window: how many tokens a query sees, its own included; all earlier ones if None.
            lengths: how many of the T tokens of each row are meant, the first ones, from 0 to T;
                all if None.

        Returns:
            o `[B, T, HQ, V]` in v's dtype, zero where `lengths` leaves tokens out.

        Raises:
            ValueError: a shape, device, option or `lengths` does not fit, or differs from the first
                call.
            TypeError: an argument has the wrong type, or is not real floating point.
            NotImplementedError: a tensor requires a gradient: decoding has none.
            RuntimeError: a CUDA graph is captured, and there is no room, or there was no append
                before it that was not captured: see `reserve`.
        """
        if torch.compiler.is_compiling():
            # Traced, it would be another program for every length.
            untraced = torch.compiler.disable(self.append)
            return untraced(
                q, k, v, w, beta, g, scale=scale, sinks=sinks, window=window, lengths=lengths
            )
        tensors = (q, k, v, w, beta, g, sinks)
        scale = examined(self._known_calls, self._examine, tensors, (scale, window))
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            raise NotImplementedError(
                "PathCache.append: decoding has no gradients, and a tensor requires one; "
                "use torch.no_grad(), or path_attention for training"
            )
        new = self._check_lengths(q.shape[1], lengths)
        with autocast_off(q.device):
            return self._append(Tokens(*tensors[:6]), Options(scale, sinks, window), new)

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens of each sequence, those held included.

        Up to there 1 to 16 tokens at a time are appended without moving memory. On a GPU, after a
        first one that was not captured, such an append of equally many tokens to every sequence can
        be captured in a CUDA graph; call `replayed` after each replay. Appending more tokens at
        once moves memory again.

        Args:
            num_tokens: how many; at least as many as are held.

        Raises:
            TypeError: it is no int.
            ValueError: it is less than what is held.
        """
        check_int("PathCache.reserve", "num_tokens", num_tokens)
        if num_tokens < max(self.lengths):
            raise ValueError(
                f"PathCache.reserve: `num_tokens` must be at least {max(self.lengths)}, which are "
                f"held, got {num_tokens}; give a larger one"
            )
        self._reserved = num_tokens
        if self._store is not None:
            self._store.reserve(num_tokens, max(self._recent))

    def replayed(self, num_tokens: int | None = None) -> None:
        """Count the tokens that the replay of a captured `append` has added to each sequence.

        Args:
            num_tokens: how many it takes of each; None if appends of one number alone are captured.

        Raises:
            TypeError: it is no int.
            ValueError: it is None, and appends of several numbers are captured.
            RuntimeError: no such append is captured that fits the memory of now, or there was no
                room.
        """
        if num_tokens is not None:
            check_int("PathCache.replayed", "num_tokens", num_tokens)
        elif len(self._captured) > 1:
            raise ValueError(
                "PathCache.replayed: `num_tokens` must be given, since appends of "
                f"{sorted(self._captured)} tokens are captured, got None; give that of the replay"
            )
        else:
            num_tokens = next(iter(self._captured), 0)
        store = self._store
        if store is None or self._captured.get(num_tokens) != store.addresses():
            raise RuntimeError(
                f"PathCache.replayed: an append of {num_tokens or 'some'} tokens must have been "
                "captured since memory was last moved, and none was; capture it again"
            )
        if max(self.lengths) + num_tokens > store.room():
            raise RuntimeError(
                f"PathCache.replayed: there must be room for {num_tokens} more tokens, got "
                f"{max(self.lengths)} of {store.room()}; reserve more before capturing"
            )
        self._count(store, [num_tokens] * self.batch_size)

    def rollback(self, num_tokens: int | Sequence[int]) -> None:
        """Forget the last tokens, as if they had never been appended.

        Args:
            num_tokens: how many, for all sequences or for each. Every appended token allows one
                more, up to `max_rollback`, and every one taken back one less.

        Raises:
            TypeError: a number is no int.
            ValueError: that many cannot be taken back.
        """
        if isinstance(num_tokens, int) and not isinstance(num_tokens, bool):
            counts = [num_tokens] * self.batch_size
        else:
            counts = self._check_counts("rollback", "num_tokens", num_tokens)
        if any(not 0 <= n <= most for n, most in zip(counts, self._rollback, strict=True)):
            raise ValueError(
                f"PathCache.rollback: `num_tokens` must be from 0 to {self._rollback} for each "
                f"sequence, got {counts}; take fewer back, or give the cache a larger max_rollback"
            )
        self._recent = [recent - n for recent, n in zip(self._recent, counts, strict=True)]
        self._rollback = [most - n for most, n in zip(self._rollback, counts, strict=True)]
        self._counts_known = False
        self._tell_graph()

    def select(self, rows: Tensor) -> PathCache:
        """Return a cache of some of the sequences, in any order and as often as asked.

        Args:
            rows: int64 `[B']`, which of the B sequences each of the new ones is; on any device.

        Raises:
            TypeError: it is no int64 tensor.
            ValueError: it is not one-dimensional, empty, or names a row that there is not.
        """
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(
                f"PathCache.select: `rows` must be an int64 tensor, got {got}; "
                "make one with torch.tensor([0, 1])"
            )
        order = rows.tolist()
        if rows.dim() != 1 or not order or min(order) < 0 or max(order) >= self.batch_size:
            raise ValueError(
                "PathCache.select: `rows` must be a vector of one number or more from 0 to "
                f"{self.batch_size - 1}, got {order}; leave out others"
            )
        chosen = PathCache(len(order), max_rollback=self.max_rollback)
        chosen._reserved = self._reserved
        chosen._old = [self._old[row] for row in order]
        chosen._recent = [self._recent[row] for row in order]
        chosen._rollback = [self._rollback[row] for row in order]
        if self._store is not None:
            chosen._store = self._store.select(rows.to(self._store.keys.device))
        return chosen

    def _examine(self, *arguments: Any) -> float:
        """Check what layouts and options say of an append's arguments, and return `scale`."""
        *parts, sinks, scale, window = arguments
        tokens = Tokens(*parts)
        q = tokens.q
        check_inputs("PathCache.append", *tokens, sinks, window, None)
        if q.shape[0] != self.batch_size:
            raise ValueError(
                f"PathCache.append: `q` must have batch size {self.batch_size}, got shape "
                f"{list(q.shape)}; a cache belongs to one batch of sequences"
            )
        scale = check_scale("PathCache.append", scale, q.shape[-1])
        if self._store is not None:
            self._store.check(tokens, Options(scale, sinks, window))
        return scale

    def _check_lengths(self, T: int, lengths: Sequence[int] | None) -> list[int]:
        if lengths is None:
            return [T] * self.batch_size
        new = self._check_counts("append", "lengths", lengths)
        if any(not 0 <= n <= T for n in new):
            raise ValueError(
                f"PathCache.append: `lengths` must be {self.batch_size} numbers from 0 to T = {T}, "
                f"got {new}; fill shorter rows up behind"
            )
        return new

    def _check_counts(self, method: str, name: str, counts: Any) -> list[int]:
        """Return a whole number for each sequence; a tensor's are read."""
        try:
            checked = [index(n) for n in counts]
        except TypeError:
            raise TypeError(
                f"PathCache.{method}: `{name}` must be an int for each sequence, got {counts!r}; "
                f"give {self.batch_size} whole numbers"
            ) from None
        if len(checked) != self.batch_size:
            raise ValueError(
                f"PathCache.{method}: `{name}` must be {self.batch_size} numbers, one for each "
                f"sequence, got {checked}; give as many"
            )
        return checked

    def _groups(self, new: list[int]) -> Iterator[Group]:
        row = 0
        for (old, recent, n), same in groupby(zip(self._old, self._recent, new, strict=True)):
            rows = slice(row, row + len(list(same)))
            yield Group(rows, old, recent, n)
            row = rows.stop

    def _append(self, tokens: Tokens, options: Options, new: list[int]) -> Tensor:
        """Choose how tokens whose arguments are checked are appended."""
        q = tokens.q
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._capture(tokens, options, new)
        if self._store is None:
            self._store = Store(tokens, options, self.max_rollback)
            self._known_calls.clear()  # these were not compared with the store
        if 0 < q.shape[1] <= MAX_NEW and self._store.has_kernels():
            return self._append_few(self._store, tokens, options, new)
        return self._append_many(self._store, tokens, options, new)

    @torch.no_grad()
    def _append_many(
        self, store: Store, tokens: Tokens, options: Options, new: list[int]
    ) -> Tensor:
        """Append by PyTorch's products, one group of rows after the other."""
        q, v = tokens.q, tokens.v
        store.reserve(
            max(self._reserved, *map(add, self.lengths, new)), max(map(add, self._recent, new))
        )
        self._counts_known = False
        o = v.new_zeros(*q.shape[:3], v.shape[-1])
        for group in list(self._groups(new)):
            if group.new:
                part = tokens.of(group)
                o[group.rows, : group.new] = self._attend(store, group, part, options).to(v.dtype)
                self._make_blocks(store, group)
        self._allow_rollback(new)
        if sum(new) > len(new):
            # A prompt's tokens were recent for a moment, and need not leave their room behind.
            store.resize_recent(max(*self._recent, self.max_rollback + BLOCK))
        self._tell_graph()
        return o

    def _attend(self, store: Store, group: Group, tokens: Tokens, options: Options) -> Tensor:
        """Put a group's tokens behind the ones held, and return what they see."""
        store.write(group, tokens)
        if group.new == 1:
            return store.attend_one(group, tokens.q, options)
        if group.old + group.recent == 0 and store.has_kernels():
            # A prompt: there is nothing in the cache that it has to see.
            return path_attention(*tokens, **options._asdict())
        return store.attend_many(group, tokens.q, options)

    def _make_blocks(self, store: Store, group: Group) -> None:
        """Make blocks of a group's oldest recent tokens, and count its tokens."""
        recent = group.recent + group.new
        blocks = max(0, (recent - self.max_rollback) // BLOCK)
        old, recent = group.old + blocks * BLOCK, recent - blocks * BLOCK
        if group.new > 1:
            if blocks:
                store.make_blocks(group, blocks)
            store.make_triangles(Group(group.rows, old, recent, 0))
        elif blocks:
            store.make_block(group)
        self._set(group.rows, old, recent)

    def _set(self, rows: slice, old: int, recent: int) -> None:
        count = rows.stop - rows.start
        self._old[rows], self._recent[rows] = [old] * count, [recent] * count

    def _allow_rollback(self, new: list[int]) -> None:
        self._rollback = [min(self.max_rollback, most) for most in map(add, self._rollback, new)]

    def _append_few(self, store: Store, tokens: Tokens, options: Options, new: list[int]) -> Tensor:
        """Append at most `MAX_NEW` tokens to each row by the kernels, on a GPU."""
        q, num_tokens = tokens.q, tokens.q.shape[1]
        # The kernels reach for as many tokens in every row, whatever each of them gets.
        most, most_recent = max(self.lengths) + num_tokens, max(self._recent) + num_tokens
        store.reserve(max(self._reserved, most), most_recent)
        if not self._counts_known:
            self._tell_counts(q.device)
        assert self._counts is not None
        appended = None
        if min(new) < num_tokens:
            appended = torch.tensor(new, dtype=torch.int32).to(q.device, non_blocking=True)
        # In steps: so a call's launches are those of the call before.
        bound = min(store.room(), -(-max(self._old) // BOUND_STEP) * BOUND_STEP)
        o = store.decode(tokens, options, self._counts, appended, bound)
        self._count(store, new)
        return o

    def _capture(self, tokens: Tokens, options: Options, new: list[int]) -> Tensor:
        """Launch the kernels for as many tokens of every row, without counting them."""
        store, num_tokens = self._store, tokens.q.shape[1]
        room = 0 if store is None else store.room() - max(self.lengths)
        fits = 0 < num_tokens <= min(MAX_NEW, room) and min(new) == num_tokens
        if store is None or not (fits and self._counts_known and store.has_kernels()):
            raise RuntimeError(
                f"PathCache.append: what a CUDA graph captures must be 1 to {MAX_NEW} tokens, as "
                "many for every sequence, after some that were not captured, and with room, got "
                f"tokens {list(tokens.q.shape[:2])} and room for {room}; call reserve, and append "
                "as many tokens first"
            )
        now = store.addresses()
        self._captured = {n: where for n, where in self._captured.items() if where == now}
        self._captured[num_tokens] = now
        assert self._counts is not None
        return store.decode(tokens, options, self._counts, None, store.room())

    @torch.inference_mode(False)
    def _tell_counts(self, device: torch.device) -> None:
        """Bring the device's counts up to date, where they are.

        CUDA has copied what is not pinned by the time it returns: there is nothing to wait for.
        """
        counts = torch.tensor([self._old, self._recent], dtype=torch.int32)
        if self._counts is None:
            self._counts = counts.to(device, non_blocking=True)
        else:
            self._counts.copy_(counts, non_blocking=True)
        self._counts_known = True

    def _tell_graph(self) -> None:
        """Bring the device's counts up to date where a captured append may be replayed next."""
        if self._captured and self._counts is not None:
            self._tell_counts(self._counts.device)

    def _count(self, store: Store, new: list[int]) -> None:
        """Count tokens that the kernels have appended, and make blocks of the oldest."""
        self._recent = list(map(add, self._recent, new))
        self._allow_rollback(new)
        most = BLOCK + self.max_rollback
        if max(self._recent) < most:
            return
        for group in list(self._groups([0] * len(new))):
            if group.recent >= most:
                store.make_block(group)
                self._set(group.rows, group.old + BLOCK, group.recent - BLOCK)
                if self._counts_known and self._counts is not None:
                    # There, without waiting for the device.
                    self._counts[0, group.rows] += BLOCK
                    self._counts[1, group.rows] -= BLOCK
