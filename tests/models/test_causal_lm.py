"""The causal language model: its layers, its three ways of running, its loss."""

import functools
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

from householder.models import PRESETS, CausalLM, CausalLMConfig
from householder.models._recompute import keeping_the_dear
from householder.models.block import SwiGLU
from householder.nn import (
    DeltaNet,
    DeltaProduct,
    ForgettingAttention,
    GatedDeltaNet,
    GatedDeltaProduct,
    PaTHAttention,
    RotaryAttention,
)
from householder.ops import linear_cross_entropy

V = 11
ALL_MIXERS = "delta,gated_delta,delta_product,gated_delta_product,path,path_fox,rope,swa,fox"


def make(pattern=ALL_MIXERS, **options):
    torch.manual_seed(0)
    shape = {"d_model": 32, "num_layers": len(pattern.split(",")), "head_dim": 8, "window": 4}
    # PyTorch's own initialisation: the published one is so small that every layer is near to none.
    return CausalLM(CausalLMConfig(V, pattern=pattern, init_std=None, **{**shape, **options}))


def some_tokens(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


def test_pattern_repeats_and_global_layers_replace():
    config = CausalLMConfig(
        V, num_layers=5, pattern="delta_product, path_fox", global_layers=(1, 4), head_dim=32
    )
    path, rotary = "forgetting_path_attention", "rotary_attention"
    assert config.layer_names() == ("delta_product", rotary, "delta_product", path, rotary)


def test_layers_are_what_the_pattern_names():
    kinds = [type(layer.mixer) for layer in make().layers]
    assert kinds == [
        DeltaNet,
        GatedDeltaNet,
        DeltaProduct,
        GatedDeltaProduct,
        PaTHAttention,
        PaTHAttention,
        RotaryAttention,
        RotaryAttention,
        ForgettingAttention,
    ]
    path, path_fox, rope, swa = (layer.mixer for layer in make(window=5).layers[4:8])
    assert path.f_proj is None
    assert path_fox.f_proj is not None
    assert (rope.window, swa.window) == (None, 5)


def test_config_survives_json():
    config = CausalLMConfig(V, num_layers=3, global_layers=(2,), num_heads=2, window=7)
    assert CausalLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": "delta_net,mamba"},
            "`pattern` must be one of .*'rotary_attention'.* got 'mamba'",
        ),
        ({"global_layers": (8,)}, "`global_layers` must be indices from 0 to 7, got 8"),
        ({"window": 0}, "`window` must be at least 1, got 0"),
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
        ({"expand_v": 0.0}, "CausalLMConfig: `expand_v` must be greater than 0, got 0.0"),
        ({"num_value_heads": 1.5}, "CausalLMConfig: `num_value_heads` must be an int, got 1.5"),
        ({"qk_norm": "l1"}, "CausalLMConfig: `qk_norm` must be one of .* got 'l1'"),
        ({"pattern": ["rope"]}, "CausalLMConfig: `pattern` must be a string"),
        ({"global_layers": ("1",)}, "CausalLMConfig: `global_layers` must be ints, got '1'"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CausalLMConfig(**{"vocab_size": V, **options})


def test_unknown_fields_and_presets_are_refused():
    with pytest.raises(ValueError, match="got layers; correct the name"):
        CausalLMConfig.from_dict({"vocab_size": V, "layers": 3})
    with pytest.raises(ValueError, match=r"`preset` must be one of .*'340m'.* got '7b'"):
        CausalLMConfig.preset("7b", V)


def test_the_documentation_has_the_presets_sizes():
    page = (Path(__file__).parents[2] / "docs" / "language-models.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([\d |]+) \|$", page, flags=re.MULTILINE))
    assert list(rows) == list(PRESETS)
    for size in ("10m", "340m"):
        patterns = ("delta", "path", "gated_delta", "gated_delta_product")
        for pattern, cell in zip(patterns, rows[size].split(" | "), strict=True):
            config = CausalLMConfig.preset(size, 32_000, pattern=pattern)
            millions = CausalLM(config, device="meta").num_parameters() / 1e6
            assert str(round(millions)) == cell, (size, pattern)


@pytest.mark.parametrize("size", ["340m", "760m", "1.3b"])
def test_presets_have_the_size_of_their_name(size):
    with torch.device("meta"):
        model = CausalLM(CausalLMConfig.preset(size, 32_000, pattern="delta_net"))
    named = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert 0.95 < model.num_parameters() / named < 1.05
    assert model.num_parameters(embeddings=False) == (
        model.num_parameters() - 32_000 * PRESETS[size]["d_model"]
    )


def test_logits_depend_on_earlier_tokens_alone():
    model, tokens = make(), some_tokens(2, 9)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amin(dim=(0, 2)).min() > 0


def test_whole_segments_and_steps_agree():
    model, tokens = make(), some_tokens(2, 12)
    whole = model(tokens)
    with torch.no_grad():
        first, states = model(tokens[:, :7], return_states=True)
        rest = []
        for token in tokens[:, 7:].unbind(1):
            logits, states = model.step(token, states)
            rest.append(logits)
    torch.testing.assert_close(torch.cat([first, torch.stack(rest, 1)], 1), whole)


def test_packed_sequences_do_not_see_one_another():
    model, lengths = make(), (5, 1, 6)
    parts = [some_tokens(1, 12)[:, :length] for length in lengths]
    cu_seqlens = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    packed = model(torch.cat(parts, 1), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed, torch.cat([model(part) for part in parts], 1))


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_cross_entropy_of_the_logits(tied):
    model, tokens = make("delta_product,rope", tie_embeddings=tied), some_tokens(2, 9)
    labels = some_tokens(2, 9)
    labels[0, :4] = -100
    plain = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model.loss(tokens, labels), plain)
    assert (model.head is None) == tied


def test_blocked_loss_has_the_gradient_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(V, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = some_tokens(13)
    labels[3] = -100
    blocked = linear_cross_entropy(x, weight, labels, logits_at_once=4 * V)
    plain = F.cross_entropy(F.linear(x, weight), labels)
    torch.testing.assert_close(blocked, plain)
    for ours, theirs in zip(
        torch.autograd.grad(blocked, (x, weight)),
        torch.autograd.grad(plain, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_loss_of_no_labels_is_zero():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(V, 4)
    loss = linear_cross_entropy(x, weight, torch.full((3,), -100))
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_loss_never_holds_all_logits(monkeypatch):
    shapes = []
    linear = F.linear

    def recording(*args):
        shapes.append((y := linear(*args)).shape)
        return y

    monkeypatch.setattr(F, "linear", recording)
    linear_cross_entropy(torch.randn(10, 4), torch.randn(V, 4), some_tokens(10), logits_at_once=40)
    assert shapes == [(3, V), (3, V), (3, V), (1, V)]


def test_checkpointing_changes_no_gradient():
    model, tokens = make(), some_tokens(2, 8)
    gradients, runs = [], []
    model.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(saved, plain)
    assert len(runs) == 3  # once, and then once more in the backward pass


def test_operations_per_token():
    """Linear layers as PyTorch counts them, and beside them attention and recurrences."""
    tokens = some_tokens(2, 8)
    for tied in (False, True):
        model = make("delta", tie_embeddings=tied)
        with FlopCounterMode(display=False) as counter:
            model(tokens)
        state = 4 * 8 * 8  # heads of 8 × 8
        recurrence = 2 * state * (2 * 1 + 1)
        assert model.flops_per_token(8) == counter.get_total_flops() / 16 + recurrence
    for pattern, seen in (("delta", 0), ("delta_product", 0), ("rope", 100), ("swa", 0)):
        model = make(pattern)
        more = model.flops_per_token(1000) - model.flops_per_token(800)
        assert more == 4 * 32 * seen, pattern
    one, two = (make("delta_product", num_householder=n) for n in (1, 2))
    weights = sum(p.numel() for p in two.parameters() if p.dim() == 2)
    weights -= sum(p.numel() for p in one.parameters() if p.dim() == 2)
    assert two.flops_per_token(8) - one.flops_per_token(8) == 2 * weights + 2 * state * 2


def test_recurrences_know_whether_to_make_their_states_anew():
    model = make("gated_delta_product,rope")
    mixer = model.layers[0].mixer
    seen = [mixer.recompute]
    for model.recompute, model.checkpoint_activations in itertools.product((True, False), repeat=2):
        assert model.layers[1].recompute == model.layers[0].recompute == mixer.recompute
        seen.append(mixer.recompute)
    # A block that is run again as a whole keeps them in between.
    assert seen == [True, False, True, False, False]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_what_a_compiled_block_makes_anew_is_cheap_and_changes_no_gradient():
    """As many products as before, and of the MLP's three hidden vectors two are kept."""
    torch._dynamo.reset()
    block = CausalLMConfig(V, d_model=32, head_dim=16, mlp_width=88).build_block("gated_delta_net")
    x = torch.randn(2, 70, 32, requires_grad=True)
    options = {"state": None, "cu_seqlens": None, "mask": None}
    results, products, kept = [], [], []
    for function in (block._run, functools.partial(keeping_the_dear, block._run)):
        graphs = []

        def record(graph, _, graphs=graphs):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        compiler = aot_autograd(
            fw_compiler=record, partition_fn=min_cut_rematerialization_partition
        )
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        hidden = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, hidden=hidden: hidden.append(x.numel() == 140 * 88) or x, lambda x: x
        ):
            y = compiled(x, **options)
        results.append(torch.autograd.grad(y.sin().sum(), [x, *block.parameters()]))
        nodes = [str(node.target) for graph in graphs for node in graph.graph.nodes]
        products.append(sum("mm." in node or "householder." in node for node in nodes))
        kept.append((sum(hidden), len(hidden)))
    torch.testing.assert_close(*results)
    assert products[0] == products[1]
    assert [hidden for hidden, _ in kept] == [3, 2]
    assert kept[1][1] < kept[0][1]


def test_hooks_see_the_hidden_vector_of_the_mlp():
    mlp, x = SwiGLU(8, width=24), torch.randn(3, 8)
    plain, seen = mlp(x), []
    mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    torch.testing.assert_close(mlp(x), plain)
    assert seen == [(3, 24)]


# Dynamo looks at the gradients of its inputs, which are no leaves here, behind a filter of its own.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_blocks_that_are_alike_are_compiled_once():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, tokens = make("gated_delta_product", num_layers=3), some_tokens(2, 9)
    plain = model.loss(tokens[:, :-1], tokens[:, 1:])
    names = set(model.state_dict())
    model.compile_blocks(backend="aot_eager")
    compiled = model.loss(tokens[:, :-1], tokens[:, 1:])
    compiled.backward()
    torch.testing.assert_close(compiled, plain)
    assert counters["stats"]["unique_graphs"] == 1
    assert set(model.state_dict()) == names


# Dynamo looks at the gradients of its inputs, which are no leaves here, behind a filter of its own.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(
    ("pattern", "bounds"),
    [
        (ALL_MIXERS, None),
        # The others read the bounds of packed sequences.
        (ALL_MIXERS.removesuffix(",rope,swa,fox"), [0, 3, 3, 9]),
    ],
    ids=["all", "packed"],
)
def test_training_step_compiles_to_one_graph(pattern, bounds):
    torch._dynamo.reset()
    model, tokens = make(pattern), some_tokens(1 if bounds else 2, 10)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    results = []
    for loss_of in (model.loss, torch.compile(model.loss, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = loss_of(tokens[:, :-1], tokens[:, 1:], cu_seqlens=cu_seqlens)
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(2, 3)), TypeError, "`tokens` must be int64, got torch.float32"),
        (lambda m: m([[1, 2]]), TypeError, "`tokens` must be a tensor, got list"),
        (lambda m: m(some_tokens(1, 3), cu_seqlens=[0, 3]), TypeError, "`cu_seqlens` must be a te"),
        (lambda m: m(some_tokens(3)), ValueError, r"`tokens` must be \[B, T\], got shape \[3\]"),
        (
            lambda m: m.loss(some_tokens(2, 3), some_tokens(2, 4)),
            ValueError,
            r"`labels` must be of the shape of tokens, \[2, 3\], got \[2, 4\]",
        ),
        (
            lambda m: m(some_tokens(2, 3), states=[]),
            ValueError,
            "`states` must have one entry per layer, 1, got 0",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(make("delta_net"))
