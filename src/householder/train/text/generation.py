"""Continue a text, token by token."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from householder.models import CausalLM, Decoder, load_causal_lm
from householder.models.generation import check_draw_options, draw
from householder.train.build import resolve_device
from householder.train.errors import ConfigError
from householder.train.text.tokenizer import BYTES, Tokenizer, make_tokenizer


def continue_text(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    device: str,
    dtype: str,
    tokenizer: str | None = None,
) -> Iterator[str]:
    """Return the pieces of text with which a trained model continues a prompt.

    Args:
        folder: of the model, or of the run that trained it.
        prompt: the beginning of a document; may be empty.
        max_new_tokens: how many tokens to draw at most; the document's end ends them earlier.
        temperature: as in `sample_tokens`.
        top_k: as in `sample_tokens`.
        top_p: as in `sample_tokens`.
        seed: of the draws; `None` for PyTorch's own generator.
        device: where to run.
        dtype: of the weights, "float32" or "bfloat16".
        tokenizer: "bytes", or a `tokenizer.json` or its folder; `None` for the model's own.

    Raises:
        ConfigError: the folder holds no model or no tokenizer, the tokenizer has more tokens than
            the model, the prompt is no text, or an option is out of range.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"`dtype` must be float32 or bfloat16, got {dtype!r}; weights are converted to it"
        )
    try:
        check_draw_options("sample_tokens", temperature, top_k, top_p)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if (folder / "model").is_dir():
        folder /= "model"
    try:
        model = load_causal_lm(folder, device=resolve_device(device), dtype=getattr(torch, dtype))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    words = _tokenizer_for(model, folder, tokenizer)
    try:
        numbers = words.encode(prompt).tolist()
    except UnicodeEncodeError as error:
        raise ConfigError(
            "`prompt` must be text in UTF-8, got a byte that is none of it at character "
            f"{error.start}; convert the text to UTF-8"
        ) from error
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    tokens = sample_tokens(
        model,
        [words.separator, *numbers],
        max_new_tokens=max_new_tokens,
        num_tokens=words.vocab_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=words.separator,
        generator=generator,
    )
    return stream_text(tokens, words)


def _tokenizer_for(model: CausalLM, folder: Path, name: str | None) -> Tokenizer:
    """Return the tokenizer of that name, or the one beside the model."""
    if name is None and not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"`model`: {folder} must hold tokenizer.json beside the weights, and does not; name "
            f"one with --tokenizer, or give --tokenizer {BYTES} for a model of bytes"
        )
    tokenizer = make_tokenizer(str(folder) if name is None else name)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"`tokenizer` must have at most the model's {model.config.vocab_size} tokens, "
            f"{name or folder / 'tokenizer.json'} has {tokenizer.vocab_size}; give the one that "
            "the model was trained with"
        )
    return tokenizer


def sample_tokens(
    model: CausalLM,
    prompt: list[int],
    *,
    max_new_tokens: int,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield tokens that continue a prompt, as they are drawn.

    Args:
        model: in any mode.
        prompt: token numbers, at least one.
        max_new_tokens: how many to draw at most.
        num_tokens: the tokenizer's vocabulary; the model's may be padded beyond it.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest; `None` among all.
        top_p: draw among the likeliest that together have this probability; `None` among all.
        stop: a token that ends the text, itself not yielded; `None` for none.
        generator: of the draws, on the CPU; `None` for PyTorch's own.

    Raises:
        ValueError: the prompt is empty, or an option is out of range.
    """
    if not prompt:
        raise ValueError("sample_tokens: `prompt` must have a token, got none; begin with one")
    check_draw_options("sample_tokens", temperature, top_k, top_p)
    device = model.head_weight.device
    decoder = Decoder(model, torch.tensor([prompt], device=device), max_new_tokens=max_new_tokens)
    for drawn in range(1, max_new_tokens + 1):
        # Drawn on the CPU: the same seed means the same text on every device.
        logits = decoder.logits[:, :num_tokens].float().cpu()
        token = int(draw(logits, temperature, top_k, top_p, generator))
        if token == stop:
            return
        yield token
        if drawn < max_new_tokens:
            decoder.step(torch.tensor([token], device=device))


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of tokens as they come, a character as soon as it is whole.

    Examples:
        >>> from householder.train.text.tokenizer import ByteTokenizer
        >>> list(stream_text("né".encode(), ByteTokenizer()))
        ['n', 'é']
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    # Tokens are decoded together with those before them, since a tokenizer may put a space between.
    before: list[int] = []
    new: list[int] = []
    for token in tokens:
        new.append(token)
        whole = tokenizer.decode_bytes(before + new)
        if whole.endswith("�".encode()):
            continue  # a part of a character, which the next token completes
        if text := decoder.decode(whole[len(tokenizer.decode_bytes(before)) :]):
            yield text
        before, new = new, []
    rest = tokenizer.decode_bytes(before + new)[len(tokenizer.decode_bytes(before)) :]
    if text := decoder.decode(rest, final=True):
        yield text
