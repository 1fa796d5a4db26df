"""Accuracies against loops over positions, and their corner cases."""

import math

import pytest
import torch

from householder.train.tasks import IGNORE_INDEX, make_task
from householder.train.tasks.metrics import (
    final_accuracy,
    position_accuracy,
    prefix_accuracy,
    scaled_accuracy,
    score,
    sequence_accuracy,
    token_accuracy,
)


@pytest.fixture
def case():
    """Random labels, a third of them not supervised; predictions that are right 90% of the time."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (200, 15), generator=generator)
    labels[torch.rand(200, 15, generator=generator) < 1 / 3] = IGNORE_INDEX
    labels[:, 0], labels[:, 14] = IGNORE_INDEX, 3
    noise = torch.randint(5, (200, 15), generator=generator)
    wrong = torch.rand(200, 15, generator=generator) < 0.1
    return torch.where(wrong | (labels < 0), noise, labels), labels


def rows(case):
    predictions, labels = case
    return list(zip(predictions.tolist(), labels.tolist(), strict=True))


def test_token_and_position_accuracy(case):
    hits = [[] for _ in range(15)]
    for predicted, wanted in rows(case):
        for t in range(15):
            if wanted[t] != IGNORE_INDEX:
                hits[t].append(predicted[t] == wanted[t])
    everything = [hit for at in hits for hit in at]
    assert token_accuracy(*case) == pytest.approx(sum(everything) / len(everything))
    by_position = position_accuracy(*case)
    assert math.isnan(by_position[0])
    for t in range(1, 15):
        assert by_position[t].item() == pytest.approx(sum(hits[t]) / len(hits[t]))


def test_prefix_and_sequence_accuracy(case):
    alive = [0] * 15
    for predicted, wanted in rows(case):
        for t in range(15):
            if wanted[t] not in (IGNORE_INDEX, predicted[t]):
                break
            alive[t] += 1
    assert prefix_accuracy(*case).tolist() == pytest.approx([n / 200 for n in alive])
    assert sequence_accuracy(*case) == pytest.approx(alive[-1] / 200)
    assert 0 < alive[-1] < 200


def test_final_accuracy_reads_the_last_supervised_position_of_each_row():
    labels = torch.tensor([[1, 2, -100], [-100, -100, 0], [3, -100, -100]])
    assert final_accuracy(torch.tensor([[0, 2, 0], [0, 0, 1], [3, 1, 1]]), labels) == 2 / 3


def test_final_accuracy_needs_an_answer_in_every_row():
    with pytest.raises(ValueError, match="got 1 without"):
        final_accuracy(torch.zeros(2, 2).long(), torch.tensor([[0, 1], [-100, -100]]))


def test_scaled_accuracy():
    assert scaled_accuracy(1.0, 0.2) == 1.0
    assert scaled_accuracy(0.2, 0.2) == 0.0
    assert scaled_accuracy(0.0, 0.5) == -1.0
    with pytest.raises(ValueError, match="chance"):
        scaled_accuracy(0.5, 1.0)


def test_score_is_the_published_number(case):
    predictions, labels = case
    assert score(make_task("s3"), predictions, labels) == sequence_accuracy(predictions, labels)
    assert score(make_task("mqar"), predictions, labels) == token_accuracy(predictions, labels)
    assert score(make_task("mod-arithmetic"), predictions, labels) == pytest.approx(
        (final_accuracy(predictions, labels) - 0.2) / 0.8
    )


@pytest.mark.parametrize(
    "predictions", [torch.zeros(2, 3), torch.zeros(2, 3, 4).long(), torch.zeros(2, 2).long()]
)
def test_refuses_what_are_not_classes(predictions):
    with pytest.raises(ValueError, match="argmax"):
        token_accuracy(predictions, torch.zeros(2, 3).long())


def test_refuses_labels_without_supervision():
    with pytest.raises(ValueError, match="supervised"):
        prefix_accuracy(torch.zeros(2, 3).long(), torch.full((2, 3), IGNORE_INDEX))
