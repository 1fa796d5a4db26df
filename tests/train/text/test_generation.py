"""What a trained model writes."""

import io
import sys

import pytest
import torch

from householder.cli import main
from householder.models import CausalLM, CausalLMConfig, save_causal_lm
from householder.train import ConfigError
from householder.train.text.generation import continue_text, sample_tokens, stream_text
from householder.train.text.tokenizer import ByteTokenizer


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = CausalLMConfig(
        320, d_model=16, num_layers=2, head_dim=8, pattern="delta_product,path", init_std=None
    )
    return CausalLM(config)


def options(**changed):
    return {"max_new_tokens": 12, "num_tokens": 257, "temperature": 0.0, **changed}


def test_greedy_tokens_are_those_of_whole_forward_passes(model):
    prompt = [256, 1, 2, 3]
    drawn = list(sample_tokens(model, prompt, **options()))
    for _ in range(12):
        prompt.append(int(model(torch.tensor([prompt]))[0, -1, :257].argmax()))
    assert drawn == prompt[4:]


def test_seeded_draws_repeat_and_stay_in_the_vocabulary(model):
    def draw(seed, **changed):
        generator = torch.Generator().manual_seed(seed)
        settings = options(temperature=5.0, max_new_tokens=60, **changed)
        return list(sample_tokens(model, [256], generator=generator, **settings))

    assert draw(0) == draw(0) != draw(1)
    assert max(draw(0, num_tokens=5)) < 5
    assert draw(0, top_k=1) == draw(1, top_k=1)
    assert draw(0, top_p=1e-6) == draw(0, top_k=1)
    assert len(set(draw(0))) > len(set(draw(0, top_k=3)))


def test_the_stop_token_ends_the_text(model):
    free = list(sample_tokens(model, [256], **options()))
    stopped = list(sample_tokens(model, [256], stop=free[4], **options()))
    assert stopped == free[: free.index(free[4])]


def test_characters_are_whole():
    pieces = list(stream_text("Höfe → 🏠".encode(), ByteTokenizer()))
    assert pieces == list("Höfe → 🏠")
    assert "".join(stream_text(b"\xf0\x9f", ByteTokenizer())) == "�"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": -1.0}, "`temperature` must be finite and at least 0, got -1.0"),
        ({"top_k": 0}, "`top_k` must be at least 1, got 0"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_options_are_refused(model, changed, message):
    with pytest.raises(ValueError, match=message):
        next(sample_tokens(model, [256], **options(**changed)))


def test_an_empty_prompt_and_no_model_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="`prompt` must have a token"):
        next(sample_tokens(model, [], **options()))
    settings = {"top_k": None, "top_p": None, "seed": 0, "device": "cpu", "dtype": "float32"}
    settings |= {"max_new_tokens": 1, "temperature": 1.0}
    with pytest.raises(ConfigError, match=r"must hold config.json and model.safetensors"):
        continue_text(tmp_path, "a", **settings)
    save_causal_lm(model, tmp_path)
    with pytest.raises(ConfigError, match=r"must hold tokenizer.json .* --tokenizer bytes"):
        continue_text(tmp_path, "a", **settings)
    with pytest.raises(ConfigError, match=r"`prompt` must be text in UTF-8, .* at character 1"):
        continue_text(tmp_path, "a\udcff", tokenizer="bytes", **settings)
    assert len("".join(continue_text(tmp_path, "a", tokenizer="bytes", **settings))) <= 1


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tmp_path):
    save_causal_lm(CausalLM(CausalLMConfig(256, d_model=16, num_layers=1, head_dim=8)), tmp_path)
    words = ["generate", str(tmp_path), "a", "--tokenizer", "bytes", "--device", "cpu"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    with pytest.raises(ConfigError, match="at most the model's 256 tokens, bytes has 257"):
        continue_text(
            tmp_path,
            "a",
            max_new_tokens=1,
            temperature=1.0,
            top_k=None,
            top_p=None,
            seed=0,
            device="cpu",
            dtype="float32",
            tokenizer="bytes",
        )


def test_command_continues_an_argument_and_standard_input(model, tmp_path, capsys, monkeypatch):
    save_causal_lm(model, tmp_path)
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer.file_content())
    words = ["generate", str(tmp_path), "--temperature", "0", "--max-new-tokens", "4"]

    def run(*more: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            main([*words, "--device", "cpu", *more])
        return capsys.readouterr().out

    given = run("né")
    monkeypatch.setattr(sys, "stdin", io.StringIO("né"))
    assert given == run()
    assert given.startswith("né")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"n\xe9"), encoding="utf-8"))
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--device", "cpu"])
    assert "`prompt` must be text in UTF-8" in capsys.readouterr().err
