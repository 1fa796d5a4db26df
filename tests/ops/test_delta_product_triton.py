"""The Triton kernels of `delta_product` under Triton's interpreter: float32, tiny, on the CPU.

Whether kernels are interpreted is settled when they are imported, and so this file also runs as a
script in a process of its own, where the cases are computed; the tests look at its answers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Arguments of `delta_product_inputs`; K and V are multiples of 16.
CASES = {
    "plain": {"B": 1, "T": 70, "N": 1, "H": 1, "K": 16, "V": 16, "decay": None},
    "no initial state": {"B": 1, "T": 66, "N": 1, "H": 1, "K": 16, "V": 16,
                         "with_initial_state": False},
    "gate, wide values": {"B": 2, "T": 67, "N": 1, "H": 1, "HV": 2, "K": 16, "V": 32},
    "strong gate": {"B": 1, "T": 40, "N": 2, "H": 1, "K": 32, "V": 16, "decay": 30.0},
    "two heads": {"B": 1, "T": 50, "N": 3, "H": 2, "K": 16, "V": 16},
    "not powers of two": {"B": 1, "T": 20, "N": 4, "H": 1, "K": 48, "V": 80},
    "shorter than a chunk": {"B": 1, "T": 5, "N": 5, "H": 1, "K": 16, "V": 16},
    "eight reflections": {"B": 1, "T": 11, "N": 8, "H": 1, "K": 16, "V": 16, "strength": 2.0},
    "packed, grouped heads": {"B": 1, "T": 90, "N": 2, "H": 1, "HV": 2, "K": 16, "V": 16,
                              "num_sequences": 5},
    "no tokens": {"B": 2, "T": 0, "N": 2, "H": 1, "K": 16, "V": 16},
}  # fmt: skip
OUTPUTS = ("o", "final_state", "dq", "dk", "dv", "dbeta", "dg", "dinitial_state")
# A chunk solves for 64 rows at once what the definition does one by one, here in 16 dimensions.
FACTOR = 4.0


def compute(case: dict) -> dict[str, str]:
    """Run one case; return what breaks the accuracy rule, by output."""
    import torch

    from householder.ops.delta_product import reference, triton
    from householder.testing import assert_as_accurate, delta_product_inputs

    def differentiate(dtype: torch.dtype) -> list:
        leaves = {
            n: x.to(dtype).requires_grad_()
            for n, x in inputs.items()
            if x is not None and x.is_floating_point()
        }
        arguments = [leaves.get(n) for n in ("q", "k", "v", "beta", "g")]
        o, state = reference.forward(*arguments, scale, leaves.get("initial_state"), cu_seqlens)
        for result, gradient in ((o, do), (state, dstate)):
            if result.requires_grad:  # without tokens, o depends on nothing
                result.backward(gradient.to(dtype), retain_graph=True)
        grads = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values())
        return [o, state, *grads]

    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # so that memory comes filled with NaN
    inputs = delta_product_inputs(**case, dtype=torch.float32)
    inputs["beta"][:, ::4] = 0.0  # tokens without effect have gradients all the same
    cu_seqlens, scale = inputs["cu_seqlens"], 0.3
    order = ("q", "k", "v", "beta", "g")
    arguments = [*(inputs[n] for n in order), scale, inputs["initial_state"], cu_seqlens]
    o, state, *saved = triton.forward(*arguments, save=True)
    do, dstate = torch.randn_like(o), torch.randn_like(state)
    actual = [o, state, *triton.backward(do, dstate, *arguments, *saved)]
    expected, plain = differentiate(torch.float64), differentiate(torch.float32)
    if inputs["g"] is None:
        expected.insert(6, None)
        plain.insert(6, None)

    broken = {}
    for name, a, p, e in zip(OUTPUTS, actual, plain, expected, strict=False):
        if a is None or e is None:
            continue
        try:
            assert_as_accurate(a, p, e, factor=FACTOR, name=name)
        except AssertionError as error:
            broken[name] = str(error)
    unsaved = triton.forward(*arguments, save=False)
    if not torch.equal(unsaved[0], o) or any(x.numel() for x in unsaved[2:]):
        broken["unsaved"] = "forward without saving differs or saves"
    if case["T"] > 0 and cu_seqlens is None:
        broken |= compute_step([x if x is None else x[:, 0] for x in arguments[:5]], state)
    return broken


def compute_step(token: list, state) -> dict[str, str]:
    """Advance `state` by one token; return what breaks the accuracy rule."""
    from householder.ops.delta_product import reference, triton
    from householder.testing import assert_as_accurate

    actual = triton.step(*token, 0.3, state)
    plain = reference.step(*token, 0.3, state)
    wide = [x if x is None else x.double() for x in token]
    expected = reference.step(*wide, 0.3, state.double())
    try:
        for a, p, e in zip(actual, plain, expected, strict=True):
            assert_as_accurate(a, p, e)
    except AssertionError as error:
        return {"step": str(error)}
    return {}


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, str]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_accurate_as_the_definition(name, answers):
    assert answers[name] == {}


if __name__ == "__main__":
    print(json.dumps({name: compute(case) for name, case in CASES.items()}))
