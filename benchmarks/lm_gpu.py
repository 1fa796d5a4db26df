"""Time training steps of 340M language models on a GPU, beside flash-linear-attention's models.

    python benchmarks/lm_gpu.py                    # all cases
    python benchmarks/lm_gpu.py gated_delta_net    # some
    python benchmarks/lm_gpu.py --breakdown        # and where the time of a step goes
    python benchmarks/lm_gpu.py --ahead 3          # compile on all processors first

Width 1024, 24 layers, 8 heads of 128, SwiGLU of 2816, 32,000 tokens, untied head; 8 sequences of
4,096 tokens, fused AdamW, cross entropy without all logits on both sides. `autocast` keeps weights
in float32 and multiplies in bfloat16; `bfloat16` keeps everything in bfloat16. Compiled variants,
of both, are compiled block by block; `householder-keeping-compiled` makes nothing anew in its
backward pass, and `fla-tf32` may multiply float32 matrices in TF32. Tokens per second are those of
eight steps after four. A process per mixer; all but one wait.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib
import importlib.util
import itertools
import multiprocessing
import multiprocessing.connection
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recording import add_arguments, append, described_commit, environment

FILE = "language-model-gpu.csv"
COLUMNS = (
    "date", "case", "variant", "tokens_per_second", "step_ms", "peak_gib", "first_s", "parameters",
    "loss", "note", "device", "torch", "commit",
)  # fmt: skip
MIXERS = ("gated_delta_net", "gated_delta_product", "delta_net", "delta_product")
VARIANTS = (
    "householder-compiled", "fla", "fla-compiled", "fla-tf32", "householder",
    "householder-keeping-compiled",
)  # fmt: skip
PRECISIONS = ("autocast", "bfloat16")
BREAKDOWN = "language-model-breakdown-gpu.csv"
# By names of kernels, the first that fits; a compiler's names list what it has fused.
KINDS = {
    "products": "nvjet|gemm|cutlass|cublas",
    "optimizer": "multi_tensor",
    "softmax of the head": "softmax_gradient|SoftMax|cross_entropy|nll_loss",
    "convolutions": "conv",
    "recurrence": "hopper_|walk_|prepare_|activate_|gate_k|table_|segment|chunk_|wy_|w_u_|l2norm",
    "norms": "norm",
    "gates": "swiglu|silu",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is trained, and for how long."""

    batch: int = 8
    length: int = 4096
    vocabulary: int = 32_000
    width: int = 1024
    layers: int = 24
    heads: int = 8
    mlp_width: int = 2816
    num_householder: int = 2
    steps: int = 8
    warmup: int = 4


def ours(mixer: str, sizes: Sizes, compiled: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from householder.models import CausalLM, CausalLMConfig

    config = CausalLMConfig(
        sizes.vocabulary,
        d_model=sizes.width,
        num_layers=sizes.layers,
        pattern=mixer,
        num_heads=sizes.heads,
        head_dim=sizes.width // sizes.heads,
        expand_v=1.0,
        num_householder=sizes.num_householder,
        use_output_gate=mixer != "delta_net",
        mlp_width=sizes.mlp_width,
        tie_embeddings=False,
    )
    model = CausalLM(config)
    if compiled:
        model.compile_blocks()
    return model, lambda tokens: model.loss(tokens[:, :-1], tokens[:, 1:])


def theirs(
    mixer: str, sizes: Sizes, compiled: bool
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    import fla.models as fla

    shared: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "intermediate_size": sizes.mlp_width,
        "num_heads": sizes.heads,
        "fuse_cross_entropy": False,
        "fuse_linear_cross_entropy": True,
    }
    if mixer == "delta_net":
        model = fla.DeltaNetForCausalLM(fla.DeltaNetConfig(**shared))
    else:
        shared |= {"head_dim": sizes.width // sizes.heads, "expand_v": 1.0}
        if mixer == "gated_delta_net":
            model = fla.GatedDeltaNetForCausalLM(fla.GatedDeltaNetConfig(**shared))
        else:
            shared |= {
                "num_householder": sizes.num_householder,
                "use_forget_gate": mixer.startswith("gated"),
            }
            model = fla.GatedDeltaProductForCausalLM(fla.GatedDeltaProductConfig(**shared))
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    # Their model shifts labels itself: the same number of tokens goes through the mixers.
    return model, lambda tokens: model(tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss


@functools.cache  # what it lifted must be told of again
def lift_refusal() -> str:
    """Let fla run what it refuses on a Hopper GPU with this Triton, and say so.

    Its gradient of gated rules is known to be wrong with Triton 3.4 to 3.7.0, unless TileLang is
    installed, whose kernel it takes then. The wrong kernel takes its time all the same.
    """
    if importlib.util.find_spec("tilelang") is not None:
        return "fla's gated gradient by TileLang"
    from fla.ops.common import chunk_o

    if chunk_o.TRITON_ABOVE_3_7_1:
        return ""
    chunk_o.TRITON_ABOVE_3_7_1 = True
    return "fla's refusal of the gated gradient with this Triton lifted"


def shorten_tuning() -> None:
    """Let Triton's autotuner measure a configuration for 20 ms in place of 100."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    shorter = functools.partial(do_bench, warmup=5, rep=20)
    Autotuner.do_bench = property(lambda self: shorter)


def measure(
    mixer: str, variant: str, precision: str, sizes: Sizes, breakdown: bool, device: str = "cuda"
) -> dict[str, object]:
    """Train a new model for a few steps and return what a row says about them."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if variant.endswith("tf32") else "highest")
    note = ""
    if variant.startswith("fla"):
        shorten_tuning()
        note = lift_refusal() if "gated" in mixer else ""
    make = theirs if variant.startswith("fla") else ours
    with torch.device(device):
        model, loss_of = make(mixer, sizes, variant.endswith("compiled"))
    if "keeping" in variant:
        model.recompute = False
    if precision == "bfloat16":
        model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (sizes.batch, sizes.length + 1)
    tokens = torch.randint(sizes.vocabulary, shape, device=device)

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    on_gpu = device == "cuda"
    synchronize: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    begun = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - begun
    for _ in range(sizes.warmup - 1):
        step()
    synchronize()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for _ in range(sizes.steps):
        loss = step()
    synchronize()
    seconds = (time.perf_counter() - begun) / sizes.steps
    return {
        "tokens_per_second": round(sizes.batch * sizes.length / seconds),
        "step_ms": round(1e3 * seconds, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else "",
        "first_s": round(first, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": round(loss.item(), 3),
        "note": note,
        "kernels": kernels(step) if breakdown else "",
    }


def breakdown_of(listing: str) -> dict[str, float]:
    """Return the milliseconds of each kind of work among `kernels`, and of all of it."""
    total, *lines = listing.splitlines()
    kinds = {"all": float(total.split()[0])} | dict.fromkeys((*KINDS, "elementwise"), 0.0)
    for line in lines:
        milliseconds, _, name = line.split(maxsplit=2)
        kind = next((k for k, names in KINDS.items() if re.search(names, name)), "elementwise")
        kinds[kind] += float(milliseconds)
    return {kind: round(milliseconds, 1) for kind, milliseconds in kinds.items()}


def kernels(step: Callable[[], Tensor], count: int = 60) -> str:
    """Return the kernels that take most of a step's time: milliseconds, calls, name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1e3
    lines = [
        f"{e.self_device_time_total / 1e3:8.2f} {e.count:5d} {e.key[:110]}" for e in events[:count]
    ]
    return "\n".join([f"{total:8.2f} ms on the device", *lines])


def compile_share(index: int, count: int) -> None:
    """Make Triton's autotuner compile every `count`-th configuration, and measure none."""
    from triton.runtime.autotuner import Autotuner

    def compile_only(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        if self.configs.index(config) % count != index:
            return [float("inf")] * 3
        try:
            self.fn.run(*args, **{**meta, **config.all_kwargs(), "warmup": True})
        except Exception:  # a configuration that does not fit; the autotuner passes over it too
            return [float("inf")] * 3
        return [1.0] * 3

    Autotuner._bench = compile_only


def compile_ahead(
    mixer: str, variant: str, precision: str, sizes: Sizes, index: int, count: int
) -> None:
    """Run steps of one layer, to fill the caches on disk."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
    os.environ["FLA_CACHE_RESULTS"] = "0"
    begun = time.perf_counter()
    if variant.startswith("fla"):
        compile_share(index, count)
    one = dataclasses.replace(sizes, layers=1, steps=1, warmup=1)
    try:
        measure(mixer, variant, precision, one, False)
        outcome = "done"
    except Exception as error:  # the measured run will say it again
        outcome = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.perf_counter() - begun
    name = f"{mixer} {variant} {precision} {index}/{count}"
    print(f"ahead {name}: {seconds:.0f} s, {outcome}", flush=True)


def measure_all(
    mixer: str, cases: list[tuple[str, str]], sizes: Sizes, breakdown: bool, lock: Any, pipe: Any
) -> None:
    """Send a row for each `(variant, precision)`, while holding the lock."""
    for package in ("householder.models", "fla.models"):  # while another process holds the lock
        with contextlib.suppress(ImportError):  # its rows will say so
            importlib.import_module(package)
    with lock:
        for variant, precision in cases:
            try:
                row = measure(mixer, variant, precision, sizes, breakdown)
            except Exception as error:  # whatever the peer raises: its row says so
                first_line = (str(error).splitlines() or [""])[0]
                row = {"note": f"refuses: {type(error).__name__}: {first_line[:200]}"}
            pipe.send((mixer, variant, precision, row))
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
    pipe.send(None)


def rows(
    mixers: list[str], cases: list[tuple[str, str]], sizes: Sizes, breakdown: bool
) -> Iterator[tuple[str, str, str, dict[str, object]]]:
    """Yield what every mixer's process measures, as it comes."""
    spawn = multiprocessing.get_context("spawn")
    lock = spawn.Lock()
    running = []
    for mixer in mixers:
        receiver, sender = spawn.Pipe(duplex=False)
        args = (mixer, cases, sizes, breakdown, lock, sender)
        process = spawn.Process(target=measure_all, args=args)
        process.start()
        sender.close()
        running.append((process, receiver))
    receivers = [receiver for _, receiver in running]
    while receivers:
        for receiver in multiprocessing.connection.wait(receivers):
            try:
                result = receiver.recv()  # type: ignore[attr-defined]
            except EOFError:  # the process died
                result = None
            if result is None:
                receivers.remove(receiver)
            else:
                yield result
    for process, _ in running:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mixers", nargs="*", default=MIXERS, help=f"of {', '.join(MIXERS)}")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--precisions", default=PRECISIONS[0])
    parser.add_argument("--breakdown", action="store_true", help="write the kernels of a step")
    parser.add_argument("--ahead", type=int, default=0, help="processes that compile fla's kernels")
    add_arguments(parser)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    sizes, variants = Sizes(), options.variants.split(",")
    cases = list(itertools.product(variants, options.precisions.split(",")))
    if options.ahead:
        spawn = multiprocessing.get_context("spawn")
        jobs = [
            spawn.Process(target=compile_ahead, args=(mixer, *case, sizes, i, count))
            for mixer in options.mixers
            for case in cases
            for count in [options.ahead if case[0].startswith("fla") else 1]
            for i in range(count)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
    path = options.results / FILE
    for mixer, variant, precision, row in rows(
        list(options.mixers), cases, sizes, options.breakdown
    ):
        case = f"train-340m-{mixer}-{sizes.batch}x{sizes.length}-{precision}"
        listing = row.pop("kernels", "")
        if listing:
            (options.results / f"{case}-{variant}.txt").write_text(f"{listing}\n")
            parts = {"case": case, "variant": variant, **breakdown_of(str(listing))}
            parts["commit"] = options.commit or described_commit()
            append(options.results / BREAKDOWN, tuple(parts), [parts])
            print(parts, flush=True)
        row |= {"case": case, "variant": variant, **environment(options.commit)}
        append(path, COLUMNS, [row])
        print(*(f"{row.get(c, '')}" for c in COLUMNS[1:10]), sep="  ", flush=True)


if __name__ == "__main__":
    main()
