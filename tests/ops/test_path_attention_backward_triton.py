"""The backward kernels of `path_attention` under Triton's interpreter: float32, tiny, on the CPU.

Whether kernels are interpreted is settled when they are imported, and so this file also runs as a
script in a process of its own, where the cases are computed; the tests look at its answers.
"""

import importlib
import json
import math

import pytest

pytest.importorskip("triton")

# Arguments of `path_attention_inputs`, and `window`; K and V are multiples of 16. `hide` is a token
# with a gate of −∞. `tile` are the rows of a tile of the kernels of the rectangles, `initial` the
# tokens before the first query.
CASES = {
    "no tokens": {"B": 2, "T": 0, "H": 1, "K": 16, "V": 16, "with_sinks": True},
    "one token": {"B": 2, "T": 1, "H": 1, "K": 16, "V": 16},
    "one chunk": {"B": 1, "T": 64, "H": 1, "K": 16, "V": 16, "hide": 30},
    "three chunks": {"B": 1, "T": 170, "H": 2, "K": 16, "V": 16, "decay": None, "tile": 128},
    "grouped heads, gates, sinks": {"B": 1, "T": 200, "H": 1, "HQ": 2, "K": 16, "V": 16,
                                    "with_sinks": True, "hide": 80},
    "not powers of two, strong gate": {"B": 1, "T": 140, "H": 1, "K": 48, "V": 80, "decay": 30.0,
                                       "tile": 128},
    "tiles of half a chunk": {"B": 1, "T": 140, "H": 1, "K": 16, "V": 16, "decay": None,
                              "tile": 32},
    "window": {"B": 1, "T": 260, "H": 1, "K": 16, "V": 16, "window": 70, "tile": 128},
    "window inside a chunk": {"B": 2, "T": 70, "H": 1, "K": 16, "V": 16, "window": 20},
    # The fewest for which the gradient of a product goes down two levels.
    "nine chunks": {"B": 1, "T": 515, "H": 1, "K": 16, "V": 16, "decay": None},
    "initial": {"B": 1, "T": 515, "H": 1, "K": 16, "V": 16, "decay": None, "initial": 290},
    "initial, grouped heads, gates, sinks": {"B": 1, "T": 330, "H": 1, "HQ": 2, "K": 16, "V": 16,
                                             "with_sinks": True, "initial": 257, "tile": 128},
    "initial, window": {"B": 2, "T": 260, "H": 1, "K": 16, "V": 16, "window": 70, "initial": 140,
                        "tile": 32},
    "initial alone": {"B": 1, "T": 140, "H": 1, "K": 16, "V": 16, "initial": 140},
    "nine chunks, packed": {"B": 1, "T": 640, "H": 1, "K": 16, "V": 16, "decay": 0.02,
                            "num_sequences": 3},
}  # fmt: skip
NAMES = ("q", "k", "v", "w", "beta", "g", "sinks")
# A chunk solves for 64 rows at once, in 16 dimensions, where the plain form solves for 16.
FACTOR = 4.0


def compute(case: dict) -> dict[str, str]:
    """Run one case; return what breaks the accuracy rule, by gradient."""
    import torch

    from householder.ops.path_attention import chunk, triton
    from householder.testing import assert_as_accurate, path_attention_inputs

    config = importlib.import_module("householder.ops.path_attention.triton.gradient_config")
    case = dict(case)
    window, tile, hide = (case.pop(name, None) for name in ("window", "tile", "hide"))
    initial = case.pop("initial", 0)
    query_tiles, key_tiles = config.query_tiles, config.key_tiles
    if tile is not None:
        config.query_tiles = lambda *sizes: query_tiles(*sizes)._replace(rows=tile)
        config.key_tiles = lambda *sizes: key_tiles(*sizes)._replace(columns=tile)
    inputs = path_attention_inputs(**case, dtype=torch.float32)
    if case["T"]:
        inputs["beta"][:, ::4] = 0.0
    if hide is not None:
        inputs["g"][:, hide] = -math.inf
    others = 0.3, window, inputs["cu_seqlens"]
    inputs["q"] = inputs["q"][:, initial:]
    arguments = [inputs[name] for name in NAMES]
    wide = [x if x is None else x.double() for x in arguments]
    torch.use_deterministic_algorithms(True)  # so that memory comes filled with NaN
    o, lse = triton.forward(*arguments, *others)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    actual = triton.backward(do, *arguments, *others, o, lse)
    plain = chunk.backward(do, *arguments, *others, *chunk.forward(*arguments, *others))
    expected = chunk.backward(do.double(), *wide, *others, *chunk.forward(*wide, *others))
    config.query_tiles, config.key_tiles = query_tiles, key_tiles
    broken = {}
    for name, a, p, e in zip(NAMES, actual, plain, expected, strict=True):
        if (a is None) != (e is None):
            broken[name] = "one of the forms has no gradient"
        elif a is not None:
            try:
                assert_as_accurate(a, p, e, factor=FACTOR, name=f"d{name}")
            except AssertionError as error:
                broken[name] = str(error)
    return broken


def compute_alone() -> list[bool]:
    """Return whether neighbours, in a batch or a packing, leave a sequence's gradients as they are.

    The neighbours are infinite, or NaN in the gradient of their outputs.
    """
    import torch

    from householder.ops.path_attention import triton
    from householder.testing import path_attention_inputs

    inputs = path_attention_inputs(1, 180, 1, 16, 16, dtype=torch.float32)
    arguments = [inputs[name] for name in NAMES]
    bounds = torch.tensor([0, 20, 20, 90, 180], dtype=torch.int32)
    do = torch.randn(1, 180, 1, 16)

    def differentiate(arguments, do, bounds):
        o, lse = triton.forward(*arguments, 0.3, None, bounds)
        return triton.backward(do, *arguments, 0.3, None, bounds, o, lse)[:6]

    before = [x[:, 20:90] for x in differentiate(arguments, do, bounds)]
    part = [x if x is None else x[:, 20:90] for x in arguments]
    alone = differentiate(part, do[:, 20:90], None)
    double = [x if x is None else torch.cat([x, x]) for x in part]
    batched = differentiate(double, torch.cat([do[:, 20:90]] * 2), None)
    for x in arguments[:4]:
        x[:, :20] = math.inf
    do[:, 90:] = math.nan
    after = [x[:, 20:90] for x in differentiate(arguments, do, bounds)]
    return [
        all(map(torch.equal, before, others)) for others in (alone, [x[1:] for x in batched], after)
    ]


def compute_first_row() -> bool:
    """Return whether rows that see themselves only have gradients of exactly zero."""
    import torch

    from householder.ops.path_attention import triton
    from householder.testing import path_attention_inputs

    inputs = path_attention_inputs(1, 100, 1, 16, 16, dtype=torch.float32)
    inputs["g"][:, 70] = -math.inf
    arguments = [inputs[name] for name in NAMES]
    o, lse = triton.forward(*arguments, 0.3, None, None)
    dq = triton.backward(torch.randn_like(o), *arguments, 0.3, None, None, o, lse)[0]
    return not dq[:, [0, 70]].any() and bool(dq[:, 1:70].any())


@pytest.fixture(scope="module")
def answers(interpreted) -> dict:
    return interpreted(__file__)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_as_accurate_as_the_chunked_form(name, answers):
    assert answers[name] == {}


def test_a_sequence_has_its_gradients_to_itself(answers):
    assert answers["alone"] == [True, True, True]


def test_rows_that_see_themselves_only_have_no_gradient(answers):
    assert answers["first row"]


def test_products_of_gradients_have_a_range_that_float16_lacks():
    from householder.ops.path_attention.triton.gradient_config import gradient_precision

    assert [gradient_precision(p) for p in ("bf16", "fp16", "tf32x3")] == ["bf16", "tf32", "tf32x3"]


if __name__ == "__main__":
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # so that memory comes filled with NaN
    answers = {name: compute(case) for name, case in CASES.items()}
    torch.use_deterministic_algorithms(False)
    answers |= {"alone": compute_alone(), "first row": compute_first_row()}
    print(json.dumps(answers))
