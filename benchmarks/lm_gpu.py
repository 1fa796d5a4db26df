"""Time training steps of 340M language models on a GPU, beside flash-linear-attention's models.

    python benchmarks/lm_gpu.py                    # all cases
    python benchmarks/lm_gpu.py gated_delta_net    # some
    python benchmarks/lm_gpu.py --breakdown        # and where the time of a step goes

Width 1024, 24 layers, 8 heads of 128, SwiGLU of 2816, 32,000 tokens, untied head; 8 sequences of
4,096 tokens, autocast to bfloat16, fused AdamW, cross entropy without all logits on both sides.
Tokens per second are those of eight steps after four. One process per case and variant: what one
has compiled or tuned does not help another.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import multiprocessing
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
FILE = "language-model-gpu.csv"
COLUMNS = (
    "date", "case", "variant", "tokens_per_second", "step_ms", "peak_gib", "first_s", "parameters",
    "loss", "note", "device", "torch", "commit",
)  # fmt: skip
MIXERS = ("gated_delta_net", "gated_delta_product", "delta_net", "delta_product")
VARIANTS = ("householder", "householder-compiled", "fla")
B, T, VOCABULARY = 8, 4096, 32_000
STEPS, WARMUP = 8, 4


def ours(mixer: str, compiled: bool) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    from householder.models import CausalLM, CausalLMConfig

    config = CausalLMConfig.preset(
        "340m",
        VOCABULARY,
        pattern=mixer,
        num_heads=8,
        head_dim=128,
        expand_v=1.0,
        num_householder=2,
        use_output_gate=mixer != "delta_net",
        mlp_width=2816,
        tie_embeddings=False,
    )
    model = CausalLM(config).cuda()
    loss = torch.compile(model.loss) if compiled else model.loss
    return model, lambda tokens: loss(tokens[:, :-1], tokens[:, 1:])


def theirs(mixer: str) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    import fla.models as fla

    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "intermediate_size": 2816,
        "num_heads": 8,
        "fuse_cross_entropy": False,
        "fuse_linear_cross_entropy": True,
    }
    if mixer == "delta_net":
        model = fla.DeltaNetForCausalLM(fla.DeltaNetConfig(**shared))
    else:
        shared |= {"head_dim": 128, "expand_v": 1.0}
        if mixer == "gated_delta_net":
            model = fla.GatedDeltaNetForCausalLM(fla.GatedDeltaNetConfig(**shared))
        else:
            shared |= {"num_householder": 2, "use_forget_gate": mixer.startswith("gated")}
            model = fla.GatedDeltaProductForCausalLM(fla.GatedDeltaProductConfig(**shared))
    model = model.cuda()
    # Their model shifts labels itself: the same number of tokens goes through the mixers.
    return model, lambda tokens: model(tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss


def measure(mixer: str, variant: str, breakdown: bool) -> dict[str, object]:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if variant == "fla":
        model, loss_of = theirs(mixer)
    else:
        model, loss_of = ours(mixer, compiled=variant.endswith("compiled"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(VOCABULARY, (B, T + 1), device="cuda")

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    begun = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - begun
    for _ in range(WARMUP - 1):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for _ in range(STEPS):
        loss = step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / STEPS
    return {
        "tokens_per_second": round(B * T / seconds),
        "step_ms": round(1e3 * seconds, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "first_s": round(first, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": round(loss.item(), 3),
        "note": kernels(step) if breakdown else "",
    }


def kernels(step: Callable[[], Tensor], count: int = 12) -> str:
    """Return the kernels that take most of a step's time, with their milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1e3
    parts = [f"{e.key[:40]} {e.self_device_time_total / 1e3:.1f}" for e in events[:count]]
    return f"of {total:.0f} ms on the device: " + "; ".join(parts)


def measure_to(pipe: object, mixer: str, variant: str, breakdown: bool) -> None:
    try:
        row: dict[str, object] = measure(mixer, variant, breakdown)
    except Exception as error:  # whatever the peer raises: its row says so
        row = {"note": f"refuses: {type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    pipe.send(row)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mixers", nargs="*", default=MIXERS, help=f"of {', '.join(MIXERS)}")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--breakdown", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / FILE
    spawn = multiprocessing.get_context("spawn")
    for mixer in options.mixers:
        for variant in options.variants.split(","):
            receiver, sender = spawn.Pipe(duplex=False)
            process = spawn.Process(
                target=measure_to, args=(sender, mixer, variant, options.breakdown)
            )
            process.start()
            sender.close()
            try:
                row = receiver.recv()
            except EOFError:
                row = {"note": "refuses: the process died"}
            process.join()
            row |= {
                "date": datetime.date.today().isoformat(),
                "case": f"train-340m-{mixer}-{B}x{T}",
                "variant": variant,
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "commit": options.commit,
            }
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(*(f"{row.get(c, '')}" for c in COLUMNS[1:10]), sep="  ", flush=True)


if __name__ == "__main__":
    main()
