"""Which kernels of `path_attention` run, and what they are compiled for: nothing runs here."""

import os

import pytest
import torch

from householder.testing import path_attention_inputs

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

# All have the same levels but for the tree's ends, and T · H is a multiple of 16 for some.
LENGTHS = {"one chunk": range(1, 18), "a tree": (513, 520, 527, 528, 576, 640, 641, 1000, 1024)}


@pytest.mark.parametrize("form", ["portable", "gated", "for Hopper"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_longer_sequences_compile_nothing_anew(lengths, form, specialized, monkeypatch):
    from householder.ops.path_attention import triton
    from householder.ops.path_attention.triton import problem

    monkeypatch.setattr(problem, "is_hopper", lambda device: form == "for Hopper")
    K, dtype = (128, torch.bfloat16) if form == "for Hopper" else (32, torch.float32)
    numbers = []
    for T in lengths:
        q, k, v, w = (torch.zeros(2, T, 4, K, dtype=dtype) for _ in range(4))
        beta = torch.zeros(2, T, 4)
        inputs = q, k, v, w, beta, beta if form == "gated" else None, None, 0.3, None, None
        o, lse = triton.forward(*inputs)
        triton.backward(torch.zeros_like(o), *inputs, o, lse)
        numbers.append({kernel: len(variants) for kernel, variants in specialized.items()})
    assert len(numbers[0]) > 4
    assert numbers[-1] == numbers[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_forms_that_copy_reflectors_beside_keys_know_their_dtypes(dtype, specialized, monkeypatch):
    """Reflectors may have the keys' dtype or float32; the portable kernels take others."""
    from householder.ops.path_attention import triton
    from householder.ops.path_attention.inputs import Inputs
    from householder.ops.path_attention.triton import problem

    monkeypatch.setattr(problem, "is_hopper", lambda device: True)
    q, k, v, w = (torch.zeros(1, 700, 4, 128, dtype=torch.bfloat16) for _ in range(4))
    beta = torch.zeros(1, 700, 4)
    inputs = q, k, v, w.to(dtype), beta, None, None, 0.3, None, None
    assert problem.make_problem(*problem.arrange(Inputs(*inputs))).precision == "bf16"
    o, lse = triton.forward(*inputs)
    grads = triton.backward(torch.zeros_like(o), *inputs, o, lse)
    assert grads[3].dtype == dtype
    portable = {"pairs_kernel", "solve_kernel", "columns_kernel", "values_kernel"}
    other = dtype == torch.float16
    assert portable & set(specialized) == (portable if other else set())
    assert ("chunk_kernel" in specialized) != other


@pytest.mark.parametrize(
    "others", [(None, None), (20, torch.tensor([0, 0, 30, 100], dtype=torch.int32))], ids=str
)
def test_heads_in_portions_are_those_together(others, monkeypatch):
    """Where copies of the queries take too much memory, heads go in portions."""
    from householder.ops.path_attention import chunk
    from householder.ops.path_attention.triton import portions

    calls = []

    def count(function):
        return lambda *inputs: calls.append(inputs[1].shape) or function(*inputs)

    monkeypatch.setattr(portions.attend, "forward", count(chunk.forward))
    monkeypatch.setattr(portions.gradients, "backward", count(chunk.backward))
    x = path_attention_inputs(1, 100, 6, 8, 5, HQ=12, with_sinks=True)
    inputs = [x[n] for n in ("q", "k", "v", "w", "beta", "g", "sinks")]
    others = 0.3, *others
    together = portions.forward(*inputs, *others)
    do = torch.randn_like(together[0])
    together += portions.backward(do, *inputs, *others, *together)
    assert len(calls) == 2
    # Room for three heads and a half, of which three divide six.
    monkeypatch.setattr(portions, "LEVEL_BYTES", int(3.5 * 100 * 2 * 8 * 8))
    apart = portions.forward(*inputs, *others)
    apart += portions.backward(do, *inputs, *others, *apart)
    assert [shape[2] for shape in calls[2:]] == [3, 3, 6, 6]  # k, and q behind do
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_what_begins_between_multiples_of_16_bytes_is_read_from_a_copy():
    from householder.ops._triton import addressable

    memory = torch.randn(1 + 2 * 70 * 3 * 16)
    x = memory[1:].view(2, 70, 3, 16)
    assert x.data_ptr() % 16
    copy = addressable(x)
    assert copy.data_ptr() % 16 == 0
    assert torch.equal(copy, x)
    assert addressable(copy) is copy
