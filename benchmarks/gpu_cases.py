"""What `gpu.py` measures: the problems, their inputs, and whom they are given to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from householder import delta_product, delta_product_step
from householder.ops.delta_product.triton import config
from recording import installed_version

Inputs = dict[str, Tensor | None]
INPUTS = ("q", "k", "v", "beta", "g")
GROUPS = ("table", "length", "reflections", "step", "first")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# The ceilings of one NVIDIA H200 that the floors are computed with.
FLOPS_PER_MS = 790e9
BYTES_PER_MS = 4.3e9


class Configuration(NamedTuple):
    """What kernels are compiled for."""

    H: int
    D: int
    N: int
    gated: bool
    dtype: str
    step: bool
    in_segments: bool


class GpuCase(NamedTuple):
    """One problem: sizes, and whether there are gates.

    Cases of the group `step` have one token; of the group `first` only first calls are timed.
    """

    group: str
    B: int
    T: int
    H: int
    D: int
    N: int
    gated: bool = False
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        gate = "gated" if self.gated else "ungated"
        dtype = "" if self.dtype == "bf16" else f"-{self.dtype}"
        return f"{self.group}-{self.B}x{self.T}x{self.H}x{self.D}-n{self.N}-{gate}{dtype}"

    @property
    def configuration(self) -> Configuration:
        cut = config.segment_chunks(self.T, self.N, self.H, self.D) > 0
        step = self.group == "step"
        return Configuration(self.H, self.D, self.N, self.gated, self.dtype, step, cut)

    def shortened(self) -> GpuCase:
        """Return a case of the same configuration that is quickly compared with float64.

        One sequence of a few chunks that do not end with the last token, or of three segments.
        """
        segment = config.segment_chunks(self.T, self.N, self.H, self.D)
        tokens = 2 * segment * config.chunk_tokens(self.N)
        return self if self.group == "step" else self._replace(B=1, T=tokens + 208)

    def floor_ms(self, backward: bool) -> float:
        """Return the time below which no kernel can be, in chunks of 64 rows.

        The larger of the matrix products at the tensor cores' rate and of every input, output and
        gradient moved once; of one token, its float32 state read and written.
        """
        if self.group == "step":
            return 2 * 4 * self.B * self.H * self.D**2 / BYTES_PER_MS
        rows, n = self.B * self.T * self.H, self.N
        big, small, moved = 2 * self.D**2, 2 * 64 * self.D, 2 * self.D * rows
        flops = rows * (n * (2 * big + 2 * small) + big + 2 * small)
        bytes_ = (2 + 2 * n) * moved
        if backward:
            flops += rows * (n * (7 * big + 6 * small) + 2 * big + 5 * small)
            bytes_ += (3 + 4 * n) * moved
        return max(flops / FLOPS_PER_MS, bytes_ / BYTES_PER_MS)


def cases() -> Iterator[GpuCase]:
    """The table of the documentation, one token, time against T and against N, and first calls."""
    for N in (1, 2, 3, 4):
        yield GpuCase("table", 8, 4096, 16, 128, N)
    for N in (1, 2):
        yield GpuCase("table", 8, 4096, 16, 128, N, gated=True)
        yield GpuCase("table", 1, 32768, 16, 128, N)
        yield GpuCase("table", 8, 4096, 32, 64, N)
    yield GpuCase("table", 1, 32768, 16, 128, 1, gated=True)
    for B in (1, 64, 256):
        for N in (1, 4):
            yield GpuCase("step", B, 1, 16, 128, N)
    for power in range(10, 19):
        yield GpuCase("length", 1, 1 << power, 16, 128, 1)
    for N in range(1, 9):
        yield GpuCase("reflections", 4, 4096, 16, 128, N)
    short, long = 208, 8400
    for dtype in DTYPES:
        for D in (64, 128, 256):
            yield GpuCase("first", 1, short, 16, D, 1, True, dtype)
        yield GpuCase("first", 1, long, 16, 128, 1, True, dtype)
        yield GpuCase("first", 1, long, 16, 256, 1, True, dtype)
    yield GpuCase("first", 1, short, 16, 128, 4, True, "fp32")
    yield GpuCase("first", 1, long, 16, 256, 8, True, "fp32")
    yield GpuCase("first", 1, short, 16, 128, 1, False, "fp32")
    # Those of the table and of time against N.
    for N in range(1, 9):
        yield GpuCase("first", 1, short, 16, 128, N)
    for N in (1, 2):
        yield GpuCase("first", 1, long, 16, 128, N)
        yield GpuCase("first", 1, short, 32, 64, N)
    yield GpuCase("first", 1, short, 16, 128, 2, True)


def make_inputs(case: GpuCase) -> Inputs:
    """Draw inputs like a trained layer's: unit keys, β in (0, 2), mild gates."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    B, T, H, D, N = case[1:6]
    dtype = DTYPES[case.dtype]
    inputs = {
        "q": F.normalize(normal(B, T, H, D), dim=-1).to(dtype),
        "k": F.normalize(normal(B, T, N, H, D), dim=-1).to(dtype),
        "v": normal(B, T, N, H, D).to(dtype),
        "beta": (2 * normal(B, T, N, H).sigmoid()).to(dtype),
        "g": F.logsigmoid(normal(B, T, H) + 3) if case.gated else None,
    }
    return {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}


def ours(inputs: Inputs) -> Tensor:
    return delta_product(*(inputs[name] for name in INPUTS))[0]


def our_step(inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    token = (inputs[name] for name in INPUTS)
    return delta_product_step(*(None if x is None else x[:, 0] for x in token), state=state)


def flash_linear_attention(inputs: Inputs) -> Tensor:
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


def peer_refuses_gates() -> bool:
    """Return whether flash-linear-attention refuses the gradient of gated calls here.

    It does so after its forward, for which it would first choose between all its programs.
    """
    version = tuple(int(x) for x in triton.__version__.split(".")[:3])
    return torch.cuda.get_device_capability() == (9, 0) and (3, 4, 0) <= version < (3, 7, 1)


def flash_linear_attention_step(inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Call the peer's recurrent form, which has one reflection a token."""
    from fla.ops.delta_rule import fused_recurrent_delta_rule

    q, k, v, beta, _ = (inputs[name] for name in INPUTS)
    if k.shape[2] > 1:
        raise NotImplementedError("one reflection a token")
    flat = [x.flatten(1, 2) for x in (k, v, beta)]
    o, new = fused_recurrent_delta_rule(q, *flat, initial_state=state, output_final_state=True)
    return o[:, 0], new


VARIANTS: dict[str, Callable[[Inputs], Tensor]] = {"householder": ours}
STEPS: dict[str, Callable[[Inputs, Tensor], tuple[Tensor, Tensor]]] = {"householder": our_step}
FLA_VERSION = installed_version("fla-core")
if FLA_VERSION:
    VARIANTS["fla"] = flash_linear_attention
    STEPS["fla"] = flash_linear_attention_step
