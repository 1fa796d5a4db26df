"""The short convolution against torch's own, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from householder.nn import ShortConvolution
from householder.ops import short_convolution


def torch_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """The same convolution by `conv1d`: x `[B, T, D]`, zeros before the first token."""
    if x.shape[1] == 0:  # conv1d makes no empty output
        return x
    padded = F.pad(x.mT, (weight.shape[-1] - 1, 0))
    return F.conv1d(padded, weight, groups=x.shape[-1]).mT


@pytest.mark.parametrize("kernel_size", [1, 2, 4, 7])
@pytest.mark.parametrize("T", [0, 1, 3, 10])
def test_is_a_causal_depthwise_convolution(kernel_size: int, T: int) -> None:
    conv = ShortConvolution(5, kernel_size, dtype=torch.float64)
    x = torch.randn(2, T, 5, dtype=torch.float64)
    y, state = conv(x)
    torch.testing.assert_close(y, torch_convolution(x, conv.weight), rtol=0, atol=1e-15)
    # The state holds the last inputs, zeros where there were none yet.
    expected = F.pad(x, (0, 0, kernel_size - 1, 0))[:, T:]
    assert torch.equal(state, expected)


@pytest.mark.parametrize("lengths", [[5], [1, 4], [0, 2, 0, 0, 3], [2, 0]])
def test_packed_is_separate_to_the_bit(lengths: list[int]) -> None:
    conv = ShortConvolution(3, 4)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    sequences = [torch.randn(1, t, 3) for t in lengths]
    state = torch.randn(len(lengths), 3, 3)
    y, new_state = conv(torch.cat(sequences, dim=1), state, cu_seqlens)
    for s, x in enumerate(sequences):
        y_s, new_state_s = conv(x, state[s : s + 1])
        assert torch.equal(y[:, cu_seqlens[s] : cu_seqlens[s + 1]], y_s)
        assert torch.equal(new_state[s : s + 1], new_state_s)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed: bool) -> None:
    conv = ShortConvolution(2, 3, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 1, 1, 5], dtype=torch.int32) if packed else None
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(3 if packed else 1, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(conv, {"weight": weight}, (x, state, cu_seqlens))

    assert torch.autograd.gradcheck(run, (x, state, conv.weight))


def test_the_state_does_not_keep_the_sequence_alive() -> None:
    conv = ShortConvolution(4, 3)
    _, state = conv(torch.randn(1, 1000, 4))
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


def test_half_precision_is_summed_in_float32() -> None:
    """One rounding, of the result: the terms 256 + 1 − 256 do not cancel to 0 in bfloat16."""
    conv = ShortConvolution(1, 3, dtype=torch.bfloat16)
    with torch.no_grad():
        conv.weight.fill_(1)
    x = torch.tensor([256.0, 1.0, -256.0], dtype=torch.bfloat16).view(1, 3, 1)
    y, state = conv(x)
    assert y.flatten().tolist() == [256.0, 256.0, 1.0]
    assert y.dtype == state.dtype == torch.bfloat16


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^ShortConvolution: `kernel_size` must be at least 1"):
        ShortConvolution(4, 0)
    conv = ShortConvolution(4)
    with pytest.raises(ValueError, match=r"^short_convolution: `weight` must be \[D, 1, W\]"):
        short_convolution(torch.zeros(2, 3, 4), torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"^ShortConvolution: `x` must be a tensor, got list"):
        ShortConvolution(4, 4)([[1.0]])
    with pytest.raises(ValueError, match=r"^ShortConvolution: `x` must be \[B, T, 4\]"):
        conv(torch.randn(2, 5, 3))
    with pytest.raises(ValueError, match=r"^ShortConvolution: `state` must be \[2, 3, 4\]"):
        conv(torch.randn(2, 5, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"^ShortConvolution: `cu_seqlens` must rise from 0 to T"):
        conv(torch.randn(1, 5, 4), None, torch.tensor([0, 6], dtype=torch.int32))


@pytest.mark.parametrize("continued", [False, True])
def test_no_compiled_program_searches_in_a_view(continued):
    """What PyTorch 2.11 compiles for a GPU begins such a search at the base of the view.

    https://github.com/pytorch/pytorch/issues/182343
    """
    torch._dynamo.reset()
    searched = []

    def look(program, inputs):
        for node in program.graph.nodes:
            if node.target is torch.searchsorted:
                (bounds, *_) = node.args
                # A copy, or the argument itself where its numbers lie side by side.
                searched.append(bounds.args[0] if bounds.target == "contiguous" else bounds)
        return program.forward

    layer = ShortConvolution(6, 4)
    bounds = torch.tensor([0, 2, 7], dtype=torch.int32)
    state = torch.randn(2, 3, 6) if continued else None
    torch.compile(layer, backend=look, fullgraph=True)(torch.randn(1, 7, 6), state, bounds)
    assert searched
    assert {node.op for node in searched} == {"placeholder"}
