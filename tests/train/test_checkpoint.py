import json
import os

import pytest
import torch
from torch import nn

from householder.train import CheckpointError
from householder.train import checkpoint as ckpt


@pytest.fixture
def saved(tmp_path):
    """The folder of checkpoints and the newest one in it."""
    for step in (10, 20):
        content = ckpt.Checkpoint(
            step,
            {"weight": torch.arange(6.0).view(2, 3) + step, "mask": torch.tensor([True, False])},
            {"exp_avg/weight": torch.ones(2, 3)},
            {"note": "ü", "seconds": 0.1},
        )
        path = ckpt.save(tmp_path, content, keep=2)
    return tmp_path, path


def test_what_is_loaded_is_what_was_saved(saved):
    checkpoint = ckpt.load(saved[1])
    assert checkpoint.step == 20
    assert torch.equal(checkpoint.model["weight"], torch.arange(6.0).view(2, 3) + 20)
    assert checkpoint.model["mask"].tolist() == [True, False]
    assert torch.equal(checkpoint.optimizer["exp_avg/weight"], torch.ones(2, 3))
    assert checkpoint.state == {"note": "ü", "seconds": 0.1}


def test_only_the_newest_are_kept(saved):
    folder, _ = saved
    assert ckpt.steps(folder) == [10, 20]
    ckpt.save(folder, ckpt.Checkpoint(30, {}, {}, {}), keep=1)
    assert ckpt.steps(folder) == [30]


@pytest.mark.parametrize("name", [*ckpt.FILES, "manifest.json"])
def test_every_flipped_byte_is_found(saved, name):
    _, path = saved
    original = (path / name).read_bytes()
    for place in range(0, len(original), max(1, len(original) // 60)):
        damaged = bytearray(original)
        damaged[place] ^= 1
        (path / name).write_bytes(damaged)
        if name == "manifest.json" and _same_json(original, damaged):
            continue  # white space: nothing is damaged
        with pytest.raises(CheckpointError, match=r"step-00000020.*(from step 10|must be of)"):
            ckpt.load(path)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("name", [*ckpt.FILES, "manifest.json"])
def test_a_missing_or_truncated_file_is_found(saved, name):
    _, path = saved
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        ckpt.load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        ckpt.load(path)


def test_nothing_is_unpickled(saved):
    for path in saved[1].iterdir():
        assert path.suffix in (".safetensors", ".json")


def test_a_death_while_saving_leaves_the_older_checkpoint(saved, monkeypatch):
    folder, path = saved

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        ckpt.save(folder, ckpt.Checkpoint(30, {}, {}, {}))
    assert ckpt.latest(folder) == path
    assert ckpt.load(path).step == 20
    monkeypatch.undo()
    ckpt.save(folder, ckpt.Checkpoint(30, {}, {}, {}))
    assert ckpt.steps(folder) == [20, 30]
    assert not list(folder.glob(".*"))


def test_model_of_another_shape_is_refused():
    with pytest.raises(CheckpointError, match=r"weight must be \[3, 2\], is \[5, 2\]"):
        ckpt.restore_model(nn.Linear(2, 3, bias=False), nn.Linear(2, 5, bias=False).state_dict())
    with pytest.raises(CheckpointError, match=r"bias must be \[3\], is absent"):
        ckpt.restore_model(nn.Linear(2, 3), nn.Linear(2, 3, bias=False).state_dict())


def test_optimizer_continues_as_if_nothing_had_happened():
    def build():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()

    whole, optimizer = build()
    for seed in range(4):
        step(whole, optimizer, seed)

    first, optimizer = build()
    for seed in range(2):
        step(first, optimizer, seed)
    kept = {k: v.clone() for k, v in ckpt.optimizer_tensors(first, optimizer).items()}
    second, optimizer = build()
    second.load_state_dict(first.state_dict())
    ckpt.restore_optimizer(second, optimizer, kept)
    for seed in range(2, 4):
        step(second, optimizer, seed)
    assert torch.equal(second.weight, whole.weight)


def test_optimizer_state_of_another_model_is_refused():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="fits no parameter"):
        ckpt.restore_optimizer(model, optimizer, {"exp_avg/weight": torch.ones(2, 4)})
    with pytest.raises(CheckpointError, match="fits no parameter"):
        ckpt.restore_optimizer(model, optimizer, {"exp_avg/other": torch.ones(2, 3)})


def test_random_state_continues():
    states = ckpt.random_state(torch.device("cpu"))
    expected = torch.rand(3)
    torch.rand(7)
    ckpt.restore_random_state(json.loads(json.dumps(states)), torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
