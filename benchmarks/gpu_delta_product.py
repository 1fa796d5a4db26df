"""Check and time the kernels of `delta_product` on a GPU.

`python gpu_delta_product.py check|time|short|variants|step …`
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from householder.ops.delta_product import chunk
from householder.ops.delta_product.triton import backward, config, forward, step

NAMES = ("o", "final", "dq", "dk", "dv", "dbeta", "dg", "dinitial")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def make_inputs(
    B: int, T: int, N: int, H: int, HV: int, K: int, V: int, dtype: torch.dtype, gate: str,
    cu: list[int] | None = None, initial: bool = False, seed: int = 0, device: str = "cuda",
) -> dict[str, Any]:  # fmt: skip
    """Draw inputs like a trained layer's: unit keys, β in (0, 2), gates from weak to strong."""
    gen = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device)

    g = None
    if gate != "none":
        g = F.logsigmoid(normal(B, T, HV) * 2 + 3)
        if gate == "strong":
            g = torch.where(normal(B, T, HV) > 1.5, -300.0, g)
    num_sequences = B if cu is None else len(cu) - 1
    return {
        "q": F.normalize(normal(B, T, H, K), dim=-1).to(dtype),
        "k": F.normalize(normal(B, T, N, H, K), dim=-1).to(dtype),
        "v": normal(B, T, N, HV, V).to(dtype),
        "beta": (2 * normal(B, T, N, HV).sigmoid()).to(dtype),
        "g": g,
        "scale": K**-0.5,
        "initial_state": normal(num_sequences, HV, K, V) if initial else None,
        "cu_seqlens": None if cu is None else torch.tensor(cu, dtype=torch.int32, device=device),
    }


def run(module: Any, x: dict[str, Any], do: Tensor, dfinal: Tensor | None) -> list[Tensor | None]:
    o, final, *saved = module[0](*x.values(), True)
    return [o, final, *module[1](do, dfinal, *x.values(), *saved)]


def errors(case: tuple) -> str:
    """Compare one case with float64: relative errors of every output and gradient."""
    began = time.time()
    *shape, name, gate, cu, initial = case
    x = make_inputs(*shape, DTYPES[name], gate, cu, initial)
    exact = {
        n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in x.items()
    }
    do = torch.randn_like(x["v"][:, :, 0])
    dfinal = None
    if initial:
        dfinal = torch.randn_like(x["initial_state"])
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    got = run((forward, backward), x, do, dfinal)
    again = run((forward, backward), x, do, dfinal)
    torch.use_deterministic_algorithms(False)
    ref = run(
        (chunk.forward, chunk.backward),
        exact,
        do.double(),
        None if dfinal is None else dfinal.double(),
    )
    parts = []
    for label, a, b, c in zip(NAMES, got, ref, again, strict=True):
        if a is not None and b is not None and b.numel():
            error = ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()
            changed = "" if torch.equal(a, c) else " NOT DETERMINISTIC"
            limit = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 5e-6}[name]
            parts.append(f"{label} {error:.1e}{'' if error < limit else ' LARGE'}{changed}")
    seconds = f"{time.time() - began:.0f}s"
    return f"{case[:7]} {name} {gate} {'packed' if cu else ''} {' '.join(parts)} {seconds}"


def cases() -> list[tuple]:
    """(B, T, N, H, HV, K, V, dtype, gate, cu_seqlens, initial state)."""
    packed = [0, 1, 1, 70, 200, 200, 333, 512, 1000]
    many = list(range(0, 1001, 4))
    return [
        (2, 1000, 1, 2, 2, 128, 128, "bf16", "none", None, True),
        (2, 1000, 1, 2, 2, 128, 128, "bf16", "strong", None, True),
        (2, 1000, 2, 2, 4, 128, 128, "bf16", "weak", None, True),
        (2, 1000, 3, 2, 2, 128, 128, "bf16", "none", None, False),
        (2, 1000, 4, 2, 2, 128, 128, "bf16", "weak", None, True),
        (2, 500, 1, 2, 2, 64, 64, "bf16", "weak", None, True),
        (2, 500, 2, 2, 2, 64, 64, "bf16", "none", None, True),
        (1, 1000, 2, 2, 2, 64, 128, "bf16", "strong", packed, True),
        (1, 1000, 1, 2, 2, 128, 64, "bf16", "none", many, True),
        (1, 300, 8, 1, 2, 32, 16, "bf16", "weak", None, True),
        (1, 300, 5, 1, 1, 96, 160, "bf16", "weak", None, True),
        (1, 300, 1, 1, 1, 256, 256, "bf16", "weak", None, True),
        (1, 300, 2, 1, 1, 192, 48, "bf16", "none", None, True),
        (2, 500, 1, 2, 2, 128, 128, "fp16", "weak", None, True),
        (2, 500, 2, 2, 2, 64, 64, "fp16", "none", None, True),
        (1, 1000, 1, 1, 2, 64, 64, "fp32", "strong", packed, True),
        (2, 500, 2, 1, 1, 128, 128, "fp32", "weak", None, True),
        (1, 300, 3, 1, 1, 48, 80, "fp32", "none", None, True),
        (1, 300, 1, 1, 1, 256, 256, "fp32", "weak", None, True),
        (1, 300, 7, 1, 1, 16, 16, "bf16", "none", None, True),
        (1, 300, 1, 1, 1, 32, 16, "fp32", "none", None, True),
        (1, 300, 7, 1, 1, 16, 16, "fp32", "weak", None, True),
        (1, 300, 1, 1, 1, 64, 64, "fp16", "none", None, True),
    ]


def check_in_process(index: int, count: int) -> None:
    for case in cases()[index::count]:
        try:
            print(errors(case), flush=True)
        except Exception as error:
            print(case[:9], "FAILED", repr(error)[:400], flush=True)


def check_step() -> None:
    from householder.ops.delta_product import reference

    for N, K, V, name, gate in ((1, 128, 128, "bf16", "weak"), (4, 48, 80, "fp32", "none")):
        x = make_inputs(8, 1, N, 2, 4, K, V, DTYPES[name], gate)
        token = [None if x[n] is None else x[n][:, 0] for n in ("q", "k", "v", "beta", "g")]
        state = torch.randn(8, 4, K, V, device="cuda")
        o, new = step(*token, K**-0.5, state)
        exact = [None if t is None else t.double() for t in token]
        ro, rn = reference.step(*exact, K**-0.5, state.double())
        print(
            "step",
            N,
            K,
            V,
            name,
            ((o - ro).norm() / ro.norm()).item(),
            ((new - rn).norm() / rn.norm()).item(),
        )


# (B, T, H, N, K=V, gate): best peer, must and aim, forward and forward + backward in ms.
TABLE = {
    (8, 4096, 16, 1, 128, "none"): "peer 0.337/1.24 aim 0.22/0.90",
    (8, 4096, 16, 1, 128, "weak"): "peer 0.338/1.25 aim 0.22/0.90",
    (8, 4096, 16, 2, 128, "none"): "must 0.60/2.2 aim 0.38/1.5",
    (8, 4096, 16, 2, 128, "weak"): "must 0.60/2.2 aim 0.38/1.5",
    (8, 4096, 16, 3, 128, "none"): "must 0.85/3.2 aim 0.52/2.1",
    (8, 4096, 16, 4, 128, "none"): "must 1.1/4.2 aim 0.66/2.8",
    (1, 32768, 16, 1, 128, "weak"): "peer 0.392/1.36 aim 0.33/1.1",
    (1, 32768, 16, 1, 128, "none"): "peer 0.676/1.81 aim 0.36/1.3",
    (1, 32768, 16, 2, 128, "none"): "must 0.95/3.4 aim 0.6/2.1",
    (8, 4096, 32, 1, 64, "none"): "must 0.45/1.4 aim 0.28/1.0",
    (8, 4096, 32, 2, 64, "none"): "must 0.8/2.6 aim 0.5/1.6",
}


def median_ms(function: Any) -> float:
    import triton

    return triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median")


def kernel_times(function: Any, repeats: int = 5) -> dict[str, float]:
    """Return milliseconds of each kernel of one call."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    return {
        e.key[:24]: round(e.device_time_total / repeats / 1000, 4)
        for e in prof.key_averages()
        if e.device_time_total / repeats > 3
    }


def time_row(row: tuple, variants: dict[str, dict[str, Any]] | None = None) -> None:
    B, T, H, N, D, gate = row
    x = make_inputs(B, T, N, H, H, D, D, torch.bfloat16, gate)
    do = torch.randn_like(x["v"][:, :, 0])

    def both() -> None:
        run((forward, backward), x, do, None)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    fwd = median_ms(lambda: forward(**x, save=False))
    saving = median_ms(lambda: forward(**x, save=True))
    total = median_ms(both)
    print(
        f"{row} fwd {fwd:.3f} saving {saving:.3f} fwd+bwd {total:.3f} peak {peak:.0f}MiB"
        f" | {TABLE.get(row, '')}"
    )
    print("    ", kernel_times(both), flush=True)


def variants(row: tuple) -> None:
    """Time each kernel with other launch parameters."""
    B, T, H, N, D, gate = row
    x = make_inputs(B, T, N, H, H, D, D, torch.bfloat16, gate)
    do = torch.randn_like(x["v"][:, :, 0])
    Launch = config.Launch
    options = {
        "prepare_launch": [Launch(D, 4, 1, None), Launch(D, 4, 1, 128)],
        "gradient_launch": [Launch(64, 4, 1), Launch(64, 8, 1)],
    }  # fmt: skip
    for name, launches in options.items():
        kept = getattr(config, name)
        for launch in launches:
            setattr(config, name, lambda *_, launch=launch: launch)
            try:
                times = kernel_times(lambda: run((forward, backward), x, do, None))
                times = {n: t for n, t in times.items() if n[:4] == name[:4]}
                print(row, name, tuple(launch), times, flush=True)
            except Exception as error:
                print(row, name, tuple(launch), "FAILED", repr(error)[:200], flush=True)
        setattr(config, name, kept)


def time_step() -> None:
    for B in (1, 64, 256):
        for N in (1, 4):
            x = make_inputs(B, 1, N, 16, 16, 128, 128, torch.bfloat16, "none")
            token = [None if x[n] is None else x[n][:, 0] for n in ("q", "k", "v", "beta", "g")]
            states = [
                torch.randn(B, 16, 128, 128, device="cuda")
                for _ in range(max(1, 256 // B) if B < 256 else 2)
            ]
            for launch in ((32, 4), (32, 1), (32, 2), (16, 1), (16, 2), (64, 4), (128, 8), (64, 8)):
                kept = config.step_launch
                config.step_launch = lambda V, N, launch=launch: config.Launch(*launch, 1)
                step(*token, 1.0, states[0])
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for state in states[:16]:
                        step(*token, 1.0, state)
                us = median_ms(graph.replay) * 1000 / len(states[:16])
                print(f"step B={B} N={N} {launch} {us:.1f} us", flush=True)
                config.step_launch = kept


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+")
    args = parser.parse_args()
    if "check" in args.what:
        mp.spawn(check_in_process, (10,), nprocs=10)
        check_step()
    if "short" in args.what:
        for row in list(TABLE)[:6]:
            time_row(row)
    if "time" in args.what:
        for row in TABLE:
            time_row(row)
    if "variants" in args.what:
        variants((8, 4096, 16, 1, 128, "none"))
    if "step" in args.what:
        time_step()


if __name__ == "__main__":
    main()
