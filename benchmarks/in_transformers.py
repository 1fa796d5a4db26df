"""Time a Qwen3-Next model of transformers with its own fallback and on our ops.

    python benchmarks/in_transformers.py                   # on the GPU if there is one
    python benchmarks/in_transformers.py --device cpu

A forward pass over a prompt, a training step (forward and backward), and a decoded token of a whole
greedy `generate` behind a prompt of 64. Variants take turns, so that a busy machine is busy for
all. "fla" is flash-linear-attention where transformers puts it when it is installed. Logits are
compared with those of the fallback in float32, and the tokens of a continuation with its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import inspect
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import householder
from recording import add_arguments, append, environment

FILE = "in-transformers.csv"
COLUMNS = (
    "date", "case", "variant", "prefill_ms", "train_ms", "token_ms", "logits_difference",
    "same_tokens", "note", "device", "threads", "torch", "transformers", "commit",
)  # fmt: skip
# Width, layers, heads of keys and values, their size; sequences and tokens; dtype.
SIZES = {
    "cpu": (256, 4, 4, 8, 64, 1, 1024, torch.float32),
    "cuda": (1024, 8, 8, 16, 128, 4, 4096, torch.bfloat16),
    "tiny": (64, 4, 2, 4, 16, 1, 100, torch.float32),
}
PROMPT, NEW_TOKENS = 64, 32
VARIANTS = {"cpu": ("transformers", "householder"), "cuda": ("transformers", "householder", "fla")}


def make_model(size: str, device: str) -> tuple[torch.nn.Module, Tensor]:
    # transformers chooses at the import: where flash-linear-attention is installed, it never
    # takes its fallback.
    sys.modules["fla"] = None  # type: ignore[assignment]
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    del sys.modules["fla"]
    width, layers, key_heads, value_heads, head_dim, batch, length, dtype = SIZES[size]
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=min(2, width // 64),
        head_dim=64,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        mlp_only_layers=list(range(layers)),  # no experts: they are not what is compared
    )
    model = Qwen3NextForCausalLM(config).to(device, dtype).eval()
    return model, torch.randint(8192, (batch, length), device=device)


@contextlib.contextmanager
def fla_in_transformers() -> Iterator[str]:
    """Put flash-linear-attention where transformers puts it; yields what it needed for that."""
    import fla.ops.gated_delta_rule as theirs
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    import lm_gpu

    lm_gpu.shorten_tuning()
    note = lm_gpu.lift_refusal()

    def accepting(function: Callable[..., Any]) -> Callable[..., Any]:
        known = set(inspect.signature(function).parameters)
        return lambda *args, **options: function(
            *args, **{name: value for name, value in options.items() if name in known}
        )

    places = {
        "torch_chunk_gated_delta_rule": theirs.chunk_gated_delta_rule,
        "torch_recurrent_gated_delta_rule": theirs.fused_recurrent_gated_delta_rule,
    }
    originals = {name: getattr(module, name) for name in places}
    for name, function in places.items():
        setattr(module, name, accepting(function))
    try:
        yield note
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def using(variant: str) -> contextlib.AbstractContextManager[object]:
    if variant == "householder":
        return householder.use_in_transformers()
    return fla_in_transformers() if variant == "fla" else contextlib.nullcontext()


def seconds_of(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return times[1:]


def decode(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    prompt = tokens[:, :PROMPT]
    return generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )


def measure(model: torch.nn.Module, tokens: Tensor) -> tuple[dict[str, list[float]], list[str]]:
    """Return the times of the three quantities, and what the peer says where it refuses one."""

    def train() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad()

    @torch.no_grad()
    def prefill() -> None:
        model(tokens, use_cache=False)

    figures, refusals = {}, []
    for name, run, repeats, parts in (
        ("prefill_ms", prefill, 5, 1),
        ("token_ms", lambda: decode(model, tokens), 3, NEW_TOKENS),
        ("train_ms", train, 3, 1),
    ):
        try:
            figures[name] = [1e3 * seconds / parts for seconds in seconds_of(run, repeats)]
        except Exception as error:  # whatever the peer raises: its row says so
            first_line = (str(error).splitlines() or [""])[0]
            refusals.append(f"{name}: refuses: {type(error).__name__}: {first_line[:160]}")
            model.zero_grad()
    return figures, refusals


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@torch.no_grad()
def compare(
    model: torch.nn.Module, tokens: Tensor, logits: Tensor, continued: Tensor
) -> dict[str, str]:
    difference = (model(tokens, use_cache=False).logits.float() - logits).norm() / logits.norm()
    same = (decode(model, tokens) == continued)[:, PROMPT:].float().mean()
    return {"logits_difference": f"{difference.item():.1e}", "same_tokens": f"{same.item():.4f}"}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=sorted(SIZES), help="of the model; as the device is")
    parser.add_argument("--variants", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=1, help="turns of every variant")
    add_arguments(parser)
    options = parser.parse_args()
    model, tokens = make_model(options.size or options.device, options.device)
    import transformers

    transformers.logging.set_verbosity_error()
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / FILE
    continued = decode(model, tokens)
    dtype = model.dtype
    with torch.no_grad():
        logits = model.float()(tokens, use_cache=False).logits
    model.to(dtype)
    variants = options.variants.split(",") if options.variants else VARIANTS[options.device]
    times: dict[str, dict[str, list[float]]] = {variant: {} for variant in variants}
    for turn in range(options.rounds):
        for variant in variants:
            last = turn == options.rounds - 1
            with using(variant) as said:
                figures, refusals = measure(model, tokens)
                compare_now = last and {"prefill_ms", "token_ms"} <= figures.keys()
                compared = compare(model, tokens, logits, continued) if compare_now else {}
            for name, values in figures.items():
                times[variant].setdefault(name, []).extend(values)
            medians = {name: f"{median(values):.4g}" for name, values in times[variant].items()}
            row = {
                **environment(options.commit, transformers=transformers.__version__),
                "case": f"qwen3-next-{options.device}-{'x'.join(map(str, tokens.shape))}",
                "variant": variant,
                **medians,
                **compared,
                "note": "; ".join([said] * (variant == "fla" and said != "") + refusals),
                "device": torch.cuda.get_device_name() if tokens.is_cuda else platform.machine(),
                "threads": torch.get_num_threads(),
            }
            print(*(f"{row.get(c, '')}" for c in COLUMNS[1:9]), sep="  ", flush=True)
            if last:
                append(path, COLUMNS, [row])
            gc.collect()


if __name__ == "__main__":
    main()
