"""The Triton kernels of `PathCache` under Triton's interpreter: float32, tiny, on the CPU.

Whether kernels are interpreted is settled when they are imported, and so this file also runs as a
script in a process of its own, where the cases are computed; the test looks at its answers.
"""

import json

import pytest

pytest.importorskip("triton")

# Arguments of `path_attention_inputs` and of the cache; `steps` are how many tokens come at a time
# after a prompt, and among the first of them a block is made and joined with another.
CASES = {
    "grouped heads, gates, sinks": {"B": 1, "HQ": 2, "H": 1, "K": 16, "V": 24, "with_sinks": True,
                                    "max_rollback": 3, "steps": [1, 1, 1, 1]},
    "not powers of two": {"B": 1, "HQ": 2, "H": 2, "K": 40, "V": 12, "decay": None,
                          "steps": [1, 1, 1]},
    "a window over blocks": {"B": 1, "HQ": 1, "H": 1, "K": 16, "V": 16, "window": 90,
                             "steps": [1, 1, 5, 1]},
    "a window of recent tokens": {"B": 1, "HQ": 1, "H": 1, "K": 16, "V": 16, "window": 3,
                                  "steps": [1, 4, 1]},
    "several tokens": {"B": 1, "HQ": 2, "H": 1, "K": 24, "V": 16, "steps": [2, 16, 3, 1],
                       "max_rollback": 20, "with_sinks": True},
    "many queries a key head": {"B": 1, "HQ": 5, "H": 1, "K": 16, "V": 16, "steps": [14, 2],
                                "decay": None},
    "two rows of their own lengths": {"B": 2, "HQ": 1, "H": 1, "K": 16, "V": 16,
                                      "steps": [1, 4, 6, 1], "apart": True},
    # Of 16 tokens no row gets all, and there is room for those it gets alone.
    "no more room than it takes": {"B": 1, "HQ": 1, "H": 1, "K": 16, "V": 16, "steps": [3, 1],
                                   "padded": True},
    "in half precision": {"B": 1, "HQ": 2, "H": 1, "K": 24, "V": 16, "steps": [1, 5, 1],
                          "dtype": "float16"},
    "one query a key head in half precision": {"B": 1, "HQ": 1, "H": 1, "K": 16, "V": 40,
                                               "steps": [1, 1, 1], "dtype": "float16"},
}  # fmt: skip
PROMPT = 64 * 5 + 62


def compute(case: dict) -> str:
    """Run one case; return what breaks the accuracy rule, or an empty string."""
    import math

    import torch

    from householder import PathCache, path_attention
    from householder.ops.path_attention.cache.store import Store
    from householder.testing import assert_as_accurate, path_attention_inputs

    case = dict(case)
    window, apart, steps = case.pop("window", None), case.pop("apart", False), case.pop("steps")
    max_rollback, padded = case.pop("max_rollback", 0), case.pop("padded", False)
    T = PROMPT + sum(steps)
    dtype = getattr(torch, case.pop("dtype", "float32"))
    inputs = path_attention_inputs(**case, T=T, dtype=dtype)
    if inputs["g"] is not None:
        inputs["g"][:, 70] = -math.inf  # hides what is before, and must not become NaN
        inputs["g"][:, PROMPT - 3] = inputs["g"][:, PROMPT + 2] = -math.inf
    wide = {n: None if x is None else x.double() for n, x in inputs.items()}
    expected = path_attention(**wide, window=window)
    plain = path_attention(**inputs, window=window)

    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # so that memory comes filled with NaN
    Store.has_kernels = lambda self: True  # on the CPU too
    cache = PathCache(case["B"], max_rollback=max_rollback)
    options = {"sinks": inputs["sinks"], "window": window}
    tokens = [inputs[n] for n in ("q", "k", "v", "w", "beta", "g")]

    def part(lo: int, hi: int) -> list:
        return [None if x is None else x[:, lo:hi] for x in tokens]

    if padded:
        cache.reserve(T)
    cache.append(*part(0, PROMPT), **options)
    outputs, lo = [], PROMPT
    for n in steps:
        here = part(lo, lo + n)
        if apart:
            # The second row gets a part of its tokens, and then the others alone.
            few = n // 2
            o = cache.append(*here, **options, lengths=[n, few])
            if o[1, few:].any():
                return "a token left out has an output"
            rest = part(lo + few, lo + n)
            o[1, few:] = cache.append(*rest, **options, lengths=[0, n - few])[1]
        elif padded:
            # What stands in the places of tokens that nobody gets does not matter.
            more = part(0, 16 - n)
            here = [
                None if x is None else torch.cat([x, y], 1) for x, y in zip(here, more, strict=True)
            ]
            o = cache.append(*here, **options, lengths=[n])[:, :n]
        else:
            o = cache.append(*here, **options)
            if max_rollback:
                cache.rollback(n)
                # Others in between must leave no trace; of a block's making only its roundings.
                cache.append(*part(0, n), **options)
                cache.rollback(n)
                again = cache.append(*here, **options)
                if not (o - again).norm() <= 1e-6 * o.norm():
                    return "a roll-back left something behind"
        outputs.append(o)
        lo += n
    if cache.lengths != [T] * case["B"]:
        return f"lengths {cache.lengths}"
    try:
        actual = torch.cat(outputs, dim=1)
        assert_as_accurate(actual, plain[:, PROMPT:], expected[:, PROMPT:], factor=3.0)
    except AssertionError as error:
        return str(error)
    return ""


def test_new_tokens_are_as_accurate_as_the_whole(interpreted):
    answers = interpreted(__file__)
    assert answers == dict.fromkeys(CASES, "")


if __name__ == "__main__":
    print(json.dumps({name: compute(case) for name, case in CASES.items()}))
