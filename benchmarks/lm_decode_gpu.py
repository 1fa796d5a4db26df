"""Time how fast 340M language models write on a GPU, beside flash-linear-attention's `generate`.

    python benchmarks/lm_decode_gpu.py                     # all batch sizes
    python benchmarks/lm_decode_gpu.py --batches 1,256     # some
    python benchmarks/lm_decode_gpu.py --breakdown         # and the kernels of a token

The models of `lm_gpu.py` in bfloat16. A row is a whole call, greedy: a prompt of 128 tokens is read
and 64 are written. "householder" is `CausalLM.generate`, which captures a CUDA graph on the way;
"householder-launches" the same without one; "householder-transformers" and "fla" are `generate` of
transformers. Before it is timed, a graph's logits are compared with those of separate launches.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import lm_gpu
from recording import add_arguments, append, environment

FILE = "language-model-decoding-gpu.csv"
COLUMNS = (
    "date", "case", "variant", "tokens_per_second", "ms_per_token", "first_ms", "peak_gib", "note",
    "device", "torch", "commit",
)  # fmt: skip
VARIANTS = ("householder", "fla", "householder-launches", "householder-transformers")
PROMPT, NEW = 128, 64


def generator(
    mixer: str, variant: str, sizes: lm_gpu.Sizes, device: str
) -> Callable[[Tensor, int], Tensor]:
    """Return a function that writes so many tokens behind a prompt."""
    with torch.device(device):
        if variant == "fla":
            lm_gpu.shorten_tuning()
            model, _ = lm_gpu.theirs(mixer, sizes, compiled=False)
        else:
            model, _ = lm_gpu.ours(mixer, sizes, compiled=False)
    if variant == "householder-transformers":
        from householder.hf.modeling import HouseholderConfig, HouseholderForCausalLM

        with torch.device(device):
            model = HouseholderForCausalLM(HouseholderConfig(**model.config.to_dict()))
    model = model.bfloat16().eval()
    if variant in ("householder", "householder-launches"):
        graph = None if variant == "householder" else False
        return lambda tokens, new: model.generate(
            tokens, max_new_tokens=new, temperature=0, graph=graph
        )
    options = {"do_sample": False, "pad_token_id": 0}
    return lambda tokens, new: model.generate(
        tokens, max_new_tokens=new, min_new_tokens=new, **options
    )


def measure(
    mixer: str, variant: str, batch: int, sizes: lm_gpu.Sizes, device: str = "cuda"
) -> dict[str, object]:
    torch.manual_seed(0)
    write = generator(mixer, variant, sizes, device)
    tokens = torch.randint(3, sizes.vocabulary, (batch, PROMPT), device=device)
    on_gpu = device == "cuda"

    def seconds(new: int) -> float:
        begun = time.perf_counter()
        assert write(tokens, new).shape[1] == PROMPT + new
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    seconds(3)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    whole, first = (min(seconds(new) for _ in range(2)) for new in (NEW, 1))
    return {
        "tokens_per_second": round(batch * NEW / whole),
        "ms_per_token": f"{1e3 * whole / NEW:.3f}",
        "first_ms": f"{1e3 * first:.1f}",
        "peak_gib": f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if on_gpu else "",
    }


@torch.no_grad()
def graph_error(mixer: str, sizes: lm_gpu.Sizes) -> float:
    """Return the largest difference of a graph's logits from those of separate launches."""
    from householder.models import Decoder

    with torch.device("cuda"):
        model = lm_gpu.ours(mixer, sizes, compiled=False)[0].bfloat16()
    tokens = torch.randint(sizes.vocabulary, (4, PROMPT + 8), device="cuda")
    logits = []
    for graph in (False, True):
        decoder = Decoder(model, tokens[:, :PROMPT], max_new_tokens=8, graph=graph)  # type: ignore[arg-type]
        steps = [decoder.step(token).clone() for token in tokens[:, PROMPT:].unbind(1)]
        logits.append(torch.stack(steps))
    return float((logits[0] - logits[1]).abs().max())


def breakdown(mixer: str, batch: int, sizes: lm_gpu.Sizes) -> str:
    """Return the kernels of one token, with the time between the replays of two."""
    from householder.models import Decoder

    with torch.device("cuda"):
        model = lm_gpu.ours(mixer, sizes, compiled=False)[0].bfloat16()
    tokens = torch.randint(sizes.vocabulary, (batch, PROMPT), device="cuda")
    decoder = Decoder(model, tokens, max_new_tokens=200)  # type: ignore[arg-type]
    for _ in range(20):
        decoder.step(tokens[:, 0])
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(100):
        decoder.step(tokens[:, 0])
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / 100
    kernels = lm_gpu.kernels(lambda: decoder.step(tokens[:, 0]))
    return f"{1e3 * seconds:8.3f} ms between tokens\n{kernels}"


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mixers", nargs="*", default=("gated_delta_net",))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--breakdown", action="store_true", help="write the kernels of a token")
    add_arguments(parser)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    path, sizes = options.results / FILE, lm_gpu.Sizes()
    for mixer in options.mixers:
        if "householder" in options.variants.split(","):
            difference = graph_error(mixer, sizes)
            if difference:
                raise SystemExit(f"{mixer}: logits of a graph are off by {difference}")
        for batch in map(int, options.batches.split(",")):
            for variant in options.variants.split(","):
                try:
                    row = measure(mixer, variant, batch, sizes)
                except Exception as error:  # whatever the peer raises: its row says so
                    first_line = (str(error).splitlines() or [""])[0]
                    row = {"note": f"refuses: {type(error).__name__}: {first_line[:200]}"}
                case = {"case": f"decode-340m-{mixer}-batch-{batch}", "variant": variant}
                row |= {**case, **environment(options.commit)}
                append(path, COLUMNS, [row])
                print(*(f"{row.get(c, '')}" for c in COLUMNS[1:8]), sep="  ", flush=True)
                gc.collect()
                torch.cuda.empty_cache()
            if options.breakdown:
                listing = breakdown(mixer, batch, sizes)
                (options.results / f"decode-340m-{mixer}-batch-{batch}.txt").write_text(listing)


if __name__ == "__main__":
    main()
