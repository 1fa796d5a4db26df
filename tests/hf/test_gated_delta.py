"""Models of transformers with gated delta layers give the same answers on our ops."""

from __future__ import annotations

import importlib
import types

import pytest
import torch

import householder
from householder.hf import gated_delta, gated_delta_functions
from householder.hf.gated_delta import CHUNK, RECURRENT

transformers = pytest.importorskip("transformers")


def qwen3_next(**changed):
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **changed,
    )
    return Qwen3NextForCausalLM(config).eval()


@pytest.fixture
def counted(monkeypatch):
    """Count how often the two ops are asked."""
    calls = {"delta_product": 0, "delta_product_step": 0}
    for name in calls:
        function = getattr(gated_delta_functions, name)

        def call(*args, _name=name, _function=function, **options):
            calls[_name] += 1
            return _function(*args, **options)

        monkeypatch.setattr(gated_delta_functions, name, call)
    return calls


def tokens(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_are_equal(counted):
    model, batch = qwen3_next(), tokens(2, 75)
    results = []
    for patched in (False, True):
        model.zero_grad()
        with householder.use_in_transformers() if patched else torch.enable_grad():
            output = model(batch, labels=batch)
            output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits.detach(), gradients))
    assert counted["delta_product"] == 3  # three of the four layers, in one forward pass
    (plain, plain_gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
# Of every model of transformers that has such layers: its classes, and what its config takes.
FAMILIES = {
    "qwen3_next": ("Qwen3Next", "Config", {"head_dim": 16, **EXPERTS}),
    "qwen3_5": ("Qwen3_5", "TextConfig", {"head_dim": 16, "intermediate_size": 32}),
    "qwen3_5_moe": ("Qwen3_5Moe", "TextConfig", {"head_dim": 16, **EXPERTS}),
    "qwen4_exp": (
        "Qwen4Exp",
        "TextConfig",
        {"head_dim": 16, "hc_count": 2, "hc_lowrank": 8, **EXPERTS, **INDEXER},
    ),
    "olmo_hybrid": ("OlmoHybrid", "Config", {"intermediate_size": 32, "linear_num_key_heads": 4}),
}


@pytest.mark.parametrize("family", gated_delta.MODELS)
def test_every_family_is_switched_with_equal_logits_and_continuations(family, counted):
    prefix, suffix, options = FAMILIES[family]
    package = f"transformers.models.{family}"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"this transformers has no {family}")
    modeling = importlib.import_module(f"{package}.modeling_{family}")
    configuration = importlib.import_module(f"{package}.configuration_{family}")
    shared = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = getattr(configuration, prefix + suffix)(**{**shared, **options})
    model = getattr(modeling, f"{prefix}ForCausalLM")(config).eval()

    def run():
        with torch.no_grad():
            logits = model(tokens(2, 70), use_cache=False).logits
        return logits, model.generate(tokens(2, 9), max_new_tokens=4, do_sample=False)

    logits, continued = run()
    assert counted == {"delta_product": 0, "delta_product_step": 0}
    with householder.use_in_transformers():
        our_logits, our_continued = run()
    assert counted == {"delta_product": 3 + 3, "delta_product_step": 3 * 3}
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(our_continued, continued)


def test_greedy_and_padded_decoding_are_equal(counted):
    model, batch = qwen3_next(), tokens(2, 9)
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(batch, **options)
    with householder.use_in_transformers():
        ours = model.generate(batch, **options)
    assert torch.equal(ours, plain)
    assert counted == {"delta_product": 3, "delta_product_step": 3 * 7}


def test_half_precision_is_as_near_to_the_exact_as_the_fallback():
    batch = tokens(1, 70)
    exact = qwen3_next()(batch).logits.double()
    half = qwen3_next().bfloat16()
    plain = half(batch).logits
    with householder.use_in_transformers():
        ours = half(batch).logits
    error, plain_error = ((x.double() - exact).abs().max() for x in (ours, plain))
    assert error <= 2 * plain_error


def test_packed_sequences_stay_apart():
    function = gated_delta_functions.over_sequences("auto")
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 12, 2, 8, generator=generator) for _ in range(2))
    v, g, beta = (
        torch.randn(1, 12, 4, 6, generator=generator),
        -torch.rand(1, 12, 4, generator=generator),
        torch.rand(1, 12, 4, generator=generator),
    )
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed, _ = function(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, cu_seqlens=bounds)
    alone, _ = function(*(x[:, 5:] for x in (q, k, v, g, beta)), use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(packed[:, 5:], alone)


def theirs_of_the_module():
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    if not callable(getattr(module, "causal_conv1d_fn", None)):
        pytest.skip("the layers of this transformers keep their convolutions themselves")
    return module


def test_packed_sequences_of_a_whole_model_stay_apart():
    """Which takes the convolution too: a token at a boundary must not see three before it."""
    model, batch = qwen3_next(), tokens(1, 12)
    theirs_of_the_module()
    packed = {
        "position_ids": torch.tensor([[*range(5), *range(7)]]),
        "cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 5, 12], dtype=torch.int32),
        "use_cache": False,
    }
    with torch.no_grad(), householder.use_in_transformers():
        together = model(batch, **packed).logits
        alone = torch.cat([model(part).logits for part in batch.split([5, 7], dim=1)], dim=1)
        torch.testing.assert_close(together, alone)
        del packed["cu_seq_lens_q"], packed["cu_seq_lens_k"]
        by_number = model(batch, seq_idx=torch.tensor([[0] * 5 + [1] * 7]), **packed).logits
    torch.testing.assert_close(by_number, alone)


@pytest.mark.parametrize("activation", ["silu", "gelu", None])
@pytest.mark.parametrize("with_bias", [False, True])
def test_convolutions_are_those_of_transformers(activation, with_bias):
    theirs = theirs_of_the_module()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 6, generator=generator).mT  # channels first, as the layers have them
    weight = torch.randn(6, 4, generator=generator)
    bias = torch.randn(6, generator=generator) if with_bias else None
    options = {"weight": weight, "bias": bias, "activation": activation}
    whole = gated_delta_functions.causal_conv1d_fn(x, **options)
    torch.testing.assert_close(whole, theirs.causal_conv1d_fn(x, **options))
    for length in (1, 3):
        states = [x[..., :4].clone() for _ in range(2)]
        parts = [
            function(x[..., 4 : 4 + length], state, **options)
            for function, state in zip(
                (gated_delta_functions.causal_conv1d_update, theirs.causal_conv1d_update),
                states,
                strict=True,
            )
        ]
        torch.testing.assert_close(*parts)
        torch.testing.assert_close(parts[0], whole[..., 4 : 4 + length])
        assert torch.equal(*states)


def test_undo_puts_everything_back_and_twice_is_once():
    functions = {CHUNK: print, **gated_delta._CONVOLUTIONS}
    places = [p for m in gated_delta._modules() for p in gated_delta._places(m, functions)]
    assert places

    def now():
        return [vars(place.owner).get(place.name) for place in places]

    def all_are_ours():
        return all(p._replace(original=x).is_ours for p, x in zip(places, now(), strict=True))

    before = now()
    assert not all_are_ours()
    first = householder.use_in_transformers()
    second = householder.use_in_transformers()
    assert all_are_ours()
    assert second.modules == ()
    second.undo()
    assert all_are_ours()
    first.undo()
    assert now() == before


def test_layers_that_keep_the_functions_are_switched_too(monkeypatch):
    """As in transformers 5.0 to 5.14, whose layers took the functions when they were made."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.chunk_gated_delta_rule = "theirs, whole"
            self.recurrent_gated_delta_rule = "theirs, one"

        def forward(self):
            return self.chunk_gated_delta_rule, self.recurrent_gated_delta_rule

    module = types.ModuleType("modeling_old")
    vars(module).update({CHUNK: print, RECURRENT: print, "Layer": Layer})
    monkeypatch.setattr(gated_delta, "_modules", lambda: [module])
    old = Layer()
    with householder.use_in_transformers() as patch:
        new = Layer()
        for layer in (old, new):
            assert [f.__name__ for f in layer()] == [
                "chunk_gated_delta_rule",
                "recurrent_gated_delta_rule",
            ]
        assert getattr(module, CHUNK) is print
        assert patch.modules == (__name__,)
        assert householder.use_in_transformers().modules == ()
    for layer in (old, new):
        assert layer() == ("theirs, whole", "theirs, one")


def test_an_unknown_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(gated_delta, "_modules", list)
    with pytest.raises(NotImplementedError, match=r"must have one of qwen3_next.* has none"):
        householder.use_in_transformers()


def test_without_transformers_it_says_so(monkeypatch):
    monkeypatch.setattr(gated_delta.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install transformers"):
        householder.use_in_transformers()
