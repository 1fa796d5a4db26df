"""Our language models in transformers: every way of generating agrees with whole forward passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from householder.models import CausalLM, load_causal_lm, save_causal_lm

transformers = pytest.importorskip("transformers")

from householder.hf.cache import MAX_ROLLBACK, HouseholderCache  # noqa: E402
from householder.hf.modeling import HouseholderConfig, HouseholderForCausalLM  # noqa: E402

V = 23
PATTERNS = {
    "delta": "delta,delta_product",
    "gated": "gated_delta,gated_delta_product",
    "path": "path,path_fox",
    "attention": "rope,swa,fox",
    "hybrid": "gated_delta_product,path,swa",
}


def make(pattern: str, seed: int = 0, **options) -> HouseholderForCausalLM:
    torch.manual_seed(seed)
    config = HouseholderConfig(
        vocab_size=V,
        d_model=32,
        num_layers=len(pattern.split(",")),
        head_dim=8,
        window=5,
        pattern=pattern,
        # PyTorch's own initialisation: the published one leaves nearly all logits equal.
        init_std=None,
        **options,
    )
    return HouseholderForCausalLM(config).eval()


@pytest.fixture(params=PATTERNS.values(), ids=PATTERNS)
def model(request):
    return make(request.param)


def tokens(*shape: int) -> torch.Tensor:
    # Without 0, which fills rows up: transformers would take it for nothing.
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(3))


def greedy(model: HouseholderForCausalLM, prompt: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        logits = model(prompt).logits[:, -1]
        prompt = torch.cat([prompt, logits.argmax(-1, keepdim=True)], dim=1)
    return prompt


GREEDY = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}


@torch.no_grad()
def test_cached_logits_are_those_of_the_whole(model):
    batch = tokens(2, 20)
    whole = model(batch).logits
    cache, parts = None, []
    for part in batch.split([9, 1, 1, 6, 3], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.get_seq_length() == 20


def test_greedy_continuations_are_those_of_whole_passes(model):
    prompt = tokens(2, 7)
    expected = greedy(model, prompt, 10)
    assert torch.equal(model.generate(prompt, **GREEDY), expected)
    assert torch.equal(model.generate(prompt, use_cache=False, **GREEDY), expected)


def test_rows_filled_up_in_front_continue_as_alone(model):
    short, long = tokens(1, 4), tokens(1, 9).flip(1)
    batch = torch.cat([torch.cat([torch.full((1, 5), 1), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    together = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(together[0, 5:], greedy(model, short, 10)[0])
    assert torch.equal(together[1], greedy(model, long, 10)[0])
    # What stands in front is of no account, also without a cache.
    whole = model(batch, attention_mask=mask).logits
    torch.testing.assert_close(whole[:1, 5:], model(short).logits)


def test_prompts_are_read_in_parts_and_texts_continued_from_their_cache(model):
    prompt = tokens(2, 9)
    assert torch.equal(
        model.generate(prompt, prefill_chunk_size=4, **GREEDY), greedy(model, prompt, 10)
    )
    first = model.generate(prompt, return_dict_in_generate=True, **GREEDY)
    # Somebody answers what was written, and it goes on.
    answered = torch.cat([first.sequences, tokens(2, 3)], dim=1)
    second = model.generate(answered, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, greedy(model, answered, 10))


def test_beams_and_draws_do_not_depend_on_the_cache(model):
    prompt = tokens(2, 7)
    for options in (
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "num_return_sequences": 3},
    ):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            settings = {**GREEDY, **options, "use_cache": use_cache}
            results.append(model.generate(prompt, **settings))
        assert torch.equal(*results), options


def test_assisted_decoding_is_greedy_decoding(model):
    prompt = tokens(1, 8).repeat(1, 3)
    expected = greedy(model, prompt, 10)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), expected)
    assistant = make("delta", seed=1)
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **GREEDY), expected)
    # An assistant that is always right: every guess stays.
    assert torch.equal(model.generate(prompt, assistant_model=model, **GREEDY), expected)


@torch.no_grad()
def test_forgotten_tokens_leave_no_trace(model):
    batch = tokens(1, 20)
    cache = model(batch[:, :6], use_cache=True).past_key_values
    for first in (6, 10):  # a guess of five, of which one stays, twice
        guess = batch[:, first : first + 1].repeat(1, 5)
        model(guess, past_key_values=cache)
        cache.crop(-4)
        model(batch[:, first + 1 : first + 4], past_key_values=cache)
        assert cache.get_seq_length() == first + 4
    logits = model(batch[:, 14:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(batch).logits[:, 14:])


@torch.no_grad()
def test_tokens_forgotten_of_a_prompt_leave_what_fills_rows_up(model):
    batch, mask = tokens(2, 12), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    cache = model(batch[:, :8], attention_mask=mask, use_cache=True).past_key_values
    cache.crop(-2)
    logits = model(batch[:, 6:], past_key_values=cache).logits
    alone = torch.cat([model(batch[:1, 3:]).logits[:, 3:], model(batch[1:]).logits[:, 6:]])
    torch.testing.assert_close(logits, alone)


@torch.no_grad()
def test_crop_refuses_what_it_cannot():
    model = make("delta")
    cache = model(tokens(1, 6), use_cache=True).past_key_values
    model(tokens(1, 1), past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"can forget the 0 tokens .* got 2"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="`tokens_to_remove` must be negative or 0, got 3"):
        cache.crop(3)
    model(tokens(1, MAX_ROLLBACK + 1), past_key_values=cache)  # more than a PaTH layer takes back
    with pytest.raises(RuntimeError, match=r"can forget the 0 tokens .* got 1"):
        cache.crop(-1)


def test_loss_is_that_of_shifted_labels_and_trains(model):
    batch = tokens(2, 9)
    output = model(batch, labels=batch)
    logits = output.logits[:, :-1].flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
    torch.testing.assert_close(output.loss, plain)
    model.train().gradient_checkpointing_enable()
    model(batch, labels=batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_training_can_go_without_logits():
    batch = tokens(2, 9)
    model, frugal = make("delta,path"), make("delta,path")
    frugal.config.skip_training_logits = True
    frugal.load_state_dict(model.state_dict())
    whole, alone = (m.train()(batch, labels=batch) for m in (model, frugal))
    assert whole.logits is not None
    assert alone.logits is None
    assert torch.equal(alone.loss, whole.loss)
    assert frugal(batch).logits is not None
    assert frugal.eval()(batch, labels=batch).logits is not None


def test_names_of_the_package_are_those_of_its_modules():
    import householder.hf

    for name in householder.hf.__all__:
        assert getattr(householder.hf, name).__name__ == name
    assert set(householder.hf.__all__) <= set(dir(householder.hf))
    with pytest.raises(AttributeError, match="no attribute 'HouseholderTokenizer'"):
        householder.hf.HouseholderTokenizer  # noqa: B018


def test_parts_of_a_step_add_up_to_its_loss():
    """As `Trainer` accumulates gradients: it gives every part the number of labels of the whole."""
    model = make("delta,path")
    batch, labels = tokens(3, 9), tokens(3, 9)
    labels[0, :6] = -100
    whole = model(batch, labels=labels).loss
    asked = (labels[:, 1:] != -100).sum()
    parts = [
        model(batch[rows], labels=labels[rows], num_items_in_batch=asked).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.slow
def test_trainer_takes_the_same_step_in_parts(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 9)]
    trained = []
    for size, parts in ((4, 1), (1, 4)):
        model = make("delta,path").train()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        transformers.Trainer(model, arguments, train_dataset=rows).train()
        trained.append(model.state_dict())
    for name, x in trained[0].items():
        torch.testing.assert_close(trained[1][name], x, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_to_keep(model):
    batch = tokens(2, 9)
    whole = model(batch).logits
    torch.testing.assert_close(model(batch, logits_to_keep=2).logits, whole[:, -2:])
    chosen = torch.tensor([1, 4])
    torch.testing.assert_close(model(batch, logits_to_keep=chosen).logits, whole[:, chosen])


@pytest.mark.parametrize(
    "options",
    [
        {"return_flash_attn_kwargs": True},
        {"return_position_ids": False, "return_seq_idx": True},
        {},
    ],
    ids=["bounds", "numbers", "positions"],
)
def test_packed_sequences_stay_apart(model, options):
    """In each of the ways in which transformers' collator may say where they begin."""
    parts = tokens(1, 9).split([4, 1, 4], dim=1)
    collate = transformers.DataCollatorWithFlattening(**options)
    packed = collate([{"input_ids": part[0]} for part in parts])
    alone = torch.cat([model(part).logits for part in parts], 1)
    torch.testing.assert_close(model(**packed).logits, alone)


def test_positions_that_go_on_are_of_no_account():
    model, batch = make("delta,rope"), tokens(2, 9)
    assert torch.equal(model(batch, position_ids=torch.arange(5, 14)).logits, model(batch).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_by_transformers(tmp_path, tied):
    model = make("gated_delta_product,path", tie_embeddings=tied, global_layers=[1])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is HouseholderForCausalLM
    batch = tokens(2, 9)
    torch.testing.assert_close(loaded(batch).logits, model(batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_be_resized(tmp_path, tied):
    model = make("delta", tie_embeddings=tied)
    batch = tokens(2, 9)
    before = model(batch).logits
    model.resize_token_embeddings(V + 4, mean_resizing=False)
    after = model(batch).logits
    torch.testing.assert_close(after[..., :V], before)
    assert after.shape[-1] == V + 4
    model.save_pretrained(tmp_path / "theirs")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(loaded(batch).logits, after)
    save_causal_lm(model.model, tmp_path / "ours")
    assert torch.equal(load_causal_lm(tmp_path / "ours")(batch), after)


def test_what_training_on_text_writes_is_loaded(tmp_path):
    model = make("delta,path").model
    save_causal_lm(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = tokens(2, 9)
    torch.testing.assert_close(loaded(batch).logits, model(batch), rtol=0, atol=0)
    # And the other way round.
    loaded.save_pretrained(tmp_path / "again")
    ours = load_causal_lm(tmp_path / "again")
    assert isinstance(ours, CausalLM)
    torch.testing.assert_close(ours(batch), model(batch), rtol=0, atol=0)


@pytest.mark.slow
def test_a_fresh_process_finds_it_by_one_import(tmp_path):
    make("delta").save_pretrained(tmp_path)
    code = (
        "import householder.hf.modeling, transformers, sys;"
        "print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.strip() == "HouseholderForCausalLM"


def test_config_is_json_and_keeps_every_field(tmp_path):
    config = HouseholderConfig(vocab_size=9, num_heads=2, global_layers=[1], eos_token_id=3)
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.lm_config() == config.lm_config()
    assert loaded.eos_token_id == 3
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "householder"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m(inputs_embeds=torch.zeros(1, 2, 32)),
            NotImplementedError,
            "`input_ids` must be given",
        ),
        (
            lambda m: m(tokens(1, 3), attention_mask=torch.tensor([[1, 0, 1]])),
            ValueError,
            "must be 0 in front of the tokens",
        ),
        (
            lambda m: m(tokens(1, 3), attention_mask=torch.tensor([[1, 1, 0]]), use_cache=True),
            ValueError,
            "pad on the left",
        ),
        (
            lambda m: m(tokens(1, 3), seq_idx=torch.tensor([[0, 0, 1]]), use_cache=True),
            NotImplementedError,
            "packed sequences must begin and end in one call, got 2 of them and a cache",
        ),
        (
            lambda m: m(tokens(2, 3), position_ids=torch.tensor([[0, 1, 0], [0, 1, 2]])),
            ValueError,
            "the batch must be packed as B = 1, got B = 2",
        ),
        (
            lambda m: m.generate(tokens(1, 3), cache_implementation="static", **GREEDY),
            ValueError,
            "`cache_implementation` must be None, got 'static'",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(make("delta"))


def test_cache_can_be_repeated_chosen_and_emptied():
    model = make(PATTERNS["hybrid"])
    batch = tokens(2, 12)
    with torch.no_grad():
        cache = model(batch[:, :8], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        logits = model(batch[[1, 0], 8:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(batch[[1, 0]]).logits[:, 8:])
    cache.reset()
    assert isinstance(cache, HouseholderCache)
    assert cache.get_seq_length() == 0
