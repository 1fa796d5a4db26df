import csv
import io

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from householder.models import SequenceTagger
from householder.recipes import flip_flop
from householder.recipes.transitions import record_transitions, transitions_figure
from householder.train import Comparison, ConfigError, Evaluation, TrainConfig, TrainResult
from householder.train.tasks import make_task


class Recall(nn.Module):
    """Answer with the bit written at most `reach` pairs ago, else with 0."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach

    def forward(self, tokens):
        distance = flip_flop.pairs_since_write(tokens)
        places = torch.arange(distance.shape[1]) - distance
        bits = tokens[:, 1::2].gather(1, places).where(distance <= self.reach, 0)
        return F.one_hot(bits.repeat_interleave(2, dim=1), 2).float()


def result(reach, mixer="path_attention"):
    config = TrainConfig(
        task="flip-flop", mixer=mixer, num_householder=1, length=64, eval_length=64, device="cpu"
    )
    return TrainResult(config, Recall(reach), Evaluation("token", (64,), (1.0,), 8), 1, 1, 1.0)


def test_settings_are_the_published_model():
    configs = Comparison.from_settings(flip_flop.settings("gpu")).configs
    assert [c.mixer for c in configs] == list(flip_flop.PUBLISHED)
    for config in configs:
        assert (config.length, config.num_layers, config.num_heads, config.d_model) == (
            *(512, 1, 2),
            64,
        )
    with pytest.raises(ConfigError, match=r"`size` must be one of cpu, gpu, got 'tpu'"):
        flip_flop.settings("tpu")


def test_errors_are_counted_by_distance():
    exact = flip_flop.count_errors(result(1000), "flip-flop", 300)
    assert not exact.wrong.any()
    assert exact.percent == 0
    # As many as in the sequences themselves, however they are cut into batches.
    reads = (make_task("flip-flop").sample(300, 64, torch.Generator())[0] == 3).sum().item()
    assert abs(exact.reads.sum().item() - reads) < 0.1 * reads
    forgetful = flip_flop.count_errors(result(3), "flip-flop", 300)
    assert torch.equal(forgetful.reads, exact.reads)
    assert not forgetful.wrong[:4].any()
    beyond = forgetful.wrong[4:].sum() / forgetful.reads[4:].sum()
    assert 0.4 < beyond < 0.6


def test_the_number_of_sequences_at_once_does_not_matter(monkeypatch):
    whole = flip_flop.count_errors(result(3), "flip-flop-sparse", 40)
    monkeypatch.setitem(flip_flop.TEST_TOKENS, "cpu", 64 * 7)
    parts = flip_flop.count_errors(result(3), "flip-flop-sparse", 40)
    assert whole.percent > 10
    assert torch.equal(parts.reads, whole.reads)
    assert torch.equal(parts.wrong, whole.wrong)


def test_files_and_table(tmp_path):
    found = [
        flip_flop.count_errors(result(reach, mixer), test, 200)
        for reach, mixer in ((1000, "path_attention"), (2, "rotary_attention"))
        for test in flip_flop.TEST_TITLES
    ]
    flip_flop.write_errors(found, tmp_path)
    with open(tmp_path / "errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["published_percent"] for row in rows] == [
        "0.0",
        "0.0001",
        "0.0",
        "6.9",
        "40.3",
        "0.01",
    ]
    assert [int(row["wrong"]) for row in rows] == [e.wrong.sum().item() for e in found]
    with open(tmp_path / "errors-by-distance.csv", newline="") as file:
        by_distance = list(csv.DictReader(file))
    total = sum(int(row["reads"]) for row in by_distance)
    assert total == sum(int(row["reads"]) for row in rows)
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=120, file=io.StringIO())
    console.print(flip_flop.published_beside_measured(found))
    text = console.file.getvalue()
    for part in ("PaTH", "RoPE", "0.0001 / 0", f"40.3 / {found[4].percent:.3g}"):
        assert part in text


def test_transitions_are_those_of_the_layer():
    torch.manual_seed(0)
    task = make_task("flip-flop")
    model = SequenceTagger(5, 2, d_model=16, num_heads=2, mixer="path_attention", init_std=None)
    tokens = task.sample(1, 20, torch.Generator().manual_seed(0)).tokens[0]
    found = record_transitions(model, tokens)
    assert found.attention.shape == (2, 20, 20)
    torch.testing.assert_close(found.attention.sum(-1), torch.ones(2, 20))
    assert not found.attention.triu(1).any()
    # What the layer makes of its values, weighted so, is what it returns.
    layer = model.layers[0]
    x = layer.mixer_norm(model.embeddings(tokens))[None]
    _, _, v = layer.mixer.project(x)
    o = torch.einsum("hij,jhv->ihv", found.attention, v[0])
    torch.testing.assert_close(layer.mixer.o_proj(o.flatten(1)), layer.mixer(x)[0])
    w, beta, _, _ = layer.mixer.transitions(x)
    torch.testing.assert_close(found.beta, beta[0])
    torch.testing.assert_close(found.overlap[1, 3, 4], (w[0, 3, 1] @ w[0, 4, 1]).abs())
    picture = transitions_figure(found, list("w1i0r1w0i1" * 2), "title")
    assert len(picture.axes) == 4
    with pytest.raises(ValueError, match="one of the model's 1 PaTH layers, got 1"):
        record_transitions(model, tokens, layer=1)
