"""What the Gluon kernels of `path_attention` compute, in float64 on a CPU (see gluon_arrays.py).

The rectangles are compared with loops over chunks and levels, what chunks have to themselves with
autograd through its definition.
"""

import math

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from householder.ops.path_attention.triton import (
    hopper_attend,
    hopper_chunk_back,
    hopper_key_back,
    hopper_leaf,
    hopper_prepare,
    hopper_query_back,
    problem,
)

from . import gluon_arrays as gluon

pytestmark = pytest.mark.usefixtures("in_float64")

LOG2_E = math.log2(math.e)
CLOSE = 1e-13

# B, T, H, query heads per key head, K, V, and the first token that has a query. More query heads
# than tiles in flight; a last tile of one chunk and of two, full and not; a sequence of two chunks.
CASES = [
    (1, 100, 1, 1, 16, 16, None),
    (2, 64 * 9, 1, 1, 16, 32, None),
    (1, 700, 2, 1, 32, 16, None),
    (1, 330, 1, 6, 16, 16, None),
    (2, 64 * 9, 1, 1, 16, 16, 128),
    (1, 700, 1, 2, 16, 16, 450),
    (1, 330, 1, 1, 16, 16, 329),
]


def product_of(f, batch, tiles, level, block):
    """Return the product of a block of one head."""
    return f[4 * batch * tiles // 2 + ((2 * block + 1) << level) - 1]


class Rectangles:
    """Queries, keys and products of all levels, and what attention needs beside them."""

    def __init__(self, B, T, H, group, K, V, first_query):
        self.sizes = B, T, H, group, K, V
        self.first_query = first_query
        self.tiles = -(-T // 128)
        self.chunks = -(-T // 64)
        self.levels = max(self.chunks - 1, 0).bit_length()
        self.rows = rows = B * self.tiles * 128
        heads = H * group
        self.q = 0.3 * torch.randn(self.levels, heads, rows, K)
        self.k = 0.3 * torch.randn(self.levels, H, rows, K)
        self.f = 0.2 * torch.randn(H, rows // 32, K, K)
        self.v, self.do = torch.randn(B, T, H, V), torch.randn(B, T, heads, V)
        self.lse = torch.full((heads, rows), math.inf)
        self.delta = torch.zeros(heads, rows)
        for b in range(B):
            inside = slice(b * self.tiles * 128, b * self.tiles * 128 + T)
            behind = slice(inside.stop, (b + 1) * self.tiles * 128)
            self.lse[:, inside], self.delta[:, inside] = torch.randn(2, heads, T)
            self.q[:, :, behind] = self.k[:, :, behind] = 0.0
            asking_nothing = slice(inside.start, inside.start + (first_query or 0))
            self.lse[:, asking_nothing] = math.inf
            self.q[:, :, asking_nothing] = self.delta[:, asking_nothing] = 0.0
        self.do[:, : first_query or 0] = 0.0
        # A chunk has queries where it is in a right block, and keys in a left one that has a right
        # neighbour; what it has not nobody wrote.
        for _, h, c, rows in self.places():
            for level in range(self.levels):
                block = c >> level
                if block % 2 == 0:
                    self.q[level, h * group : (h + 1) * group, rows] = math.nan
                if block % 2 == 1 or (block + 1) << level >= self.chunks:
                    self.k[level, h, rows] = math.nan

    def asks(self, chunk):
        """Return whether a query is in a chunk's tile, or in one before it."""
        return self.first_query is None or 128 * (chunk // 2 + 1) > self.first_query

    def places(self):
        """Yield batch row, key head, chunk and the chunk's rows."""
        B, _, H, *_ = self.sizes
        for b in range(B):
            for h in range(H):
                for c in range(self.chunks):
                    start = b * self.tiles * 128 + c * 64
                    yield b, h, c, slice(start, start + 64)

    def tokens(self, x, b, h):
        """Return a head's rows of `x [B, T, ·, D]`, with zeros to the end of the last tile."""
        return torch.nn.functional.pad(x[b, :, h], (0, 0, 0, self.tiles * 128 - self.sizes[1]))

    def rectangle(self, b, h, hq, level, first_query, last_query, first_key, last_key):
        """Return P and dA of one rectangle, given in chunks of the sequence."""
        origin = b * self.tiles * 128
        queries, keys = (
            slice(64 * first_query, 64 * last_query),
            slice(64 * first_key, 64 * last_key),
        )
        of_q = slice(origin + queries.start, origin + queries.stop)
        of_k = slice(origin + keys.start, origin + keys.stop)
        logits = self.q[level, hq, of_q] @ self.k[level, h, of_k].mT
        p = torch.exp2(logits * LOG2_E - self.lse[hq, of_q, None])
        dp = self.tokens(self.do, b, hq)[queries] @ self.tokens(self.v, b, h)[keys].mT
        return p, p * (dp - self.delta[hq, of_q, None]), of_q, of_k, queries

    def described(self, *names):
        """Return tensors by their names as what copies read: a matrix, or `[B, T, H · D]`."""
        B, T, *_ = self.sizes
        for name in names:
            x = getattr(self, name)
            rows = x.view(B, T, -1) if name in ("v", "do") else x.flatten(0, -2)
            yield gluon.Description(rows)


def empty(*shape):
    return torch.full(shape, torch.nan)


def assert_close(actual, expected):
    """Compare where something is expected."""
    there = ~expected.isnan()
    assert (actual[there] - expected[there]).abs().max() < CLOSE * expected[there].abs().max()


@pytest.mark.parametrize(("tiles", "sequences"), [(1, 1), (3, 7), (5, 40), (32, 6), (200, 3)])
@pytest.mark.parametrize("places", [16, 128])
def test_programs_work_on_every_tile_once_and_on_costly_ones_first(tiles, sequences, places):
    find = problem.locate_program.fn
    found = [find(i, tiles, sequences, places) for i in range(tiles * sequences)]
    assert sorted(found) == [(s, t) for s in range(sequences) for t in range(tiles)]
    for sequence in range(sequences):
        of_sequence = [tile for s, tile in found if s == sequence]
        assert of_sequence == sorted(of_sequence)
    # Those that take turns are at the same tile, and fill the places once.
    together = min(max(places // tiles, 1), sequences)
    assert found[:together] == [(s, 0) for s in range(together)]


@pytest.mark.parametrize("sizes", CASES)
def test_gradients_of_queries(sizes):
    x = Rectangles(*sizes)
    B, T, H, group, K, V, first_query = sizes
    heads = H * group
    expected, expected_levels = empty(heads, x.rows, K), empty(x.levels, heads, x.rows, K)
    for b, h, c, rows in x.places():
        for hq in range(h * group, (h + 1) * group):
            dq = torch.zeros(64, K)
            levels = [level for level in reversed(range(x.levels)) if (c >> level) % 2]
            for level in levels:
                left = (c >> level) - 1
                if level != levels[0] and x.asks(c):
                    expected_levels[level, hq, rows] = dq
                    dq = dq @ product_of(x.f[h], b, 2 * x.tiles, level, left).mT
                keys = left << level, (left + 1) << level
                _, da, _, of_k, _ = x.rectangle(b, h, hq, level, c, c + 1, *keys)
                dq = dq + da @ x.k[level, h, of_k]
            expected[hq, rows] = dq
    actual, actual_levels = torch.empty_like(expected), torch.empty_like(expected_levels)
    gluon.run(
        hopper_query_back.query_kernel, B * x.tiles * heads, *x.described("q", "k", "v", "do", "f"),
        *map(gluon.Pointer, (x.lse, x.delta, actual_levels, actual)), None, None, None, T,
        B * x.tiles, H, first_query, V, V, group, K, V, False, 2,
    )  # fmt: skip
    assert_close(actual, expected)
    if not expected_levels.isnan().all():
        assert_close(actual_levels, expected_levels)


@pytest.mark.parametrize("sizes", CASES)
@pytest.mark.parametrize("tile", [64, 128])
def test_gradients_of_keys_and_values(tile, sizes):
    x = Rectangles(*sizes)
    B, T, H, group, K, V, first_query = sizes
    expected, expected_values = empty(H, x.rows, K), empty(H, x.rows, V)
    expected_levels = empty(x.levels, H, x.rows, K)
    for b, h, c, rows in x.places():
        dk, dv = torch.zeros(64, K), torch.zeros(64, V)
        levels = [
            level
            for level in reversed(range(x.levels))
            if (c >> level) % 2 == 0 and ((c >> level) + 1) << level < x.chunks
        ]
        for level in levels:
            right = (c >> level) + 1
            if level != levels[0]:
                expected_levels[level, h, rows] = dk
                dk = dk @ product_of(x.f[h], b, 2 * x.tiles, level, right)
            queries = right << level, min((right + 1) << level, x.chunks)
            for hq in range(h * group, (h + 1) * group):
                p, da, of_q, _, seen = x.rectangle(b, h, hq, level, *queries, c, c + 1)
                dk = dk + da.mT @ x.q[level, hq, of_q]
                dv = dv + p.mT @ x.tokens(x.do, b, hq)[seen]
        expected[h, rows], expected_values[h, rows] = dk, dv
    actual, actual_values = torch.empty_like(expected), torch.empty_like(expected_values)
    actual_levels = torch.empty_like(expected_levels)
    gluon.run(
        hopper_key_back.key_kernel, B * x.tiles * H, *x.described("q", "q", "k", "v", "do", "f"),
        *map(gluon.Pointer, (x.lse, x.delta, actual_levels, actual, actual_values)), None, None,
        None, T, B * x.tiles, H, first_query, V, V, group, K, V, False, tile, 4,
    )  # fmt: skip
    assert_close(actual, expected)
    assert_close(actual_values, expected_values)
    if not expected_levels.isnan().all():
        assert_close(actual_levels, expected_levels)


@pytest.mark.parametrize("sizes", CASES)
def test_attention(sizes):
    x = Rectangles(*sizes)
    B, T, H, group, K, V, first_query = sizes
    heads = H * group
    # The weights in a chunk behind the sequence's end stay NaN.
    x.weights, own_lse = empty(heads, x.rows, 64), torch.randn(B, T, heads)
    sinks = torch.randn(heads)
    expected, expected_lse = empty(B, T, heads, V), empty(B, T, heads)
    for b, h, c, rows in x.places():
        for hq in range(h * group, (h + 1) * group):
            inside = slice(64 * c, min(64 * (c + 1), T))
            n = inside.stop - inside.start
            p = x.weights[hq, rows] = torch.randn(64, 64).softmax(1)
            total = torch.exp2(own_lse[b, inside, hq, None])
            own = torch.cat([x.v[b, inside, h], torch.zeros(64 - n, V)])
            o = total * (p @ own)[:n]
            total = total + sinks[hq].exp()
            levels = [level for level in range(x.levels) if (c >> level) % 2]
            if levels:
                q = x.q[levels[0], hq, rows][:n]
            for level in levels:
                left = (c >> level) - 1
                keys = slice((left << level) * 64, ((left + 1) << level) * 64)
                of_k = slice(keys.start + b * x.tiles * 128, keys.stop + b * x.tiles * 128)
                p = torch.exp(q @ x.k[level, h, of_k].mT)
                o, total = o + p @ x.tokens(x.v, b, h)[keys], total + p.sum(1, keepdim=True)
                q = q @ product_of(x.f[h], b, 2 * x.tiles, level, left)
            if x.asks(c):
                expected[b, inside, hq], expected_lse[b, inside, hq] = o / total, total.log()[:, 0]
    actual, actual_lse = empty(B, T, heads, V), own_lse.clone()
    gluon.run(
        hopper_attend.attend_kernel, B * x.tiles * heads,
        *x.described("q", "k", "v", "f", "weights"),
        *map(gluon.Pointer, (sinks, actual, actual_lse)),
        None, None, None, T, B * x.tiles, H, first_query, V, group, K, V, False, 2,
    )  # fmt: skip
    assert_close(actual, expected)
    assert_close(actual_lse, expected_lse)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("K", [64, 112, 128])
@pytest.mark.parametrize(
    ("chunk", "first_query"), [(1, None), (2, None), (3, None), (4, None), (6, None), (2, 261),
                               (3, 261), (4, 261)]
)  # fmt: skip
def test_products_of_chunks(chunk, first_query, K, wide):
    chunks, rows = 8, 512
    length, beside, above = rows - 20, chunk ^ 1, chunk // 2
    levels, gradients = torch.randn(2, rows, K)
    w, f, df = torch.randn(length, K), torch.randn(rows // 32, K, K), torch.randn(rows // 64, K, K)
    x, dx = (y[64 * beside : 64 * beside + 64] for y in (levels, gradients))
    passes = 0 < above < (chunks - 1) // 2
    if chunk % 2 == 0 and 128 * (above + 1) <= (first_query or 0):
        expected = passes * f[2 * beside].mT @ df[2 * above]
        dx[:] = math.nan
    elif chunk % 2 == 0:
        expected = x.mT @ dx + passes * f[2 * beside].mT @ df[2 * above]
    else:
        expected = dx.mT @ x + passes * df[2 * above] @ f[2 * beside].mT
    w_c = w[64 * chunk : 64 * chunk + 64]
    wdf, wdft = empty(rows, K), empty(rows, K)
    gluon.run(
        hopper_leaf.leaf_kernel, chunks,
        *map(gluon.Pointer, (levels, gradients, w, f, df, wdf, wdft)), None, None, None, length,
        rows // 128, 1, first_query, 0, 0, K, K, False, -(-K // 64), wide,
    )  # fmt: skip
    of_chunk = slice(64 * chunk, 64 * chunk + 64)
    assert_close(wdf[of_chunk], w_c @ expected)
    assert_close(wdft[of_chunk], w_c @ expected.mT)


def chunk_by_definition(q, k, v, w, beta, scale, other, other_v):
    """Return what a chunk gives: o and lse of its rows, scaled Q←, K→ and F.

    The rows see one key more, of logit `other` and value `other_v`, for all that lies before.
    """
    m = (beta[:, None] * (w @ w.mT)).tril(-1)
    t = torch.linalg.inv(torch.eye(64) + m)
    e, z = t @ (beta[:, None] * (w @ k.mT).tril(-1)), t @ (beta[:, None] * w)
    x = (q @ w.mT).tril()
    logits = scale * (q @ k.mT - x @ e)
    logits = logits.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    logits = torch.cat([logits, other[:, None]], 1)
    p = logits.softmax(1)
    o = p[:, :64] @ v + p[:, 64:] * other_v
    rest = (scale * (q - x @ z), k - e.mT @ w, torch.eye(w.shape[1]) - w.mT @ z)
    return o, logits.logsumexp(1), t, rest


def invert(minus):
    """Return (I − m)⁻¹ for the strictly lower part m of `minus`, in shared memory."""
    return gluon.Shared(torch.linalg.inv(torch.eye(64) - minus.tril(-1)))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("attends", [False, True])
@pytest.mark.parametrize(("K", "chunk", "T"), [(128, 1, 512), (64, 2, 300), (112, 4, 300)])
def test_what_chunks_have_to_themselves(K, chunk, T, attends, wide, monkeypatch):
    monkeypatch.setattr(hopper_prepare, "invert_unit_lower", invert)
    scale, rows, start = K**-0.5, -(-T // 128) * 128, 64 * chunk
    chunks, n = rows // 64, min(T - start, 64)
    valid = (torch.arange(64) < n)[:, None]
    q, k = torch.randn(2, T, K)
    v, beta = torch.randn(T, K), 2 * torch.rand(T)
    w = torch.nn.functional.normalize(torch.randn(T, K), dim=1)
    own = [
        valid * torch.nn.functional.pad(x[start : start + 64], (0, 0, 0, 64 - n))
        for x in (q, k, v, w, beta[:, None])
    ]
    unseen = torch.full((64,), -torch.inf), torch.zeros(64, K)
    o, lse, t, (q_start, k_end, f) = chunk_by_definition(*own[:4], own[4][:, 0], scale, *unseen)
    number = (chunks - 1).bit_length()
    queries, keys = empty(number, rows, K), empty(number, rows, K)
    products = empty(2 * chunks, K, K)
    inverse, weights, sums = empty(chunks, 64, 64), empty(chunks, 64, 64), empty(T)
    given = [gluon.Pointer(x) for x in (q, k, w, beta, queries, keys, products)]
    kept = [gluon.Pointer(inverse)]
    kept += [gluon.Pointer(x) if attends else None for x in (weights, sums)]
    gluon.run(
        hopper_prepare.prepare_kernel, chunks, *given, *kept, None, None, None, scale, T, 1, rows,
        number, *(0, 0) * 3, 0, 1, 0, K, K, K, K, False, -(-K // 64), wide,
    )  # fmt: skip
    of_chunk = slice(start, start + 64)
    assert_close(inverse[chunk], t)
    assert_close(products[2 * chunk], f)
    query_level = (chunk & -chunk).bit_length() - 1
    key_level = (~chunk & (chunk + 1)).bit_length() - 1
    assert_close(queries[query_level, of_chunk], q_start)
    if ((chunk >> key_level) + 1) << key_level < -(-T // 64):
        assert_close(keys[key_level, of_chunk], k_end)
    else:
        assert keys[:, of_chunk].isnan().all()
    if attends:
        assert_close((weights[chunk] @ own[2])[:n], o[:n])
        assert (weights[chunk] >= 0).all()
        assert (weights[chunk].triu(1) == 0).all()
        assert_close(sums[of_chunk], lse[:n] * LOG2_E)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("K", "V", "n", "chunk", "chunks"),
    [(128, 128, 64, 1, 4), (64, 64, 64, 2, 4), (128, 64, 64, 0, 4), (64, 128, 40, 3, 4)],
)
def test_gradients_inside_a_chunk(K, V, n, chunk, chunks, wide):
    scale, length, rows = K**-0.5, 64 * (chunks - 1) + 40 if n < 64 else 64 * chunks, 64 * chunks
    valid = (torch.arange(64) < n)[:, None]
    q, k = valid * torch.randn(2, 64, K)
    v, do, dv = valid * torch.randn(3, 64, V)
    w = valid * torch.nn.functional.normalize(torch.randn(64, K), dim=1)
    beta = 2 * torch.rand(64) * valid[:, 0]
    inputs = [x.requires_grad_() for x in (q, k, v, w, beta)]
    o, lse, t, rest = chunk_by_definition(*inputs, scale, torch.randn(64), torch.randn(64, V))
    dq, dk = valid * torch.randn(2, 64, K)
    df = torch.randn(K, K) if 0 < chunk < chunks - 1 else torch.zeros(K, K)
    pairs = ((o, valid * do), *zip(rest, (dq, dk, df), strict=True), (v, dv))
    expected = torch.autograd.grad(sum((x * dx).sum() for x, dx in pairs), inputs)

    def at(x, size):
        """Put rows where the chunk is, among NaN."""
        x = x.detach().view(64, -1)[: size - 64 * chunk]
        whole = empty(size, x.shape[1])
        whole[64 * chunk : 64 * chunk + len(x)] = x
        return gluon.Pointer(whole)

    delta = (valid * do * o).sum(1)
    inverse = empty(chunks, 64, 64)
    inverse[chunk] = t.detach()
    products = (w @ df, w @ df.mT) if df.any() else (empty(64, K), empty(64, K))
    outputs = [empty(length, x.shape[1]) for x in (q, k, v, w)] + [empty(length, 1)]
    lse = torch.where(valid[:, 0], lse, torch.inf)
    tokens = [at(x, length) for x in (q, k, v, w, beta, o, do, lse)]
    strides = (0, 0) * 4 + (0, 1, 0) + (0, 0) * 2
    gluon.run(
        hopper_chunk_back.chunk_kernel, chunks, *tokens, at(delta, rows), gluon.Pointer(inverse),
        *(at(x, rows) for x in (dq, dk, dv, *products)), *map(gluon.Pointer, outputs),
        None, None, None, scale, length, chunks // 2, 1, *strides, K, K, V, K, V, V, K, V, False,
        K // 64, V // 64, wide,
    )  # fmt: skip
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual[64 * chunk : 64 * chunk + n], wanted[:n].view(n, -1))
