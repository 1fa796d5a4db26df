"""Check and time `delta_product` on a GPU, beside flash-linear-attention if it is installed.

    python benchmarks/gpu.py                       # all groups
    python benchmarks/gpu.py table step            # some of them: table, length, reflections, step
    python benchmarks/gpu.py --results /tmp/out    # where `delta-product-gpu.csv` is appended to

bfloat16 inputs. Both sides are called through their public functions, gradients through autograd to
every input. Before a case is timed, outputs and gradients of one sequence are compared with the
chunked form in float64. Times are medians of repeats with the L2 cache cleared in between, of the
call replayed from a CUDA graph (`forward_ms`, `both_ms`: the device's share) and of the call as it
is (`called_…`: at small sizes the host's share). Peak memory is what one forward + backward takes
beyond its inputs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from householder import delta_product, delta_product_step
from householder.testing import relative_error

RESULTS = Path(__file__).parent / "results"
INPUTS = ("q", "k", "v", "beta", "g")
TOLERANCE = 1.5e-2
MAX_CHECKED = 8192  # tokens of the sequence that is compared with float64
REPEATS_MS = 150  # how long each figure is measured

TIMES = ("forward_ms", "both_ms", "called_forward_ms", "called_both_ms")

# The ceilings of one NVIDIA H200 that the floors are computed with.
FLOPS_PER_MS = 790e9
BYTES_PER_MS = 4.3e9


class GpuCase(NamedTuple):
    """One problem: sizes, and whether there are gates."""

    group: str
    B: int
    T: int
    H: int
    D: int
    N: int
    gated: bool = False

    @property
    def name(self) -> str:
        gate = "gated" if self.gated else "ungated"
        return f"{self.group}-{self.B}x{self.T}x{self.H}x{self.D}-n{self.N}-{gate}"

    def floor_ms(self, backward: bool) -> float:
        """Return the time below which no kernel can be, in chunks of 64 rows.

        The larger of the matrix products at the tensor cores' rate and of every input, output and
        gradient moved once.
        """
        rows, n = self.B * self.T * self.H, self.N
        big, small, moved = 2 * self.D**2, 2 * 64 * self.D, 2 * self.D * rows
        flops = rows * (n * (2 * big + 2 * small) + big + 2 * small)
        bytes_ = (2 + 2 * n) * moved
        if backward:
            flops += rows * (n * (7 * big + 6 * small) + 2 * big + 5 * small)
            bytes_ += (3 + 4 * n) * moved
        return max(flops / FLOPS_PER_MS, bytes_ / BYTES_PER_MS)


def cases() -> Iterator[GpuCase]:
    """The table of the documentation, then time against T and against N."""
    for N in (1, 2, 3, 4):
        yield GpuCase("table", 8, 4096, 16, 128, N)
    for N in (1, 2):
        yield GpuCase("table", 8, 4096, 16, 128, N, gated=True)
        yield GpuCase("table", 1, 32768, 16, 128, N)
        yield GpuCase("table", 8, 4096, 32, 64, N)
    yield GpuCase("table", 1, 32768, 16, 128, 1, gated=True)
    for power in range(10, 19):
        yield GpuCase("length", 1, 1 << power, 16, 128, 1)
    for N in range(1, 9):
        yield GpuCase("reflections", 4, 4096, 16, 128, N)


def make_inputs(case: GpuCase) -> dict[str, Tensor | None]:
    """Draw inputs like a trained layer's: unit keys, β in (0, 2), mild gates."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    B, T, H, D, N = case[1:6]
    inputs = {
        "q": F.normalize(normal(B, T, H, D), dim=-1).bfloat16(),
        "k": F.normalize(normal(B, T, N, H, D), dim=-1).bfloat16(),
        "v": normal(B, T, N, H, D).bfloat16(),
        "beta": (2 * normal(B, T, N, H).sigmoid()).bfloat16(),
        "g": F.logsigmoid(normal(B, T, H) + 3) if case.gated else None,
    }
    return {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}


def ours(inputs: dict[str, Tensor | None]) -> Tensor:
    return delta_product(*(inputs[name] for name in INPUTS))[0]


def flash_linear_attention(inputs: dict[str, Tensor | None]) -> Tensor:
    """Call the peer with the reflections of a token side by side along T, as it takes them."""
    q, k, v, beta, g = (inputs[name] for name in INPUTS)
    N = k.shape[2]
    flat = [x.flatten(1, 2) for x in (k, v, beta)]
    if N == 1 and g is None:
        from fla.ops.delta_rule import chunk_delta_rule

        return chunk_delta_rule(q, *flat)[0]
    if N == 1:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        k, v, beta = flat
        return chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0]
    from fla.ops.gated_delta_product import chunk_gated_delta_product

    k, v, beta = flat
    return chunk_gated_delta_product(q, k, v, g=g, beta=beta, num_householder=N)[0]


VARIANTS: dict[str, Callable[[dict[str, Tensor | None]], Tensor]] = {"householder": ours}
if version := next((d.version for d in metadata.distributions() if d.name == "fla-core"), ""):
    VARIANTS["fla"] = flash_linear_attention


def differentiate(
    run: Callable[[dict[str, Tensor | None]], Tensor], inputs: dict[str, Tensor | None], do: Tensor
) -> list[Tensor]:
    """Return the output and the gradient of every input."""
    o = run(inputs)
    given = [x for x in inputs.values() if x is not None]
    return [o, *torch.autograd.grad(o, given, do)]


def largest_error(case: GpuCase, inputs: dict[str, Tensor | None]) -> float:
    """Compare one sequence of the case with the chunked form in float64."""
    length = min(case.T, MAX_CHECKED)
    part = {
        name: None if x is None else x[:1, :length].detach().clone().requires_grad_()
        for name, x in inputs.items()
    }
    exact = {
        name: None if x is None else x.detach().double().requires_grad_()
        for name, x in part.items()
    }
    do = torch.randn(1, length, case.H, case.D, device="cuda", dtype=torch.bfloat16)

    def in_float64(x: dict[str, Tensor | None]) -> Tensor:
        return delta_product(*(x[name] for name in INPUTS), impl="chunk")[0]

    actual = differentiate(ours, part, do)
    expected = differentiate(in_float64, exact, do.double())
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def measure(case: GpuCase) -> list[dict[str, object]]:
    """Check a case, then time every variant of it."""
    inputs = make_inputs(case)
    error = largest_error(case, inputs)
    if not error <= TOLERANCE:
        raise SystemExit(f"{case.name}: off by {error:.1e}; a wrong answer is not timed")
    do = torch.randn(case.B, case.T, case.H, case.D, device="cuda", dtype=torch.bfloat16)
    rows = []
    for variant, run in VARIANTS.items():
        try:
            differentiate(run, inputs, do)
        except Exception as reason:  # a peer may refuse a case or this version of Triton
            if variant == "householder":
                raise
            print(f"{case.name:44} {variant:12} refuses: {str(reason).splitlines()[0][:80]}")
            continue
        peak = peak_memory(lambda run=run: differentiate(run, inputs, do))
        with torch.no_grad():
            called = bench(lambda run=run: run(inputs))
            forward = bench_captured(variant, lambda run=run: run(inputs))
        both_called = bench(lambda run=run: differentiate(run, inputs, do))
        both = bench_captured(variant, lambda run=run: differentiate(run, fresh(inputs), do))
        rows.append(
            {
                "case": case.name,
                "variant": variant,
                "forward_ms": forward,
                "both_ms": both,
                "called_forward_ms": called,
                "called_both_ms": both_called,
                "peak_mib": round(peak),
                "floor_forward_ms": round(case.floor_ms(False), 4),
                "floor_both_ms": round(case.floor_ms(True), 4),
                "error": f"{error:.1e}" if variant == "householder" else "",
            }
        )
    return rows


def bench(run: Callable[[], object]) -> float:
    """Return the median device time of one call in ms."""
    return round(triton.testing.do_bench(run, warmup=50, rep=REPEATS_MS, return_mode="median"), 4)


def bench_captured(variant: str, run: Callable[[], object]) -> float:
    """Return the median time of one call replayed from a CUDA graph: the device's share alone."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as reason:  # a peer may wait for the host on its way
        if variant == "householder":
            raise
        print(f"{variant} cannot be captured: {str(reason).splitlines()[0][:80]}")
        return float("nan")
    return bench(graph.replay)


def fresh(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Return the same tensors as leaves of their own, which no other stream has used."""
    return {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}


def peak_memory(run: Callable[[], object]) -> float:
    """Return the MiB that one call takes beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_step(B: int, N: int) -> dict[str, object]:
    """Time one token for B sequences, float32 states, replayed from a CUDA graph."""
    case = GpuCase("step", B, 1, 16, 128, N)
    inputs = {n: None if x is None else x.detach()[:, 0] for n, x in make_inputs(case).items()}
    token = [inputs[name] for name in INPUTS]
    # Different states in turn: one alone would be served from the L2 cache.
    states = [torch.randn(B, 16, 128, 128, device="cuda") for _ in range(max(2, 256 // B))]
    with torch.no_grad():
        o, new = delta_product_step(*token, state=states[0])
        exact = [None if x is None else x.double() for x in token]
        expected = delta_product_step(*exact, state=states[0].double(), impl="reference")
        error = max(relative_error(a, e) for a, e in zip((o, new), expected, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for state in states:
                delta_product_step(*token, state=state)
    time = bench(graph.replay) / len(states)
    return {
        "case": case.name,
        "variant": "householder",
        "forward_ms": round(time, 5),
        "floor_forward_ms": round(2 * 4 * B * 16 * 128**2 / BYTES_PER_MS, 5),
        "error": f"{error:.1e}",
    }


def main() -> None:
    """Run the chosen groups and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="*", default=["table", "length", "reflections", "step"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="the measured commit; default: what git says")
    arguments = parser.parse_args()
    environment = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fla": version,
        "commit": arguments.commit or described_commit(),
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / "delta-product-gpu.csv"
    chosen = [case for case in cases() if case.group in arguments.groups]
    for case in chosen:
        report(path, measure(case), environment)
        torch.cuda.empty_cache()
    if "step" in arguments.groups:
        for B in (1, 64, 256):
            report(path, [measure_step(B, N) for N in (1, 4)], environment)


def report(path: Path, rows: list[dict[str, object]], environment: dict[str, object]) -> None:
    """Print rows and append them to the CSV file."""
    columns = (
        "date", "case", "variant", *TIMES, "peak_mib",
        "floor_forward_ms", "floor_both_ms", "error",
        "device", "torch", "triton", "fla", "commit",
    )  # fmt: skip
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row | environment)
            times = " / ".join(f"{row[n]:.4g}" for n in TIMES if n in row)
            print(
                f"{row['case']:42} {row['variant']:12} {times:>34} ms"
                f"  {row.get('peak_mib', '')!s:>6} MiB  error {row['error']}",
                flush=True,
            )


def described_commit() -> str:
    """Return what git calls this checkout."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
