"""`path_attention` and its cache on a GPU as users call them: compiled, packed, of any length."""

import itertools

import pytest
import torch

from householder import PathCache, path_attention
from householder.testing import assert_as_accurate, path_attention_inputs, relative_error

pytestmark = pytest.mark.gpu

TOKENS = ("q", "k", "v", "w", "beta", "g")


def arrange(*sizes, **options):
    inputs = path_attention_inputs(*sizes, **{"dtype": torch.bfloat16, "device": "cuda", **options})
    return {
        name: x.requires_grad_() if x is not None and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def differentiate(inputs, do=None, call=path_attention, **options):
    """Return the output and the gradients of all that has one, by name."""
    leaves = {n: x for n, x in inputs.items() if x is not None and x.requires_grad}
    o = call(**inputs, **options)
    do = torch.ones_like(o) if do is None else do
    return {"o": o} | dict(zip(leaves, torch.autograd.grad(o, leaves.values(), do), strict=True))


def widen(inputs):
    return {
        n: x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x
        for n, x in inputs.items()
    }


@pytest.mark.parametrize("T", [2, 63, 64, 65, 127, 128, 129, 191, 257])
@pytest.mark.parametrize("decay", [None, 0.1])
def test_lengths_around_chunks_and_tiles(T, decay):
    inputs = arrange(2, T, 2, 64, 64, decay=decay)
    do = torch.randn(2, T, 2, 64, device="cuda", dtype=torch.bfloat16)
    actual = differentiate(inputs, do, impl="triton")
    expected = differentiate(widen(inputs), do.double(), impl="chunk")
    for name, e in expected.items():
        assert relative_error(actual[name], e) < 1.2e-2, name


@pytest.mark.parametrize(
    "options",
    [
        {"decay": None},
        {"decay": 0.1, "HQ": 4, "with_sinks": True, "window": 200},
        {"decay": None, "num_sequences": 5},
        {"decay": 0.1, "num_sequences": 5},
    ],
    ids=["plain", "gates, sinks, window", "packed", "packed, gates"],
)
def test_training_compiles_into_one_graph(options):
    options = dict(options)
    window = options.pop("window", None)
    inputs = arrange(1, 700, 2, 64, 64, **options)
    compiled = torch.compile(path_attention, fullgraph=True)
    actual = differentiate(inputs, window=window, call=compiled)
    for name, e in differentiate(inputs, window=window, impl="triton").items():
        assert torch.equal(actual[name], e), name


@pytest.mark.parametrize("decay", [None, 0.1])
@pytest.mark.parametrize("K", [64, 128])
def test_gradients_of_packed_sequences_are_those_alone(K, decay):
    inputs = arrange(1, 3000, 2, K, K, num_sequences=7, decay=decay)
    do = torch.randn(1, 3000, 2, K, device="cuda", dtype=torch.bfloat16)
    together = differentiate(inputs, do)
    bounds = inputs["cu_seqlens"].tolist()
    assert bounds[1] == 0, "an empty sequence must be among them"
    for start, end in itertools.pairwise(bounds):
        here = slice(None), slice(start, end)
        alone = {
            n: None if inputs[n] is None else inputs[n][here].detach().requires_grad_()
            for n in TOKENS
        }
        for name, x in differentiate(alone, do[here]).items():
            assert torch.equal(x, together[name][here]), name


@pytest.mark.parametrize("K", [64, 128])
def test_cotangents_that_are_views_count_as_what_they_show(K):
    """A sum's gradient is one number with strides of zero; others come transposed."""
    inputs = arrange(2, 700, 2, K, K, decay=None)
    drawn = torch.randn(2, 700, 2, K, device="cuda", dtype=torch.bfloat16)
    one = drawn.new_ones(1, 1, 1, 1)
    for view in (one.expand_as(drawn), drawn.mT.contiguous().mT):
        assert not view.is_contiguous()
        plain = differentiate(inputs, view.contiguous())
        for name, x in differentiate(inputs, view).items():
            assert relative_error(x, plain[name].double()) < 1e-2, name


@pytest.mark.parametrize("decay", [None, 0.1])
def test_function_transforms(decay):
    """Per-sample gradients are those one by one."""
    inputs = arrange(2, 300, 2, 64, 64, decay=decay)
    given = [inputs[n].detach() for n in TOKENS if inputs[n] is not None]

    def loss(*given):
        return path_attention(*given, impl="triton").float().sin().sum()

    each = torch.func.grad(loss, argnums=tuple(range(len(given))))
    stacked = [torch.stack([x, x.flip(0)]) for x in given]
    together = torch.func.vmap(each)(*stacked)
    for i in range(2):
        for a, b in zip(together, each(*(x[i] for x in stacked)), strict=True):
            assert relative_error(a[i], b.double()) < 1e-2


@pytest.mark.parametrize("decay", [None, 0.01])
def test_memory_does_not_grow_with_the_square_of_the_length(decay, monkeypatch):
    """Beside what is linear there is a copy of the queries for every level of the tree.

    Of long sequences, whose levels would take too much, not for all heads at once.
    """
    from householder.ops.path_attention.triton import portions

    def peak(T):
        inputs = arrange(1, T, 4, 128, 128, decay=decay)
        differentiate(inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        differentiate(inputs)
        return torch.cuda.max_memory_allocated() - before

    levels = {T: (T // 64 - 1).bit_length() for T in (8192, 32_768)}
    small, large = map(peak, levels)
    assert large < 4.2 * small * levels[32_768] / levels[8192]
    # In copies of the queries: of 32,768 logits a query would take 256.
    assert large < (2 * levels[32_768] + 20) * (32_768 * 4 * 128 * 2)
    monkeypatch.setattr(portions, "LEVEL_BYTES", 1)
    assert peak(32_768) < 0.75 * large


@pytest.mark.parametrize(
    "options",
    [
        {"decay": None},
        {"decay": 0.1, "HQ": 8, "with_sinks": True},
        {"decay": None, "num_sequences": 5},
    ],
    ids=["plain", "gates, sinks", "packed"],
)
def test_heads_in_portions_have_the_same_bits(options, monkeypatch):
    """So they go where the levels of all of them would take too much memory."""
    from householder.ops.path_attention.triton import portions

    inputs = arrange(1, 700, 4, 128, 128, **options)
    together = differentiate(inputs)
    monkeypatch.setattr(portions, "LEVEL_BYTES", 1)
    for name, x in differentiate(inputs).items():
        assert torch.equal(x, together[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("K", [64, 128])
def test_more_than_two_to_the_31_elements(K):
    """Of two packed sequences the second, behind so many numbers, is the one that it is alone."""
    H, last = 2048 // K, 3000
    # The copies of the queries at all levels of the tree.
    T = 131_072 + last
    assert T * H * K * (T // 64).bit_length() > 2**31
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(1, T, H, *shape, generator=draw, device="cuda", dtype=torch.bfloat16)

    inputs = {"q": normal(K), "k": normal(K), "v": normal(K), "beta": 2 * normal().sigmoid()}
    inputs["w"] = torch.nn.functional.normalize(normal(K), dim=-1)
    do = normal(K)
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    bounds = torch.tensor([0, T - last, T], device="cuda", dtype=torch.int32)
    together = differentiate(inputs, do, cu_seqlens=bounds)
    alone = {n: x[:, -last:].detach().requires_grad_() for n, x in inputs.items()}
    for name, x in differentiate(alone, do[:, -last:]).items():
        assert torch.equal(x, together[name][:, -last:]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_prompt_in_parts_is_the_whole_prompt(dtype):
    """Parts of any size, at once or few tokens long, with and without a block's end in them."""
    sizes = [100, 1, 64, 27, 300, 3, 128, 17, 0, 60]
    T = sum(sizes)
    inputs = path_attention_inputs(
        2, T, 2, 64, 64, HQ=4, decay=0.01, with_sinks=True, dtype=dtype, device="cuda"
    )
    cache, outputs, lo = PathCache(2), [], 0
    for size in sizes:
        here = [inputs[n][:, lo : lo + size] for n in TOKENS]
        outputs.append(cache.append(*here, sinks=inputs["sinks"]))
        lo += size
    whole = {n: x for n, x in inputs.items() if n != "cu_seqlens"}
    exact = path_attention(**{n: x.double() for n, x in whole.items()}, impl="chunk")
    plain = path_attention(**whole, impl="chunk")
    # Keys are rounded once per doubling, and so once to four times here.
    assert_as_accurate(torch.cat(outputs, dim=1), plain, exact, factor=3.0)
    assert cache.lengths == [T, T]
