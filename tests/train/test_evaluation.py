import pytest
import torch
from torch import nn

from householder.train import Evaluation, evaluate
from householder.train.tasks import make_task

CPU = torch.device("cpu")


class Oracle(nn.Module):
    """Answer a Z_m word problem exactly, except in chosen rows from a chosen position on."""

    def __init__(self, modulus, wrong_rows=0, wrong_from=0):
        super().__init__()
        self.modulus, self.wrong_rows, self.wrong_from = modulus, wrong_rows, wrong_from
        self.seen = 0

    def forward(self, tokens):
        assert not self.training
        elements = tokens.where(tokens < self.modulus, 0)
        answers = elements.cumsum(dim=1) % self.modulus
        rows = torch.arange(self.seen, self.seen + len(tokens))
        self.seen += len(tokens)
        wrong = (rows < self.wrong_rows)[:, None] & (
            torch.arange(tokens.shape[1]) == self.wrong_from
        )
        answers = torch.where(wrong, (answers + 1) % self.modulus, answers)
        return nn.functional.one_hot(answers, self.modulus).float()


def test_one_error_spoils_the_rest_of_its_sequence(tiny):
    config = tiny(task="z5", length=4, eval_length=10, eval_samples=8)
    evaluation = evaluate(Oracle(5, wrong_rows=2, wrong_from=7), config, CPU)
    assert evaluation.metric == "prefix"
    # Column 7 is position 7: column 0 is BOS, which is not supervised.
    assert evaluation.lengths == tuple(range(1, 11))
    assert evaluation.accuracy == (1.0,) * 6 + (0.75,) * 4
    assert (evaluation.at(4), evaluation.at(7), evaluation.at(99)) == (1.0, 0.75, 0.75)
    assert (evaluation.reach(0.9), evaluation.reach(0.75), evaluation.reach(1.1)) == (6, 10, 0)


def test_batches_do_not_change_the_result(tiny, monkeypatch):
    config = tiny(task="z5", eval_samples=33)
    whole = evaluate(Oracle(5, 10, 3), config, CPU)
    monkeypatch.setattr("householder.train.evaluation.MIN_TOKENS", 1)
    parts = evaluate(Oracle(5, 10, 3), config, CPU)
    assert whole == parts


def test_tasks_with_one_answer_are_evaluated_at_several_lengths(tiny):
    class Parity(nn.Module):
        def forward(self, tokens):
            ones = (tokens == 1).cumsum(dim=1) % 2
            # Right up to 20 tokens, the opposite beyond.
            return nn.functional.one_hot(ones ^ int(tokens.shape[1] > 20), 2).float()

    config = tiny(task="parity", length=5, eval_length=40)
    evaluation = evaluate(Parity(), config, CPU)
    assert evaluation.metric == "final"
    assert (evaluation.lengths[0], evaluation.lengths[-1]) == (5, 40)
    assert set(evaluation.accuracy) == {1.0, 0.0}
    assert evaluation.reach(1.0) == 20


@pytest.mark.parametrize(("task", "length"), [("mod-arithmetic", 9), ("mqar", 64)])
def test_lengths_are_those_the_task_can_make(tiny, task, length):
    made = make_task(task)

    class Zero(nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, made.num_classes)

    config = tiny(task=task, length=length, eval_length=2 * length, eval_samples=2)
    evaluation = evaluate(Zero(), config, CPU)
    assert evaluation.lengths[0] == length
    assert len(evaluation.lengths) > 1
    for each in evaluation.lengths:
        made.sample(1, each, torch.Generator())


def test_check_can_stop_an_evaluation(tiny):
    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate(Oracle(5), tiny(task="z5"), CPU, check=stop)


def test_reach_of_a_curve_that_dips():
    assert Evaluation("final", (1, 2, 3), (1.0, 0.5, 1.0), 4).reach(0.9) == 1
