"""Check and time `path_attention` on a GPU, beside PyTorch's attention and flash-linear-attention.

    python benchmarks/path_gpu.py                      # both groups
    python benchmarks/path_gpu.py table                # one of them: table, length
    python benchmarks/path_gpu.py --forward            # without gradients
    python benchmarks/path_gpu.py --results /tmp/out   # where `path-attention-gpu.csv` is appended

bfloat16 inputs. `sdpa` is `scaled_dot_product_attention(is_causal=True)`, attention without
positions: what the reflectors cost is the difference. All are called through their public
functions, gradients through autograd to every input. Before a case is timed, the outputs (and
gradients) of one sequence are compared with the chunked form in float64. Times are medians of
repeats with the L2 cache cleared in between, of the call replayed from a CUDA graph. Peak memory is
what the timed call takes beyond its inputs.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from householder import path_attention
from householder.testing import relative_error

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1.5e-2
MAX_CHECKED = 4096  # tokens of the sequence that is compared with float64
REPEATS_MS = 100  # how long each figure is measured
# The rate of bfloat16 matrix products of one NVIDIA H200 that the floor is computed with.
FLOPS_PER_MS = 790e9

Inputs = dict[str, Tensor]


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

    def floor_ms(self, backward: bool) -> float:
        """Return the time of the matrix products of plain causal attention alone."""
        pairs = self.B * self.H * self.T**2 / 2
        return (14 if backward else 4) * pairs * self.D / FLOPS_PER_MS


CASES = [
    *(PathCase("table", B, T, 16, D) for B, T in ((4, 4096), (1, 16384)) for D in (64, 128)),
    *(PathCase("length", 1, 1 << power, 16, D) for D in (64, 128) for power in range(10, 18)),
]


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


def ours(inputs: Inputs) -> Tensor:
    return path_attention(**inputs)


def sdpa(inputs: Inputs) -> Tensor:
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def flash_linear_attention(inputs: Inputs) -> Tensor:
    from fla.ops.path_attn import parallel_path_attn

    # It wants reflectors and their coefficients in float32.
    wide = (inputs["w"].float(), inputs["beta"].float())
    return parallel_path_attn(inputs["q"], inputs["k"], inputs["v"], *wide)[0]


VARIANTS: dict[str, Callable[[Inputs], Tensor]] = {"householder": ours, "sdpa": sdpa}
if version := next((d.version for d in metadata.distributions() if d.name == "fla-core"), ""):
    VARIANTS["fla"] = flash_linear_attention


def differentiate(run: Callable[[Inputs], Tensor], inputs: Inputs, do: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the inputs that it depends on."""
    o = run(inputs)
    given = list(inputs.values())
    grads = torch.autograd.grad(o, given, do, allow_unused=True)
    return [o, *(x for x in grads if x is not None)]


def largest_error(case: PathCase, inputs: Inputs, backward: bool) -> float:
    """Compare one sequence of the case with the chunked form in float64."""
    length = min(case.T, MAX_CHECKED)
    part, exact = (
        {n: x[:1, :length].detach().to(dtype).requires_grad_() for n, x in inputs.items()}
        for dtype in (torch.bfloat16, torch.float64)
    )
    chunked = functools.partial(path_attention, impl="chunk")
    if not backward:
        with torch.no_grad():
            return relative_error(ours(part), chunked(**exact))
    do = torch.randn(1, length, case.H, case.D, device="cuda", dtype=torch.bfloat16)
    actual = differentiate(ours, part, do)
    expected = differentiate(lambda x: chunked(**x), exact, do.double())
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def measure(case: PathCase, backward: bool) -> list[dict[str, object]]:
    """Check a case, then time every variant of it."""
    inputs = make_inputs(case)
    error = largest_error(case, inputs, backward)
    if not error <= TOLERANCE:
        raise SystemExit(f"{case.name}: off by {error:.1e}; a wrong answer is not timed")
    do = torch.randn(case.B, case.T, case.H, case.D, device="cuda", dtype=torch.bfloat16)
    rows = []
    for variant, run in VARIANTS.items():

        def forward(run: Callable[[Inputs], Tensor] = run) -> object:
            with torch.no_grad():
                return run(inputs)

        def both(run: Callable[[Inputs], Tensor] = run) -> object:
            # Leaves of their own, which no other stream has used.
            leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
            return differentiate(run, leaves, do)

        row = {
            "case": case.name,
            "variant": variant,
            "floor_forward_ms": round(case.floor_ms(False), 4),
            "error": f"{error:.1e}" if variant == "householder" else "",
        }
        try:
            row["forward_ms"] = bench(forward)
            row["forward_peak_mib"] = round(peak_memory(forward))
            if backward:
                row["both_ms"] = bench(both)
                row["both_peak_mib"] = round(peak_memory(both))
                row["floor_both_ms"] = round(case.floor_ms(True), 4)
        except Exception as reason:  # a peer may refuse a case, or run out of memory
            if variant == "householder":
                raise
            print(f"{case.name:28} {variant:12} refuses: {str(reason).splitlines()[0][:80]}")
        rows.append(row)
    return rows


def bench(run: Callable[[], object]) -> float:
    """Return the median time in ms of one call, replayed from a CUDA graph where it can be."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    except RuntimeError:  # a peer may wait for the host on its way
        torch.cuda.synchronize()
        replay = run
    times = triton.testing.do_bench(replay, warmup=20, rep=REPEATS_MS, return_mode="median")
    return round(times, 4)


def peak_memory(run: Callable[[], object]) -> float:
    """Return the MiB that one call takes beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    """Run the chosen groups and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="*", default=["table", "length"])
    parser.add_argument("--forward", action="store_true", help="leave the gradients out")
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
    path = arguments.results / "path-attention-gpu.csv"
    for case in CASES:
        if case.group in arguments.groups:
            report(path, measure(case, not arguments.forward), environment)
            torch.cuda.empty_cache()


def report(path: Path, rows: list[dict[str, object]], environment: dict[str, object]) -> None:
    """Print rows and append them to the CSV file."""
    columns = (
        "date", "case", "variant", "forward_ms", "both_ms", "forward_peak_mib", "both_peak_mib",
        "floor_forward_ms", "floor_both_ms", "error", "note", "device", "torch", "triton", "fla",
        "commit",
    )  # fmt: skip
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row | environment)
            print(
                f"{row['case']:24} {row['variant']:11} {row.get('forward_ms', '-')!s:>8}"
                f" / {row.get('both_ms', '-')!s:>8} ms {row.get('both_peak_mib', '-')!s:>6} MiB"
                f" {row['error']}",
                flush=True,
            )


def described_commit() -> str:
    """Return what git calls this checkout."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
