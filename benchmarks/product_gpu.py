"""Check and time `householder_product` and `householder_frame` on a GPU, beside torch and peft.

    python benchmarks/product_gpu.py                      # all groups
    python benchmarks/product_gpu.py adapted              # one of them: frame, thin, adapted
    python benchmarks/product_gpu.py --results /tmp/out   # where `product-gpu.csv` is appended to

`frame` forms all of Q of r reflectors in float32, from given reflectors and coefficients, with
gradients to both, and `thin` its first r columns, which is what the peer gives,
`torch.linalg.householder_product`. `adapted` is y = (x Q) Wᵀ in bfloat16 with
a frozen W, on 8192 tokens, with gradients to x and the reflectors; the peer is peft's HRA, and the
frozen layer alone is measured beside them. Before a case is timed, results are compared with
float64, and Q is checked to be orthogonal: ours, no peer's. Times are medians of repeats with the
second-level cache cleared in between, of the call replayed from a CUDA graph (`forward_ms`,
`both_ms`: the device's share) and of the call as it is (`called_…`: at small sizes the host's
share). Peak memory is what one forward + backward takes beyond its inputs.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional as F

from gpu import TIMES
from householder import householder_frame, householder_product, testing
from householder.testing import relative_error
from recording import add_arguments, append, environment, installed_version, peak_memory

REPEATS_MS = 60  # how long each figure is measured
LONG_MS = 100  # calls from here on are not repeated for statistics' sake
TOKENS = 8192
# Relative errors: of bfloat16 operands and results, and of float32 sums of thousands of terms.
TOLERANCE = {"frame": 1e-5, "thin": 1e-5, "adapted": 1.2e-2}
COLUMNS = (
    "date", "case", "variant", *TIMES, "peak_mib", "error", "orthogonality", "largest_entry",
    "device", "torch", "triton", "peft", "commit",
)  # fmt: skip


class Case(NamedTuple):
    """One problem: the width and how many reflectors."""

    group: str
    n: int
    r: int
    cosine: float = 0.0  # between any two reflectors

    @property
    def name(self) -> str:
        close = f"-cosine{self.cosine:g}" if self.cosine else ""
        return f"{self.group}-n{self.n}-r{self.r}{close}"


Parameters = dict[str, Tensor]
Run = Callable[[Parameters], Tensor]


def cases() -> Iterator[Case]:
    """The table of the documentation."""
    for n, r in ((1024, 32), (1024, 1024), (4096, 32), (4096, 128), (4096, 4096)):
        yield Case("frame", n, r)
        if r < n:
            yield Case("thin", n, r)
    for cosine in (0.5, 0.99):
        yield Case("frame", 1024, 1024, cosine)
    for r in (8, 32, 128):
        yield Case("adapted", 4096, r)


def make_reflectors(case: Case, dtype: torch.dtype) -> Tensor:
    """Draw unit vectors, any two of them at about the given cosine."""
    generator = torch.Generator("cuda").manual_seed(0)

    def units(count: int) -> Tensor:
        drawn = torch.randn(count, case.n, generator=generator, device="cuda", dtype=torch.float64)
        return F.normalize(drawn, dim=-1)

    k = case.cosine**0.5 * units(1) + (1 - case.cosine) ** 0.5 * units(case.r)
    return F.normalize(k, dim=-1).to(dtype)


def frame_problem(case: Case) -> tuple[Parameters, dict[str, Run], Run]:
    """Return the inputs, the variants and the same in float64."""
    k = make_reflectors(case, torch.float32)
    if not case.cosine:
        # As LAPACK has them, so that torch can take them: zero before the pivot.
        k = k.flip(0).triu().flip(0)
    inputs = {"k": k, "beta": 2 / k.square().sum(-1)}
    columns = case.r if case.group == "thin" else case.n

    def ours(p: Parameters, impl: str = "auto") -> Tensor:
        return householder_frame(p["k"], p["beta"], columns, impl=impl)

    variants: dict[str, Run] = {"householder": ours}
    if columns == case.r and not case.cosine:
        variants["torch"] = torch_frame
    return inputs, variants, lambda p: ours(p, "chunk")


def torch_frame(p: Parameters) -> Tensor:
    """Form the same columns from LAPACK's form; its pivots are 1."""
    columns, beta = p["k"].flip(0).mT, p["beta"].flip(0)
    pivots = columns.diagonal()
    return torch.linalg.householder_product(columns / pivots, beta * pivots.square())


def adapted_problem(case: Case) -> tuple[Parameters, dict[str, Run], Run]:
    """Return the inputs, the variants and the same in float64."""
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    weight = (normal(case.n, case.n) / case.n**0.5).bfloat16()
    inputs = {
        "x": normal(TOKENS, case.n).bfloat16(), "k": make_reflectors(case, torch.bfloat16),
    }  # fmt: skip

    def ours(p: Parameters, impl: str = "auto") -> Tensor:
        x = householder_product(p["x"], p["k"], transpose=True, impl=impl)
        return F.linear(x, weight.to(x.dtype))

    variants: dict[str, Run] = {"householder": ours, "frozen": lambda p: F.linear(p["x"], weight)}
    if installed_version("peft"):
        variants["peft"] = peft_layer(weight, inputs["k"])
    return inputs, variants, lambda p: ours(p, "chunk")


def peft_layer(weight: Tensor, k: Tensor) -> Run:
    """Return peft's HRA around the frozen layer, with the given reflectors."""
    from peft import HRAConfig, get_peft_model

    model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False)).to(weight)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    config = HRAConfig(r=k.shape[0], target_modules=["0"])
    model = get_peft_model(model, config)
    u = next(v for name, v in model.named_parameters() if "hra_u" in name)
    with torch.no_grad():
        u.copy_(k.mT)
    u.data = u.data.to(weight.dtype)

    def run(p: Parameters) -> Tensor:
        # The reflectors are the module's own; give autograd the ones it is asked about.
        return torch.func.functional_call(model, {name_of(model): p["k"].mT}, (p["x"],))

    return run


def name_of(model: nn.Module) -> str:
    """Return the name of the parameter that holds the reflectors."""
    return next(name for name, _ in model.named_parameters() if "hra_u" in name)


def leaves(inputs: Parameters, dtype: torch.dtype | None = None) -> Parameters:
    """Return the same tensors as leaves of their own, which no other stream has used."""
    return {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in inputs.items()}


def differentiate(run: Run, p: Parameters, dy: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the inputs; the frozen layer has none of k."""
    y = run(p)
    grads = torch.autograd.grad(y, list(p.values()), dy, allow_unused=True)
    return [y, *(g for g in grads if g is not None)]


def measure(case: Case) -> list[dict[str, object]]:
    """Check a case, then time every variant of it."""
    problem = adapted_problem if case.group == "adapted" else frame_problem
    inputs, variants, definition = problem(case)
    with torch.no_grad():
        dy = torch.randn_like(variants["householder"](inputs))
    expected = differentiate(definition, leaves(inputs, torch.float64), dy.double())
    actual = differentiate(variants["householder"], leaves(inputs), dy)
    error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    orthogonality = None if case.group == "adapted" else orthogonality_error(actual[0])
    # Gradients of nearly parallel reflectors are ill-conditioned; there Q alone counts.
    if not case.cosine and not error <= TOLERANCE[case.group]:
        raise SystemExit(f"{case.name}: off by {error:.1e}; a wrong answer is not timed")
    del expected, actual
    torch.cuda.empty_cache()
    rows = []
    for variant, run in variants.items():
        try:
            row = time_variant(variant, run, inputs, dy)
        except Exception as reason:  # a peer may refuse a case
            if variant == "householder":
                raise
            print(f"{case.name:28} {variant:12} refuses: {str(reason).splitlines()[0][:80]}")
            continue
        if variant == "householder":
            row["error"] = f"{error:.1e}"
            if orthogonality is not None:
                row |= orthogonality
        rows.append({"case": case.name, "variant": variant, **row})
    return rows


def orthogonality_error(Q: Tensor) -> dict[str, object]:
    """Return ‖QᵀQ − I‖₂ and the largest entry of QᵀQ − I, both in units of ε √n."""
    wide = Q.detach().double()
    error = wide.mT @ wide - torch.eye(Q.shape[1], device=Q.device, dtype=torch.float64)
    unit = torch.finfo(Q.dtype).eps * Q.shape[0] ** 0.5
    norm, largest = testing.orthogonality_error(Q), float(error.abs().max())
    return {"orthogonality": f"{norm / unit:.2f}", "largest_entry": f"{largest / unit:.2f}"}


def time_variant(variant: str, run: Run, inputs: Parameters, dy: Tensor) -> dict[str, object]:
    """Time a variant's forward, and forward with backward."""
    p = leaves(inputs)
    differentiate(run, p, dy)
    peak = peak_memory(lambda: differentiate(run, p, dy))
    with torch.no_grad():
        times = [bench_captured(variant, lambda: run(inputs))]
        called = [bench(lambda: run(inputs))]
    times.append(bench_captured(variant, lambda: differentiate(run, leaves(inputs), dy)))
    called.append(bench(lambda: differentiate(run, p, dy)))
    return dict(zip(TIMES, times + called, strict=True)) | {"peak_mib": round(peak)}


def bench(run: Callable[[], object]) -> float:
    """Return the median device time of one call in ms; of three where it is long."""
    times = []
    while len(times) < 3:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
        if times[0] < LONG_MS:
            break
    else:
        return round(sorted(times)[1], 1)
    time = triton.testing.do_bench(run, warmup=15, rep=REPEATS_MS, return_mode="median")
    return round(time, 4)


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


def main() -> None:
    """Run the chosen groups and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="*", default=["frame", "thin", "adapted"])
    add_arguments(parser)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft")
    versions = {"triton": triton.__version__, "peft": installed_version("peft")}
    where = environment(arguments.commit, **versions)
    path = arguments.results / "product-gpu.csv"
    for case in cases():
        if case.group in arguments.groups:
            report(path, measure(case), where)
            torch.cuda.empty_cache()


def report(path: Path, rows: list[dict[str, object]], where: dict[str, object]) -> None:
    """Append rows to the CSV file and print them."""
    append(path, COLUMNS, [row | where for row in rows])
    for row in rows:
        times = " / ".join(f"{row[n]:.4g}" for n in TIMES)
        checks = " ".join(str(row.get(n, "")) for n in COLUMNS[8:11])
        print(
            f"{row['case']:28} {row['variant']:12} {times:>34} ms  {row['peak_mib']!s:>6} MiB"
            f"  {checks}",
            flush=True,
        )


if __name__ == "__main__":
    main()
