"""What is remembered of calls."""

import pytest
import torch

from householder import delta_product, delta_product_step
from householder.ops import _dispatch
from householder.ops._dispatch import examined, remember


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


def test_one_token_is_examined_with_and_without_gradients():
    q, k, v = torch.zeros(1, 2, 8), torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8)
    beta, state = torch.zeros(1, 1, 2), torch.zeros(1, 2, 8, 8)
    with pytest.raises(NotImplementedError, match="has no gradients"):
        delta_product_step(q, k, v, beta, state=state, impl="triton")
    with torch.no_grad(), pytest.raises(NotImplementedError, match="cannot run"):
        delta_product_step(q, k, v, beta, state=state, impl="triton")
