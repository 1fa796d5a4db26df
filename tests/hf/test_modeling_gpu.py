"""Every way of generating gives what whole forward passes give, for every mixer, on a GPU."""

import pytest
import torch

pytest.importorskip("transformers")
pytestmark = pytest.mark.gpu

from householder.hf.modeling import HouseholderConfig, HouseholderForCausalLM  # noqa: E402
from householder.models.causal_lm_config import LAYERS  # noqa: E402

V, NEW = 61, 16
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}


def make(mixer, seed=0):
    torch.manual_seed(seed)
    config = HouseholderConfig(
        vocab_size=V, d_model=128, num_layers=2, head_dim=64, window=9, pattern=mixer,
        # PyTorch's own initialisation: the published one leaves nearly all logits equal.
        init_std=None,
    )  # fmt: skip
    return HouseholderForCausalLM(config).eval().cuda()


@pytest.fixture(params=LAYERS)
def model(request):
    return make(request.param)


def tokens(*shape):
    # Without 0, which fills rows up.
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(3)).cuda()


@torch.no_grad()
def greedy(model, prompt):
    for _ in range(NEW):
        prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


def test_greedy_and_left_padded(model):
    prompt, short = tokens(2, 40), tokens(1, 25)
    expected = greedy(model, prompt)
    assert torch.equal(model.generate(prompt, **GREEDY), expected)
    batch = torch.cat([torch.cat([torch.full_like(prompt[:1, :15], 1), short], 1), prompt])
    mask = torch.ones_like(batch)
    mask[0, :15] = 0
    together = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(together[0, 15:], greedy(model, short)[0])
    assert torch.equal(together[1:], expected)


@pytest.mark.slow
def test_beams_do_not_depend_on_the_cache(model):
    prompt = tokens(2, 40)
    options = {**GREEDY, "num_beams": 3}
    cached, whole = (model.generate(prompt, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, whole)


@pytest.mark.slow
def test_assisted_is_greedy(model):
    prompt = tokens(1, 20).repeat(1, 2)
    expected = greedy(model, prompt)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), expected)
    assistant = make("delta_net", seed=1)
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **GREEDY), expected)


@torch.no_grad()
def test_cached_logits_are_as_exact_as_whole_passes_in_bfloat16(model):
    batch = tokens(2, 40)
    model = model.bfloat16()
    whole = model(batch).logits
    cache, parts = None, []
    for part in batch.split([25, 1, 1, 8, 5], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    exact = model.cpu().double()(batch.cpu()).logits.cuda()
    error, whole_error = ((x.double() - exact).norm() for x in (torch.cat(parts, 1), whole))
    assert error <= 2 * whole_error
