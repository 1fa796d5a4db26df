"""Check and time `delta_product` on a GPU, beside flash-linear-attention if it is installed.

    python benchmarks/gpu.py                       # all groups
    python benchmarks/gpu.py table step            # some: table, length, reflections, step, first
    python benchmarks/gpu.py --part 1/4            # the first of four shares, one for each GPU
    python benchmarks/gpu.py --results /tmp/out    # where `delta-product-gpu.csv` is appended to

bfloat16 inputs. Both sides are called through their public functions, gradients through autograd to
every input. First everything is compiled into an empty cache, by one process for every five
processors; they time our first calls of each configuration and compare outputs and gradients with
the chunked form in float64: a wrong answer is not timed. The peer's kernels choose their own tile
sizes afterwards, when nothing else runs.

Times are medians of repeats with the L2 cache cleared in between, of the call replayed from a CUDA
graph (`forward_ms`, `both_ms`: the device's share) and of the call as it is (`called_…`: at small
sizes the host's share). Peak memory is what one forward + backward takes beyond its inputs; of it,
`gradient_mib` are the gradients themselves.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from torch import Tensor

from gpu_cases import (
    DTYPES,
    FLA_VERSION,
    GROUPS,
    INPUTS,
    STEPS,
    VARIANTS,
    Configuration,
    GpuCase,
    Inputs,
    cases,
    make_inputs,
    ours,
    peer_refuses_gates,
)
from householder import delta_product, delta_product_step
from householder.testing import relative_error
from recording import add_arguments, append, environment, peak_memory

FILE = "delta-product-gpu.csv"
TIMES = ("forward_ms", "both_ms", "called_forward_ms", "called_both_ms")
COLUMNS = (
    "date", "case", "variant", *TIMES, "peak_mib", "gradient_mib",
    "floor_forward_ms", "floor_both_ms", "first_forward_s", "first_backward_s", "error", "note",
    "device", "torch", "triton", "fla", "commit",
)  # fmt: skip
TOLERANCES = {"bf16": 1.5e-2, "fp16": 2.5e-3, "fp32": 5e-6}
REPEATS_MS = 60  # how long each figure is measured
# The peer tries this many programs of each of its kernels, and each in this time.
PEER_SHARES = 12
PEER_TRIAL_MS = 10
Row = dict[str, object]


def differentiate(run: Callable[[Inputs], Tensor], inputs: Inputs, do: Tensor) -> list[Tensor]:
    """Return the output and the gradient of every input."""
    o = run(inputs)
    given = [x for x in inputs.values() if x is not None]
    return [o, *torch.autograd.grad(o, given, do)]


def output_gradient(case: GpuCase) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    shape = case.B, case.T, case.H, case.D
    return torch.randn(*shape, generator=generator, device="cuda").to(DTYPES[case.dtype])


def in_float64(inputs: Inputs) -> Tensor:
    return delta_product(*(inputs[name] for name in INPUTS), impl="chunk")[0]


def first_call(case: GpuCase) -> Row:
    """Compile a configuration; return the times of its first calls and its largest error."""
    quiet()
    if case.group == "step":
        return first_step(case)
    case = case.shortened()
    inputs, do = make_inputs(case), output_gradient(case)
    exact: Inputs = {
        name: None if x is None else x.detach().double().requires_grad_()
        for name, x in inputs.items()
    }
    # What PyTorch itself loads at its first steps is not counted.
    expected = differentiate(in_float64, exact, do.double())
    torch.cuda.synchronize()
    start = time.perf_counter()
    o = ours(inputs)
    torch.cuda.synchronize()
    middle = time.perf_counter()
    grads = torch.autograd.grad(o, [x for x in inputs.values() if x is not None], do)
    torch.cuda.synchronize()
    end = time.perf_counter()
    error = max(relative_error(a, e) for a, e in zip((o, *grads), expected, strict=True))
    with torch.no_grad():
        ours(inputs)  # without what the backward needs, the walk is another program
    return {
        "first_forward_s": round(middle - start, 2),
        "first_backward_s": round(end - middle, 2),
        "error": error,
    }


def first_step(case: GpuCase) -> Row:
    """Do the same for one token."""
    inputs = make_inputs(case)
    state = torch.randn(case.B, case.H, case.D, case.D, device="cuda")
    exact = [None if inputs[n] is None else inputs[n].detach().double()[:, 0] for n in INPUTS]
    with torch.no_grad():
        expected = delta_product_step(*exact, state=state.double(), impl="reference")
        torch.cuda.synchronize()
        start = time.perf_counter()
        actual = STEPS["householder"](inputs, state)
        torch.cuda.synchronize()
        end = time.perf_counter()
    error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    return {"first_forward_s": round(end - start, 2), "error": error}


def compile_peer(case: GpuCase, share: int) -> None:
    """Compile the peer's kernels for a case, of the programs each chooses from only a share."""
    from triton.runtime.autotuner import Autotuner

    quiet()
    everything = Autotuner.prune_configs

    def some(self: Autotuner, kwargs: dict[str, object]) -> list[triton.Config]:
        found = everything(self, kwargs)
        return found[share % len(found) :: PEER_SHARES]

    Autotuner.prune_configs = some
    try_quickly(1)
    try:
        short = case._replace(B=1, T=min(case.T, 4096))
        differentiate(VARIANTS["fla"], make_inputs(short), output_gradient(short))
    except Exception:  # what it refuses is told when it is to be timed
        return
    finally:
        Autotuner.prune_configs = everything


def try_quickly(milliseconds: int) -> None:
    """Let kernels that choose between programs time each for this long."""
    bench = functools.partial(triton.testing.do_bench, warmup=5, rep=milliseconds)
    triton.runtime.driver.active.get_benchmarker = lambda: bench


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def compile_all(chosen: list[GpuCase], workers: int) -> dict[Configuration, Row]:
    """Make every first call, in parallel; return what they found."""
    firsts = {case.configuration: case for case in reversed(chosen)}
    context = multiprocessing.get_context("spawn")
    # These are timed, and each compiles up to five kernels at the same time.
    with ProcessPoolExecutor(max(1, workers // 5), mp_context=context) as pool:
        calls = {configuration: pool.submit(first_call, c) for configuration, c in firsts.items()}
        found = {configuration: outcome(call) for configuration, call in calls.items()}
    if FLA_VERSION:
        families = {peer_family(case): case for case in reversed(chosen) if peer_chooses(case)}
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for case in families.values():
                for share in range(PEER_SHARES):
                    pool.submit(compile_peer, case, share)
    return found


def outcome(future: Future[Row]) -> Row:
    """Return what a first call found; a failure spoils its own cases and not the others'."""
    reason = future.exception()
    if reason is None:
        return future.result()
    print(f"first call: {type(reason).__name__}: {str(reason)[:400]}", flush=True)
    return {"error": float("inf")}


def measure(case: GpuCase, first: Row) -> list[Row]:
    """Time every variant of a case."""
    inputs, do = make_inputs(case), output_gradient(case)
    rows: list[Row] = []
    for variant, run in VARIANTS.items():
        row = describe(case, variant, first)
        rows.append(row)
        if variant == "fla" and case.gated and peer_refuses_gates():
            refuse(row, NotImplementedError("gradients of gates on Hopper before Triton 3.7.1"))
            continue
        try:
            differentiate(run, inputs, do)
        except Exception as reason:
            refuse(row, reason)
            continue
        row["peak_mib"] = round(peak_memory(functools.partial(differentiate, run, inputs, do)))
        with torch.no_grad():
            row["called_forward_ms"] = bench(functools.partial(run, inputs))
            row["forward_ms"] = bench_captured(row, functools.partial(run, inputs))
        row["called_both_ms"] = bench(functools.partial(differentiate, run, inputs, do))
        row["both_ms"] = bench_captured(row, functools.partial(differentiate_anew, run, inputs, do))
    return rows


def tell_first(case: GpuCase, first: Row) -> list[Row]:
    """Return what the first calls told."""
    return [{"case": case.name, "variant": "householder"} | first | {"error": shown(first)}]


def shown(first: Row) -> str:
    return f"{first['error']:.1e}"


def measure_step(case: GpuCase, first: Row) -> list[Row]:
    """Time one token for B sequences, float32 states, replayed from a CUDA graph."""
    inputs = fresh(make_inputs(case))
    # Different states in turn: one alone would be served from the L2 cache.
    count = max(2, 256 // case.B)
    states = [torch.randn(case.B, case.H, case.D, case.D, device="cuda") for _ in range(count)]
    rows: list[Row] = []
    for variant, run in STEPS.items():
        row = describe(case, variant, first)
        with torch.no_grad():
            try:
                run(inputs, states[0])
            except Exception as reason:
                refuse(row, reason)
                continue
            time = bench_captured(row, functools.partial(run_all, run, inputs, states))
            row["forward_ms"] = round(time / count, 5)
            row["called_forward_ms"] = bench(functools.partial(run, inputs, states[0]))
        rows.append(row)
    return rows


def describe(case: GpuCase, variant: str, first: Row) -> Row:
    """Return what is known of a row before it is measured."""
    row: Row = {"case": case.name, "variant": variant}
    row["floor_forward_ms"] = round(case.floor_ms(False), 5)
    if case.group != "step":
        row["floor_both_ms"] = round(case.floor_ms(True), 5)
        entries = case.B * case.T * case.H * (case.D + 2 * case.N * case.D + case.N)
        gates = 4 * case.B * case.T * case.H if case.gated else 0
        row["gradient_mib"] = round((2 * entries + gates) / 2**20)
    if variant == "householder":
        row |= first | {"error": shown(first)}
    return row


def refuse(row: Row, reason: Exception) -> None:
    """Note why a peer does not take a case; we take all of them."""
    if row["variant"] == "householder":
        raise reason
    row["note"] = f"refuses: {str(reason).splitlines()[0][:80]}"


def bench(run: Callable[[], object]) -> float:
    """Return the median device time of one call in ms."""
    return round(triton.testing.do_bench(run, warmup=25, rep=REPEATS_MS, return_mode="median"), 5)


def bench_captured(row: Row, run: Callable[[], object]) -> float:
    """Return the median time of one call replayed from a CUDA graph: the device's share alone."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as reason:  # a peer may wait for the host on its way
        if row["variant"] == "householder":
            raise
        row["note"] = f"cannot be captured: {str(reason).splitlines()[0][:80]}"
        return float("nan")
    return bench(graph.replay)


def fresh(inputs: Inputs) -> Inputs:
    """Return the same tensors as leaves of their own, which no other stream has used."""
    return {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}


def differentiate_anew(run: Callable[[Inputs], Tensor], inputs: Inputs, do: Tensor) -> None:
    differentiate(run, fresh(inputs), do)


def run_all(run: Callable[[Inputs, Tensor], object], inputs: Inputs, states: list[Tensor]) -> None:
    for state in states:
        run(inputs, state)


def take_part(chosen: list[GpuCase], part: str) -> list[GpuCase]:
    """Return the cases of share `i/n`: those of one configuration go together."""
    index, count = map(int, part.split("/"))
    groups: dict[object, list[GpuCase]] = defaultdict(list)
    for case in chosen:
        groups[peer_family(case)].append(case)
    shares: list[list[GpuCase]] = [[] for _ in range(count)]
    seconds = [0.0] * count
    for group in sorted(groups.values(), key=expected_seconds, reverse=True):
        least = seconds.index(min(seconds))
        shares[least] += group
        seconds[least] += expected_seconds(group)
    return shares[index - 1]


def peer_family(case: GpuCase) -> tuple[object, ...]:
    """Return what the peer chooses its programs by; it does not choose again for another N > 1."""
    return case.configuration._replace(N=min(case.N, 2), in_segments=False)


def peer_chooses(case: GpuCase) -> bool:
    return not case.gated and case.group not in ("step", "first")


def expected_seconds(group: list[GpuCase]) -> float:
    """Return about how long the cases of one family take on an H200 with 16 processors."""
    timed = [case for case in group if case.group not in ("step", "first")]
    return 2 * len(group) + 3 * len(timed) + 30 * any(map(peer_chooses, group))


def report(path: Path, rows: list[Row], where: Row) -> None:
    """Append rows to the CSV file and print them."""
    append(path, COLUMNS, [row | where for row in rows])
    for row in rows:
        times = " / ".join(f"{row[n]:.4g}" for n in TIMES if n in row)
        print(
            f"{row['case']:40} {row['variant']:12} {times or row.get('note', ''):>30}"
            f" {row.get('peak_mib', '')!s:>5} MiB {row.get('error', '')!s:>7}"
            f" {row.get('first_forward_s', '')!s} {row.get('first_backward_s', '')!s}",
            flush=True,
        )


def main() -> None:
    """Run the chosen groups and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="*", default=GROUPS, help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="one of N shares of the cases")
    parser.add_argument("--workers", type=int, help="processes that compile; default: processors")
    add_arguments(parser)
    arguments = parser.parse_args()
    where = environment(arguments.commit, triton=triton.__version__, fla=FLA_VERSION)
    chosen = [case for case in cases() if case.group in arguments.groups]
    chosen = take_part(chosen, arguments.part)
    workers = arguments.workers or len(os.sched_getaffinity(0)) // int(arguments.part[2:])
    # The peer's choices are made here, undisturbed, and not taken from other runs.
    os.environ["FLA_CACHE_RESULTS"] = "0"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        start = time.perf_counter()
        first = compile_all(chosen, max(1, workers))
        print(f"compiled and checked in {time.perf_counter() - start:.0f} s", flush=True)
        quiet()
        try_quickly(PEER_TRIAL_MS)
        wrong: list[str] = []
        for case in chosen:
            found = first[case.configuration]
            if not found["error"] <= TOLERANCES[case.dtype]:
                wrong.append(f"{case.name} ({found['error']:.1e})")
                continue
            run = {"step": measure_step, "first": tell_first}.get(case.group, measure)
            report(arguments.results / FILE, run(case, found), where)
            torch.cuda.empty_cache()
    print(f"{len(chosen)} cases in {time.perf_counter() - start:.0f} s", flush=True)
    if wrong:
        raise SystemExit(f"wrong, and therefore not timed: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
