"""The Triton kernels of `delta_product` under Triton's interpreter: float32, tiny, on the CPU.

Whether kernels are interpreted is settled when they are imported, and so this file also runs as a
script in a process of its own, where the cases are computed; the tests look at its answers.
"""

import json

import pytest

pytest.importorskip("triton")

# Arguments of `delta_product_inputs`; K and V are multiples of 16. `segment` is the length, in
# tokens, at which sequences are cut.
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
    "no sequences": {"B": 0, "T": 70, "N": 2, "H": 1, "K": 16, "V": 16},
    "no sequences to cut": {"B": 0, "T": 70, "N": 2, "H": 1, "K": 16, "V": 16, "segment": 32},
    "three segments": {"B": 2, "T": 150, "N": 1, "H": 1, "K": 16, "V": 16, "decay": None,
                       "segment": 64},
    "two segments of chunks": {"B": 1, "T": 140, "N": 1, "H": 1, "K": 32, "V": 16, "decay": None,
                               "with_initial_state": False, "segment": 128},
    "segments, not powers of two": {"B": 1, "T": 50, "N": 4, "H": 1, "K": 48, "V": 80,
                                    "decay": 0.01, "segment": 16},
    "segments, packed, grouped heads": {"B": 1, "T": 400, "N": 2, "H": 1, "HV": 2, "K": 16,
                                        "V": 16, "num_sequences": 4, "decay": 0.02, "segment": 32},
    "segments, weak gate": {"B": 1, "T": 230, "N": 1, "H": 1, "K": 16, "V": 16, "decay": 0.02,
                            "segment": 64},
    "segments, strong gate": {"B": 1, "T": 400, "N": 1, "H": 1, "K": 16, "V": 16, "decay": 3.0,
                              "segment": 128},
}  # fmt: skip
# Log gate, β|k|² and whether a chunk of 64 tokens hides what lies before it: e^-128 does, e^-32
# does not, nor does e^-128 when reflections by β|k|² = 6 stretch up to 5-fold (e^103 in all).
HIDDEN = {
    "strong gate hides": (-2.0, 1.0, True),
    "weak gate does not": (-0.5, 1.0, False),
    "strong gate, long keys": (-2.0, 6.0, False),
}
# N, and whether sequences are packed.
GATE_PARTS = {
    "gate parts": (1, False),
    "gate parts, packed": (1, True),
    "gate parts, two reflections": (2, False),
    "gate parts, three reflections, packed": (3, True),
}
OUTPUTS = ("o", "final_state", "dq", "dk", "dv", "dbeta", "dg", "dinitial_state")
# A chunk solves for 64 rows at once what the definition does one by one, here in 16 dimensions, and
# float32 factors are multiplied in two parts without the product of the small ones, as on a GPU.
FACTOR = 5.0


def compute(case: dict) -> dict[str, str]:
    """Run one case; return what breaks the accuracy rule, by output."""
    import torch

    from householder.ops.delta_product import reference, triton
    from householder.testing import assert_as_accurate, delta_product_inputs

    case = dict(case)
    triton.config.SEGMENT_TOKENS = case.pop("segment", 4096)
    torch.manual_seed(0)

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
    torch.manual_seed(0)
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
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    declared = triton.saved_shapes(*arguments[:5], sequences)
    if [(tuple(x.shape), x.dtype) for x in saved] != list(declared):
        broken["saved"] = f"{[x.shape for x in saved]} is not what is declared, {declared}"
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


def compute_hidden(g: float, strength: float) -> list[bool]:
    """Make the first chunk of the first segment NaN; return what of the second one is finite.

    That is o, and dv with a NaN in the last chunk of the last segment's `do`.
    """
    import torch

    from householder.ops.delta_product import triton
    from householder.testing import delta_product_inputs

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)
    triton.config.SEGMENT_TOKENS = 128
    inputs = delta_product_inputs(1, 384, 1, 1, 16, 16, strength=strength, dtype=torch.float32)
    inputs["g"].fill_(g)
    arguments = [inputs[n] for n in ("q", "k", "v", "beta", "g")]
    arguments = [*arguments, 0.3, inputs["initial_state"], None]
    o, _, *saved = triton.forward(*arguments, save=True)
    do = torch.randn_like(o)
    do[:, -1] = torch.nan
    dv = triton.backward(do, None, *arguments, *saved)[2]
    arguments[2][:, 0] = torch.nan
    o = triton.forward(*arguments, save=False)[0]
    return [bool(x[:, 128:256].isfinite().all()) for x in (o, dv)]


def compute_gate_parts(N: int, packed: bool) -> float:
    """Put random parts of the gates' gradient together; return the error relative to plain sums."""
    import torch

    from householder.ops.delta_product.triton import hopper_gates as parts
    from householder.ops.delta_product.triton.chunks import FROM_START, TO_END, make_problem
    from householder.testing import relative_error

    torch.manual_seed(0)
    lengths, HV, groups = ([0, 70, 3] if packed else [70]), 2, 2
    T, C, BC = sum(lengths), 64 // N, 64 if N == 1 else 32
    q, k, v = (torch.zeros(1, T, *shape, HV, 16) for shape in ((), (N,), (N,)))
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) if packed else None
    g = torch.zeros(1, T, HV)
    p = make_problem(q, k, v, torch.zeros(1, T, N, HV), g, bounds)
    size = parts.PARTS_SIZE
    x = torch.randn(p.num_chunks, HV, size)
    table = torch.rand(p.num_chunks, HV, 6, 64)
    # Behind a chunk's last token there is nothing.
    for place in (parts.TAKEN.value, parts.TAKEN.value + 1):
        x[:, :, 64 * place + C * N : 64 * (place + 1)] = 0.0
    if N > 1:
        x[:, :, 64 * parts.ASKED.value :][..., : 4 * groups * BC].unflatten(2, (-1, BC))[
            ..., C:
        ] = 0
    dg = torch.full_like(g, torch.nan)
    parts.gate_kernel[(p.num_chunks * HV,)](
        x, table, dg, *p.packing, size, 0.3, T, HV, N=N, C=C, R=64, BC=BC, PACKED=packed,
        GROUPS=groups,
    )  # fmt: skip

    def lines(place: int, number: int, width: int = 64) -> torch.Tensor:
        return (
            x[:, :, 64 * place :][..., : number * width].double().unflatten(2, (-1, width)).sum(2)
        )

    written, taken, crossing = (
        lines(place.value, groups) for place in (parts.WRITTEN, parts.TAKEN, parts.CROSSING)
    )
    written = written * table[:, :, TO_END.value].double()
    taken = taken * table[:, :, FROM_START.value].double()
    asked = lines(parts.ASKED.value, groups if N == 1 else 4 * groups, BC)
    kept = x[:, :, 64 * parts.KEPT.value :][..., : 4 * groups].double().sum(2)
    chunks = [(length, at) for length in lengths for at in range(0, length, C)]
    expected = []
    for i, (length, at) in enumerate(chunks):
        for t in range(min(C, length - at)):
            before, after = written[i, :, : t * N].sum(1), taken[i, :, t * N : C * N].sum(1)
            rest = asked[i, :, t:C].sum(1) + crossing[i, :, t * N] + kept[i]
            expected.append(0.3 * (before + after + rest))
    return relative_error(dg[0], torch.stack(expected))


@pytest.fixture(scope="module")
def answers(interpreted) -> dict[str, dict[str, str]]:
    return interpreted(__file__)


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_accurate_as_the_definition(name, answers):
    assert answers[name] == {}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_segment_sees_what_gates_leave_of_those_before_it(name, answers):
    assert answers[name] == [HIDDEN[name][2]] * 2


@pytest.mark.parametrize("name", GATE_PARTS)
def test_parts_of_the_gates_gradient_are_put_together(name, answers):
    assert answers[name] < 1e-6


@pytest.mark.parametrize("N", range(1, 9))
def test_a_sequence_of_a_segments_length_is_not_cut(N):
    from householder.ops.delta_product.triton import config

    assert config.segment_chunks(config.SEGMENT_TOKENS, N, 1, 64) == 0
    assert config.segment_chunks(2 * config.SEGMENT_TOKENS, N, 1, 64) > 0


def test_segments_are_where_their_sequence_has_them(monkeypatch):
    import torch

    from householder.ops.delta_product.triton import config
    from householder.ops.delta_product.triton.chunks import make_problem
    from householder.ops.delta_product.triton.segments import make_segments

    monkeypatch.setattr(config, "SEGMENT_TOKENS", 64)
    lengths = [0, 0, 130, 64, 1, 65, 0, 128, 200, 0]
    T, N, C = sum(lengths), 2, 32
    q, k, v = (torch.zeros(1, T, *shape, 1, 16) for shape in ((), (N,), (N,)))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    p = make_problem(q, k, v, torch.zeros(1, T, N, 1), None, cu_seqlens)
    s = make_segments(p)

    expected, first, chunk, start = [], [0], 0, 0
    for i, length in enumerate(lengths):
        pieces = [min(64, length - a) for a in range(0, max(length, 1), 64)]
        for j, piece in enumerate(pieces):
            expected.append((i, start + 64 * j, start + 64 * j + piece, chunk + 2 * j))
        start, chunk = start + length, chunk + -(-length // C)
        first.append(len(expected))
    assert s.chunks == 2
    assert s.first.tolist() == first
    bounds = s.bounds.tolist()
    actual = zip(s.sequence.tolist(), bounds, bounds[1:], s.first_chunk.tolist(), strict=False)
    assert list(actual)[: len(expected)] == expected
    assert len(bounds) == s.number + 1
    assert s.number >= len(expected)
    assert bounds[len(expected) :] == [T] * (s.number + 1 - len(expected))


if __name__ == "__main__":
    answers = {name: compute(case) for name, case in CASES.items()}
    answers |= {name: compute_hidden(g, strength) for name, (g, strength, _) in HIDDEN.items()}
    answers |= {name: compute_gate_parts(*case) for name, case in GATE_PARTS.items()}
    print(json.dumps(answers))
