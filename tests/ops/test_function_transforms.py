"""`torch.func` and orders of gradient of the sequence ops: what holds for each of them alike."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from householder import delta_product, path_attention
from householder.testing import delta_product_inputs, path_attention_inputs


class Op(NamedTuple):
    """An op as a function of tensors: their names, where the reflectors are, how to draw them."""

    loss: Callable[..., torch.Tensor]
    names: tuple[str, ...]
    reflectors: int
    draw: Callable[..., dict]
    sizes: dict
    tiny: dict


def delta_product_loss(q, k, v, beta, g, initial_state, **options):
    options["initial_state"] = initial_state
    o, state = delta_product(q, k, v, beta, g, output_final_state=True, **options)
    return o.sin().sum() + state.cos().sum()


def path_attention_loss(q, k, v, w, beta, g, sinks, **options):
    return path_attention(q, k, v, w, beta, g, sinks=sinks, **options).sin().sum()


OPS = {
    "delta_product": Op(
        delta_product_loss,
        names=("q", "k", "v", "beta", "g", "initial_state"),
        reflectors=1,
        draw=delta_product_inputs,
        sizes={"T": 40, "HV": 4},
        tiny={"B": 1, "T": 3, "N": 2, "H": 1, "K": 2, "V": 2},
    ),
    "path_attention": Op(
        path_attention_loss,
        names=("q", "k", "v", "w", "beta", "g", "sinks"),
        reflectors=3,
        draw=path_attention_inputs,
        sizes={"T": 40, "HQ": 4, "with_sinks": True},
        tiny={"B": 1, "T": 4, "H": 1, "K": 2, "V": 2, "HQ": 2, "with_sinks": True},
    ),
}


@pytest.fixture(params=OPS.values(), ids=OPS)
def op(request):
    return request.param


@pytest.fixture
def args(op):
    inputs = op.draw(**op.sizes)
    return tuple(inputs[name] for name in op.names)


@pytest.fixture
def expected(op, args):
    """The gradients by the definition, differentiated by PyTorch."""
    leaves = [x.clone().requires_grad_() for x in args]
    return torch.autograd.grad(op.loss(*leaves, impl="reference"), leaves)


def agree(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_func_grad(op, args, expected):
    agree(torch.func.grad(op.loss, argnums=tuple(range(len(args))))(*args), expected)


def test_vmap_of_grad(op, args, expected):
    stacked = [torch.stack([x, 0.9 * x]) for x in args]
    per_sample = torch.func.vmap(torch.func.grad(op.loss, argnums=tuple(range(len(args)))))
    agree([x[0] for x in per_sample(*stacked)], expected)


def test_grad_of_vmap(op, args, expected):
    place = op.reflectors
    before, after = args[:place], args[place + 1 :]

    def total(stacked):
        return torch.func.vmap(lambda x: op.loss(*before, x, *after))(stacked).sum()

    stacked = torch.stack([args[place], 0.9 * args[place]])
    agree([torch.func.grad(total)(stacked)[0]], [expected[place]])


def test_vmap_over_bounds_is_refused(op):
    sizes = {**op.sizes, "B": 1, "T": 60, "num_sequences": 4}
    inputs = op.draw(**sizes)
    bounds = inputs.pop("cu_seqlens")
    args = [inputs[name] for name in op.names]
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.vmap(lambda cu: op.loss(*args, cu_seqlens=cu))(bounds[None])


def test_second_order_is_refused_with_the_remedy(op, args):
    leaves = [x.clone().requires_grad_() for x in args]
    (first,) = torch.autograd.grad(op.loss(*leaves), leaves[op.reflectors], create_graph=True)
    with pytest.raises(NotImplementedError, match='impl="reference"'):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_reference_has_second_order_and_forward_mode(op):
    inputs = op.draw(**op.tiny)
    leaves = [inputs[name].requires_grad_() for name in op.names]

    def loss(*args):
        return op.loss(*args, impl="reference")

    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, leaves)
