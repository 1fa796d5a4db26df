"""Which kernels of `path_attention` run, and what they are compiled for: nothing runs here."""

import os

import pytest
import torch

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
