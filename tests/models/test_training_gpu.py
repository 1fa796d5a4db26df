"""A training step on a GPU: compiled and not, keeping what is cheap and making it anew."""

import pytest
import torch

from householder.models import CausalLM, CausalLMConfig
from householder.testing import relative_error

pytestmark = pytest.mark.gpu

# What PyTorch says while it compiles, which as an error would stop it: of its own code, and of
# gradients that it looks at behind a break.
WITH_A_COMPILER = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute:UserWarning",
)

V = 61


def make(pattern, dtype, **options):
    torch.manual_seed(0)
    config = CausalLMConfig(
        V, d_model=128, num_layers=2, head_dim=128, window=40, pattern=pattern, **options
    )
    return CausalLM(config, device="cuda", dtype=dtype)


def requested_bytes():
    """Return what tensors take; blocks of the allocator may be larger, by which ones were free."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def differentiate(model, precision, cu_seqlens=None):
    """Return the loss and all gradients, and how many bytes the forward pass kept."""
    shape = (4, 300) if cu_seqlens is None else (1, 301)
    tokens = torch.randint(V, shape, generator=torch.Generator().manual_seed(1)).cuda()
    before = requested_bytes()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], cu_seqlens=cu_seqlens)
    kept = requested_bytes() - before
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([x.flatten().float() for x in gradients]), kept


@WITH_A_COMPILER
@pytest.mark.parametrize(
    "pattern", ["delta", "gated_delta", "delta_product", "gated_delta_product", "path", "rope"]
)
def test_compiled_blocks_give_the_gradients_of_those_that_are_not(pattern):
    torch._dynamo.reset()
    plain, compiled = (make(pattern, torch.float32) for _ in range(2))
    compiled.compile_blocks()
    (loss, gradients, _), (again, same, _) = (
        differentiate(model, "float32") for model in (plain, compiled)
    )
    assert loss == pytest.approx(again, rel=1e-6)
    assert relative_error(same, gradients) < 1e-5


@WITH_A_COMPILER
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("pattern", "precision"), [("delta", "bfloat16"), ("gated_delta_product", "autocast")]
)
def test_making_anew_keeps_less_and_changes_no_gradient(pattern, compiled, precision):
    torch._dynamo.reset()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    results = []
    for recompute in (False, True):
        model = make(pattern, dtype, use_output_gate=True)
        model.recompute = recompute
        if compiled:
            model.compile_blocks()
        differentiate(model, precision)  # compiles, and makes what stays
        results.append(differentiate(model, precision))
    (loss, gradients, kept), (again, same, less) = results
    # The states at least; compiled, the normalised vectors too.
    assert less < (0.85 if compiled else 0.93) * kept
    if compiled:  # fused in another way, it may be rounded in other places
        assert loss == pytest.approx(again, rel=1e-3)
        assert relative_error(same, gradients) < 0.03
    else:
        assert loss == again
        assert torch.equal(same, gradients)


@WITH_A_COMPILER
@pytest.mark.parametrize(
    "pattern", ["delta", "gated_delta", "delta_product", "path", "path_fox", "rope", "fox"]
)
def test_compiled_blocks_take_packed_sequences(pattern):
    """Rotary attention in float32 reads where they begin, and so breaks a graph in two."""
    torch._dynamo.reset()
    bounds = torch.tensor([0, 90, 91, 300], dtype=torch.int32, device="cuda")
    plain, compiled = (make(pattern, torch.float32) for _ in range(2))
    compiled.compile_blocks(fullgraph=False)
    (loss, gradients, _), (again, same, _) = (
        differentiate(model, "float32", bounds) for model in (plain, compiled)
    )
    assert loss == pytest.approx(again, rel=1e-6)
    assert relative_error(same, gradients) < 1e-5


@pytest.mark.parametrize("pattern", ["gated_delta_product", "path"])
def test_blocks_that_are_run_again_give_the_same_gradients(pattern):
    results = []
    for again in (False, True):
        model = make(pattern, torch.bfloat16)
        model.checkpoint_activations = again
        results.append(differentiate(model, "bfloat16"))
    (loss, gradients, kept), (same_loss, same, less) = results
    assert loss == same_loss
    assert torch.equal(same, gradients)
    assert less < 0.5 * kept
