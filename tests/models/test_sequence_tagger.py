"""The tagger and its blocks: forms agree, the config rebuilds the model, training works."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from householder.models import Block, SequenceTagger, SequenceTaggerConfig, SwiGLU
from householder.models.block import default_mlp_width
from householder.nn import ATTENTIONS, MIXERS, DeltaNet, MixerState

# Each field away from its default at least once; valid for the mixer of its name.
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {"d_model": 16},
    "two-layers": {"d_model": 16, "num_layers": 2, "num_householder": 2, "mlp_width": 24},
    "gated_delta_product": {
        "d_model": 12,
        "num_layers": 2,
        "mixer": "gated_delta_product",
        "num_heads": 2,
        "head_dim": 5,
        "num_value_heads": 4,
        "expand_v": 0.6,
        "num_householder": 3,
        "use_short_conv": True,
        "conv_size": 3,
        "init_std": None,
    },
    "gated_delta_net": {
        "d_model": 12,
        "mixer": "gated_delta_net",
        "allow_neg_eigval": False,
        "use_output_gate": False,
        "norm_eps": 1e-6,
    },
    "delta_net": {
        "d_model": 12,
        "mixer": "delta_net",
        "use_output_gate": True,
        "use_short_conv": True,
        "qk_activation": "relu",
        "qk_norm": "sum",
    },
    "tied, no MLP": {"d_model": 16, "num_layers": 2, "mlp_width": 0, "tie_embeddings": True},
}


# Of those whose labels are not five.
NUM_CLASSES = {"tied, no MLP": 7}


def make_model(name: str) -> SequenceTagger:
    torch.manual_seed(0)
    return SequenceTagger(7, NUM_CLASSES.get(name, 5), dtype=torch.float64, **CONFIGS[name])


def make_tokens(*shape: int) -> Tensor:
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(1))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def run_definition(model: SequenceTagger, tokens: Tensor) -> Tensor:
    """The tagger from its parameters, except for the mixer, which has its own test."""
    p = dict(model.named_parameters())
    eps = model.config.norm_eps

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    x = p["embeddings.weight"][tokens]
    for i, layer in enumerate(model.layers):
        x = x + layer.mixer(norm(x, p[f"layers.{i}.mixer_norm.weight"]))
        if model.config.mlp_width == 0:
            continue
        h = norm(x, p[f"layers.{i}.mlp_norm.weight"])
        gate = h @ p[f"layers.{i}.mlp.gate_proj.weight"].T
        up = h @ p[f"layers.{i}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ p[f"layers.{i}.mlp.down_proj.weight"].T
    tied = model.config.tie_embeddings
    return norm(x, p["norm.weight"]) @ p["embeddings.weight" if tied else "head.weight"].T


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_the_definition(name: str) -> None:
    model, tokens = make_model(name), make_tokens(2, 6)
    logits = model(tokens)
    assert logits.shape == (2, 6, NUM_CLASSES.get(name, 5))
    assert_close(logits, run_definition(model, tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_and_segments_are_the_whole(name: str) -> None:
    model, tokens = make_model(name), make_tokens(2, 9)
    logits, states = model(tokens, return_states=True)
    assert torch.equal(logits, model(tokens))

    step_states, outputs = model.init_state(2), []
    for tokens_t in tokens.unbind(1):
        logits_t, step_states = model.step(tokens_t, step_states)
        outputs.append(logits_t)
    assert_close(torch.stack(outputs, dim=1), logits)

    first, middle_states = model(tokens[:, :4], return_states=True)
    second, segment_states = model(tokens[:, 4:], states=middle_states, return_states=True)
    assert_close(torch.cat([first, second], dim=1), logits)
    for a, b, c in zip(step_states, segment_states, states, strict=True):
        assert_close(a.matrix, c.matrix)
        assert_close(b.matrix, c.matrix)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_is_separate(name: str) -> None:
    model, tokens = make_model(name), make_tokens(1, 9)
    cu_seqlens = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    logits = model(tokens, cu_seqlens=cu_seqlens)
    assert_close(logits[:, :2], model(tokens[:, :2]))
    assert_close(logits[:, 2:], model(tokens[:, 2:]))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_rebuilds_the_model_through_json(name: str) -> None:
    model, tokens = make_model(name), make_tokens(1, 4)
    config = json.loads(json.dumps(model.config.to_dict()))
    assert SequenceTaggerConfig.from_dict(config) == model.config
    rebuilt = SequenceTagger.from_config(config, dtype=torch.float64)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens), model(tokens))
    assert rebuilt.config == model.config


def test_every_config_field_reaches_the_model() -> None:
    """Each field away from its default changes the modules' printed form or initial values."""
    base = {"vocab_size": 7, "num_classes": 5, "d_model": 16}
    changes = {
        "vocab_size": 8, "num_classes": 6, "d_model": 32, "num_layers": 2,
        "mixer": "gated_delta_product", "num_heads": 2, "head_dim": 8, "num_value_heads": 8,
        "expand_v": 2.0, "num_householder": 2, "allow_neg_eigval": False, "use_output_gate": True,
        "use_short_conv": True, "conv_size": 5, "qk_activation": "elu", "qk_norm": "none",
        "mlp_width": 40, "norm_eps": 1e-3, "init_std": 0.05, "tie_embeddings": True,
    }  # fmt: skip
    assert set(changes) == {field.name for field in dataclasses.fields(SequenceTaggerConfig)}

    def fingerprint(**options: Any) -> tuple[str, float]:
        # The kernel width shows only in a model with a convolution.
        options.setdefault("use_short_conv", "conv_size" in options)
        if "tie_embeddings" in options:
            options["num_classes"] = base["vocab_size"]
        torch.manual_seed(0)
        model = SequenceTagger(**{**base, **options})
        return repr(model), sum(p.double().abs().sum().item() for p in model.parameters())

    for name, value in changes.items():
        reference = fingerprint(use_short_conv=True) if name == "conv_size" else fingerprint()
        assert fingerprint(**{name: value}) != reference, name


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model, tokens = make_model(name), make_tokens(3, 8)
    tokens[0, :7] = torch.arange(7)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 5).backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        assert p.grad.abs().max() > 0, parameter_name


def test_initial_weights_are_the_published_ones() -> None:
    model = SequenceTagger(100, 100, d_model=256, num_layers=8, num_householder=2)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(p, torch.ones_like(p))
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            bound = 1 / math.sqrt(p.shape[1]) / math.sqrt(2 * 8)
            assert 0.99 * bound < p.abs().max() <= bound, name
        else:
            assert abs(p.std() / 0.02 - 1) < 0.06, name


@pytest.mark.parametrize("mixer", ATTENTIONS)
def test_attentions_by_name(mixer: str) -> None:
    options = {"d_model": 24, "num_heads": 2, "num_layers": 2, "mlp_width": 16, "mixer": mixer}
    torch.manual_seed(0)
    model, tokens = SequenceTagger(7, 5, **options, dtype=torch.float64), make_tokens(2, 9)
    logits = model(tokens)
    assert_close(logits, run_definition(model, tokens))
    rebuilt = SequenceTagger.from_config(model.config.to_dict(), dtype=torch.float64)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens), logits)
    with torch.no_grad():
        first, states = model(tokens[:, :4], return_states=True)
        rest = []
        for tokens_t in tokens[:, 4:].unbind(1):
            logits_t, states = model.step(tokens_t, states)
            rest.append(logits_t)
    assert_close(torch.cat([first, torch.stack(rest, dim=1)], dim=1), logits.detach())


def test_attentions_refuse_options_of_the_delta_rule() -> None:
    for option, value in (("num_householder", 2), ("use_short_conv", True), ("qk_norm", "none")):
        with pytest.raises(ValueError, match=f"`{option}` must be left at .* 'rotary_attention'"):
            SequenceTagger(7, 5, d_model=24, mixer="rotary_attention", **{option: value})


def test_heads_keep_their_size_under_every_mixer() -> None:
    sizes = set()
    for mixer in MIXERS:
        layer = SequenceTagger(7, 5, d_model=24, mixer=mixer).layers[0].mixer
        sizes.add((layer.num_heads, layer.head_dim, layer.value_head_dim))
    assert sizes == {(4, 6, 6)}


def test_it_learns_a_product_of_reflections() -> None:
    """Parity, one bit of state: 0 to 100 % at twice the training length within 150 small steps."""
    torch.manual_seed(0)
    model = SequenceTagger(2, 2, d_model=16, num_heads=2, mlp_width=32, init_std=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        tokens = torch.randint(2, (64, 8), generator=generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), (tokens.cumsum(1) % 2).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = torch.randint(2, (200, 16), generator=generator)
    assert torch.equal(model(tokens).argmax(-1), tokens.cumsum(1) % 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "`vocab_size` must be at least 1, got 0"),
        ({"num_classes": 2.5}, TypeError, "`num_classes` must be an int, got 2.5"),
        ({"num_layers": 0}, ValueError, "`num_layers` must be at least 1, got 0"),
        ({"num_heads": 0}, ValueError, "`num_heads` must be at least 1, got 0"),
        ({"mixer": "mamba"}, ValueError, "'rotary_attention', got 'mamba'"),
        ({"d_model": 18}, ValueError, "multiple of num_heads=4, got d_model=18"),
        ({"mlp_width": -1}, ValueError, "`mlp_width` must be at least 1, got -1"),
        ({"tie_embeddings": True}, ValueError, "a class for each of the 7 tokens, got"),
        ({"init_std": -1.0}, ValueError, "`init_std` must be greater than 0, got -1.0"),
        ({"mixer": "delta_net", "num_householder": 2}, ValueError, "must be 1, got 2"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        SequenceTagger(**{"vocab_size": 7, "num_classes": 5, "d_model": 16, **options})
    assert message in str(caught.value)


def test_unknown_config_fields_are_named() -> None:
    config = SequenceTaggerConfig(7, 5).to_dict()
    with pytest.raises(ValueError, match=r"^SequenceTaggerConfig: .*got depth, width;"):
        SequenceTagger.from_config({**config, "width": 3, "depth": 2})


def test_wrong_inputs_are_named() -> None:
    model = make_model("two-layers")
    with pytest.raises(TypeError, match=r"`tokens` must be int64, got torch.float32"):
        model(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"`tokens` must be \[B, T\], got shape \[3\]"):
        model(make_tokens(3))
    with pytest.raises(ValueError, match=r"`tokens` must be \[B\], got shape \[2, 1\]"):
        model.step(make_tokens(2, 1), model.init_state(2))
    with pytest.raises(ValueError, match=r"`states` must have one entry per layer, 2, got 1"):
        model(make_tokens(2, 3), states=model.init_state(2)[:1])


@pytest.mark.parametrize(("d_model", "width"), [(64, 256), (128, 512), (96, 256), (2048, 5632)])
def test_default_mlp_width(d_model: int, width: int) -> None:
    assert default_mlp_width(d_model) == width


def test_block_hands_the_state_through() -> None:
    block = Block(DeltaNet(8, num_heads=2), mlp_width=16)
    x = torch.randn(2, 3, 8)
    y, state = block(x, return_state=True)
    assert isinstance(state, MixerState)
    assert torch.equal(y, block(x))
    y_t, _ = block.step(x[:, 0], block.init_state(2))
    torch.testing.assert_close(y_t, y[:, 0])


def test_swiglu_refuses_no_width() -> None:
    with pytest.raises(ValueError, match=r"^SwiGLU: `width` must be at least 1, got 0"):
        SwiGLU(8, 0)
