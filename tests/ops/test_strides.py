"""Arguments of any strides, parameters and bounds too: the kernels give what copies of them give.

As a script, in a process where Triton interprets, it runs the kernels on the CPU in float32; on a
GPU the tests run them in bfloat16.
"""

import json

import pytest
import torch

from householder import PathCache, delta_product, delta_product_step, path_attention
from householder.ops import (
    gated_rms_norm,
    householder_product,
    linear_cross_entropy,
    short_convolution,
    swiglu,
)
from householder.ops._dispatch import INTERPRETING
from householder.testing import delta_product_inputs, path_attention_inputs, relative_error

TOKENS = ("q", "k", "v", "w", "beta", "g")


def every_other(x):
    """Return the same numbers with others between them, which must not be read."""
    # Bounds and labels that lie outside would end in more than wrong numbers.
    other = float("nan") if x.is_floating_point() else 0
    wide = torch.full((*x.shape, 2), other, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


def backwards(x):
    """Return the same numbers, the first axis innermost."""
    axes = range(x.dim() - 1, -1, -1)
    return x.permute(*axes).contiguous().permute(*axes)


def repeated(x):
    """Return numbers that are one, along the first axis longer than that: its stride is 0."""
    axis = next((i for i, size in enumerate(x.shape) if size > 1), 0)
    return x.narrow(axis, 0, 1).expand_as(x) if x.is_floating_point() else x


WAYS = {f.__name__: f for f in (every_other, backwards, repeated)}


def sequences(packed, dtype, device):
    sizes = {"B": 1, "num_sequences": 3} if packed else {"B": 2}
    T = 12 if INTERPRETING else 400
    return delta_product_inputs(
        **sizes, T=T, N=2, H=1, K=16, V=32, HV=2, dtype=dtype, device=device
    )


def attention(packed, dtype, device):
    sizes = {"B": 1, "num_sequences": 3} if packed else {"B": 2}
    T = 70 if INTERPRETING else 400
    return path_attention_inputs(
        **sizes, T=T, H=1, HQ=2, K=16, V=32, with_sinks=True, dtype=dtype, device=device
    )


def with_gates(inputs):
    """Add the gates' parameters."""
    g = inputs["g"]
    drawn = torch.linspace(-1, 1, 2 * g.shape[-1], device=g.device).to(g.dtype)
    return inputs | {"A_log": drawn[::2].contiguous(), "dt_bias": drawn[1::2].contiguous()}


OPTIONS = {"qk_norm": "l2", "beta_activation": "2sigmoid", "gate_activation": "softplus"}


def step(dtype, device):
    x = with_gates(sequences(False, dtype, device))
    tokens = {n: x[n][:, 0] for n in ("q", "k", "v", "beta", "g")}
    return tokens | {n: x[n] for n in ("A_log", "dt_bias")} | {"state": x["initial_state"]}


def decode(sinks, **tokens):
    """Append a prompt to a cache and then tokens, one and three at a time."""
    cache, outputs, lo = PathCache(tokens["q"].shape[0]), [], 0
    T = tokens["q"].shape[1]
    for n in (T - 6, 1, 1, 3, 1):
        here = [tokens[name][:, lo : lo + n] for name in TOKENS]
        outputs.append(cache.append(*here, sinks=sinks))
        lo += n
    return torch.cat(outputs, dim=1)


def others(name, dtype, device):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    bounds = torch.tensor([0, 0, 7, 20], dtype=torch.int32, device=device)
    labels = torch.randint(30, (20,), generator=generator).to(device)
    return {
        "convolution": {"x": draw(2, 20, 8), "weight": draw(8, 1, 4), "history": draw(2, 3, 8)},
        "packed convolution": {
            "x": draw(1, 20, 8), "weight": draw(8, 1, 4), "cu_seqlens": bounds,
        },
        "norm": {"x": draw(2, 20, 8), "gate": draw(2, 20, 8), "weight": draw(8)},
        "product": {"gate": draw(2, 20, 8), "up": draw(2, 20, 8)},
        "loss": {"x": draw(20, 16), "weight": draw(30, 16), "labels": labels},
        "reflections": {"x": draw(20, 32), "reflectors": draw(4, 32), "beta": draw(4).abs()},
    }[name]  # fmt: skip


# What is called, with what, and whether it has gradients.
CASES = {
    "delta_product": (delta_product, lambda *a: sequences(False, *a), True),
    "delta_product, packed": (delta_product, lambda *a: sequences(True, *a), True),
    "delta_product, options": (
        lambda **x: delta_product(**x, **OPTIONS), lambda *a: with_gates(sequences(True, *a)), True,
    ),
    "delta_product_step": (lambda **x: delta_product_step(**x, **OPTIONS), step, False),
    "path_attention": (path_attention, lambda *a: attention(False, *a), True),
    "path_attention, packed": (path_attention, lambda *a: attention(True, *a), True),
    "short_convolution": (short_convolution, lambda *a: others("convolution", *a), True),
    "short_convolution, packed": (
        short_convolution, lambda *a: others("packed convolution", *a), True,
    ),
    "gated_rms_norm": (gated_rms_norm, lambda *a: others("norm", *a), True),
    "swiglu": (swiglu, lambda *a: others("product", *a), True),
    "linear_cross_entropy": (linear_cross_entropy, lambda *a: others("loss", *a), True),
    "householder_product": (householder_product, lambda *a: others("reflections", *a), True),
}  # fmt: skip


def run(call, inputs, differentiate, **options):
    """Return the outputs and all gradients."""
    given = {
        n: x.detach().requires_grad_(differentiate and x.is_floating_point())
        for n, x in inputs.items()
    }
    with torch.set_grad_enabled(differentiate):
        outputs = call(**given, **options)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    if not differentiate:
        return outputs
    total = sum(x.float().sin().sum() for x in outputs)
    leaves = [x for x in given.values() if x.requires_grad]
    return [*outputs, *torch.autograd.grad(total, leaves)]


# Interpreted kernels take seconds: what the others differ in is strides that some of these have.
INTERPRETED = sorted({*CASES} - {"delta_product", "delta_product, packed", "path_attention"})


def difference(name, way, dtype, device, **options):
    """Return by how much, at most, results for strided arguments and for copies differ."""
    call, make, differentiate = CASES[name]
    views = {n: WAYS[way](x) for n, x in make(dtype, device).items() if x is not None}
    copies = {n: x.contiguous() for n, x in views.items()}
    results = (run(call, x, differentiate, **options) for x in (views, copies))
    return max(relative_error(a, b.double()) for a, b in zip(*results, strict=True))


@pytest.fixture(scope="module")
def interpreted_differences(interpreted):
    pytest.importorskip("triton")
    return interpreted(__file__)


@pytest.mark.parametrize("name", INTERPRETED)
def test_strides_do_not_matter_to_interpreted_kernels(name, interpreted_differences):
    assert interpreted_differences[name] == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_strides_do_not_matter(name, way):
    pytest.importorskip("triton")
    # Kernels for Hopper copy rows of 16 bytes; others take their place where there are none.
    assert difference(name, way, torch.bfloat16, "cuda", impl="triton") < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_strides_do_not_matter_to_a_cache(way):
    pytest.importorskip("triton")
    inputs = attention(False, torch.bfloat16, "cuda")
    views = {n: WAYS[way](x) for n, x in inputs.items() if x is not None}
    copies = {n: x.contiguous() for n, x in views.items()}
    with torch.no_grad():
        assert torch.equal(decode(**views), decode(**copies))


if __name__ == "__main__":
    found = {
        name: difference(name, "every_other", torch.float32, "cpu", impl="triton")
        for name in INTERPRETED
    }
    print(json.dumps(found))
