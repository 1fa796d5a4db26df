"""Time decoded tokens of `path_attention`, and measure how decoding drifts.

    python benchmarks/decoding.py                      # both, on a GPU if there is one
    python benchmarks/decoding.py latency              # or one of them: latency, drift
    python benchmarks/decoding.py --results /tmp/out   # where the CSV files are appended to

Latency: `PathCache.append` of N tokens beside plain attention, PyTorch's
`scaled_dot_product_attention` of N queries over as many keys, which has no positions to keep: once
alone ("torch SDPA"), and once with what a decoded token does before it, putting N keys and values
into a cache of its own at a position that the device holds ("torch SDPA, cached"). Ours always puts
them. The cache holds about T tokens, few short of a power of two: there is a block of every size
and, on a GPU, the most recent tokens there can be, which is when a token costs most. There the
calls are replayed from a CUDA graph with the L2 cache cleared in between (`us`), and called as they
are (`called_us`); on a CPU they take turns. `error` is that of tokens decoded after 300, against
float64.

Drift: reflections (β = 2), bfloat16, 16 heads of 64, each a sequence of its own. Errors against
float64 of the outputs of the 128 tokens before T, decoded one by one, after a prefill in one go,
and by the full forward pass: means over heads. `ratio` is the mean of the first over the second,
with its standard error. The reflectors are numbers of float16, which is what a forward pass in half
precision multiplies.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from householder import PathCache, path_attention
from householder.testing import relative_error
from recording import add_arguments, append, environment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, B, T, H, K = V
LATENCY = {
    "cuda": [
        *((1, B, T, 16, 128) for B in (1, 16) for T in (4096, 16384, 65536)),
        *((N, B, T, 16, 128) for N in (2, 4, 8, 16) for B in (1, 16) for T in (4096, 16384)),
    ],
    "cpu": [(1, 1, T, 8, 64) for T in (4096, 16384)],
}
REPEATS = 41  # so few that on a CPU no block is made among them
DRIFT_TOKENS = (1024, 2048, 4096, 8192, 16384)
DRIFT_HEADS = 16
COLUMNS = {
    "latency": (
        *("date", "dtype", "N", "B", "T", "H", "K", "variant", "us", "called_us", "error"),
        *("device", "torch", "commit"),
    ),
    "drift": (
        *("date", "dtype", "T", "heads", "decoded", "prefilled", "forward", "ratio", "ratio_error"),
        *("device", "torch", "commit"),
    ),
}


def make_tokens(B: int, T: int, H: int, K: int, dtype: torch.dtype, beta: float) -> list[Tensor]:
    """Draw q, k, v, w and β of T tokens on the device, w unit vectors."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(B, T, H, K, generator=generator, device=DEVICE)

    q, k, v = (normal().to(dtype) for _ in range(3))
    w = F.normalize(normal(), dim=-1)
    return [q, k, v, w, torch.full((B, T, H), beta, device=DEVICE)]


def part(tokens: list[Tensor], lo: int, hi: int) -> list[Tensor]:
    return [x[:, lo:hi] for x in tokens]


def decode(tokens: list[Tensor], prompt: int, N: int = 1) -> Tensor:
    """Append a prompt and then N tokens at a time; return the outputs of all."""
    cache, T = PathCache(tokens[0].shape[0]), tokens[0].shape[1]
    outputs = [cache.append(*part(tokens, 0, prompt))] if prompt else []
    outputs += [cache.append(*part(tokens, t, t + N)) for t in range(prompt, T, N)]
    return torch.cat(outputs, dim=1)


def full_cache(B: int, T: int, H: int, K: int, dtype: torch.dtype) -> PathCache:
    """Return a cache that holds T random tokens, without the work of a prefill."""
    cache = PathCache(B)
    cache.append(*make_tokens(B, 2, H, K, dtype, 2.0))
    cache.reserve(T + 64)
    store = cache._store
    assert store is not None
    for name in ("keys", "values", "w"):
        getattr(store, name).normal_()
    # Orthogonal matrices' entries, as they are held.
    if store.path_scales is None:
        store.paths.normal_(std=K**-0.5)
    else:
        store.paths.random_(-32767, 32768)
        store.path_scales.fill_((3 / K) ** 0.5 / 32767)
    hold(cache, T)
    return cache


def hold(cache: PathCache, T: int) -> None:
    """Make a cache hold T of the tokens there is room for."""
    cache._old, cache._recent = [T // 64 * 64] * cache.batch_size, [T % 64] * cache.batch_size
    cache._counts_known = False


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Return what replays a call from a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def replayed_us(replay: Callable[[], object], before: Callable[[], object]) -> float:
    """Return the median time of a replay, the L2 cache cleared in between."""
    flushed = torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)
    times = []
    for _ in range(REPEATS):
        before()
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(1e3 * start.elapsed_time(end) for start, end in times[5:])


def append_us(cache: PathCache, token: list[Tensor], T: int) -> float:
    """Return the time of appending tokens to a cache of T, again and again."""

    def run() -> None:
        hold(cache, T)
        cache._tell_counts(token[0].device)
        cache.append(*token)

    run()
    hold(cache, T)
    cache._tell_counts(token[0].device)
    counts = cache._counts
    assert counts is not None
    fixed = counts.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(*token)
    return replayed_us(graph.replay, lambda: counts.copy_(fixed))


def alternating_us(*runs: Callable[[], object]) -> list[float]:
    """Return the median time of each call on a CPU, taking turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(REPEATS):
        for run, of_run in zip(runs, times, strict=True):
            begun = time.perf_counter()
            run()
            of_run.append(1e6 * (time.perf_counter() - begun))
    return [statistics.median(of_run) for of_run in times]


def measure_latency(
    N: int, B: int, T: int, H: int, K: int, dtype: torch.dtype
) -> list[dict[str, object]]:
    """Time N tokens for B sequences of T tokens, ours and PyTorch's."""
    checked = make_tokens(B, 300 + 80, H, K, dtype, 1.9)
    exact = path_attention(*(x.double() for x in checked))
    error = relative_error(decode(checked, 300, N)[:, 300:], exact[:, 300:])

    held = T - 1 - N if DEVICE == "cuda" else T - 2 - REPEATS
    cache, token = full_cache(B, held, H, K, dtype), make_tokens(B, N, H, K, dtype, 2.0)
    query = token[0].transpose(1, 2)
    # Memory of its own, compact, as a cache of plain attention would have.
    keys, values = torch.randn(2, B, H, T, K, device=DEVICE).to(dtype)

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(query, keys, values)

    new_keys, new_values = (x.transpose(1, 2).to(dtype) for x in token[1:3])
    position = torch.arange(T - N, T, device=DEVICE)

    def plain_cached() -> Tensor:
        keys.index_copy_(2, position, new_keys)
        values.index_copy_(2, position, new_values)
        return plain()

    def ours() -> Tensor:
        return cache.append(*token)

    rows: list[dict[str, object]] = [
        {"variant": "householder", "error": f"{error:.1e}"},
        {"variant": "torch SDPA", "error": ""},
        {"variant": "torch SDPA, cached", "error": ""},
    ]
    if DEVICE == "cpu":
        times = alternating_us(ours, plain, plain_cached)
        for row, us in zip(rows, times, strict=True):
            row["us"] = row["called_us"] = f"{us:.1f}"
    else:
        rows[0]["us"] = f"{append_us(cache, token, held):.2f}"
        for row, run in zip(rows[1:], (plain, plain_cached), strict=True):
            row["us"] = f"{replayed_us(captured(run), lambda: None):.2f}"
        for row, run in zip(rows, (ours, plain, plain_cached), strict=True):
            hold(cache, held - 100 * N)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(100):
                run()
            torch.cuda.synchronize()
            row["called_us"] = f"{1e4 * (time.perf_counter() - begun):.1f}"
    size = {"dtype": str(dtype).removeprefix("torch."), "N": N, "B": B, "T": T, "H": H, "K": K}
    return [{**size, **row} for row in rows]


def errors_of_heads(o: Tensor, exact: Tensor) -> Tensor:
    """Return the relative error `[H]` of each head's outputs."""
    wrong, right = (x.movedim(2, 0).flatten(1).norm(dim=1) for x in (o.double() - exact, exact))
    return wrong / right


def measure_drift() -> list[dict[str, object]]:
    """Return the errors of the 128 tokens before each of `DRIFT_TOKENS`."""
    tokens = make_tokens(1, DRIFT_TOKENS[-1], DRIFT_HEADS, 64, torch.bfloat16, 2.0)
    tokens[3] = tokens[3].half().float()
    exact = path_attention(*(x.double() for x in tokens), impl="chunk")
    forward = path_attention(*tokens)
    decoded = decode(tokens, 0)
    rows = []
    for T in DRIFT_TOKENS:
        tail = slice(T - 128, T)
        cache = PathCache(1)
        cache.append(*part(tokens, 0, T - 128))
        prefilled = cache.append(*part(tokens, T - 128, T))
        found = {"decoded": decoded[:, tail], "prefilled": prefilled, "forward": forward[:, tail]}
        errors = {name: errors_of_heads(o, exact[:, tail]) for name, o in found.items()}
        ratio = errors["decoded"] / errors["prefilled"]
        row: dict[str, object] = {"dtype": "bfloat16", "T": T, "heads": DRIFT_HEADS}
        row |= {name: f"{error.mean():.3e}" for name, error in errors.items()}
        row["ratio"] = f"{ratio.mean():.4f}"
        row["ratio_error"] = f"{ratio.std() / DRIFT_HEADS**0.5:.4f}"
        rows.append(row)
    return rows


def report(
    path: Path, columns: tuple[str, ...], rows: list[dict[str, object]], commit: str
) -> None:
    """Append rows to a CSV file and print them."""
    where = environment(commit)
    append(path, columns, [row | where for row in rows])
    for row in rows:
        print(*(f"{name}={row[name]}" for name in columns if name in row), flush=True)


@torch.no_grad()
def main() -> None:
    """Measure what is asked for and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", default=["latency", "drift"])
    add_arguments(parser)
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"])
    parser.add_argument("--tokens", nargs="*", type=int, help="only so many tokens at once")
    arguments = parser.parse_args()
    kind = "gpu" if DEVICE == "cuda" else "cpu"
    if "latency" in arguments.what:
        for dtype in arguments.dtype:
            for size in LATENCY[DEVICE]:
                if arguments.tokens and size[0] not in arguments.tokens:
                    continue
                path = arguments.results / f"decoding-{kind}.csv"
                rows = measure_latency(*size, getattr(torch, dtype))
                report(path, COLUMNS["latency"], rows, arguments.commit)
    if "drift" in arguments.what:
        path = arguments.results / f"decoding-drift-{kind}.csv"
        report(path, COLUMNS["drift"], measure_drift(), arguments.commit)


if __name__ == "__main__":
    main()
