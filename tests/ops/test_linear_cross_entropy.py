"""`linear_cross_entropy`: its forms beside all logits at once.

As a script, in a process where Triton interprets, it compares the kernel with the chunked form.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from householder.ops import linear_cross_entropy
from householder.ops.linear_cross_entropy import chunk
from householder.ops.linear_cross_entropy.op import softmax_gradient_op
from householder.testing import assert_as_accurate

IGNORED = -100
NAMES = ("loss", "dx", "dweight")


def make(dtype, rows=50, features=16, vocabulary=37, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, features, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::7] = IGNORED
    return x.to(device, dtype), weight.to(device, dtype), labels.to(device)


def differentiate(x, weight, labels, **options):
    x, weight = (y.detach().clone().requires_grad_() for y in (x, weight))
    loss = linear_cross_entropy(x, weight, labels, **options)
    # Another factor than one, which the backward pass has to put in.
    return loss.detach(), *torch.autograd.grad(3 * loss, (x, weight))


def check(dtype, impl, device="cpu", at_once=7 * 37, **sizes):
    x, weight, labels = make(dtype, device=device, **sizes)
    expected = differentiate(x.double(), weight.double(), labels, impl="reference")
    plain = differentiate(x, weight, labels, impl="reference")
    actual = differentiate(x, weight, labels, impl=impl, logits_at_once=at_once)
    for name, *results in zip(NAMES, actual, plain, expected, strict=True):
        assert_as_accurate(*results, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [1, 7 * 37, 10**6])
def test_blocks_are_as_accurate_as_all_logits_at_once(dtype, at_once):
    check(dtype, "chunk", at_once=at_once)


def test_under_autocast_products_are_narrow_and_the_rest_is_not():
    x, weight, labels = make(torch.float32)
    expected = differentiate(x.double(), weight.double(), labels, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        plain = differentiate(x, weight, labels, impl="reference")
        actual = differentiate(x, weight, labels, logits_at_once=7 * 37)
    assert [y.dtype for y in actual] == [torch.float32] * 3
    for name, *results in zip(NAMES, actual, plain, expected, strict=True):
        assert_as_accurate(*results, name=name)


def test_sequences_may_have_any_shape():
    x, weight, labels = make(torch.float64)
    flat = linear_cross_entropy(x, weight, labels)
    shaped = linear_cross_entropy(x.view(5, 10, -1), weight, labels.view(5, 10))
    torch.testing.assert_close(shaped, flat)
    plain = F.cross_entropy(x @ weight.mT, labels, ignore_index=IGNORED)
    torch.testing.assert_close(flat, plain)


def test_only_what_needs_a_gradient_gets_one():
    x, weight, labels = make(torch.float64)
    both = differentiate(x, weight, labels)
    for wanted, expected in ((x, both[1]), (weight, both[2])):
        leaf = wanted.clone().requires_grad_()
        given = (leaf, weight) if wanted is x else (x, leaf)
        (actual,) = torch.autograd.grad(3 * linear_cross_entropy(*given, labels), leaf)
        torch.testing.assert_close(actual, expected)


def test_function_transforms_find_the_gradient():
    x, weight, labels = make(torch.float64)
    dx, dweight = torch.func.grad(
        lambda x, w: 3 * linear_cross_entropy(x, w, labels, logits_at_once=100), (0, 1)
    )(x, weight)
    _, expected_dx, expected_dweight = differentiate(x, weight, labels, impl="reference")
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(dweight, expected_dweight)


def test_a_second_order_is_refused_in_blocks_and_there_in_the_reference():
    x, weight, labels = make(torch.float64, rows=3, features=2, vocabulary=4)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='impl="reference"'):
        dx.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda x: linear_cross_entropy(x, weight, labels, impl="reference"), (x,)
    )


def test_op_is_registered_as_pytorch_wants_it():
    x, weight, labels = make(torch.float32)
    for gradient in (False, True):
        args = (x @ weight.mT, labels, IGNORED, gradient, "chunk")
        torch.library.opcheck(softmax_gradient_op, args)


def test_compiles_to_one_graph():
    x, weight, labels = make(torch.float32)
    x.requires_grad_()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = compiled(x, weight, labels, logits_at_once=20 * 37)
    torch.testing.assert_close(loss, linear_cross_entropy(x, weight, labels))
    torch.testing.assert_close(
        torch.autograd.grad(3 * loss, x)[0], differentiate(x, weight, labels)[1]
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(50)}, TypeError, "`labels` must be int64, got torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "`labels` must be"),
        ({"weight": torch.zeros(0, 16)}, ValueError, "V ≥ 1, got shapes"),
        ({"weight": torch.zeros(37, 5)}, ValueError, r"got shapes \[50, 16\] and \[37, 5\]"),
        ({"impl": "fast"}, ValueError, '`impl` must be one of "auto", "triton"'),
        ({"impl": "triton"}, NotImplementedError, "it needs tensors on a CUDA device"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    x, weight, labels = make(torch.float32)
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"x": x, "weight": weight, "labels": labels, **change})


def compute_interpreted() -> dict[str, str]:
    from householder.ops.linear_cross_entropy import triton

    broken = {}
    for vocabulary in (1, 17, 100, 5000):  # the last in more than one turn
        for gradient in (False, True):
            logits = 4 * torch.randn(5, vocabulary)
            labels = torch.randint(vocabulary, (5,))
            labels[2] = IGNORED
            results = []
            for form in (triton, chunk):
                changed = logits.clone()
                losses = form.softmax_gradient_(changed, labels, IGNORED, gradient)
                results.append((losses, changed))
            try:
                torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6)
            except AssertionError as error:
                broken[f"{vocabulary}, {gradient}"] = str(error)
    for label in (-1, 5):  # there are 0 … 4
        losses = triton.softmax_gradient_(
            torch.randn(2, 5), torch.tensor([label, 1]), IGNORED, False
        )
        if losses.isnan().tolist() != [True, False]:
            broken[f"label {label}"] = f"losses {losses.tolist()}"
    return broken


def test_kernel_gives_what_the_chunked_form_gives(interpreted):
    pytest.importorskip("triton")
    assert interpreted(__file__) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [37, 4096, 5003])
def test_on_a_gpu_it_is_as_accurate_as_all_logits_at_once(dtype, vocabulary):
    sizes = {"rows": 300, "features": 64, "vocabulary": vocabulary}
    check(dtype, "triton", device="cuda", at_once=128 * vocabulary, **sizes)


@pytest.mark.gpu
def test_on_a_gpu_it_repeats():
    x, weight, labels = make(torch.bfloat16, 500, 64, 3001, device="cuda")
    first, second = (differentiate(x, weight, labels, logits_at_once=2**18) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(compute_interpreted()))
