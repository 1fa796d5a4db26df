"""Check and time `path_attention` on a GPU, beside PyTorch's attention and flash-linear-attention.

    python benchmarks/path_gpu.py                      # both groups
    python benchmarks/path_gpu.py table                # one of them: table, length
    python benchmarks/path_gpu.py first                # our first calls, on an idle machine
    python benchmarks/path_gpu.py --results /tmp/out   # the folder of `path-attention-gpu.csv`
    python benchmarks/path_gpu.py compile --kernels /tmp/k   # on a busy machine, and later
    python benchmarks/path_gpu.py --kernels /tmp/k           # on a quiet one

bfloat16 inputs (the peer wants reflectors and coefficients in float32 and gets them so). `sdpa` is
`scaled_dot_product_attention(is_causal=True)`, attention without positions: what the reflectors
cost is the difference. All are called through their public functions, gradients through autograd
to every input.

First every form is compiled into an empty cache, in processes beside one another; they time our
first calls and compare outputs and gradients with the chunked form in float64: a wrong answer of
ours is not timed, and a peer that does not compile in `--compile-seconds` is left out. What was
compiled into `--kernels` is taken from there, without the times of first calls.

Times are medians of repeats with the L2 cache cleared in between, of the call replayed from a CUDA
graph (`forward_ms`, `both_ms`: the device's share) and of the call as it is (`called_…`); calls of
more than 20 ms are not captured. Peak memory is what the timed call takes beyond its inputs. Of a
peer a row's note says where it ran out of memory, or was left out because a call would take longer
than `--slowest-ms`, by what it took at another length.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from gpu import PEER_TRIAL_MS, quiet, try_quickly
from householder import path_attention
from householder.testing import relative_error
from recording import add_arguments, append, environment, installed_version, peak_memory

FILE = "path-attention-gpu.csv"
COLUMNS = (
    "date", "case", "variant", "forward_ms", "both_ms", "called_forward_ms", "called_both_ms",
    "forward_peak_mib", "both_peak_mib", "floor_forward_ms", "floor_both_ms", "first_forward_s",
    "first_backward_s", "error", "note", "device", "torch", "triton", "fla", "commit",
)  # fmt: skip
TOLERANCE = 1.5e-2
CHECKED_TOKENS = 4096
CAPTURED_MS = 20.0  # calls that take longer do not wait for the host
REPEATS_MS = 60  # how long each figure is measured
LONG_MS = 100.0  # calls that take longer are made three times
# The peer tries many programs for two of its kernels; so many processes compile them.
PEER_SHARES = 12
# The rate of bfloat16 matrix products of one NVIDIA H200 that the floor is computed with.
FLOPS_PER_MS = 790e9
OURS = "householder"

Inputs = dict[str, Tensor]
Row = dict[str, object]


class PathCase(NamedTuple):
    """One problem: causal, as many query as key heads."""

    group: str
    B: int
    T: int
    H: int
    D: int

    @property
    def name(self) -> str:
        return f"{self.group}-{self.B}x{self.T}x{self.H}x{self.D}"

    @property
    def pairs(self) -> int:
        """How many pairs of a query and a key there are."""
        return self.B * self.H * self.T**2 // 2

    def floor_ms(self, backward: bool) -> float:
        """Return the time of the matrix products of plain causal attention alone."""
        return (14 if backward else 4) * self.pairs * self.D / FLOPS_PER_MS


# The longest first: what the peer takes for them is foretold from the table's, which also has
# 16,384 tokens.
POWERS = (17, 16, 15, 13, 12, 11, 10)
CASES = [
    *(PathCase("table", B, T, 16, D) for B, T in ((4, 4096), (1, 16384)) for D in (64, 128)),
    *(PathCase("length", 1, 1 << power, 16, D) for power in POWERS for D in (128, 64)),
]


class FirstCase(NamedTuple):
    """A configuration of which only our first calls are timed."""

    D: int
    dtype: str
    gated: bool = False
    wide: bool = False  # reflectors and β in float32

    @property
    def name(self) -> str:
        kinds = "-gated" * self.gated + "-wide" * self.wide
        return f"first-1x{CHECKED_TOKENS}x4x{self.D}-{self.dtype}{kinds}"


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FIRST_CASES = [
    *(FirstCase(D, dtype) for dtype in DTYPES for D in (64, 128, 256)),
    *(FirstCase(D, dtype, gated=True) for dtype in ("bf16", "fp32") for D in (64, 128)),
    *(FirstCase(D, dtype, wide=True) for dtype in ("bf16", "fp16") for D in (64, 128)),
]
# Each compiles eight kernels at the same time, one or two of which take most of the time.
FIRST_TOGETHER = 3


def make_inputs(case: PathCase) -> Inputs:
    """Draw inputs like a trained layer's: unit reflectors, β in (0, 2)."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    B, T, H, D = case[1:]
    inputs = {name: normal(B, T, H, D).bfloat16() for name in ("q", "k", "v")}
    inputs["w"] = F.normalize(normal(B, T, H, D), dim=-1).bfloat16()
    inputs["beta"] = (2 * normal(B, T, H).sigmoid()).bfloat16()
    return {name: x.requires_grad_() for name, x in inputs.items()}


def output_gradient(case: PathCase) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randn(*case[1:], generator=generator, device="cuda", dtype=torch.bfloat16)


def ours(inputs: Inputs) -> Tensor:
    return path_attention(*inputs.values())


def sdpa(inputs: Inputs) -> Tensor:
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def flash_linear_attention(inputs: Inputs) -> Tensor:
    from fla.ops.path_attn import parallel_path_attn

    return parallel_path_attn(*inputs.values())[0]


VARIANTS: dict[str, Callable[[Inputs], Tensor]] = {OURS: ours, "sdpa": sdpa}
if FLA_VERSION := installed_version("fla-core"):
    VARIANTS["fla"] = flash_linear_attention


def as_wanted(variant: str, inputs: Inputs) -> Inputs:
    """Return the inputs as a variant takes them, as leaves of their own."""
    if variant == "fla":
        inputs = inputs | {name: inputs[name].detach().float() for name in ("w", "beta")}
    return leaves(inputs)


def leaves(inputs: Inputs) -> Inputs:
    """Return the same tensors as leaves of their own, which no other stream has used."""
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


def differentiate(run: Callable[[Inputs], Tensor], inputs: Inputs, do: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the inputs that it depends on."""
    o = run(inputs)
    grads = torch.autograd.grad(o, list(inputs.values()), do, allow_unused=True)
    return [o, *(x for x in grads if x is not None)]


def first_call(variant: str, D: int) -> Row:
    """Compile a variant; return the times of its first calls and its largest error."""
    quiet()
    case = PathCase("first", 1, CHECKED_TOKENS, 16, D)
    do = output_gradient(case)
    return time_first(variant, as_wanted(variant, make_inputs(case)), do)


def first_call_of(case: FirstCase) -> Row:
    """Do the same with an empty cache; for a process that has compiled nothing."""
    quiet()
    sizes = PathCase("first", 1, CHECKED_TOKENS, 4, case.D)
    dtype = DTYPES[case.dtype]
    inputs = {name: x.detach().to(dtype) for name, x in make_inputs(sizes).items()}
    if case.wide:
        inputs |= {name: inputs[name].float() for name in ("w", "beta")}
    if case.gated:
        inputs["g"] = F.logsigmoid(inputs["q"][..., 0] + 4)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        return time_first(OURS, leaves(inputs), output_gradient(sizes).to(dtype))


def time_first(variant: str, inputs: Inputs, do: Tensor) -> Row:
    """Return the times of the first calls, and the largest error of outputs and gradients."""
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    expected = differentiate(
        lambda x: path_attention(*x.values(), impl="chunk"), exact, do.double()
    )
    torch.cuda.synchronize()
    start = time.perf_counter()
    o = VARIANTS[variant](inputs)
    torch.cuda.synchronize()
    middle = time.perf_counter()
    grads = torch.autograd.grad(o, list(inputs.values()), do)
    torch.cuda.synchronize()
    end = time.perf_counter()
    error = max(relative_error(a, e) for a, e in zip((o, *grads), expected, strict=True))
    row: Row = {"error": f"{error:.1e}"}
    if variant == OURS:
        row["first_forward_s"] = round(middle - start, 2)
        row["first_backward_s"] = round(end - middle, 2)
    return row


def compile_share(D: int, share: int | None) -> None:
    """Compile the peer's forward pass with a share of the programs that it chooses from.

    Without `share`: forward and backward, with one program of each choice.
    """
    from triton.runtime.autotuner import Autotuner

    everything = Autotuner.prune_configs

    def some(self: Autotuner, kwargs: dict[str, object]) -> list[triton.Config]:
        found = everything(self, kwargs)
        return found[:1] if share is None else found[share % len(found) :: PEER_SHARES]

    quiet()
    try_quickly(1)
    Autotuner.prune_configs = some
    try:
        case = PathCase("first", 1, 1024, 16, D)
        inputs = as_wanted("fla", make_inputs(case))
        if share is None:
            differentiate(VARIANTS["fla"], inputs, output_gradient(case))
        else:
            VARIANTS["fla"](inputs)
    finally:
        Autotuner.prune_configs = everything


def first_calls(limit_s: float) -> dict[tuple[str, int], Row]:
    """Make all first calls beside one another; a peer's may fail, or take too long."""
    found: dict[tuple[str, int], Row] = {}
    end = time.perf_counter() + limit_s
    wanted = [(D, share) for share in (None, *range(PEER_SHARES)) for D in (128, 64)]
    workers = min(len(os.sched_getaffinity(0)), 2 + len(wanted))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        own = {D: pool.apply_async(first_call, (OURS, D)) for D in (128, 64)}
        if FLA_VERSION:
            for compiled in [pool.apply_async(compile_share, key) for key in wanted]:
                compiled.wait(max(0.0, end - time.perf_counter()))
            calls = {D: pool.apply_async(first_call, ("fla", D)) for D in (128, 64)}
            for D, call in calls.items():
                try:
                    found["fla", D] = call.get(max(0.0, end - time.perf_counter()))
                except multiprocessing.TimeoutError:
                    found["fla", D] = {"note": f"does not compile in {limit_s:.0f} s"}
                except Exception as reason:
                    found["fla", D] = {"note": refusal(reason)}
        found |= {(OURS, D): call.get() for D, call in own.items()}
    return found


def compile_all(kernels: Path, limit_s: float) -> dict[tuple[str, int], Row]:
    """Make all first calls, or read what those found that compiled into the same folder."""
    os.environ["TRITON_CACHE_DIR"] = str(kernels)
    known = kernels / "first-calls.json"
    if known.exists():
        rows = json.loads(known.read_text())
        return {
            (variant, D): {name: x for name, x in row.items() if not name.startswith("first_")}
            for variant, D, row in rows
        }
    found = first_calls(limit_s)
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps([(*key, row) for key, row in found.items()]))
    return found


def refusal(reason: Exception) -> str:
    """Say in a row why a peer has no figure."""
    if isinstance(reason, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(reason, TooSlow):
        return f"left out: {reason}"
    return f"refuses: {str(reason).splitlines()[0][:80]}"


class TooSlow(Exception):
    """A call would take longer than it may."""


class Guard:
    """Foretell what a call takes from what it took at another length: its pairs decide."""

    def __init__(self, slowest_ms: float) -> None:
        self.slowest_ms = slowest_ms
        self.per_pair: dict[tuple[str, int, str], float] = {}

    def check(self, case: PathCase, variant: str, part: str) -> None:
        """Raise TooSlow if a peer's call would take too long."""
        expected = self.per_pair.get((variant, case.D, part), 0.0) * case.pairs
        if expected > self.slowest_ms and variant != OURS:
            raise TooSlow(f"a call would take about {expected / 1e3:.0f} s")

    def learn(self, case: PathCase, variant: str, part: str, ms: float) -> None:
        self.per_pair[variant, case.D, part] = ms / case.pairs


def measure(case: PathCase, firsts: dict[tuple[str, int], Row], guard: Guard) -> list[Row]:
    """Time every variant of a case."""
    inputs, do = make_inputs(case), output_gradient(case)
    rows: list[Row] = []
    for variant in VARIANTS:
        row: Row = {"case": case.name, "variant": variant}
        row["floor_forward_ms"] = round(case.floor_ms(False), 4)
        row["floor_both_ms"] = round(case.floor_ms(True), 4)
        row |= firsts.get((variant, case.D), {})
        rows.append(row)
        if "note" in row:
            continue
        own = as_wanted(variant, inputs)
        try:
            time_parts(row, case, own, do, guard)
        except Exception as reason:  # a peer may refuse a case, or run out of memory
            if variant == OURS:
                raise
            row["note"] = refusal(reason)
        del own
        torch.cuda.empty_cache()
    return rows


def time_parts(row: Row, case: PathCase, inputs: Inputs, do: Tensor, guard: Guard) -> None:
    """Measure the forward pass, and forward and backward together."""
    variant = str(row["variant"])
    run = VARIANTS[variant]

    def forward() -> object:
        with torch.no_grad():
            return run(inputs)

    def both() -> object:
        return differentiate(run, leaves(inputs), do)

    for part, call in {"forward": forward, "both": both}.items():
        guard.check(case, variant, part)
        called = bench(call)
        row[f"{part}_peak_mib"] = round(peak_memory(call))
        row[f"called_{part}_ms"] = called
        row[f"{part}_ms"] = called if called > CAPTURED_MS else bench_captured(call, called)
        guard.learn(case, variant, part, called)


def bench(run: Callable[[], object]) -> float:
    """Return the median device time of one call in ms."""
    run()
    times = [time_once(run)]
    if times[0] < LONG_MS:
        options = {"warmup": 10, "rep": REPEATS_MS, "return_mode": "median"}
        return round(triton.testing.do_bench(run, **options), 4)
    return round(sorted([*times, time_once(run), time_once(run)])[1], 4)


def time_once(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def bench_captured(run: Callable[[], object], called_ms: float) -> float:
    """Return the median time in ms of one call replayed from a CUDA graph, where it can be."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # a peer may wait for the host on its way
        torch.cuda.synchronize()
        return called_ms
    return bench(graph.replay)


def measure_first_calls() -> Iterator[list[Row]]:
    """Time our first calls, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(FIRST_TOGETHER, maxtasksperchild=1) as pool:
        for case, row in zip(FIRST_CASES, pool.imap(first_call_of, FIRST_CASES), strict=True):
            yield [{"case": case.name, "variant": OURS} | row]


def report(path: Path, rows: list[Row], where: Row) -> None:
    """Append rows to the CSV file and print them."""
    append(path, COLUMNS, [row | where for row in rows])
    for row in rows:
        times = " / ".join(f"{row.get(f'{part}_ms', '-')!s:>9}" for part in ("forward", "both"))
        called = row.get("called_both_ms", "-")
        memory = row.get("both_peak_mib", row.get("forward_peak_mib", "-"))
        print(
            f"{row['case']:24} {row['variant']:11} {times} ms, called {called!s:>9}"
            f" {memory!s:>7} MiB {row.get('error', '')} {row.get('first_forward_s', '')}"
            f" {row.get('first_backward_s', '')} {row.get('note', '')}",
            flush=True,
        )


def main() -> None:
    """Run the chosen groups and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="*", default=["table", "length"])
    add_arguments(parser)
    parser.add_argument("--compile-seconds", type=float, default=120.0, help="for peers")
    parser.add_argument("--kernels", type=Path, help="the folder for what is compiled; kept")
    parser.add_argument("--slowest-ms", type=float, default=3000.0, help="of a peer's call")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case later")
    arguments = parser.parse_args()
    where = environment(arguments.commit, triton=triton.__version__, fla=FLA_VERSION)
    # The peer's choices are made here, undisturbed, and not taken from other runs.
    os.environ["FLA_CACHE_RESULTS"] = "0"
    if "first" in arguments.groups:
        for rows in measure_first_calls():
            report(arguments.results / FILE, rows, where)
    if arguments.groups == ["first"]:
        return
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        firsts = compile_all(arguments.kernels or Path(temporary), arguments.compile_seconds)
        print(f"compiled and checked in {time.perf_counter() - start:.0f} s", flush=True)
        quiet()
        try_quickly(PEER_TRIAL_MS)
        for D in (64, 128):
            if not float(str(firsts[OURS, D]["error"])) <= TOLERANCE:
                raise SystemExit(
                    f"K = V = {D} is wrong, and therefore not timed: {firsts[OURS, D]}"
                )
        guard = Guard(arguments.slowest_ms)
        for case in (c for c in CASES if c.group in arguments.groups):
            if time.perf_counter() - start > arguments.seconds:
                print(f"{case.name} and what follows is left out: the time is up", flush=True)
                break
            report(arguments.results / FILE, measure(case, firsts, guard), where)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
