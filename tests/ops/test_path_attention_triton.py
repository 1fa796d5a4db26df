"""The Triton kernels of `path_attention` under Triton's interpreter: float32, tiny, on the CPU.

Whether kernels are interpreted is settled when they are imported, and so this file also runs as a
script in a process of its own, where the cases are computed; the tests look at its answers.
"""

import json
import math

import pytest

pytest.importorskip("triton")

# Arguments of `path_attention_inputs`, and `window`; K and V are multiples of 16. `initial` are the
# tokens before the first query.
CASES = {
    "plain": {"B": 1, "T": 200, "H": 1, "K": 16, "V": 16, "decay": None},
    "five chunks": {"B": 1, "T": 300, "H": 2, "K": 16, "V": 32, "decay": None},
    "nine chunks": {"B": 1, "T": 515, "H": 1, "K": 16, "V": 16, "decay": 0.02},
    "reflections": {"B": 1, "T": 400, "H": 1, "K": 16, "V": 16, "strength": 2.0, "decay": None},
    "one token": {"B": 2, "T": 1, "H": 1, "K": 16, "V": 16},
    "one chunk": {"B": 1, "T": 64, "H": 1, "K": 16, "V": 16, "with_sinks": True},
    "two chunks": {"B": 1, "T": 128, "H": 1, "K": 16, "V": 16},
    "a token more": {"B": 2, "T": 129, "H": 1, "K": 16, "V": 16},
    "no tokens": {"B": 2, "T": 0, "H": 1, "K": 16, "V": 16},
    "grouped heads, gates, sinks": {"B": 2, "T": 330, "H": 1, "HQ": 3, "K": 16, "V": 16,
                                    "with_sinks": True},
    "not powers of two": {"B": 1, "T": 200, "H": 1, "K": 48, "V": 80},
    "wider than is held": {"B": 1, "T": 330, "H": 1, "K": 144, "V": 16},
    "strong gate": {"B": 1, "T": 300, "H": 1, "K": 16, "V": 16, "decay": 30.0},
    "packed, grouped heads": {"B": 1, "T": 520, "H": 1, "HQ": 2, "K": 16, "V": 16,
                              "num_sequences": 5},
    "packed, many short": {"B": 1, "T": 150, "H": 1, "K": 16, "V": 16, "num_sequences": 9},
    "window inside a chunk": {"B": 1, "T": 200, "H": 1, "K": 16, "V": 16, "window": 20},
    "window of a chunk": {"B": 1, "T": 330, "H": 1, "K": 16, "V": 16, "window": 64,
                          "decay": None},
    "long window, packed": {"B": 1, "T": 640, "H": 1, "K": 16, "V": 16, "window": 150,
                            "num_sequences": 3},
    "window of a token": {"B": 1, "T": 140, "H": 1, "K": 16, "V": 16, "window": 1},
    "initial": {"B": 2, "T": 420, "H": 1, "K": 16, "V": 16, "decay": None, "initial": 291},
    "initial, window, grouped heads, sinks": {"B": 1, "T": 420, "H": 1, "HQ": 2, "K": 16, "V": 16,
                                              "with_sinks": True, "window": 150, "initial": 300},
    "initial, wider than is held": {"B": 1, "T": 330, "H": 1, "K": 144, "V": 16, "initial": 257},
    "initial alone": {"B": 1, "T": 140, "H": 1, "K": 16, "V": 16, "initial": 140},
}  # fmt: skip
# A chunk solves for 64 rows at once, in 16 dimensions, where the plain form solves for 16.
FACTOR = 4.0
NAMES = ("q", "k", "v", "w", "beta", "g", "sinks")


def compute(case: dict) -> str:
    """Run one case; return how it breaks the accuracy rule, or nothing."""
    import torch

    from householder.ops.path_attention import chunk, triton
    from householder.testing import assert_as_accurate, path_attention_inputs

    case = dict(case)
    window, initial = case.pop("window", None), case.pop("initial", 0)
    inputs = path_attention_inputs(**case, dtype=torch.float32)
    if case["T"]:
        inputs["beta"][:, ::4] = 0.0
    others = 0.3, window, inputs["cu_seqlens"]
    inputs["q"] = inputs["q"][:, initial:]
    arguments = [inputs[name] for name in NAMES]
    torch.use_deterministic_algorithms(True)  # so that memory comes filled with NaN
    o, lse = triton.forward(*arguments, *others)
    wide = [x if x is None else x.double() for x in arguments]
    expected, expected_lse = chunk.forward(*wide, *others)
    plain, plain_lse = chunk.forward(*arguments, *others)
    try:
        assert_as_accurate(o, plain, expected, factor=FACTOR, name="o")
        assert_as_accurate(lse, plain_lse, expected_lse, factor=FACTOR, name="lse")
    except AssertionError as error:
        return str(error)
    return ""


def compute_levels() -> str:
    """Compare what each level keeps with dense products of reflectors."""
    import torch

    from householder.ops.path_attention.inputs import Inputs
    from householder.ops.path_attention.triton.problem import arrange, make_problem
    from householder.ops.path_attention.triton.tree import build_tree
    from householder.testing import path_attention_inputs

    T, K, C = 300, 16, 64
    inputs = path_attention_inputs(1, T, 1, K, 16, dtype=torch.float32)
    p = make_problem(*arrange(Inputs(*(inputs[name] for name in NAMES), 0.3, None, None)))
    tree = build_tree(p)
    q, k, w, beta, g = (inputs[name][0, :, 0].double() for name in ("q", "k", "w", "beta", "g"))
    chunks = -(-T // C)
    for level in range(p.num_levels):
        size = C << level
        for chunk in range(chunks):
            start = (chunk >> level) * size
            rows = range(chunk * C, min(chunk * C + C, T))
            if chunk >> level & 1:
                kept, vectors, sums = tree.q[level, 0], 0.3 * q, []
                for i in rows:
                    vector, decay = vectors[i], 0.0
                    for s in range(i, start - 1, -1):
                        vector = vector - beta[s] * w[s] * (w[s] @ vector)
                        decay += g[s]
                    sums.append((vector, decay))
            elif start + size < T:
                kept, sums = tree.k[level, 0], []
                for j in rows:
                    vector, decay = k[j], 0.0
                    for s in range(j + 1, start + size):
                        vector = vector - beta[s] * w[s] * (w[s] @ vector)
                        decay += g[s]
                    sums.append((vector, decay))
            else:
                continue
            expected = torch.stack([x for x, _ in sums])
            decays = torch.tensor([float(x) for _, x in sums])
            at = slice(rows.start, rows.stop)
            if not torch.allclose(kept[at].double(), expected, atol=1e-5):
                return f"vectors of chunk {chunk} at level {level}"
            if not torch.allclose(tree.decay[level, 0, at], decays, atol=1e-5):
                return f"gates of chunk {chunk} at level {level}"
    if tree.q[2, 0, T : T + C - T % C].any() or tree.inverse.shape != (1, 6, C, C):
        return "rows behind the end"
    return ""


def compute_hidden() -> list[bool]:
    """Return whether a gate of −∞, and the start of a sequence, hide all that is before."""
    import torch

    from householder.ops.path_attention import chunk, triton
    from householder.testing import path_attention_inputs

    inputs = path_attention_inputs(1, 300, 1, 16, 16, dtype=torch.float32)
    inputs["g"][:, 70] = inputs["g"][:, 200] = -math.inf
    whole, _ = triton.forward(*(inputs[name] for name in NAMES), 0.3, None, None)
    tail = [x if x is None else x[:, 200:] for x in (inputs[name] for name in NAMES)]
    alone, _ = chunk.forward(*tail, 0.3, None, None)
    gates_hide = torch.allclose(whole[:, 200:], alone, atol=1e-5) and bool(whole.isfinite().all())

    bounds = torch.tensor([0, 100, 100, 300], dtype=torch.int32)
    inputs = path_attention_inputs(1, 300, 1, 16, 16, dtype=torch.float32)
    before, _ = triton.forward(*(inputs[name] for name in NAMES), 0.3, None, bounds)
    for name in ("q", "k", "v", "w"):
        inputs[name][:, :100] = math.inf
    after, _ = triton.forward(*(inputs[name] for name in NAMES), 0.3, None, bounds)
    return [gates_hide, torch.equal(before[:, 100:], after[:, 100:])]


def compute_strides() -> list[bool]:
    """Return whether strided inputs and those of a batch give the bits of plain ones alone."""
    import torch

    from householder.ops.path_attention import triton
    from householder.testing import path_attention_inputs

    inputs = path_attention_inputs(2, 70, 2, 16, 16, dtype=torch.float32)
    arguments = [inputs[name] for name in NAMES]
    o, lse = triton.forward(*arguments, 0.3, None, None)
    heads_first = [x if x is None else x.transpose(1, 2).contiguous() for x in arguments[:6]]
    heads_first = [x if x is None else x.transpose(1, 2) for x in heads_first]
    strided, _ = triton.forward(*heads_first, None, 0.3, None, None)
    last_strided = [x if x is None else torch.stack([x, x], -1)[..., 0] for x in arguments[:6]]
    last, _ = triton.forward(*last_strided, None, 0.3, None, None)
    alone, alone_lse = triton.forward(
        *(x if x is None else x[1:] for x in arguments[:6]), None, 0.3, None, None
    )
    return [
        torch.equal(strided, o),
        torch.equal(last, o),
        torch.equal(alone[0], o[1]) and torch.equal(alone_lse[0], lse[1]),
    ]


def compute_public() -> list[bool]:
    """Call the public function: the choice, gradients and vmap of this form."""
    import torch

    from householder import path_attention
    from householder.testing import path_attention_inputs

    inputs = path_attention_inputs(1, 70, 1, 16, 16, HQ=2, dtype=torch.float32)
    q = inputs.pop("q").requires_grad_()
    by_form = {}
    for impl in ("triton", "chunk"):
        o = path_attention(q, **inputs, impl=impl)
        by_form[impl] = torch.autograd.grad(o.square().sum(), q)[0]
    batched = torch.stack([q.detach(), -q.detach()])
    mapped = torch.vmap(lambda x: path_attention(x, **inputs, impl="triton"))(batched)
    one_by_one = torch.stack([path_attention(x, **inputs, impl="triton") for x in batched])
    negative = path_attention(-q, **inputs, impl="triton", scale=-0.3)
    return [
        torch.allclose(by_form["triton"], by_form["chunk"], atol=1e-5),
        torch.equal(mapped, one_by_one),
        torch.equal(negative, path_attention(q, **inputs, impl="triton", scale=0.3)),
    ]


@pytest.fixture(scope="module")
def answers(interpreted) -> dict:
    return interpreted(__file__)


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_accurate_as_the_definition(name, answers):
    assert answers[name] == ""


def test_levels_keep_products_of_the_reflectors_up_to_their_blocks_bounds(answers):
    assert answers["levels"] == ""


def test_gates_of_minus_infinity_and_sequences_bounds_hide_what_is_before(answers):
    assert answers["hidden"] == [True, True]


def test_neither_strides_nor_the_batch_change_the_bits(answers):
    assert answers["strides"] == [True, True, True]


def test_the_public_function_runs_this_form(answers):
    assert answers["public"] == [True, True, True]


@pytest.mark.parametrize(
    ("T", "levels"), [(0, 0), (1, 0), (64, 0), (65, 1), (128, 1), (129, 2), (4096, 6), (4097, 7)]
)
def test_levels_of_the_tree(T, levels):
    from householder.ops.path_attention.triton.config import num_levels

    assert num_levels(T) == levels


def test_tiles_are_where_their_sequence_has_them():
    import torch

    from householder.ops.path_attention.triton.problem import make_problem, number_tiles

    lengths = [0, 0, 130, 128, 1, 129, 0, 300, 0]
    x = torch.zeros(1, sum(lengths), 1, 16)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tables = number_tiles(cu_seqlens, sum(lengths))
    p = make_problem(x, x, x, x, x[..., 0], None, None, 1.0, None, *tables, None)
    expected = [i for i, length in enumerate(lengths) for _ in range(-(-length // 128))]
    assert p.tile_sequence[: len(expected)].tolist() == expected
    assert p.num_tiles >= len(expected)
    assert p.first_tile.tolist() == [0, 0, 0, 2, 3, 4, 6, 6, 9, 9]


if __name__ == "__main__":
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # so that memory comes filled with NaN
    answers = {name: compute(case) for name, case in CASES.items()}
    torch.use_deterministic_algorithms(False)
    answers |= {
        "levels": compute_levels(),
        "hidden": compute_hidden(),
        "strides": compute_strides(),
        "public": compute_public(),
    }
    print(json.dumps(answers))
