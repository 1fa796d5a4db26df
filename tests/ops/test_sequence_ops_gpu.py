"""`delta_product` and `path_attention` on a GPU: the same bits always, and nothing waits for it."""

import pytest
import torch

from householder import PathCache, delta_product, delta_product_step, path_attention
from householder.testing import delta_product_inputs, path_attention_inputs

pytestmark = pytest.mark.gpu

OPTIONS = {"qk_norm": "l2", "beta_activation": "2sigmoid"}
TOKENS = ("q", "k", "v", "w", "beta", "g")

# Whose arguments, and which: one chunk after the other, in segments (beyond 4,096 tokens), packed.
CALLS = {
    "delta": (delta_product, {"T": 300, "N": 2, "H": 2, "K": 64, "V": 64, "HV": 4}),
    "delta, long": (delta_product, {"T": 9000, "N": 1, "H": 2, "K": 128, "V": 128, "decay": None}),
    "delta, long, gated": (delta_product, {"T": 9000, "N": 2, "H": 2, "K": 64, "V": 128}),
    "delta, long, packed": (
        delta_product, {"B": 1, "T": 20_000, "N": 1, "H": 2, "K": 64, "V": 64, "num_sequences": 3},
    ),
    "delta, float32": (
        delta_product, {"T": 300, "N": 1, "H": 2, "K": 64, "V": 64, "dtype": torch.float32},
    ),
    "delta, options": (
        lambda **x: delta_product(**x, **OPTIONS), {"T": 300, "N": 2, "H": 2, "K": 64, "V": 64},
    ),
    "path": (path_attention, {"T": 2500, "H": 2, "K": 128, "V": 128, "decay": None}),
    "path, gated": (
        path_attention, {"T": 700, "H": 2, "HQ": 4, "K": 64, "V": 64, "with_sinks": True},
    ),
    "path, packed": (
        path_attention, {"B": 1, "T": 2500, "H": 2, "K": 64, "V": 64, "num_sequences": 7},
    ),
}  # fmt: skip


def arrange(name):
    call, options = CALLS[name]
    make = path_attention_inputs if call is path_attention else delta_product_inputs
    return call, make(**{"dtype": torch.bfloat16, "device": "cuda", **options})


def step(call, inputs):
    """Return outputs and all gradients, of leaves of their own: a graph has its own stream."""
    given = {
        n: x if x is None else x.detach().requires_grad_(x.is_floating_point())
        for n, x in inputs.items()
    }
    outputs = call(**given)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    leaves = [x for x in given.values() if x is not None and x.requires_grad]
    ones = [torch.ones_like(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, ones)]


@pytest.mark.parametrize("name", CALLS)
def test_a_step_of_training_waits_for_nothing_and_is_captured(name, nothing_waits):
    call, inputs = arrange(name)
    step(call, inputs)  # compiles the kernels
    with nothing_waits():
        expected = step(call, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(call, inputs)
    for x in captured:
        x.detach().fill_(torch.nan)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_decoding_waits_for_nothing(nothing_waits):
    x = delta_product_inputs(2, 1, 2, 2, 64, 64, dtype=torch.bfloat16, device="cuda")
    token = [x[n][:, 0] for n in ("q", "k", "v", "beta", "g")]
    path = path_attention_inputs(
        2, 300, 2, 64, 64, HQ=4, with_sinks=True, dtype=torch.bfloat16, device="cuda"
    )

    def decode(cache, lo, hi):
        state, outputs = x["initial_state"], []
        for i in range(lo, hi):
            o, state = delta_product_step(*token, state=state, **OPTIONS)
            here = [path[n][:, i : i + 1] for n in TOKENS]
            outputs += [o, cache.append(*here, sinks=path["sinks"])]
        return outputs

    caches = [PathCache(2), PathCache(2)]
    with torch.no_grad():
        for cache in caches:
            cache.reserve(300)
            cache.append(*(path[n][:, :100] for n in TOKENS), sinks=path["sinks"])
        expected = decode(caches[0], 100, 300)
        # While it does not wait it makes blocks as well.
        with nothing_waits():
            outputs = decode(caches[1], 100, 300)
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("B", "T", "N", "decay"),
    [(4, 4096, 1, None), (4, 4096, 1, 0.1), (4, 4096, 2, 0.1), (1, 16_384, 1, 0.02)],
)
def test_many_runs_of_delta_product_give_the_same_bits(B, T, N, decay, dtype):
    """A wait that is missing among warps, or a copy that comes late, is seen now and then only."""
    inputs = delta_product_inputs(
        B, T, N, 8, 128, 128, decay=decay, dtype=dtype, device="cuda", with_initial_state=False
    )
    first = step(delta_product, inputs)
    for _ in range(30):
        again = step(delta_product, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
