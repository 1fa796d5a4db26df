"""What every op shares: checks, what is remembered of calls, gradients without gradients."""

import pytest
import torch

from householder import delta_product, delta_product_step, path_attention
from householder.ops import _dispatch, short_convolution
from householder.ops._checks import check_tensors
from householder.ops._dispatch import examined, first_order_only, remember


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(_dispatch, "MOST_KNOWN", 3)
    known = {}
    for i in range(10):
        remember(known, i, str(i))
        assert known[i] == str(i)
        assert len(known) <= 3


class Examiner:
    def __init__(self):
        self.calls = 0

    def __call__(self, x, y, option):
        self.calls += 1
        return x.shape, y is None, option


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(3), None, "a"),
        (torch.zeros(2, dtype=torch.float64), None, "a"),
        (torch.zeros(2, device="meta"), None, "a"),
        (torch.zeros(2), torch.zeros(2), "a"),
        (torch.zeros(2), None, "b"),
    ],
)
def test_calls_that_differ_are_examined_each(other):
    examine, known = Examiner(), {}
    for x, y, option in ((torch.zeros(2), None, "a"), other, (torch.ones(2), None, "a"), other):
        assert examined(known, examine, (x, y), (option,)) == (x.shape, y is None, option)
    assert examine.calls == 2


@pytest.mark.parametrize("options", [(["a"],), (torch.ones(()),)])
def test_what_cannot_be_a_key_is_examined_every_time(options):
    examine, known = Examiner(), {}
    for _ in range(2):
        examined(known, examine, (torch.zeros(2), None), options)
    assert examine.calls == 2


def test_a_wrong_call_is_refused_every_time():
    q, k, v = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 1, 2, 8), torch.zeros(1, 4, 1, 2, 8)
    beta = torch.zeros(1, 4, 1, 2)
    delta_product(q, k, v, beta)
    for _ in range(2):
        with pytest.raises(ValueError, match="`beta` must be"):
            delta_product(q, k, v, beta[..., :1])
        with pytest.raises(TypeError, match="`q` must be a tensor"):
            delta_product(q.tolist(), k, v, beta)
        with pytest.raises(ValueError, match="`qk_norm` must be None or one of"):
            delta_product(q, k, v, beta, qk_norm=["l2"])


def test_bounds_are_read_at_every_call():
    q, k, v = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 1, 2, 8), torch.zeros(1, 4, 1, 2, 8)
    beta = torch.zeros(1, 4, 1, 2)
    delta_product(q, k, v, beta, cu_seqlens=torch.tensor([0, 1, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="must rise from 0 to T"):
        delta_product(q, k, v, beta, cu_seqlens=torch.tensor([0, 5, 4], dtype=torch.int32))


def test_bounds_on_another_device_are_refused():
    """Kernels would take an address of the host's memory for one of their own."""
    bounds = torch.tensor([0, 4], dtype=torch.int32, device="meta")
    q, x = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 1, 2, 8)
    for call in (
        lambda: delta_product(q, x, x, x[..., 0], cu_seqlens=bounds),
        lambda: path_attention(q, q, q, q, q[..., 0], cu_seqlens=bounds),
        lambda: short_convolution(q[..., 0], torch.zeros(2, 1, 4), cu_seqlens=bounds),
    ):
        with pytest.raises(ValueError, match=r"`cu_seqlens` must be on cpu .* got meta"):
            call()


def test_one_token_is_examined_with_and_without_gradients():
    q, k, v = torch.zeros(1, 2, 8), torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8)
    beta, state = torch.zeros(1, 1, 2), torch.zeros(1, 2, 8, 8)
    with pytest.raises(NotImplementedError, match="has no gradients"):
        delta_product_step(q, k, v, beta, state=state, impl="triton")
    with torch.no_grad(), pytest.raises(NotImplementedError, match="cannot run"):
        delta_product_step(q, k, v, beta, state=state, impl="triton")


class Square(torch.autograd.Function):
    """x², whose gradient is a function of its own without one."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        return SquareBackward.apply(dy, *ctx.saved_tensors)


class SquareBackward(torch.autograd.Function):
    setup_context = staticmethod(_dispatch.keep_nothing)
    backward = first_order_only("square: the form of this test")

    @staticmethod
    def forward(dy, x):
        return 2 * x * dy


def test_a_second_order_is_refused_with_the_way_to_have_it():
    x = torch.tensor(3.0, requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x), x, create_graph=True)
    assert dx == 6
    with pytest.raises(NotImplementedError, match=r"square: the form of this test has first-order"):
        torch.autograd.grad(dx, x)
    assert torch.func.grad(Square.apply)(torch.tensor(3.0)) == 6
    compiled = torch.compile(Square.apply, fullgraph=True, backend="aot_eager")
    assert torch.autograd.grad(compiled(x), x)[0] == 6


def test_tensors_are_checked_for_kind_dtype_and_device():
    x, nowhere = torch.zeros(2), torch.zeros(2, device="meta")
    check_tensors("op", {"x": x, "y": None, "z": x.bfloat16()}, optional="y")
    check_tensors("op", {"x": x.to(torch.complex64)}, allow_complex=True)
    with pytest.raises(TypeError, match="op: `y` must be a tensor, got None; give one"):
        check_tensors("op", {"x": x, "y": None})
    with pytest.raises(TypeError, match="op: `x` must be real floating point"):
        check_tensors("op", {"x": x.to(torch.complex64)})
    with pytest.raises(ValueError, match="op: all tensors must be on one device, got `x` on cpu"):
        check_tensors("op", {"x": x, "y": nowhere})
