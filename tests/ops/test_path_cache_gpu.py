"""The Triton kernels of `PathCache` on a GPU: every kind of cache, against float64."""

import math

import pytest
import torch

from householder import PathCache, path_attention
from householder.ops.path_attention.cache.store import Store
from householder.testing import assert_as_accurate, path_attention_inputs, relative_error

pytestmark = [
    pytest.mark.gpu,
    # Of sums in PyTorch, where only memory filled with NaN is asked for.
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]

TOKENS = ("q", "k", "v", "w", "beta", "g")
HALF = [torch.bfloat16, torch.float16]
EVERY = [*HALF, torch.float32]

# Arguments of `path_attention_inputs`, `window` and `max_rollback`, and the dtypes to try.
SHAPES = {
    "narrow": ({"B": 2, "H": 2, "K": 64, "V": 64, "decay": None}, EVERY),
    "wide": ({"B": 1, "H": 2, "K": 128, "V": 128, "decay": None}, EVERY),
    "grouped heads, gates, sinks": (
        {"B": 2, "H": 2, "HQ": 8, "K": 64, "V": 128, "decay": 0.01, "with_sinks": True,
         "max_rollback": 5}, EVERY,
    ),
    "window": ({"B": 2, "H": 1, "K": 128, "V": 64, "decay": 0.01, "window": 300}, EVERY),
    "short window": ({"B": 1, "H": 2, "K": 64, "V": 64, "decay": None, "window": 9}, HALF[:1]),
    "not powers of two": ({"B": 1, "H": 2, "K": 96, "V": 80, "decay": None, "with_sinks": True},
                          EVERY),
    "odd": ({"B": 1, "H": 1, "K": 20, "V": 12, "decay": 0.01}, HALF[:1]),
    "widest": ({"B": 1, "H": 1, "HQ": 2, "K": 256, "V": 256, "decay": 0.01}, EVERY),
    "narrowest, long roll-back": (
        {"B": 1, "H": 2, "K": 16, "V": 16, "decay": None, "max_rollback": 100}, HALF[:1],
    ),
    "many query heads": ({"B": 1, "H": 2, "HQ": 40, "K": 64, "V": 64, "decay": None}, EVERY),
    "reflections": ({"B": 1, "H": 1, "K": 64, "V": 64, "decay": None, "strength": 2.0}, HALF),
    "strong gates": ({"B": 1, "H": 1, "K": 64, "V": 64, "decay": 20.0}, HALF[:1]),
}  # fmt: skip
PROMPT = 330
# One by one over two blocks, and then as many as the kernels take and more, over three.
STEPS = [*[1] * 125, 2, 16, 5, 16, 1, 7, 16, 3, 16, 16, 4, 1, 16, 13, 1, 40, 1, 1]
T = PROMPT + sum(STEPS)
CASES = [(name, dtype) for name, (_, dtypes) in SHAPES.items() for dtype in dtypes]


@pytest.fixture
def poisoned():
    """Fill memory that is not initialised with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def arrange(name, dtype):
    shape = dict(SHAPES[name][0])
    options = {"window": shape.pop("window", None)}
    max_rollback = shape.pop("max_rollback", 0)
    inputs = path_attention_inputs(**shape, T=T, dtype=dtype, device="cuda")
    options["sinks"] = inputs["sinks"]
    return inputs, options, PathCache(shape["B"], max_rollback=max_rollback)


def part(inputs, lo, hi, rows=slice(None)):
    return [None if inputs[n] is None else inputs[n][rows, lo:hi] for n in TOKENS]


def append_in_parts(cache, inputs, options, lo, sizes):
    outputs = []
    for size in sizes:
        outputs.append(cache.append(*part(inputs, lo, lo + size), **options))
        lo += size
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_new_tokens_are_as_accurate_as_the_whole(name, dtype, poisoned):
    inputs, options, cache = arrange(name, dtype)
    cache.append(*part(inputs, 0, PROMPT), **options)
    assert cache._store.has_kernels()
    o = append_in_parts(cache, inputs, options, PROMPT, STEPS)
    assert o.dtype == dtype
    assert cache.lengths == [T] * cache.batch_size
    torch.use_deterministic_algorithms(False)
    whole = {n: x for n, x in inputs.items() if n != "cu_seqlens"}
    wide = {n: None if x is None else x.double() for n, x in whole.items()}
    exact = path_attention(**wide, window=options["window"])[:, PROMPT:]
    plain = path_attention(**whole, window=options["window"], impl="chunk")[:, PROMPT:]
    # Keys are rounded once per doubling, and so once to four times here.
    assert_as_accurate(o, plain, exact, factor=3.0)


def test_the_same_bits_again(poisoned):
    def run():
        inputs, options, cache = arrange("grouped heads, gates, sinks", torch.bfloat16)
        cache.append(*part(inputs, 0, PROMPT), **options)
        return append_in_parts(cache, inputs, options, PROMPT, STEPS)

    assert torch.equal(run(), run())


@pytest.mark.parametrize("n", [1, 3, 16])
def test_a_row_does_not_depend_on_the_others(n):
    inputs, options, _ = arrange("grouped heads, gates, sinks", torch.bfloat16)
    lengths, count = [150, 330], 144 // n
    together = PathCache(2)
    together.append(*part(inputs, 0, 330), **options, lengths=lengths)
    steps = []
    for i in range(count):
        at = [
            part(inputs, x + n * i, x + n * (i + 1), slice(b, b + 1)) for b, x in enumerate(lengths)
        ]
        steps.append(together.append(*(torch.cat(x) for x in zip(*at, strict=True)), **options))
    for b, length in enumerate(lengths):
        alone, rows = PathCache(1), slice(b, b + 1)
        alone.append(*part(inputs, 0, length, rows), **options)
        for i in range(count):
            lo = length + n * i
            o = alone.append(*part(inputs, lo, lo + n, rows), **options)
            assert torch.equal(o[0], steps[i][b])


@pytest.mark.parametrize("name", ["narrow", "grouped heads, gates, sinks"])
def test_any_number_of_programs_brings_queries_to_blocks(name, monkeypatch):
    """How many there are depends on the batch, and a row's output must not."""
    pytest.importorskip("triton")
    from householder.ops._recording import forget_recordings
    from householder.ops.path_attention.cache import triton as kernels

    inputs, options, _ = arrange(name, torch.bfloat16)

    def run():
        forget_recordings()
        _, _, cache = arrange(name, torch.bfloat16)
        cache.append(*part(inputs, 0, PROMPT), **options)
        return append_in_parts(cache, inputs, options, PROMPT, [1] * 70)

    many = run()
    monkeypatch.setattr(kernels, "PATH_PROGRAMS", 1)
    few = run()
    forget_recordings()
    assert torch.equal(many, few)


def test_tokens_from_the_first_one_on(poisoned):
    """Into a cache that holds nothing, and no block for some time."""
    inputs, options, cache = arrange("grouped heads, gates, sinks", torch.bfloat16)
    o = append_in_parts(cache, inputs, options, 0, [*[1] * 70, 3, 16, 1])
    torch.use_deterministic_algorithms(False)
    few = dict(zip(TOKENS, part(inputs, 0, o.shape[1]), strict=True)) | {"sinks": inputs["sinks"]}
    wide = {n: None if x is None else x.double() for n, x in few.items()}
    plain = path_attention(**few, impl="chunk")
    assert_as_accurate(o, plain, path_attention(**wide), factor=3.0)


def test_rows_get_as_many_tokens_as_they_are_given(poisoned):
    """What `lengths` leaves out has no output and no effect, whatever is there."""
    inputs, options, _ = arrange("grouped heads, gates, sinks", torch.bfloat16)
    cache, lo = PathCache(2), [PROMPT, PROMPT]
    cache.append(*part(inputs, 0, PROMPT), **options)
    outputs = [[], []]
    for counts in [(1, 0), (0, 1), (5, 2), (16, 16), (0, 9), (16, 1), (3, 16), *[(8, 11)] * 10]:
        n = max(counts)
        tokens = []
        for x in part(inputs, 0, n):
            x = torch.full_like(x, math.nan)
            tokens.append(x)
        for b, count in enumerate(counts):
            for x, here in zip(tokens, part(inputs, lo[b], lo[b] + count), strict=True):
                x[b, :count] = here[b]
        o = cache.append(*tokens, **options, lengths=counts)
        for b, count in enumerate(counts):
            outputs[b].append(o[b, :count])
            assert not o[b, count:].any()
            lo[b] += count
    assert cache.lengths == lo
    torch.use_deterministic_algorithms(False)
    whole = {n: x for n, x in inputs.items() if n != "cu_seqlens"}
    exact = path_attention(**{n: x.double() for n, x in whole.items()})
    plain = path_attention(**whole, impl="chunk")
    for b in (0, 1):
        here = b, slice(PROMPT, lo[b])
        assert_as_accurate(torch.cat(outputs[b]), plain[here], exact[here], factor=3.0)


def test_rows_get_fewer_tokens_where_there_is_room_for_no_more():
    """The kernels hold the places of new tokens to the room less as many as there are in all."""
    inputs, options, cache = arrange("narrow", torch.bfloat16)
    other = PathCache(2)
    cache.reserve(PROMPT + 4)
    for c in (cache, other):
        c.append(*part(inputs, 0, PROMPT), **options)
    for lo, lengths in ((PROMPT, [1, 3]), (PROMPT + 3, [1, 1])):
        tokens = part(inputs, lo, lo + 16)
        o = cache.append(*tokens, **options, lengths=lengths)
        for i in range(max(lengths)):
            given = [int(i < n) for n in lengths]
            one = [None if x is None else x[:, i : i + 1] for x in tokens]
            expected = other.append(*one, **options, lengths=given)
            for b in range(2):
                if given[b]:
                    eps = torch.finfo(torch.bfloat16).eps
                    assert relative_error(o[b, i], expected[b, 0]) < 4 * eps
    assert cache.lengths == other.lengths == [PROMPT + 2, PROMPT + 4]


@pytest.mark.parametrize("max_rollback", [16, 100])
def test_what_is_taken_back_leaves_no_trace(max_rollback):
    inputs, options, _ = arrange("grouped heads, gates, sinks", torch.bfloat16)
    guesses = path_attention_inputs(
        B=2, T=16, H=2, HQ=8, K=64, V=128, decay=1.0, dtype=torch.bfloat16, device="cuda", seed=1
    )
    caches = [PathCache(2, max_rollback=max_rollback) for _ in range(2)]
    for cache in caches:
        cache.append(*part(inputs, 0, PROMPT), **options)
    lo = PROMPT
    for n in [3, 16, 1, 7, 16, 16, 2, 16, 16, 16, 11, 1]:
        caches[0].append(*part(guesses, 0, n), **options)
        caches[0].rollback(n)
        o, expected = (cache.append(*part(inputs, lo, lo + n), **options) for cache in caches)
        # Blocks may be made at other times, and roundings differ.
        assert relative_error(o, expected) < 4 * torch.finfo(torch.bfloat16).eps
        lo += n


@pytest.mark.parametrize("n", [1, 4])
def test_a_graph_is_replayed_while_blocks_are_made(n):
    inputs, options, cache = arrange("grouped heads, gates, sinks", torch.bfloat16)
    other = PathCache(2, max_rollback=5)
    for c in (cache, other):
        c.reserve(T)
        c.append(*part(inputs, 0, PROMPT), **options)
        c.append(*part(inputs, PROMPT, PROMPT + n), **options)
    lo = PROMPT + n
    static = [x.clone() for x in part(inputs, lo, lo + n)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = cache.append(*static, **options)
    assert cache.lengths == [lo, lo]  # what is captured has not happened yet
    for _ in range(200 // n):
        for x, here in zip(static, part(inputs, lo, lo + n), strict=True):
            x.copy_(here)
        graph.replay()
        cache.replayed()
        assert torch.equal(o, other.append(*part(inputs, lo, lo + n), **options))
        lo += n
    assert cache.lengths == other.lengths == [lo, lo]


@pytest.mark.parametrize("n", [1, 4])
def test_guesses_are_taken_back_between_replays(n):
    inputs, options, _ = arrange("grouped heads, gates, sinks", torch.bfloat16)
    guesses = path_attention_inputs(
        B=2, T=3 * n, H=2, HQ=8, K=64, V=128, decay=1.0, dtype=torch.bfloat16, device="cuda", seed=1
    )
    cache, other = (PathCache(2, max_rollback=12) for _ in range(2))
    for c in (cache, other):
        c.reserve(T)
        c.append(*part(inputs, 0, PROMPT), **options)
        c.append(*part(inputs, PROMPT, PROMPT + n), **options)
    static = [x.clone() for x in part(inputs, 0, n)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = cache.append(*static, **options)

    def replay(tokens):
        for x, here in zip(static, tokens, strict=True):
            x.copy_(here)
        graph.replay()
        cache.replayed()

    for i in range(40):
        lo = PROMPT + n * (i + 1)
        for guess in range(i % 3):
            replay(part(guesses, guess * n, (guess + 1) * n))
        cache.rollback(i % 3 * n)
        replay(part(inputs, lo, lo + n))
        expected = other.append(*part(inputs, lo, lo + n), **options)
        # Blocks may be made at other times, and roundings differ.
        assert relative_error(o, expected) < 4 * torch.finfo(torch.bfloat16).eps
    assert cache.lengths == other.lengths


def test_graphs_of_several_numbers_of_tokens_are_replayed_by_turns():
    inputs, options, _ = arrange("grouped heads, gates, sinks", torch.bfloat16)
    cache, other = (PathCache(2, max_rollback=5) for _ in range(2))
    for c in (cache, other):
        c.reserve(T)
        c.append(*part(inputs, 0, PROMPT), **options)
    lo, graphs = PROMPT, {}
    for n in (1, 4):
        for c in (cache, other):
            c.append(*part(inputs, lo, lo + n), **options)
        lo += n
        static, graph = [x.clone() for x in part(inputs, lo, lo + n)], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs[n] = graph, static, cache.append(*static, **options)
    for i in range(60):
        n = 4 if i % 3 else 1
        graph, static, o = graphs[n]
        for x, here in zip(static, part(inputs, lo, lo + n), strict=True):
            x.copy_(here)
        graph.replay()
        cache.replayed(n)
        assert torch.equal(o, other.append(*part(inputs, lo, lo + n), **options))
        lo += n
    assert cache.lengths == other.lengths == [lo, lo]


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_what_a_graph_cannot_hold_is_refused():
    inputs, options, cache = arrange("narrow", torch.bfloat16)
    cache.append(*part(inputs, 0, PROMPT), **options)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="what a CUDA graph captures must be 1 to 16 tokens"),
        torch.cuda.graph(graph),
    ):
        cache.append(*part(inputs, PROMPT, PROMPT + 1), **options)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_kernels_and_products_agree(dtype, monkeypatch):
    """Tokens by turns from the kernels and from PyTorch's products, in one cache."""
    inputs, options, cache = arrange("grouped heads, gates, sinks", dtype)
    other = PathCache(2)
    for c in (cache, other):
        c.append(*part(inputs, 0, PROMPT), **options)
    lo = PROMPT
    for i, n in enumerate([1, 5, 16, 1, 2, 16, 9, 16, 16, 1, 16, 4]):
        o = cache.append(*part(inputs, lo, lo + n), **options)
        with monkeypatch.context() as patch:
            if i % 2:
                patch.setattr(Store, "has_kernels", lambda self: False)
            expected = other.append(*part(inputs, lo, lo + n), **options)
        # The errors of both: in float32 each is about 3e-7.
        assert relative_error(o, expected) < 8 * torch.finfo(dtype).eps
        lo += n
        other._counts_known = False


def test_decoding_does_not_drift():
    """After 8,192 single tokens the outputs are as exact as after a fresh prefill of as many."""
    count, tail = 8192, 128
    inputs = path_attention_inputs(
        B=1, T=count, H=2, K=64, V=64, strength=2.0, decay=None, dtype=torch.bfloat16, device="cuda"
    )
    whole = [inputs[n] for n in TOKENS]
    exact = path_attention(*(None if x is None else x.double() for x in whole), impl="chunk")
    cache, fresh = PathCache(1), PathCache(1)
    cache.reserve(count)
    decoded = append_in_parts(cache, inputs, {}, 0, [1] * count)[:, -tail:]
    prefilled = append_in_parts(fresh, inputs, {}, 0, [count - tail, tail])[:, -tail:]
    drifted = relative_error(decoded, exact[:, -tail:])
    assert drifted <= 1.05 * relative_error(prefilled, exact[:, -tail:])


def test_sequences_are_selected_from_either_side():
    """Which ones is known on the host or on the device."""
    inputs, options, cache = arrange("narrow", torch.bfloat16)
    cache.append(*part(inputs, 0, PROMPT), **options)
    outputs = []
    for device in ("cpu", "cuda"):
        chosen = cache.select(torch.tensor([1, 1, 0], device=device))
        here = [None if x is None else x[[1, 1, 0]] for x in part(inputs, PROMPT, PROMPT + 1)]
        outputs.append(chosen.append(*here, **options))
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0][:2], outputs[0][[1, 0]])


def test_batches_larger_than_an_axis_of_a_grid():
    """Of a grid's second axis, 65,535 programs long, the last heads would have none."""
    B, count = 4100, 64 + 2
    inputs = path_attention_inputs(
        B=B, T=count, H=16, K=16, V=16, decay=None, dtype=torch.bfloat16, device="cuda"
    )
    expected = path_attention(*(inputs[n] for n in TOKENS))[:, -1:]
    cache, last = PathCache(B), PathCache(1)
    for c, rows in ((cache, slice(None)), (last, slice(B - 1, B))):
        c.append(*part(inputs, 0, count - 1, rows))
        assert c.has_kernels
    o = cache.append(*part(inputs, count - 1, count))
    assert relative_error(o, expected.double()) < 1e-2
    assert torch.equal(o[-1:], last.append(*part(inputs, count - 1, count, slice(B - 1, B))))


def test_views_are_read_through_their_strides():
    """Heads of one projection, and rows of a larger batch, are not copied and not mixed up."""
    inputs, options, cache = arrange("narrow", torch.bfloat16)
    other = PathCache(2)
    for c in (cache, other):
        c.append(*part(inputs, 0, PROMPT), **options)
    compact = part(inputs, PROMPT, PROMPT + 3)
    views = []
    for x in compact:
        if x is None:
            views.append(None)
            continue
        wide = torch.full((4, 2, 5, *x.shape[2:]), math.nan, dtype=x.dtype, device="cuda")
        view = wide[1:3, 1, :3]
        view.copy_(x)
        views.append(view)
    o = cache.append(*views, **options)
    assert torch.equal(o, other.append(*(None if x is None else x.contiguous() for x in compact)))
