"""`delta_product` and `path_attention` on a GPU: the same bits always, and nothing waits for it."""

import itertools

import pytest
import torch

from householder import PathCache, delta_product, delta_product_step, path_attention
from householder.testing import delta_product_inputs, path_attention_inputs

pytestmark = pytest.mark.gpu

OPTIONS = {"qk_norm": "l2", "beta_activation": "2sigmoid"}
TOKENS = ("q", "k", "v", "w", "beta", "g")


def recur(**inputs):
    return delta_product(**inputs, output_final_state=True)


# Whose arguments, and which: one chunk after the other, in segments (beyond 4,096 tokens), packed.
CALLS = {
    "delta": (recur, {"T": 300, "N": 2, "H": 2, "K": 64, "V": 64, "HV": 4}),
    "delta, long": (recur, {"T": 9000, "N": 1, "H": 2, "K": 128, "V": 128, "decay": None}),
    "delta, long, gated": (recur, {"T": 9000, "N": 2, "H": 2, "K": 64, "V": 128}),
    "delta, long, packed": (
        recur, {"B": 1, "T": 20_000, "N": 1, "H": 2, "K": 64, "V": 64, "num_sequences": 3},
    ),
    "delta, float32": (
        recur, {"T": 300, "N": 1, "H": 2, "K": 64, "V": 64, "dtype": torch.float32},
    ),
    "delta, options": (
        lambda **x: recur(**x, **OPTIONS), {"T": 300, "N": 2, "H": 2, "K": 64, "V": 64},
    ),
    "path": (path_attention, {"T": 2500, "H": 2, "K": 128, "V": 128, "decay": None}),
    "path, gated": (
        path_attention, {"T": 700, "H": 2, "HQ": 4, "K": 64, "V": 64, "with_sinks": True},
    ),
    "delta, packed": (
        recur, {"B": 1, "T": 700, "N": 2, "H": 2, "K": 128, "V": 128, "num_sequences": 7},
    ),
    "path, packed": (
        path_attention,
        {"B": 1, "T": 2500, "H": 2, "K": 64, "V": 64, "num_sequences": 7, "decay": None},
    ),
    "path, packed, wide": (
        path_attention,
        {"B": 1, "T": 2500, "H": 2, "K": 128, "V": 128, "num_sequences": 7, "decay": None},
    ),
    "path, packed, gated": (
        path_attention, {"B": 1, "T": 700, "H": 2, "K": 64, "V": 64, "num_sequences": 7},
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
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
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
            # Now and then one sequence alone goes on.
            lengths = [1, 0] if i % 50 == 0 else None
            outputs += [o, cache.append(*here, sinks=path["sinks"], lengths=lengths)]
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
    first = step(recur, inputs)
    for _ in range(30):
        again = step(recur, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def parts_of(inputs):
    """Return what picks each sequence out of what has a value per token, and per sequence."""
    bounds = inputs["cu_seqlens"]
    if bounds is None:
        return [(slice(i, i + 1),) * 2 for i in range(inputs["q"].shape[0])]
    ends = itertools.pairwise(bounds.tolist())
    return [((slice(None), slice(*ab)), slice(i, i + 1)) for i, ab in enumerate(ends)]


@pytest.mark.parametrize("name", CALLS)
def test_a_sequence_without_numbers_stays_alone(name):
    """Whole tiles are copied, rows of a neighbour with them; and zero times NaN is no zero."""
    call, inputs = arrange(name)
    parts = parts_of(inputs)
    middle = len(parts) // 2
    poisoned = {n: x if x is None else x.clone() for n, x in inputs.items()}
    for n in (*TOKENS, "initial_state"):
        if poisoned.get(n) is not None:
            poisoned[n][parts[middle][n == "initial_state"]] = torch.nan
    labels = ["o"] if call is path_attention else ["o", "final_state"]
    labels += [n for n, x in inputs.items() if x is not None and x.is_floating_point()]
    plain, other = ([*zip(labels, step(call, x), strict=True)] for x in (inputs, poisoned))
    for (label, a), (_, b) in zip(plain, other, strict=True):
        if label == "sinks":
            continue
        for i, part in enumerate(parts):
            here = part[label in ("initial_state", "final_state")]
            assert i == middle or torch.equal(a[here], b[here]), (label, i)
