"""Whether kernels of `path_attention` are compiled again for other lengths: nothing runs here."""

import os
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

# All have the same levels but for the tree's ends, and T · H is a multiple of 16 for some.
LENGTHS = {"one chunk": range(1, 18), "a tree": (513, 520, 527, 528, 576, 640, 641, 1000, 1024)}


@pytest.fixture
def compiled(monkeypatch):
    """Collect by kernel what it would be compiled for, in place of launching it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = defaultdict(set)

    def run(self, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, options = bind(*args, debug=False, **kwargs)
        found[self.fn.__name__].add(f"{specialization} {options}")

    monkeypatch.setattr(JITFunction, "run", run)
    return found


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_longer_sequences_compile_nothing_anew(lengths, gated, compiled):
    from householder.ops.path_attention import triton

    numbers = []
    for T in lengths:
        q, k, v, w = (torch.zeros(2, T, 4, 32) for _ in range(4))
        beta = torch.zeros(2, T, 4)
        inputs = q, k, v, w, beta, beta if gated else None, None, 0.3, None, None
        o, lse = triton.forward(*inputs)
        triton.backward(torch.zeros_like(o), *inputs, o, lse)
        numbers.append({kernel: len(variants) for kernel, variants in compiled.items()})
    assert len(numbers[0]) > 6
    assert numbers[-1] == numbers[0]
