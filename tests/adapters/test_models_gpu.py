"""Adapters of whole models on a GPU: timm's ViT-B/16 and a small Llama, beside peft."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from householder import adapters
from householder.adapters import HRAConfig, HTAConfig, TwoSidedConfig
from householder.cli import main
from householder.testing import assert_as_accurate, relative_error
from householder.train.adapt.data import ImageFormat, read_image

DEVICE = "cuda"
SITES = {"vit": ("attn.qkv", "attn.proj"), "llama": ("q_proj", "v_proj", "down_proj")}
SPLITS = {"qkv": 3}
KINDS = {
    "hra": lambda **k: HRAConfig(num_householder=8, **k),
    "hra-halves": lambda **k: HRAConfig(num_householder=8, orthogonalize="halves", **k),
    "hra-all": lambda **k: HRAConfig(num_householder=5, orthogonalize="all", init="random", **k),
    "hta": lambda **k: HTAConfig(splits=SPLITS, **k),
    "hta-without-rank": lambda **k: HTAConfig(splits=SPLITS, rank=0, **k),
    "hta-behind": lambda **k: HTAConfig(form="adapter", **k),
    "two-sided": lambda **k: TwoSidedConfig(num_householder=4, **k),
    "two-sided-scaled": lambda **k: TwoSidedConfig(num_householder=4, scaled=True, **k),
}


@pytest.fixture(autouse=True)
def _float32_means_float32(monkeypatch):
    """Keep cuDNN from computing the patches' convolution in TensorFloat-32, as it does unasked."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


def make_vit(timm, depth=12):
    """Return ViT-B/16 without trained weights, as `householder adapt` makes it, on the GPU."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=10, depth=depth)
    # A classifier of timm's own start gives numbers too small to tell models apart.
    nn.init.normal_(model.head.weight, std=0.05)
    return model.to(DEVICE).eval()


def make_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(DEVICE).eval()


@pytest.fixture(scope="module", params=["vit", "llama"])
def base(request):
    """Return a model's name and the model, which no test may change."""
    if request.param == "vit":
        return "vit", make_vit(request.getfixturevalue("timm"))
    return "llama", make_llama()


def inputs_of(name):
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return torch.randn(4, 3, 224, 224, generator=generator).to(DEVICE)
    return torch.randint(256, (4, 48), generator=generator).to(DEVICE)


def logits(model, x):
    out = model(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x)
    return out if isinstance(out, torch.Tensor) else out.logits


def attached(kind, base, scale=0.1, **settings):
    """Return a copy of the model with an adapter, each of its parameters moved at random."""
    name, model = base
    config = KINDS[kind](targets=SITES[name], **settings)
    model = adapters.attach(copy.deepcopy(model), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters(model).values():
            # By parts of their own size: a diagonal or factor that starts at zero by parts of 1.
            size = parameter.square().mean().sqrt() or parameter.new_tensor(0.1)
            parameter.add_(scale * size * torch.randn_like(parameter))
    return model


def gradients(model, x, autocast=False):
    parameters = list(adapters.parameters(model).values())
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        y = logits(model, x)
    labels = torch.arange(y[..., 0].numel(), device=y.device) % y.shape[-1]
    loss = F.cross_entropy(y.flatten(0, -2).float(), labels)
    return y, torch.autograd.grad(loss, parameters)


def test_published_numbers_of_hta_on_timms_models(timm):
    for name, rank, published in (
        ("vit_base_patch16_224", 1, 184_320),
        ("vit_base_patch16_224", 0, 110_592),
        ("vit_large_patch16_224", 1, 491_520),
    ):
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0)
        adapters.attach(model, HTAConfig(targets=SITES["vit"], splits=SPLITS, rank=rank))
        assert adapters.num_parameters(model) == published


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(kind, base):
    name, model = base
    x = inputs_of(name)
    before = logits(model, x)
    fresh = adapters.attach(copy.deepcopy(model), KINDS[kind](targets=SITES[name]))
    if kind == "hra-all":  # is never the identity
        assert relative_error(logits(fresh, x), before) > 1e-3
    else:
        assert relative_error(logits(fresh, x), before) < 3e-6
    assert torch.equal(logits(adapters.detach(fresh), x), before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_values_gradients_and_merging(kind, base):
    name, original = base
    model, x = attached(kind, base), inputs_of(name)
    y, grads = gradients(model, x)
    exact, exact_grads = gradients(copy.deepcopy(model).double(), x)
    assert relative_error(y, logits(original, x)) > 1e-3
    names = adapters.parameters(model).keys()
    for key, grad, expected in zip(names, grads, exact_grads, strict=True):
        assert expected.abs().max() > 0, key
        assert relative_error(grad, expected) < 2e-4, key

    weights = {n: p.clone() for n, p in original.state_dict().items()}
    adapters.merge(model)
    with torch.no_grad():
        merged = logits(model, x)
    assert_as_accurate(merged, y.detach(), exact.detach(), name="merged")
    assert relative_error(merged, exact) < 1e-5
    adapters.unmerge(model)
    for key, tensor in model.state_dict().items():
        if key in weights:
            assert relative_error(tensor, weights[key]) < 8 * torch.finfo(torch.float32).eps, key
    before = {n: p.clone() for n, p in model.state_dict().items()}
    adapters.merge(model, keep_base=True)
    adapters.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert relative_error(logits(adapters.detach(model), x), logits(original, x)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saved_and_loaded(kind, base, tmp_path):
    name, original = base
    model, x = attached(kind, base), inputs_of(name)
    adapters.save(model, tmp_path)
    loaded = adapters.load(copy.deepcopy(original), tmp_path)
    assert torch.equal(logits(loaded, x), logits(model, x))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind, base):
    """As accurate as the merged model, which is a plain one, under the same autocast."""
    name, _ = base
    model, x = attached(kind, base), inputs_of(name)
    y, grads = gradients(model, x, autocast=True)
    exact, exact_grads = gradients(copy.deepcopy(model).double(), x)
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert grad.dtype == torch.float32
        assert relative_error(grad, expected) < 0.1
    adapters.merge(model)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        plain = logits(model, x)
    assert_as_accurate(y.detach(), plain, exact.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["hra", "hta", "two-sided-scaled"])
def test_gradient_checkpointing_saves_memory_and_changes_no_gradient(kind, base):
    name, _ = base
    model, x = attached(kind, base), inputs_of(name)
    peaks, results = [], []
    for _ in range(2):
        model.train()
        gradients(model, x)  # compiles what has to be compiled
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        results.append(gradients(model, x)[1])
        peaks.append(torch.cuda.max_memory_allocated())
        if name == "vit":
            model.set_grad_checkpointing(True)
        else:
            # The second name is that of transformers before 5.2x.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(getattr(model, n) for n in names if hasattr(model, n))
            enable({"use_reentrant": False})
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5
    assert peaks[1] < peaks[0]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the compiler's own
@pytest.mark.parametrize("kind", ["hra", "hta", "two-sided-scaled"])
def test_compiled_whole(kind, timm):
    model = attached(kind, ("vit", make_vit(timm, depth=1)))
    x = inputs_of("vit")
    expected, expected_grads = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True)
    y = compiled(x)
    labels = torch.arange(len(y), device=y.device) % 10
    grads = torch.autograd.grad(
        F.cross_entropy(y, labels), list(adapters.parameters(model).values())
    )
    assert relative_error(y, expected) < 1e-5
    for a, b in zip(grads, expected_grads, strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.gpu
class TestBesidePeft:
    """peft as an oracle, on the same model."""

    @pytest.fixture(autouse=True)
    def peft(self):
        return pytest.importorskip("peft")

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
    def test_pefts_hra_gives_the_same_outputs_and_gradients(self, peft, base, tmp_path):
        name, original = base
        config = peft.HRAConfig(r=8, target_modules=list(SITES[name]), init_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(original), config)
        theirs.save_pretrained(tmp_path)
        ours = adapters.load_peft(copy.deepcopy(original), tmp_path)
        x = inputs_of(name)
        y = logits(theirs, x)
        exact = logits(copy.deepcopy(ours).double(), x)
        assert_as_accurate(logits(ours, x).detach(), y.detach(), exact.detach())

        mine = adapters.parameters(ours)
        own = torch.autograd.grad(logits(ours, x).square().mean(), list(mine.values()))
        prefix = "base_model.model."
        wanted = dict(theirs.named_parameters())
        matching = [wanted[prefix + _pefts_name(key)] for key in mine]
        for key, a, b in zip(
            mine, own, torch.autograd.grad(y.square().mean(), matching), strict=True
        ):
            # Columns, the last of which acts first.
            assert relative_error(a, b.mT.flip(0)) < 2e-4, key

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
    def test_peft_loads_our_change_as_a_lora(self, peft, base, tmp_path):
        name, original = base
        ours, x = attached("hra", base), inputs_of(name)
        adapters.export_lora(ours, tmp_path)
        lora = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path).eval()
        with torch.no_grad():
            exact = logits(copy.deepcopy(ours).double(), x)
            assert relative_error(logits(lora, x), exact) < 1e-5
            merged = lora.merge_and_unload()
            assert relative_error(logits(merged, x), exact) < 1e-5


def _pefts_name(key):
    module = key.split(".householder_adapters.")[0]
    return f"{module}.hra_u.default"


@pytest.mark.gpu
def test_a_bfloat16_llama_with_adapters_generates_what_the_merged_one_does():
    pytest.importorskip("transformers")
    name, model = "llama", make_llama().bfloat16()
    model = attached("hra", (name, model), scale=0.3)
    x = inputs_of(name)[:, :5]
    with torch.no_grad():
        exact = logits(copy.deepcopy(model).double(), x)
        y = logits(model, x)
        steps = model.generate(x, max_new_tokens=6, do_sample=False, pad_token_id=0)
        adapters.merge(model)
        assert_as_accurate(y, logits(model, x), exact)
        whole = logits(model, steps[:, :-1])
    # Each token chosen is the most probable, up to bfloat16's rounding, with adapters merged too.
    chosen = whole.gather(-1, steps[:, 1:, None]).squeeze(-1)[:, x.shape[1] - 1 :]
    best = whole.amax(-1)[:, x.shape[1] - 1 :]
    assert ((best - chosen).float() <= 0.05 * best.float().abs()).all()


@pytest.mark.gpu
def test_the_command_adapts_a_model_of_timms(timm, tmp_path, monkeypatch):
    """Train, save and merge; timm itself reads what was merged."""
    np, Image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(0, 90, (16, 16, 3)) + 150 * label
            path = tmp_path / "images" / name / f"{i:02}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    words = ["--model", "timm:vit_base_patch16_224", "--no-pretrained", "--data", "images"]
    words += ["--kind", "hra", "--rank", "4", "--steps", "20", "--lr", "0.002", "--warmup", "2"]
    with pytest.raises(SystemExit) as exit_:
        main(["adapt", *words, "--batch-size", "16", "--checkpointing", "--device", DEVICE])
    assert exit_.value.code == 0
    folder = tmp_path / "householder-adapt"
    results = json.loads((folder / "results.json").read_text())
    assert results["after"]["accuracy"] == 1
    assert results["merge_error"] < 1e-4
    merged = timm.create_model(f"local-dir:{folder / 'merged'}", pretrained=True).to(DEVICE).eval()
    settings = timm.data.resolve_model_data_config(merged)
    form = ImageFormat(settings["input_size"][-1], 3, settings["mean"], settings["std"])
    images = [read_image(tmp_path / "images" / c / "03.png", form) for c in ("dark", "light")]
    with torch.no_grad():
        assert merged(torch.stack(images).to(DEVICE)).argmax(-1).tolist() == [0, 1]
