import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from householder import adapters
from householder.adapters import AdapterError, HRAConfig, HTAConfig, TwoSidedConfig
from householder.testing import assert_as_accurate, relative_error

from .models import Convolutional, Dense, vit_skeleton

CONFIGS = {
    "hra": lambda **k: HRAConfig(num_householder=4, **k),
    "hra-halves": lambda **k: HRAConfig(num_householder=4, orthogonalize="halves", **k),
    "hra-all": lambda **k: HRAConfig(num_householder=3, orthogonalize="all", init="random", **k),
    "hta": HTAConfig,
    "hta-without-rank": lambda **k: HTAConfig(rank=0, **k),
    "hta-split": lambda **k: HTAConfig(splits={"first": 2}, **k),
    "hta-behind": lambda **k: HTAConfig(form="adapter", rank=2, **k),
    "two-sided": lambda **k: TwoSidedConfig(num_householder=4, **k),
    "two-sided-scaled": lambda **k: TwoSidedConfig(num_householder=4, scaled=True, **k),
}
MODELS = (Dense, Convolutional)
CASES = list(itertools.product(CONFIGS, MODELS))


def move(model, scale=0.3, name=None):
    """Train, as far as these tests go: move every parameter of the adapters at random."""
    with torch.no_grad():
        for parameter in adapters.parameters(model, name).values():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def adapted(kind, make, targets=("first", "second"), **settings):
    torch.manual_seed(1)
    base = make().double()
    model = adapters.attach(copy.deepcopy(base), CONFIGS[kind](targets=targets, **settings))
    return base, move(model)


def close(a, b, eps=1e-12):
    return relative_error(a, b) < eps


@pytest.mark.parametrize(("kind", "make"), CASES)
def test_a_fresh_adapter_changes_nothing(kind, make):
    base = make().double()
    x = make.inputs()
    before = base(x)
    adapters.attach(base, CONFIGS[kind](targets=["first", "second"]))
    assert close(base(x), before) == (kind != "hra-all")


@pytest.mark.parametrize(("kind", "make"), CASES)
def test_merged_is_adapted_and_unmerged_is_the_base(kind, make):
    base, model = adapted(kind, make)
    x = make.inputs()
    y = model(x)
    assert not close(y, base(x), 1e-3)
    adapters.merge(model)
    assert close(model(x), y)
    adapters.unmerge(model)
    assert close(model(x), y)
    with adapters.disabled(model):
        assert close(model(x), base(x))
    assert close(model(x), y)
    adapters.merge(model, keep_base=True)
    adapters.unmerge(model)
    adapters.detach(model)
    assert type(model.first) in (nn.Linear, nn.Conv2d)
    for (name, p), (other, q) in zip(
        model.named_parameters(), base.named_parameters(), strict=True
    ):
        assert name == other
        assert p.requires_grad
        assert close(p, q), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_weight_is_what_the_papers_say(kind):
    base, model = adapted(kind, Dense, targets=["first"])
    layer = model.first.householder_adapters.layers.default
    W = base.first.weight.detach()
    eye = torch.eye(12, dtype=torch.float64)

    def reflections(k, factor=None):  # written out, the first row acting first
        Q = torch.eye(k.shape[-1], dtype=k.dtype)
        for v in k.detach():
            Q = (torch.eye(len(v)) - (factor or 2 / v.square().sum()) * torch.outer(v, v)) @ Q
        return Q

    def gram_schmidt(k):
        basis = []
        for v in k.detach():
            for u in basis:
                v = v - (u @ v) * u
            basis.append(v / v.norm())
        return torch.stack(basis)

    if kind == "hra":
        expected = W @ reflections(layer.reflectors)
    elif kind == "hra-all":
        E = gram_schmidt(layer.reflectors)
        expected = W @ (eye - 2 * E.T @ E)
    elif kind == "hra-halves":
        E, O = gram_schmidt(layer.reflectors[0::2]), gram_schmidt(layer.reflectors[1::2])
        expected = W @ (eye - 2 * E.T @ E) @ (eye - 2 * O.T @ O)
    elif kind.startswith("two-sided"):
        m = 1 if layer.scale is None else layer.scale.detach()[:, None]
        expected = reflections(layer.output_reflectors) @ (m * W)
        expected = expected @ reflections(layer.input_reflectors)
    else:
        changes = []
        for i, d in enumerate(layer.diagonal.detach()):
            H_in = reflections(layer.input_reflector[i : i + 1], factor=1)
            H_out = reflections(layer.output_reflector[i : i + 1], factor=1)
            D = torch.zeros(len(H_out), len(H_in), dtype=torch.float64)
            D[: len(d), : len(d)] = torch.diag(d)
            low = layer.up[i] @ layer.down[i] if layer.up is not None else torch.zeros_like(D)
            changes.append((H_out @ D @ H_in + low).detach())
        change = torch.cat(changes)
        expected = W + (change @ W if kind == "hta-behind" else change)
    adapters.merge(model)
    assert close(model.first.weight, expected)


def test_a_convolution_is_adapted_as_a_matrix_on_patches():
    base, model = adapted("hra", Convolutional, targets=["first"])
    x = Convolutional.inputs()
    Q = model.first.householder_adapters.layers.default.product().to_dense().detach()
    # Written with unfold: circular padding first, then patches, then each group's rows of W Q.
    conv = base.first
    padded = F.pad(x, (2, 2, 1, 1), mode="circular")
    patches = F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    patches = patches.unflatten(1, (2, 12))  # groups of 2 channels of 3 × 2 taps
    W = (conv.weight.flatten(1) @ Q).unflatten(0, (2, 3))
    y = torch.einsum("goi,bgip->bgop", W, patches).flatten(1, 2) + conv.bias[:, None]
    assert close(model.first(x), y.unflatten(-1, (5, 12)))


@pytest.mark.parametrize(("kind", "make"), CASES)
def test_every_parameter_gets_its_gradient(kind, make):
    _, model = adapted(kind, make, targets=["first"])
    x = make.inputs()
    model(x).square().sum().backward()
    stack = model.first.householder_adapters
    for name, parameter in stack.layers.default.named_parameters():
        index = (0,) * parameter.dim()
        step = torch.zeros_like(parameter)
        step[index] = 1e-6

        def loss(change, parameter=parameter):
            with torch.no_grad():
                parameter.add_(change)
                value = model(x).square().sum()
                parameter.sub_(change)
            return value

        slope = (loss(step) - loss(-step)) / 2e-6
        assert abs(slope - parameter.grad[index]) < 1e-5 * (1 + abs(slope)), name
    assert all(p.grad is None for n, p in model.named_parameters() if "householder" not in n)


@pytest.mark.parametrize(("kind", "make"), CASES)
def test_copies_and_pickles_are_independent(kind, make):
    base, model = adapted(kind, make)
    x = make.inputs()
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        move(other)
        assert torch.equal(model(x), y)
        adapters.detach(other)
        assert torch.equal(other(x), base(x))
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", ["hra", "hta", "two-sided-scaled"])
def test_compiled_whole(kind):
    _, model = adapted(kind, Dense)
    x = Dense.inputs()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(compiled(x), model(x))
    parameters = list(adapters.parameters(model).values())
    plain = torch.autograd.grad(model(x).square().sum(), parameters)
    for a, b in zip(
        torch.autograd.grad(compiled(x).square().sum(), parameters), plain, strict=True
    ):
        assert close(a, b, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_half_precision_layers(kind, dtype):
    _, exact = adapted(kind, Dense)
    x = Dense.inputs()
    _, model = adapted(kind, Dense)
    model = copy.deepcopy(model)
    for module in (model.first, model.second):
        stack = module._modules.pop("householder_adapters")
        module.to(dtype)
        module.add_module("householder_adapters", stack.float())
    model.head.to(dtype)
    y = model(x.to(dtype))
    assert y.dtype == dtype
    # Plain: the merged weight of the exact model, rounded to the dtype.
    adapters.merge(exact)
    plain = adapters.detach(copy.deepcopy(exact), keep_merged=True).to(dtype)(x.to(dtype))
    assert_as_accurate(y, plain, exact(x), factor=4)


@pytest.mark.parametrize(("kind", "make"), CASES)
def test_autocast(kind, make):
    base, model = adapted(kind, make)
    base, model, x = base.float(), model.float(), make.inputs().float()
    exact = model(x)
    adapters.merge(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
    adapters.unmerge(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == base(x).dtype == torch.bfloat16
    assert_as_accurate(y, plain, exact.double(), factor=4)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapters.parameters(model).values())


def test_unmerging_bfloat16_is_exact_to_rounding_and_bit_for_bit_if_kept():
    torch.manual_seed(0)
    base = Dense().bfloat16()
    model = adapters.attach(copy.deepcopy(base), HRAConfig(targets=["first", "second"]))
    move(model)
    adapters.merge(model)
    assert not torch.equal(model.first.weight, base.first.weight)
    adapters.unmerge(model)
    assert (
        relative_error(model.first.weight, base.first.weight) < 2 * torch.finfo(torch.bfloat16).eps
    )
    adapters.detach(model)
    model = move(adapters.attach(copy.deepcopy(base), HRAConfig(targets=["first"])))
    adapters.merge(model, keep_base=True)
    adapters.unmerge(model)
    assert torch.equal(model.first.weight, base.first.weight)


# ViT-B/16 and ViT-L/16, four D × D projections a block, without the head.
@pytest.mark.parametrize(
    ("dim", "depth", "rank", "published"),
    [(768, 12, 1, 184_320), (768, 12, 0, 110_592), (1024, 24, 1, 491_520)],
)
def test_published_parameter_counts_of_hta(dim, depth, rank, published):
    model = vit_skeleton(dim, depth)
    config = HTAConfig(targets=["attn.qkv", "attn.proj"], rank=rank, splits={"qkv": 3})
    adapters.attach(model, config)
    assert adapters.num_parameters(model) == published


def test_published_parameter_count_of_hta_for_queries_and_values():
    model = nn.Module()
    for i in range(12):
        model.add_module(f"q{i}", nn.Linear(768, 768, device="meta"))
        model.add_module(f"v{i}", nn.Linear(768, 768, device="meta"))
    adapters.attach(model, HTAConfig(targets=["q*", "v*"]))
    assert adapters.num_parameters(model) == 92_160


@pytest.mark.parametrize("kind", ["hta", "hta-split", "hta-without-rank", "hta-behind"])
@pytest.mark.parametrize("target", ["first", "second"])
def test_hta_is_its_formula(kind, target):
    """The change is H_out diag(d) H_in + U V, however it is computed."""
    _, model = adapted(kind, Dense, targets=[target])
    layer = model.get_submodule(target).householder_adapters.layers.default
    parts = []
    for i, (a, b, d) in enumerate(
        zip(layer.output_reflector, layer.input_reflector, layer.diagonal, strict=True)
    ):
        D = torch.zeros(len(a), len(b), dtype=d.dtype)
        D.diagonal().copy_(d.detach())
        part = (torch.eye(len(a)) - a.outer(a)) @ D @ (torch.eye(len(b)) - b.outer(b))
        parts.append(part if layer.up is None else part + layer.up[i] @ layer.down[i])
    change = torch.cat(parts)
    x = torch.randn(40, change.shape[1], dtype=torch.float64)
    assert change.abs().max() > 0.1
    assert close(layer.dense(torch.float64), change)
    assert close(layer.additive(x), x @ change.T)
    # What one vector gives does not depend on how many others there are, but for rounding.
    assert close(layer.additive(x[:1]), x[:1] @ change.T)


def test_orthogonality_penalty():
    model = adapters.attach(Dense(), HRAConfig(targets=["first", "second"], num_householder=4))
    # Equal pairs: twice two entries of 1 beside each diagonal, and what random directions add.
    k = [F.normalize(p, dim=-1) for p in adapters.parameters(model).values()]
    expected = sum((a @ a.T - torch.eye(4)).square().sum() for a in k)
    assert close(adapters.orthogonality_penalty(model), expected, 1e-6)
    assert expected > 8
    adapters.orthogonality_penalty(model).backward()
    assert all(p.grad.abs().sum() > 0 for p in adapters.parameters(model).values())
    adapters.detach(model)
    adapters.attach(model, HTAConfig(targets="first"))
    with pytest.raises(AdapterError, match="needs an active HRA adapter"):
        adapters.orthogonality_penalty(model)


def test_gram_schmidt_starts_as_the_identity_and_stays_orthogonal():
    # Where peft's `apply_GS` normalises rounding noise: d = 768 and eight reflectors in pairs.
    model = nn.Sequential(nn.Linear(768, 4, bias=False))
    config = HRAConfig(targets="0", num_householder=8, orthogonalize="halves")
    adapters.attach(model, config)
    layer = model[0].householder_adapters.layers.default
    eye = torch.eye(768)
    assert (layer.product().to_dense() - eye).norm() < 1e-4
    move(model)
    Q = layer.product().to_dense()
    assert (Q.T @ Q - eye).norm() < 1e-4
    assert (Q - eye).norm() > 1


def test_alike_reflectors_are_no_less_orthogonal():
    # Where a truncated series for the triangle leaves ‖I − QQᵀ‖_F / √D = 454.
    D = 1024
    model = nn.Sequential(nn.Linear(D, D, bias=False))
    adapters.attach(model, TwoSidedConfig(targets="0", num_householder=16))
    with torch.no_grad():
        for parameter in adapters.parameters(model).values():
            parameter.copy_(torch.randn(16, D) + torch.randn(D))
    layer = model[0].householder_adapters.layers.default
    k = F.normalize(layer.input_reflectors.detach(), dim=-1)
    assert 0.4 < float((k @ k.T)[0, 1:].mean()) < 0.6
    for Q in (product.to_dense() for product in layer.products()):
        Q = Q.detach()
        error = (torch.eye(D) - Q @ Q.T).norm() / D**0.5
        assert error < 4 * torch.finfo(torch.float32).eps * 16**0.5


class TestSeveral:
    def test_switching_and_stacking(self):
        x = Dense.inputs()
        base = Dense().double()
        model = copy.deepcopy(base)
        adapters.attach(model, CONFIGS["hta-behind"](targets=["first", "second"]), "a")
        move(model)
        a = model(x)
        adapters.attach(model, CONFIGS["two-sided"](targets=["first"]), "b", activate=False)
        assert torch.equal(model(x), a)
        adapters.activate(model, "b")
        move(model)
        b = model(x)
        assert adapters.names(model) == ["a", "b"]
        adapters.activate(model, "a")
        assert torch.equal(model(x), a)
        adapters.activate(model)
        assert torch.equal(model(x), base(x))
        adapters.activate(model, "a", "b")
        both = model(x)
        assert adapters.active(model) == ["a", "b"]
        assert not close(both, a, 1e-3)
        assert not close(both, b, 1e-3)
        adapters.activate(model, "b", "a")
        assert not close(model(x), both, 1e-6)
        for order in (("a", "b"), ("b", "a")):
            adapters.activate(model, *order)
            y = model(x)
            adapters.merge(model)
            assert close(model(x), y)
            adapters.unmerge(model)
        adapters.detach(model, "a")
        assert adapters.active(model) == ["b"]
        assert close(model(x), b)
        adapters.detach(model)
        assert close(model(x), base(x))
        assert adapters.names(model) == []

    def test_gradients_follow_the_active_ones(self):
        model = adapters.attach(Dense(), HRAConfig(targets="first"), "a")
        adapters.attach(model, HRAConfig(targets="first"), "b")
        adapters.attach(model, HRAConfig(targets="second"), "fixed", trainable=False)

        def wanting():
            return {n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad}

        assert wanting() == set()
        adapters.activate(model, "a", "fixed")
        assert wanting() == {"a"}
        adapters.activate(model, "b")
        assert wanting() == {"b"}

    def test_heads_switch_with_their_adapters(self):
        base = Dense().double()
        model, x = copy.deepcopy(base), Dense.inputs()
        for name in ("a", "b"):
            adapters.attach(model, HRAConfig(targets="first", train_also="head"), name)
            assert close(model(x), base(x))
            move(model)
        ys = {}
        for name in ("a", "b"):
            adapters.activate(model, name)
            ys[name] = model(x)
        assert not close(ys["a"], ys["b"], 1e-3)
        adapters.activate(model, "a")
        adapters.merge(model)
        assert close(model(x), ys["a"])
        adapters.unmerge(model)
        assert close(model(x), ys["a"])
        assert torch.equal(model.head.weight, base.head.weight)
        assert adapters.num_parameters(model, "a") == 8 * 12 + 8 * 3 + 3


class Quantised(nn.Module):
    """A linear layer whose weight is int8, as quantisers make them."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("kind", CONFIGS)
def test_quantised_layers_are_adapted_and_not_merged(kind):
    base = Dense().double()
    base.first = Quantised(base.first)
    dense = copy.deepcopy(base)
    dense.first = nn.Linear(12, 8).double()
    with torch.no_grad():
        dense.first.weight.copy_(base.first.weight.double() * base.first.scale)
        dense.first.bias.copy_(base.first.bias)
    x = Dense.inputs()
    config = CONFIGS[kind](targets=["first"], dtype="float64")
    torch.manual_seed(3)
    adapters.attach(base, config)
    move(base)
    torch.manual_seed(3)
    adapters.attach(dense, config)
    move(dense)
    assert close(base(x), dense(x))
    with pytest.raises(AdapterError, match=r"first cannot hold the change: .* quantised"):
        adapters.merge(base)
    assert close(base(x), dense(x))
    base(x).sum().backward()
    assert all(p.grad is not None for p in adapters.parameters(base).values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_quantised_by_torch_are_adapted():
    model = torch.ao.quantization.quantize_dynamic(Dense().eval(), {nn.Linear}, dtype=torch.qint8)
    x = Dense.inputs().float()
    before = model(x)
    adapters.attach(model, HRAConfig(targets=["first"]))
    assert relative_error(model(x), before) < 0.05  # activations are quantised after the turn
    with pytest.raises(AdapterError, match="keeps no weight tensor"):
        adapters.merge(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_bitsandbytes_are_adapted_and_not_merged(bits):
    bnb = pytest.importorskip("bitsandbytes")
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    model, x = nn.Sequential(layer.to("cpu")), torch.randn(5, 64)
    before = model(x)
    adapters.attach(model, HRAConfig(targets="0", num_householder=4))
    assert close(model(x), before, 1e-5)
    move(model)
    Q = model[0].householder_adapters.layers.default.product()
    with adapters.disabled(model):
        turned = model(Q(x))
    assert close(model(x), turned, 1e-5)
    model(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapters.parameters(model).values())
    with pytest.raises(AdapterError, match="is quantised"):
        adapters.merge(model)
    adapters.detach(model)
    assert torch.equal(model(x), before)


def test_gpt2_layers_store_the_transpose():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    base = nn.Sequential(Conv1D(8, 12)).double()
    x = Dense.inputs()
    model = adapters.attach(copy.deepcopy(base), CONFIGS["two-sided"](targets="0"))
    move(model)
    y = model(x)
    assert not close(y, base(x), 1e-3)
    adapters.merge(model)
    assert close(model(x), y)
    adapters.unmerge(model)
    assert close(model[0].weight, base[0].weight)


def test_the_fused_encoder_layer_of_torch_is_not_bypassed():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    model = adapters.attach(nn.Sequential(layer), HTAConfig(targets=["linear1", "linear2"]))
    move(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fused = model(x)
    assert torch.allclose(fused, model(x), atol=1e-6)
    with adapters.disabled(model), torch.no_grad():
        assert not torch.allclose(fused, model(x), atol=1e-3)
    adapters.detach(copy.deepcopy(model))
    adapters.detach(model)
    assert not model[0].linear1._forward_pre_hooks


def test_gradient_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    _, model = adapted("two-sided-scaled", Dense)
    x = Dense.inputs()
    parameters = list(adapters.parameters(model).values())
    plain = torch.autograd.grad(model(x).square().sum(), parameters)
    y = checkpoint(model, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y.square().sum(), parameters), plain, strict=True):
        assert torch.equal(a, b)


def test_a_layer_may_be_called_by_the_name_of_its_input():
    _, model = adapted("hra", Dense)
    x = Dense.inputs()
    assert torch.equal(model.first(input=x), model.first(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2)


REFUSED = {
    "no such module": (Dense, {"targets": "firsst"}, r"'firsst'.*did you mean first"),
    "not a layer": (Attention, {"targets": "mha"}, "MultiheadAttention is no layer"),
    "no effect": (Attention, {"targets": "out_proj"}, "without calling the layer"),
    "nothing left": (Dense, {"targets": "*", "exclude": "*"}, "which leave none"),
    "whole and adapted": (Dense, {"targets": "head", "train_also": "head"}, "is trained whole"),
    "too many": (
        Dense,
        {"targets": "first", "num_householder": 13, "orthogonalize": "all", "init": "random"},
        "first has 12 inputs, which cannot hold 13",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_as_it_was(case):
    make, settings, message = REFUSED[case]
    model = make()
    before = [type(m) for m in model.modules()]
    with pytest.raises(AdapterError, match=message):
        adapters.attach(model, HRAConfig(**settings))
    assert [type(m) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert adapters.names(model) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HRAConfig(targets="*", num_householder=3), "must be even, got 3"),
        (lambda: HRAConfig(targets="*", orthogonalize="all"), "never the identity"),
        (lambda: HRAConfig(targets="*", orthogonalize="some"), "'halves', 'all', got 'some'"),
        (lambda: HRAConfig(targets="*", num_householder=0), "at least 1, got 0"),
        (lambda: HRAConfig(targets=[]), "at least one layer"),
        (lambda: HRAConfig(targets=[3]), "names or patterns"),
        (lambda: HRAConfig(targets=None), "`targets` must be names or patterns, got None"),
        (lambda: HTAConfig(targets="*", splits=["qkv"]), r"by name, got \['qkv'\]"),
        (lambda: HTAConfig(targets="*", rank=-1), "at least 0, got -1"),
        (lambda: HTAConfig(targets="*", form="lola"), "'lora', 'adapter', got 'lola'"),
        (lambda: HTAConfig(targets="*", splits={"qkv": 0}), "numbers of parts, got 0"),
        (lambda: TwoSidedConfig(targets="*", num_householder=5), "must be even"),
        (lambda: TwoSidedConfig(targets="*", dtype="int8"), "float32, float64, bfloat16"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(AdapterError, match=message):
        make()


def test_what_cannot_be_done_says_why():
    model = adapters.attach(Dense(), HRAConfig(targets="first"))
    with pytest.raises(AdapterError, match="has an adapter 'default' already"):
        adapters.attach(model, HRAConfig(targets="first"))
    with pytest.raises(AdapterError, match="`config` must be a settings object, got dict; make"):
        adapters.attach(model, {"targets": "first"})
    for name in ("", "a.b", "keys"):
        with pytest.raises(AdapterError, match="`name` must be a word"):
            adapters.attach(model, HRAConfig(targets="first"), name)
    with pytest.raises(AdapterError, match="no adapter 'b', it has default"):
        adapters.activate(model, "b")
    with pytest.raises(AdapterError, match="nothing is merged"):
        adapters.unmerge(model)
    with pytest.raises(AdapterError, match="another adapter has adapted layers"):
        adapters.attach(model, HRAConfig(targets="second", train_also="first"), "b")
    with pytest.raises(AdapterError, match="has no adapters"):
        adapters.activate(model.first)
    adapters.merge(model)
    for act in (
        lambda: adapters.attach(model, HRAConfig(targets="first"), "b"),
        lambda: adapters.activate(model),
        lambda: adapters.detach(model),
        lambda: adapters.merge(model),
        lambda: adapters.disabled(model).__enter__(),
    ):
        with pytest.raises(AdapterError, match="merged into the weights"):
            act()
    adapters.detach(model, keep_merged=True)
    assert type(model.first) is nn.Linear
    with pytest.raises(AdapterError, match="has no adapters"):
        adapters.merge(model)


def test_merging_is_refused_where_it_would_do_harm():
    model = adapters.attach(Tied(), HRAConfig(targets="out", num_householder=2))
    with pytest.raises(AdapterError, match=r"out shares its weight with embed\.weight"):
        adapters.merge(model)
    model = adapters.attach(Dense(), HRAConfig(targets=["first", "second"]))
    with torch.no_grad():
        model.second.householder_adapters.layers.default.reflectors[0, 0] = float("nan")
    before = model.first.weight.clone()
    with pytest.raises(AdapterError, match="second has values that are not finite"):
        adapters.merge(model)
    assert torch.equal(model.first.weight, before)
    adapters.activate(model)
    with pytest.raises(AdapterError, match="needs an active adapter"):
        adapters.merge(model)


@pytest.mark.parametrize("kind", ["two-sided-scaled", "hta-behind"])
def test_unmerging_is_refused_where_the_original_is_lost(kind):
    base, model = adapted(kind, Dense, targets=["first", "second"])
    layer = model.second.householder_adapters.layers.default
    with torch.no_grad():
        if kind == "hta-behind":  # I + ΔW with an eigenvalue of 0
            for parameter in layer.parameters():
                parameter.zero_()
            layer.diagonal[0, 2] = -1
        else:
            layer.scale[3] = 0
    x = Dense.inputs()
    y = model(x)
    adapters.merge(model)
    with pytest.raises(AdapterError, match=r"second: .* merge with keep_base=True"):
        adapters.unmerge(model)
    assert close(model(x), y)
    _, model = adapted(kind, Dense, targets=["first", "second"])
    adapters.merge(model, keep_base=True)
    adapters.unmerge(model)
    adapters.detach(model)
    assert torch.equal(model(x), base(x))
