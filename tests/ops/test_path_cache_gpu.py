"""The Triton kernels of `PathCache` on a GPU: every kind of cache, against float64."""

import pytest
import torch

from householder import PathCache, path_attention
from householder.ops.path_attention.cache.store import Store
from householder.testing import path_attention_inputs, relative_error

pytestmark = pytest.mark.gpu

TOKENS = ("q", "k", "v", "w", "beta", "g")
# Of one product with operands of that dtype; keys are rounded once more per doubling.
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 3e-6}

# B, HQ, H, K, V, mean decay, sinks, window, max_rollback
SHAPES = {
    "plain": (2, 4, 4, 128, 128, None, False, None, 0),
    "grouped heads, gates, sinks": (2, 8, 2, 64, 128, 0.01, True, None, 5),
    "window": (3, 2, 2, 128, 64, 0.01, False, 300, 0),
    "not powers of two": (1, 4, 4, 96, 80, None, True, None, 0),
    "wide": (1, 2, 1, 256, 256, 0.01, False, None, 0),
    "narrow, long roll-back": (1, 2, 2, 16, 16, None, False, 100, 100),
    "many query heads": (1, 40, 2, 64, 64, None, False, None, 0),
}


def arrange(shape, T, dtype):
    B, HQ, H, K, V, decay, with_sinks, window, max_rollback = SHAPES[shape]
    inputs = path_attention_inputs(
        B=B, T=T, HQ=HQ, H=H, K=K, V=V, decay=decay, with_sinks=with_sinks, dtype=dtype
    )
    inputs = {name: None if x is None else x.cuda() for name, x in inputs.items()}
    return inputs, window, PathCache(B, max_rollback=max_rollback)


def part(inputs, lo, hi, rows=slice(None)):
    return [None if inputs[n] is None else inputs[n][rows, lo:hi] for n in TOKENS]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_single_tokens_are_the_whole(shape, dtype):
    T, prompt = 700, 330
    inputs, window, cache = arrange(shape, T, dtype)
    options = {"sinks": inputs["sinks"], "window": window}
    wide = {name: None if x is None else x.double() for name, x in inputs.items()}
    exact = path_attention(**wide, window=window)
    assert PathCache(1)._store is None
    outputs = [cache.append(*part(inputs, 0, prompt), **options)]
    assert cache._store.has_kernels()
    for t in range(prompt, T):
        outputs.append(cache.append(*part(inputs, t, t + 1), **options))
    if cache.max_rollback:
        cache.rollback(3)
        outputs = outputs[:-3]
        for t in range(T - 3, T):
            outputs.append(cache.append(*part(inputs, t, t + 1), **options))
    o = torch.cat(outputs, dim=1)
    assert o.dtype == dtype
    assert relative_error(o[:, prompt:], exact[:, prompt:]) < LIMITS[dtype]


def test_a_row_does_not_depend_on_the_others():
    inputs, _, _ = arrange("plain", 400, torch.bfloat16)
    lengths, count = [150, 300], 70
    together = PathCache(2)
    together.append(*part(inputs, 0, 300), lengths=lengths)
    steps = []
    for i in range(count):
        tokens = [
            None
            if inputs[n] is None
            else torch.stack([inputs[n][b, lengths[b] + i] for b in (0, 1)])
            for n in TOKENS
        ]
        steps.append(together.append(*(None if x is None else x[:, None] for x in tokens)))
    for b, length in enumerate(lengths):
        alone = PathCache(1)
        rows = slice(b, b + 1)
        alone.append(*part(inputs, 0, length, rows))
        for i in range(count):
            o = alone.append(*part(inputs, length + i, length + i + 1, rows))
            assert torch.equal(o[0], steps[i][b])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_and_products_agree(dtype, monkeypatch):
    inputs, _, cache = arrange("plain", 500, dtype)
    other = PathCache(2)
    for c in (cache, other):
        c.append(*part(inputs, 0, 400))
    for t in range(400, 500):
        with monkeypatch.context() as patch:
            o = cache.append(*part(inputs, t, t + 1))
            patch.setattr(Store, "has_kernels", lambda self: False)
            expected = other.append(*part(inputs, t, t + 1))
        assert relative_error(o, expected) < LIMITS[dtype]
