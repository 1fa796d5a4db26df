"""What the forward for Hopper computes, in float64 on a CPU (see gluon_arrays.py)."""

import builtins
import types

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from householder import delta_product
from householder.ops.delta_product.triton import hopper_forward
from householder.testing import delta_product_inputs

from . import gluon_arrays as gluon

pytestmark = pytest.mark.usefixtures("in_float64")

R = 64
# The kernels' exponential knows fewer digits of log2(e), and T counts β = 0 as 2⁻⁴⁰.
CLOSE = 1e-9


def run(kernel, programs, arguments):
    for program in range(programs):
        known = gluon.Machine(program).stand_ins()
        gl = vars(known["gl"]) | {
            "associative_scan": lambda x, axis, _: x.cumsum(axis), "exp": torch.exp,
            "abs": torch.abs, "floor": torch.floor, "log": torch.log,
            "zeros_like": torch.zeros_like,
        }  # fmt: skip
        known |= {
            "gl": types.SimpleNamespace(**gl),
            "range": lambda *sizes: map(torch.tensor, builtins.range(*map(int, sizes))),
            "mma_v2": lambda a, b, acc: acc + a @ b, "exp2": torch.exp2,
            "product_layout": gluon.nothing,
        }  # fmt: skip
        gluon.translate(kernel, known)(**arguments)


# B, T, N, H, HV, K, V, the mean of the log gates, and how many packed sequences.
CASES = [
    (2, 150, 1, 1, 1, 16, 16, None, None),
    (1, 130, 1, 1, 2, 16, 32, 1.0, None),
    (1, 64, 2, 2, 2, 32, 16, 1.0, None),
    (1, 70, 3, 1, 1, 16, 48, 1.0, None),
    (1, 100, 2, 1, 1, 16, 16, None, 4),
    (1, 40, 4, 1, 1, 16, 16, 1.0, 3),
]


@pytest.mark.parametrize("case", CASES)
def test_forward_agrees_with_the_definition(case):
    B, T, N, H, HV, K, V, decay, packed = case
    x = delta_product_inputs(
        B, T, N, H, K, V, HV=HV, decay=decay, num_sequences=packed, dtype=torch.float64
    )
    order = x["q"], x["k"], x["v"], x["beta"], x["g"]
    expected, last = delta_product(
        *order, scale=0.3, initial_state=x["initial_state"], cu_seqlens=x["cu_seqlens"],
        output_final_state=True, impl="reference",
    )  # fmt: skip
    C = R // N
    BC = max(16, 1 << (C - 1).bit_length())
    sequences = B if packed is None else packed
    chunks = B * -(-T // C) if packed is None else T // C + packed
    lengths = torch.tensor([T] * B) if packed is None else x["cu_seqlens"].diff()
    first = torch.cat([torch.zeros(1, dtype=torch.int64), ((lengths + C - 1) // C).cumsum(0)])
    size = 1 if decay is None else 6
    BV = 16

    def memory(*shape):
        return torch.full(shape, torch.nan)

    made = {
        "o": memory(B, T, HV, V), "final": memory(sequences, HV, K, V),
        "table": memory(chunks, HV, size, R), "ut": memory(chunks, HV, R, R),
        "states": memory(chunks, HV, V, K), "u": memory(B, T, N, HV, V),
    }  # fmt: skip
    given = {n: x[n] for n in "qkv"} | {"beta": x["beta"], "initial": x["initial_state"]}
    if decay is not None:
        given["g"] = x["g"]
    strides = {}
    for name in ("q", "k", "v", "beta", "g"):
        letters = "bth" if name in "qg" else "btnh"
        steps = (0,) * 4 if x[name] is None else x[name].stride()
        strides |= {f"{name}_{a}": s for a, s in zip(letters, steps, strict=False)}
    arguments = {n: gluon.Pointer(y) for n, y in (given | made).items()} | strides
    arguments |= {
        "cu_seqlens": None if packed is None else gluon.Pointer(x["cu_seqlens"]),
        "first_chunk": None if packed is None else gluon.Pointer(first),
        "T": T, "HV": HV, "N": N, "K": K, "C": C, "R": R, "GROUP": HV // H,
        "GATED": decay is not None, "PACKED": packed is not None, "BK": K,
    }  # fmt: skip
    arguments.setdefault("g", None)
    of_chunk = torch.searchsorted(first[1:], torch.arange(chunks), right=True)
    of_chunk = gluon.Pointer(of_chunk.clamp(max=sequences - 1))
    arguments |= {
        "scale": 0.3, "V": V, "BC": BC, "PRECISION": "bf16", "SAVE": True, "BV": BV, "STAGES": 2,
        "chunk_sequence": of_chunk, "growth": None,
    }  # fmt: skip
    for kernel, programs in (
        (hopper_forward.prepare_kernel, chunks * HV),
        (hopper_forward.walk_kernel, sequences * HV * -(-V // BV)),
    ):
        run(kernel, programs, {n: y for n, y in arguments.items() if n in kernel.arg_names})
    torch.testing.assert_close(made["o"], expected, rtol=0, atol=CLOSE)
    torch.testing.assert_close(made["final"], last, rtol=0, atol=CLOSE)
    assert not made["u"].isnan().any()
