"""Checkpoints of flash-linear-attention: their layout becomes ours, and ours theirs, exactly.

Whether the converted model gives the same logits as theirs is tested on a GPU, where theirs runs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from householder.hf.fla import convert, from_fla, to_fla
from householder.hf.fla_config import ConversionError, config_from_fla, config_to_fla
from householder.models import CausalLM, CausalLMConfig, load_causal_lm, save_causal_lm

BASE = {"vocab_size": 19, "hidden_size": 32, "num_hidden_layers": 3, "norm_eps": 1e-6}

# Their configs, and of the first layer what their modules hold: name and shape.
THEIRS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "delta_net": (
        {"model_type": "delta_net", "num_heads": 4, "expand_k": 0.5, "expand_v": 1.5},
        {
            "q_proj": (16, 32),
            "k_proj": (16, 32),
            "v_proj": (48, 32),
            "b_proj": (4, 32),
            "q_conv1d": (16, 1, 4),
            "k_conv1d": (16, 1, 4),
            "v_conv1d": (48, 1, 4),
            "o_norm": (12,),
            "o_proj": (32, 48),
        },
    ),
    "gated_deltanet": (
        {
            "model_type": "gated_deltanet",
            "num_heads": 2,
            "num_v_heads": 4,
            "head_dim": 8,
            "expand_v": 2.0,
            "allow_neg_eigval": True,
        },
        {
            "q_proj": (16, 32),
            "k_proj": (16, 32),
            "v_proj": (64, 32),
            "a_proj": (4, 32),
            "b_proj": (4, 32),
            "A_log": (4,),
            "dt_bias": (4,),
            "q_conv1d": (16, 1, 4),
            "k_conv1d": (16, 1, 4),
            "v_conv1d": (64, 1, 4),
            "g_proj": (64, 32),
            "o_norm": (16,),
            "o_proj": (32, 64),
        },
    ),
    "gated_deltaproduct": (
        {
            "model_type": "gated_deltaproduct",
            "num_heads": 2,
            "head_dim": 8,
            "expand_v": 1.0,
            "num_householder": 3,
            "use_short_conv": False,
            "use_output_gate": False,
            "use_forget_gate": True,
        },
        {
            "q_proj": (16, 32),
            "k_proj": (48, 32),
            "v_proj": (48, 32),
            "a_proj": (2, 32),
            "b_proj": (6, 32),
            "A_log": (2,),
            "dt_bias": (2,),
            "o_norm": (8,),
            "o_proj": (32, 16),
        },
    ),
    "path_attn": (
        {
            "model_type": "path_attn",
            "num_heads": 4,
            "num_kv_heads": 2,
            "use_forget_gate": True,
            "tie_word_embeddings": True,
        },
        {
            "q_proj": (32, 32),
            "k_proj": (16, 32),
            "v_proj": (16, 32),
            "w_proj.0": (32, 32),
            "w_proj.1": (16, 32),
            "w_conv1d": (16, 1, 3),
            "bt_proj": (2, 32),
            "bt_proj.bias": (2,),
            "g_proj": (4, 32),
            "g_proj.bias": (4,),
            "o_proj": (32, 32),
        },
    ),
}


def their_folder(tmp_path, kind, **changed):
    """Write a folder as their `save_pretrained` would, with random weights."""
    fields, shapes = THEIRS[kind]
    config = {**BASE, **fields, **changed}
    shapes = dict(shapes)
    if not config.get("use_low_rank_w", True):
        del shapes["w_proj.0"], shapes["w_proj.1"]
        shapes["w_proj"] = (16, 32)
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embeddings.weight": (19, 32), "model.norm.weight": (32,)}
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = (19, 32)
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{norm}.weight": (32,) for norm in ("attn_norm", "mlp_norm")}
        for name, shape in {"gate": (256, 32), "up": (256, 32), "down": (32, 256)}.items():
            tensors[f"{prefix}mlp.{name}_proj.weight"] = shape
        for name, shape in shapes.items():
            whole = name if name.endswith("bias") or name == "A_log" else f"{name}.weight"
            tensors[f"{prefix}attn.{whole}"] = shape
    values = {n: torch.randn(s, generator=generator) / 8 for n, s in tensors.items()}
    folder = tmp_path / kind
    folder.mkdir()
    save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", THEIRS)
def test_theirs_becomes_ours_and_back(tmp_path, kind):
    folder = their_folder(tmp_path, kind)
    convert(folder, tmp_path / "ours")
    ours = load_causal_lm(tmp_path / "ours")
    assert ours(torch.randint(19, (2, 7))).isfinite().all()
    convert(tmp_path / "ours", tmp_path / "back")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    before.setdefault("lm_head.weight", before["model.embeddings.weight"])
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(x, after[name]), name
    theirs = json.loads((folder / "config.json").read_text())
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: back[name] for name in theirs} == theirs
    assert config_from_fla(back) == ours.config


def test_the_tokenizer_and_the_end_of_text_go_along(tmp_path):
    folder = their_folder(tmp_path, "delta_net", eos_token_id=7, pad_token_id=None)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    for made in ("ours", "back"):
        config = json.loads((tmp_path / made / "config.json").read_text())
        # The first was not said, and is 1 in their models then.
        assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 7, None]
        assert (tmp_path / made / "tokenizer.json").read_text() == "{}"
        assert not (tmp_path / made / "notes.txt").exists()


def test_their_gates_are_scaled_and_the_papers_are_not(tmp_path):
    model = from_fla(their_folder(tmp_path, "path_attn"))
    assert model.layers[0].mixer.gate_scale == pytest.approx(8**-0.5)
    paper = CausalLMConfig(19, d_model=32, head_dim=8, pattern="path_fox")
    with pytest.raises(ConversionError, match=r"`path_gate_scale` must be K\^\(-1/2\), got 1.0"):
        config_to_fla(paper)


def test_a_whole_projection_to_w_is_kept(tmp_path):
    folder = their_folder(tmp_path, "path_attn", use_low_rank_w=False)
    model = from_fla(folder)
    mixer = model.layers[0].mixer
    w = load_file(folder / "model.safetensors")["model.layers.0.attn.w_proj.weight"]
    x = torch.randn(3, 32)
    torch.testing.assert_close(mixer.w_up_proj(mixer.w_down_proj(x)), x @ w.T)
    to_fla(model, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(back["model.layers.0.attn.w_proj.weight"], w)
    assert not any("w_up" in name or "w_down" in name for name in back)


def test_without_the_convolution_w_has_no_activation(tmp_path):
    theirs = {**BASE, **THEIRS["path_attn"][0], "use_w_shortconv": False}
    ours = config_from_fla(theirs)
    layer = CausalLM(ours).layers[0].mixer
    assert layer.w_conv1d is None
    x = torch.randn(1, 4, 32)
    w = layer.w_up_proj(layer.w_down_proj(x)).unflatten(-1, (-1, 8))
    length = (w.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(layer.transitions(x)[0], w / length)
    back = config_to_fla(ours)
    assert {name: back[name] for name in theirs} == theirs
    with pytest.raises(ConversionError, match=r"`path_w_activation` must be identity, got silu"):
        config_to_fla(dataclasses.replace(ours, path_w_activation="silu"))


def test_hybrids_keep_their_layers():
    theirs = {
        **BASE,
        **THEIRS["delta_net"][0],
        "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 16},
    }
    ours = config_from_fla(theirs)
    assert ours.layer_names() == ("delta_net", "sliding_window_attention", "delta_net")
    assert (ours.window, ours.attention_key_heads, ours.attention_head_dim) == (16, 2, 8)
    back = config_to_fla(ours)["attn"]
    assert {name: back[name] for name in theirs["attn"]} == theirs["attn"]


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("delta_net", {"use_beta": False}, "`use_beta` must be True, got False"),
        ("delta_net", {"model_type": "gla"}, "`model_type` must be one of delta_net,.*'gla'"),
        ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "'swish', got 'sigmoid'"),
        ("gated_deltanet", {"attnres_block_size": 2}, "`attnres_block_size` must be None, got 2"),
        ("delta_net", {"attn": {"layers": [0], "num_heads": 4, "qkv_bias": True}}, "biases"),
    ],
)
def test_what_ours_cannot_be_is_refused(kind, changed, message):
    with pytest.raises(ConversionError, match=message):
        config_from_fla({**BASE, **THEIRS[kind][0], **changed})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "delta,path"}, "`pattern` must be one recurrent mixer"),
        ({"pattern": "path", "path_w_rank": 8}, r"`path_w_rank` must be 32 or H \* K, got 8"),
        ({"pattern": "path", "attention_qk_norm": True}, "`attention_qk_norm` must be False"),
        ({"pattern": "gated_delta", "qk_activation": "relu"}, "`qk_activation` must be 'silu'"),
        ({"pattern": "delta_product", "num_value_heads": 6, "num_heads": 3}, "no such field"),
    ],
)
def test_what_theirs_cannot_be_is_refused(options, message):
    with pytest.raises(ConversionError, match=message):
        config_to_fla(CausalLMConfig(19, d_model=32, head_dim=8, **options))


def test_folders_that_cannot_be_are_refused_and_kept(tmp_path):
    folder = their_folder(tmp_path, "delta_net")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(ConversionError, match="full is occupied"):
        convert(folder, tmp_path / "full")
    with pytest.raises(ConversionError, match="holds no model"):
        convert(tmp_path / "absent", tmp_path / "new")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"must hold config.json and safetensors"):
        convert(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_the_configs_are_refused(tmp_path):
    folder = their_folder(tmp_path, "delta_net")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_heads": 2}))
    with pytest.raises(ConversionError, match="must be those of its config"):
        from_fla(folder)


def test_the_documentation_has_the_rows_of_the_comparison(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import fla_checkpoints as script

    rows = script.table(script.RESULTS / script.FILE)
    assert rows in (root / "docs" / "transformers.md").read_text(), "python … --table"


def test_ours_with_tied_embeddings_is_theirs(tmp_path):
    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(19, d_model=32, num_layers=2, head_dim=8, pattern="delta"))
    save_causal_lm(model, tmp_path / "run" / "model")
    convert(tmp_path / "run", tmp_path / "theirs")
    again = from_fla(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["eos_token_id"] is None
    tokens = torch.randint(19, (1, 6))
    assert torch.equal(again(tokens), model(tokens))
