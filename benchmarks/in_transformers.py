"""Time a Qwen3-Next model of transformers with its own fallback and on our ops.

    python benchmarks/in_transformers.py             # on the GPU if there is one, else on the CPU

A forward pass over a prompt, a training step (forward and backward), and one decoded token. The
logits of both are compared, and so are the tokens of a greedy continuation.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

import householder

RESULTS = Path(__file__).parent / "results"
FILE = "in-transformers.csv"
COLUMNS = (
    "date", "case", "variant", "prefill_ms", "train_ms", "token_ms", "logits_difference",
    "same_tokens", "device", "threads", "torch", "transformers", "commit",
)  # fmt: skip
# Width, layers, heads of keys and values, their size; sequences and tokens; dtype.
SIZES = {
    "cpu": (256, 4, 4, 8, 64, 1, 1024, torch.float32),
    "cuda": (1024, 8, 8, 16, 128, 4, 4096, torch.bfloat16),
}
NEW_TOKENS = 32


def make_model(device: str) -> tuple[torch.nn.Module, Tensor]:
    width, layers, key_heads, value_heads, head_dim, batch, length, dtype = SIZES[device]
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        mlp_only_layers=list(range(layers)),  # no experts: they are not what is compared
    )
    model = Qwen3NextForCausalLM(config).to(device, dtype).eval()
    return model, torch.randint(8192, (batch, length), device=device)


def median_ms(run: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return sorted(times[1:])[repeats // 2]


def measure(model: torch.nn.Module, tokens: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    def train() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad()

    def decode() -> Tensor:
        return model.generate(
            tokens[:, :64], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )

    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()
        prefill = median_ms(lambda: model(tokens, use_cache=False))
    figures = {
        "prefill_ms": prefill,
        "train_ms": median_ms(train, 3),
        "token_ms": median_ms(decode, 3) / NEW_TOKENS,
    }
    return figures, logits, decode()


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    model, tokens = make_model(options.device)
    expected: tuple[Tensor, Tensor] | None = None
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / FILE
    for variant in ("transformers", "householder"):
        ours = variant == "householder"
        with householder.use_in_transformers() if ours else contextlib.nullcontext():
            figures, logits, continued = measure(model, tokens)
        expected = expected or (logits, continued)
        difference = (logits - expected[0]).norm() / expected[0].norm()
        on_gpu = options.device == "cuda"
        row = {
            "date": datetime.date.today().isoformat(),
            "case": f"qwen3-next-{options.device}-{'x'.join(map(str, tokens.shape))}",
            "variant": variant,
            **{name: f"{value:.4g}" for name, value in figures.items()},
            "logits_difference": f"{difference.item():.1e}",
            "same_tokens": f"{(continued == expected[1]).float().mean().item():.4f}",
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": options.commit,
        }
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(*(f"{row[c]}" for c in COLUMNS[1:8]), sep="  ", flush=True)


if __name__ == "__main__":
    main()
