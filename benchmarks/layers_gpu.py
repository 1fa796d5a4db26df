"""Time layers and adapters on a GPU as they are called, beside torch and peft.

    python benchmarks/layers_gpu.py                      # all groups
    python benchmarks/layers_gpu.py weights              # one of them: weights, vit
    python benchmarks/layers_gpu.py --results /tmp/out   # where `layers-gpu.csv` is appended to

`weights`: reading a parametrized weight and a gradient through it, in float32; the peer is
`torch.nn.utils.parametrizations.orthogonal` with its Householder map. `vit`: a training step
(forward, backward, AdamW) of timm's ViT-B/16 without trained weights, 64 images of 224² under
bfloat16 autocast, with adapters on queries, keys, values and outputs of every attention; the peers
are peft's LoRA and HRA. Times are medians: `forward_ms` and `step_ms` of whole calls, the host's
share included, `device_…` of the same replayed from a CUDA graph (a step without its optimizer).
Peak memory is what a step takes beyond model, gradients and optimizer.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations as torch_parametrizations

from householder.nn import parametrizations
from householder.testing import orthogonality_error
from householder.train.adapt.methods import make_method
from recording import add_arguments, append, environment, peak_memory

REPEATS = 30  # of a call, or as many as take a second
COLUMNS = (
    "date", "case", "variant", "forward_ms", "step_ms", "device_forward_ms", "device_step_ms",
    "peak_mib", "trained", "error",
    "device", "torch", "commit",
)  # fmt: skip
Row = dict[str, object]

SIZES = ((1024, 64), (1024, 1024), (4096, 128))
BATCH = 64
METHODS = (
    ("probe", 0), ("lora", 8), ("hra", 8), ("hta", 1), ("two-sided", 4), ("full", 0),
    ("peft-hra", 8),
)  # fmt: skip


def median_ms(call: Callable[[], object]) -> float:
    """Return the median time of a call between two events, the host's share included."""
    for _ in range(3):
        call()
    times: list[float] = []
    while len(times) < REPEATS and (len(times) < 3 or sum(times) < 1000):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def captured_ms(call: Callable[[], object]) -> float | None:
    """Return the median time of a call replayed from a CUDA graph; None if that cannot be."""
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as reason:  # some wait for the host on their way
        print(f"cannot be captured: {str(reason).splitlines()[0][:80]}")
        return None
    return median_ms(graph.replay)


def weights() -> Iterator[Row]:
    """Measure reading an orthogonal weight, and a gradient through it."""
    theirs = functools.partial(torch_parametrizations.orthogonal, orthogonal_map="householder")
    variants: dict[str, Callable[[nn.Module], nn.Module]] = {
        "householder": parametrizations.orthogonal,
        "torch": theirs,
        "torch, no base": functools.partial(theirs, use_trivialization=False),
    }
    for n, m in SIZES:
        for variant, parametrize in variants.items():
            layer = parametrize(nn.Linear(m, n, bias=False, device="cuda"))
            case = {"case": f"orthogonal-weight-{n}x{m}", "variant": variant}
            yield case | measure_weight(layer, torch.randn(n, m, device="cuda"))


def measure_weight(layer: nn.Module, dW: torch.Tensor) -> Row:
    """Time a parametrized weight, and check that it is orthogonal."""
    parameters = list(layer.parameters())

    def step() -> object:
        return torch.autograd.grad(layer.weight, parameters, dW)

    with torch.no_grad():
        error = orthogonality_error(layer.weight) / 2**-23 / dW.shape[0] ** 0.5
    row = measure(parameters, lambda: layer.weight, step, gradients=step)
    return row | {"error": f"{error:.2f}"}


def measure(
    trained: list[nn.Parameter],
    forward: Callable[[], torch.Tensor],
    step: Callable[[], object],
    gradients: Callable[[], object],
) -> Row:
    """Time a forward pass and a step as called, and on the device the pass and its gradients."""
    with torch.no_grad():
        forward_ms, device_forward_ms = median_ms(forward), captured_ms(forward)
    return {
        "forward_ms": forward_ms,
        "step_ms": median_ms(step),
        "device_forward_ms": device_forward_ms,
        "device_step_ms": captured_ms(gradients),
        "peak_mib": round(peak_memory(step)),
        "trained": sum(p.numel() for p in trained),
    }


def vit() -> Iterator[Row]:
    """Measure training steps of ViT-B/16."""
    import timm

    for kind, size in METHODS:
        torch.manual_seed(0)
        model = timm.create_model("vit_base_patch16_224", num_classes=10).cuda()
        model = peft_hra(model, size) if kind == "peft-hra" else adapt(model, kind, size)
        case = {"case": "vit-b16-step", "variant": f"{kind}-{size}" if size else kind}
        yield case | measure_method(model)
        del model
        torch.cuda.empty_cache()


def measure_method(model: nn.Module) -> Row:
    """Time a step of training a model that a method has made ready."""
    images = torch.randn(BATCH, 3, 224, 224, device="cuda")
    labels = torch.arange(BATCH, device="cuda") % 10
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def forward() -> torch.Tensor:
        # Without autocast's cache of weights, which a captured step would fill from outside.
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            return model(images)

    def step() -> None:
        F.cross_entropy(forward().float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def gradients() -> object:
        return torch.autograd.grad(F.cross_entropy(forward().float(), labels), trained)

    return measure(trained, forward, step, gradients)


def adapt(model: nn.Module, kind: str, size: int) -> nn.Module:
    """Make the model ready for a method, as `householder adapt` does."""
    return make_method(kind, model, rank=size, targets=["attn.qkv", "attn.proj"], head="head").model


def peft_hra(model: nn.Module, size: int) -> nn.Module:
    """Make the model ready for peft's own HRA."""
    from peft import HRAConfig, get_peft_model

    config = HRAConfig(r=size, target_modules=["attn.qkv", "attn.proj"], modules_to_save=["head"])
    return get_peft_model(model, config)


def main() -> None:
    """Run the chosen groups and append their rows."""
    groups = {"weights": weights, "vit": vit}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("groups", nargs="*", default=list(groups), help=f"of {', '.join(groups)}")
    add_arguments(parser)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft")
    where = environment(arguments.commit)
    for group in arguments.groups:
        for row in groups[group]():
            append(arguments.results / "layers-gpu.csv", COLUMNS, [row | where])
            print("  ".join(f"{row.get(name, '')!s:>12}" for name in COLUMNS[1:10]), flush=True)


if __name__ == "__main__":
    main()
