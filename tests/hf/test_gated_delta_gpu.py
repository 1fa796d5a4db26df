"""Models of transformers with gated delta layers give the same answers on our ops, on a GPU."""

import importlib
import importlib.util
import inspect

import pytest
import torch

import householder

pytest.importorskip("transformers")
pytestmark = pytest.mark.gpu

SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
MODELS = {
    "qwen3_next": ("Qwen3Next{}", {"head_dim": 64, **EXPERTS}),
    "qwen3_5": ("Qwen3_5{}", {"head_dim": 64}),
    "qwen3_5_moe": ("Qwen3_5Moe{}", {"head_dim": 64, **EXPERTS}),
    "olmo_hybrid": ("OlmoHybrid{}", {"linear_num_key_heads": 4}),
}


@pytest.fixture(params=MODELS)
def family(request, monkeypatch):
    """Return a function that makes the model, on transformers' own fallback."""
    name, (pattern, changed) = request.param, MODELS[request.param]
    package = f"transformers.models.{name}"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"this transformers has no {name}")
    modeling = importlib.import_module(f"{package}.modeling_{name}")
    # Where flash-linear-attention is installed, the model would not run on the fallback.
    for function in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        if hasattr(modeling, function):
            monkeypatch.setattr(modeling, function, None)
    for function in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        monkeypatch.setattr(modeling, function, inspect.unwrap(getattr(modeling, function)))
    configuration = importlib.import_module(f"{package}.configuration_{name}")
    suffix = "TextConfig" if name.startswith("qwen3_5") else "Config"
    make_config = getattr(configuration, pattern.format(suffix))
    make = getattr(modeling, pattern.format("ForCausalLM"))

    def make_model(dtype=torch.float32):
        torch.manual_seed(0)
        return make(make_config(**{**SIZES, **changed})).to("cuda", dtype).eval()

    return make_model


def tokens(*shape):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(1)).cuda()


def run(model, batch):
    model.zero_grad()
    output = model(batch, labels=batch, use_cache=False)
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return output.logits.detach(), gradients


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def test_logits_and_gradients_are_equal(family):
    model, batch = family(), tokens(2, 200)
    plain, plain_gradients = run(model, batch)
    with householder.use_in_transformers():
        ours, our_gradients = run(model, batch)
    assert distance(ours, plain) < 1e-5
    assert len(our_gradients) == len(plain_gradients)
    # Next to strong gates theirs is nothing but rounding of the rest.
    rounding = 1e-6 * torch.cat([g.flatten() for g in plain_gradients]).norm()
    for gradient, plain_gradient in zip(our_gradients, plain_gradients, strict=True):
        assert (gradient - plain_gradient).norm() <= 1e-4 * plain_gradient.norm() + rounding


def test_half_precision_is_as_near_to_float32_as_the_fallback(family):
    batch = tokens(2, 200)
    exact, exact_gradients = run(family(), batch)
    model = family(torch.bfloat16)
    plain, plain_gradients = run(model, batch)
    with householder.use_in_transformers():
        ours, our_gradients = run(model, batch)
    assert distance(ours, exact) <= 2 * distance(plain, exact)
    exact, plain, ours = (
        torch.cat([g.flatten().double() for g in gradients])
        for gradients in (exact_gradients, plain_gradients, our_gradients)
    )
    assert distance(ours, exact) <= 2 * distance(plain, exact)


def test_greedy_and_padded_decoding_are_equal(family):
    model, batch = family(), tokens(2, 70)
    mask = torch.ones_like(batch)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    plain = model.generate(batch, **options)
    with householder.use_in_transformers():
        ours = model.generate(batch, **options)
    assert torch.equal(ours, plain)
