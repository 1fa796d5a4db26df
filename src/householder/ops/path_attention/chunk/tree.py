"""The blocks of `path_attention`: chunks in compact WY form, and the pairs that join them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from householder.ops.wy import inverse_unit_lower

# Tokens of a chunk: about K, as many more reflectors than dimensions make the triangle
# ill-conditioned, and within these bounds.
MAX_CHUNK = 32
MIN_CHUNK = 8
# Elements of one tile of logits, which on a CPU is to stay in the caches; a GPU wants long batches.
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
MAX_TILE_COLUMNS = 512
MIN_TILE_ROWS = 16


def chunk_tokens(K: int) -> int:
    """Return C, the tokens of a chunk, for key dimension K: a power of two."""
    C = MIN_CHUNK
    while min(K, MAX_CHUNK) > C:
        C *= 2
    return C


class Heads(NamedTuple):
    """Some heads of equally long sequences, b of them, in the dtype of the computation.

    G query heads share a key head; the rows of token t are t·G … t·G + G − 1. The number of tokens
    L is a multiple of C. What fills a sequence up lies behind all its tokens, where no query of
    theirs looks. Before token `first_query` nobody asks: there q is zero.
    """

    q: Tensor  # [b, L·G, K], scaled
    k: Tensor  # [b, L, K]
    v: Tensor  # [b, L, V]
    w: Tensor  # [b, L, K]
    beta: Tensor  # [b, L, 1]
    g: Tensor | None  # [b, L, G], float64
    sinks: Tensor | None  # [b, G]
    window: int | None
    first_query: int = 0

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


class Chunks(NamedTuple):
    """The compact WY forms of all chunks of some heads, n = b · L / C of them."""

    q: Tensor  # [n, C·G, K]
    k: Tensor  # [n, C, K]
    w: Tensor  # [n, C, K]
    beta: Tensor  # [n, C, 1]
    inverse: Tensor  # [n, C, C]: (I + M)⁻¹ with M = strict_lower(diag(β) W Wᵀ)
    qw: Tensor  # [n, C·G, C]: X = lower(Q Wᵀ)
    wk: Tensor  # [n, C, C]: Y = strict_lower(W Kᵀ)
    tw: Tensor  # [n, C, K]: Z = T W with T = (I + M)⁻¹ diag(β)
    twk: Tensor  # [n, C, C]: E = T Y

    def logits(self) -> Tensor:
        """Return `lower(Q Kᵀ) − X T Y`, `[n, C·G, C]`; above the diagonal it is left undefined."""
        return torch.baddbmm(self.q @ self.k.mT, self.qw, self.twk, alpha=-1)

    def queries_at_start(self) -> Tensor:
        """Return `Q← = Q − X T W`."""
        return torch.baddbmm(self.q, self.qw, self.tw, alpha=-1)

    def keys_at_end(self) -> Tensor:
        """Return `K→ = K − (T Y)ᵀ W`."""
        return torch.baddbmm(self.k, self.twk.mT, self.w, alpha=-1)

    def products(self) -> Tensor:
        """Return `F = I − Wᵀ T W`, `[n, K, K]`."""
        eye = torch.eye(self.w.shape[-1], dtype=self.w.dtype, device=self.w.device)
        return torch.baddbmm(eye.expand(self.w.shape[0], -1, -1), self.w.mT, self.tw, alpha=-1)


def make_chunks(x: Heads) -> Chunks:
    """Solve the triangles of all chunks."""
    C, G, K = chunk_tokens(x.k.shape[-1]), x.group, x.k.shape[-1]
    q, k, w = x.q.view(-1, C * G, K), x.k.view(-1, C, K), x.w.view(-1, C, K)
    beta = x.beta.view(-1, C, 1)
    inverse = inverse_unit_lower((w @ w.mT).mul_(beta))
    wk = (w @ k.mT).tril_(-1)
    return Chunks(
        q=q,
        k=k,
        w=w,
        beta=beta,
        inverse=inverse,
        qw=keep_past_(q @ w.mT, G),
        wk=wk,
        tw=inverse @ (beta * w),
        twk=inverse @ (beta * wk),
    )


def keep_past_(x: Tensor, G: int) -> Tensor:
    """Zero what lies after the token of each row, in `[n, C·G, C]`, in place."""
    if G == 1:
        return x.tril_()
    n, _, C = x.shape
    x.view(n, C, G, C).mul_(x.new_ones(C, C).tril_().unsqueeze(1))
    return x


class Pairs(NamedTuple):
    """p pairs of neighbouring blocks, `left` and `right` tokens long, from token `first` on.

    `right` is smaller than `left` only in the last pair of a sequence.
    """

    first: int
    p: int
    left: int
    right: int

    def split(self, x: Tensor, G: int = 1) -> tuple[Tensor, Tensor]:
        """Return views `[b, p, left·G, D]` and `[b, p, right·G, D]` of `x [b, L·G, D]`."""
        size = self.left + self.right
        x = x[:, self.first * G : (self.first + self.p * size) * G]
        x = x.unflatten(1, (self.p, size * G))
        return x[:, :, : self.left * G], x[:, :, self.left * G :]

    def split_products(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of the products `[b, L // left, K, K]`: left blocks, and full right ones."""
        at = self.first // self.left
        of_pairs = f[:, at : at + 2 * self.p]
        return of_pairs[:, ::2], of_pairs[:, 1::2]

    def first_row(self, first_query: int) -> int:
        """Return the first row of the right blocks that has a query; `right` if none has one.

        Of pairs from `levels`: all of them have queries, or none has, or there is one.
        """
        return min(max(0, first_query - self.first - self.left), self.right)

    def has_queries(self, first_query: int) -> bool:
        return self.first_row(first_query) < self.right


def levels(L: int, C: int, first_query: int = 0) -> Iterator[list[Pairs]]:
    """Yield the pairs that join at each level of the tree over L tokens, the smallest first.

    Pairs wholly before the first query, the one that it lies in, and those after it are apart.
    """
    n = C
    while n < L:
        full, rest = divmod(L, 2 * n)
        before, up_to = first_query // (2 * n), -(-first_query // (2 * n))
        bounds = sorted({0, min(before, full), min(up_to, full), full})
        pairs = [Pairs(i * 2 * n, j - i, n, n) for i, j in pairwise(bounds)]
        if rest > n:
            pairs.append(Pairs(full * 2 * n, 1, n, rest - n))
        yield pairs
        n *= 2


class Tile(NamedTuple):
    """Part of the rectangles of pairs: tokens of the right blocks × tokens of the left ones."""

    rows: slice
    columns: slice
    mask: Tensor | None  # bool [rows, columns]: True where the key is outside the window


def tiles(pairs: Pairs, x: Heads) -> Iterator[Tile]:
    """Cut the rectangles of all pairs alike, leaving out what no query or window shows."""
    window = math.inf if x.window is None else x.window
    budget = TILE_ELEMENTS["cuda" if x.q.is_cuda else "cpu"]
    width = min(pairs.left, MAX_TILE_COLUMNS)
    height = max(MIN_TILE_ROWS, budget // (x.q.shape[0] * pairs.p * x.group * width))
    end = int(min(pairs.right, window - 1))
    for top in range(pairs.first_row(x.first_query), end, height):
        bottom = min(end, top + height)
        # Row r and column c are left + r − c tokens apart.
        first = int(max(0, pairs.left + top + 1 - window))
        for left in range(first, pairs.left, width):
            right = min(pairs.left, left + width)
            mask = None
            if pairs.left + bottom - 1 - left >= window:
                rows = torch.arange(top, bottom, device=x.q.device)
                columns = torch.arange(left, right, device=x.q.device)
                mask = pairs.left + rows[:, None] - columns >= window
            yield Tile(slice(top, bottom), slice(left, right), mask)


class Decay(NamedTuple):
    """The log gates between the tokens of pairs and the border between their blocks."""

    rows: Tensor  # [b·p, right·G, 1]: from the border up to and including the query
    columns: Tensor  # [b·p, G, left]: from after the key to the border


def make_decay(pairs: Pairs, x: Heads) -> Decay | None:
    """Sum the log gates of either side, or return None without gates."""
    if x.g is None:
        return None
    before, after = pairs.split(x.g)
    rows = after.cumsum(2).to(x.q.dtype).reshape(-1, pairs.right * x.group, 1)
    # The gate of the key's own token does not act on it.
    columns = torch.nn.functional.pad(before[:, :, 1:], (0, 0, 0, 1))
    columns = columns.flip(2).cumsum(2).flip(2).to(x.q.dtype)
    return Decay(rows, columns.flatten(0, 1).mT.contiguous())


def rectangle(tile: Tile, x: Heads, q: Tensor, k: Tensor, decay: Decay | None) -> Tensor:
    """Return the logits of a tile `[b·p, rows·G, columns]`, without the decay of the rows."""
    G = x.group
    logits = q[:, tile.rows.start * G : tile.rows.stop * G] @ k[:, tile.columns].mT
    by_token = logits.unflatten(1, (-1, G))
    if decay is not None:
        by_token.add_(decay.columns[:, None, :, tile.columns])
    if tile.mask is not None:
        by_token.masked_fill_(tile.mask[:, None], -math.inf)
    return logits


def diagonal(chunks: Chunks, x: Heads) -> Tensor:
    """Return the logits inside the chunks `[n, C·G, C]`, with -inf where nothing is seen."""
    logits, G = chunks.logits(), x.group
    n, _, C = logits.shape
    by_token = logits.view(n, C, G, C)
    if x.g is not None:
        # Σ of g over j < s ≤ i, summed as such: a difference of sums would cancel, or be ∞ − ∞.
        g = x.g.view(n, C, G, 1)
        later = torch.ones(C, C, dtype=torch.bool, device=g.device).tril_(-1)[:, None]
        by_token.add_(torch.where(later, g, 0.0).cumsum(1).to(logits.dtype))
    distance = torch.arange(C, device=logits.device)
    distance = distance[:, None] - distance
    unseen = distance < 0
    if x.window is not None:
        unseen |= distance >= x.window
    by_token.masked_fill_(unseen[:, None], -math.inf)
    return logits


def join(pairs: list[Pairs], x: Heads, q: Tensor, k: Tensor, f: Tensor) -> Tensor:
    """Bring Q← and K→, in place, to the bounds of the joined blocks, and return their products."""
    G = x.group
    joined = [f[:, :0]]
    for pair in pairs:
        f_left, f_right = pair.split_products(f)
        if pair.has_queries(x.first_query):
            q_right = pair.split(q, G)[1]
            q_right.copy_(q_right @ f_left)
        if pair.right == pair.left:
            k_left = pair.split(k)[0]
            k_left.copy_(k_left @ f_right.mT)
            joined.append(f_right @ f_left)
    return torch.cat(joined, dim=1) if len(joined) > 2 else joined[-1]
