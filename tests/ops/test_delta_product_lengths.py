"""What kernels of `delta_product` are compiled for, as sequences grow: nothing runs here."""

import importlib
import os

import pytest
import torch

from householder.testing import delta_product_inputs

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

# T and T · H are multiples of 16 for some, and no sequence is cut, or all are.
LENGTHS = {"whole": (1, 2, 3, 16, 37, 48, 64, 200), "in segments": (4100, 4112, 4133, 4160, 8200)}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("form", ["portable", "for Hopper"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_longer_sequences_compile_nothing_anew(lengths, form, packed, specialized, monkeypatch):
    from householder.ops.delta_product import triton

    for name in ("chunks", "backward"):
        module = importlib.import_module(f"householder.ops.delta_product.triton.{name}")
        monkeypatch.setattr(module, "is_hopper", lambda device: form == "for Hopper")
    dtype = torch.bfloat16 if form == "for Hopper" else torch.float32
    numbers = []
    for T in lengths:
        shapes = (3, 32), (2, 3, 32), (2, 3, 32)
        q, k, v = (torch.zeros(1, T, *shape, dtype=dtype) for shape in shapes)
        beta, g = torch.zeros(1, T, 2, 3), torch.zeros(1, T, 3)
        bounds = torch.tensor([0, T], dtype=torch.int32) if packed else None
        inputs = q, k, v, beta, g, 0.3, torch.zeros(1, 3, 32, 32), bounds
        o, state, *saved = triton.forward(*inputs, True)
        triton.backward(torch.zeros_like(o), torch.zeros_like(state), *inputs, *saved)
        numbers.append({kernel: len(variants) for kernel, variants in specialized.items()})
    assert len(numbers[0]) >= 4
    assert numbers[-1] == numbers[0]


def test_kernels_get_no_tensor_that_begins_between_multiples_of_16_bytes():
    from householder.ops.delta_product.triton.chunks import make_problem

    def shift(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    x = delta_product_inputs(B=1, T=20, N=2, H=1, K=16, V=16, decay=0.1, dtype=torch.float32)
    given = [shift(x[name]) for name in ("q", "k", "v", "beta", "g")]
    assert all(tensor.data_ptr() % 16 for tensor in given)
    for _ in range(2):  # the second call follows the first one's plan
        p = make_problem(*given, None)
        assert all(p.plan.wide_rows)
        for tensor, read in zip(given, (p.q, p.k, p.v, p.beta, p.g), strict=True):
            assert read.data_ptr() % 16 == 0
            assert torch.equal(read, tensor)
