import json
import signal

import pytest
import torch

from householder import adapters
from householder.cli import main
from householder.train.adapt import AdaptConfig, AdaptObserver, run_adapt
from householder.train.adapt.data import ImageFormat, TextFile, read_image
from householder.train.errors import ConfigError, Interrupted
from householder.train.interrupt import StopRequest

transformers = pytest.importorskip("transformers")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A local folder with a small ViT of transformers, trained on other classes."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=7,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processing = {"image_mean": [0.5], "image_std": [0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A local folder with a small Llama, without a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes that the mean brightness of the left half tells apart."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir()
        for i in range(20):
            pixels = generator.integers(0, 90, (8, 8)) + 150 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; give its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        with pytest.raises(SystemExit) as exit_:
            main(["adapt", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


SMALL = ["--steps", 6, "--batch-size", 8, "--warmup", 1, "--log-interval", 2, "--device", "cpu"]


@pytest.mark.parametrize("kind", ["hra", "two-sided", "hta", "lora"])
def test_images(kind, run, vit, images, tmp_path):
    if kind == "lora":
        pytest.importorskip("peft")
    words = ["--model", vit, "--data", images, "--kind", kind, "--rank", 2, *SMALL]
    code, out, err = run(*words, "--steps", 40, "--lr", 0.02, "--eval-fraction", 0.2)
    assert code == 0
    assert not err
    folder = tmp_path / "householder-adapt"
    for word in ("accuracy", "numbers trained", "householder-adapt/adapter", "40/40"):
        assert word in out, word
    results = json.loads((folder / "results.json").read_text())
    assert results["after"]["accuracy"] == 1
    assert results["merge_error"] < 1e-5
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 20
    # What was written can be used: the merged model by transformers, the adapter on the base model.
    merged = transformers.ViTForImageClassification.from_pretrained(folder / "merged").eval()
    form = ImageFormat(8, 1, (0.5,), (0.5,))
    batch = torch.stack([read_image(images / c / "03.png", form) for c in ("dark", "light")])
    with torch.no_grad():
        assert merged(batch).logits.argmax(-1).tolist() == [0, 1]
        if kind != "lora":
            config = transformers.AutoConfig.from_pretrained(vit, num_labels=2)
            base = transformers.ViTForImageClassification.from_pretrained(
                vit, config=config, ignore_mismatched_sizes=True
            ).eval()
            adapters.load(base, folder / "adapter")
            assert torch.allclose(base(batch).logits, merged(batch).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["hra", "lora"])
def test_text(kind, run, llama, text, tmp_path):
    words = ["--model", llama, "--data", text, "--tokenizer", "bytes", "--length", 16, *SMALL]
    code, out, _ = run(
        *words, "--kind", kind, "--rank", 4, "--steps", 20, "--lr", 0.02, "--checkpointing"
    )
    assert code == 0
    assert "perplexity" in out
    results = json.loads((tmp_path / "householder-adapt" / "results.json").read_text())
    # Little, since neither embeddings nor output are trained and the base model knows nothing.
    assert results["after"]["loss"] < results["before"]["loss"] - 0.01
    assert results["merge_error"] < 1e-5
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "householder-adapt" / "merged")


def test_without_trained_weights_and_in_bfloat16(run, llama, text):
    words = ["--model", llama, "--data", text, "--tokenizer", "bytes", "--length", 16, *SMALL]
    code, out, _ = run(*words, "--no-pretrained", "--dtype", "bfloat16", "--no-merge")
    assert code == 0
    assert "merged model" not in out


def test_a_resumed_run_ends_with_the_same_bits(vit, images, tmp_path):
    pytest.importorskip("peft")
    settings = {
        "model": str(vit),
        "data": str(images),
        "kind": "hta",
        "rank": 1,
        "steps": 12,
        "batch_size": 4,
        "warmup": 2,
        "checkpoint_interval": 5,
        "device": "cpu",
        "lr": 0.01,
    }
    run_adapt(AdaptConfig(**settings), tmp_path / "whole")

    class Stopper(AdaptObserver):
        def __init__(self, stop):
            self.stop = stop

        def stepped(self, step):
            if step == 7:
                self.stop.signum = signal.SIGTERM

    stop = StopRequest()
    with pytest.raises(Interrupted, match="SIGTERM at step 7; saved; continue with --resume"):
        run_adapt(AdaptConfig(**settings), tmp_path / "parts", stop=stop, observer=Stopper(stop))
    run_adapt(AdaptConfig(**settings), tmp_path / "parts", resume=True)
    files = [next((tmp_path / f / "adapter").glob("*.safetensors")) for f in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    lines = [(tmp_path / f / "metrics.jsonl").read_text() for f in ("whole", "parts")]
    losses = [{r["step"]: r["loss"] for r in map(json.loads, x.splitlines())} for x in lines]
    assert losses[0].items() <= losses[1].items()


def test_resume_and_overwrite(run, vit, images, tmp_path):
    words = ["--model", vit, "--data", images, *SMALL]
    assert run(*words)[0] == 0
    code, out, err = run(*words)
    assert code == 1
    assert "--resume" in err
    assert "loading" not in out
    (tmp_path / "file").touch()
    code, _, err = run(*words, "--out", "file")
    assert code == 1
    assert "must be a folder, is a file" in err
    code, _, err = run("--resume", "--rank", 4)
    assert code == 1
    assert "rank=8 there, 4 requested" in err
    assert run("--resume")[0] == 0
    assert run(*words, "--overwrite", "--no-merge")[0] == 0
    assert not (tmp_path / "householder-adapt" / "merged").exists()
    (tmp_path / "householder-adapt" / "mine.txt").write_text("")
    code, _, err = run(*words, "--overwrite")
    assert code == 1
    assert "nothing is deleted, because mine.txt" in err


def test_wrong_usage_is_one_line_and_exit_code_2(run, vit, llama, images, text, tmp_path):
    (tmp_path / "one" / "a").mkdir(parents=True)
    (tmp_path / "two" / "a").mkdir(parents=True)
    (tmp_path / "two" / "b").mkdir()
    cases = [
        (["--data", images], "--model must be given"),
        (["--model", vit], "--data must be given"),
        (["--model", vit, "--data", tmp_path / "absent"], "there is no such folder or file"),
        (["--model", vit, "--data", tmp_path / "one"], "at least two folders of images"),
        (["--model", vit, "--data", tmp_path / "two"], "needs at least 2 images"),
        (["--model", tmp_path, "--data", images], "transformers cannot find"),
        (["--model", llama, "--data", text], "has no tokenizer"),
        (["--model", llama, "--data", images], "needs a model that classifies images"),
        (["--model", vit, "--data", text], "needs a causal language model"),
        (["--model", "timm:vit_tiny_patch16_224", "--data", text], "takes images"),
        (["--model", vit, "--data", images, "--warmup", -1], "`warmup` must be at least 0"),
        (["--model", vit, "--data", images, "--kind", "magic"], "one of hra, two-sided, hta, lora"),
        (["--model", vit, "--data", images, "--rank", 3], "must be even, got 3"),
        (["--model", vit, "--data", images, "--rank", 0], "`rank` must be at least 1"),
        (["--model", vit, "--data", images, "--targets", "v_proj, q_prj"], "q_proj"),
        (["--model", vit, "--data", images, "--targets", "v_proj,"], "must be names or patterns"),
        (["--model", llama, "--data", text, "--tokenizer", "bytes", "--length", 9999], "9999"),
        (["--model", "timm:no_such_model", "--data", images], "timm"),
        (["--model", vit, "--data", images, "--kind", "hta", "--orthogonality", 1], "must be 0"),
        (["--resume", "--overwrite"], "give one"),
    ]
    for words, message in cases:
        code, _, err = run(*words)
        assert code == 2, (words, err)
        assert message in err, err
        # transformers may warn beside the error; ours is one line.
        assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
        assert "Traceback" not in err
        assert not (tmp_path / "householder-adapt").exists(), words


def test_regularisation_brings_reflectors_apart(vit, images, tmp_path):
    settings = {"model": str(vit), "data": str(images), "rank": 2, "steps": 24, "warmup": 0}
    cosines = []
    for weight in (0.0, 10.0):
        folder = tmp_path / str(weight)
        options = {
            "orthogonality": weight,
            "lr": 0.1,
            "device": "cpu",
            "merge": False,
            "batch_size": 8,
        }
        run_adapt(AdaptConfig(**settings, **options), folder)
        config = transformers.AutoConfig.from_pretrained(vit, num_labels=2)
        model = transformers.ViTForImageClassification(config)
        adapters.load(model, folder / "adapter")
        pairs = [p for n, p in adapters.parameters(model).items() if n.endswith("reflectors")]
        with torch.no_grad():
            cosines.append(max(abs(torch.cosine_similarity(k[0], k[1], dim=0)) for k in pairs))
    # They begin as equal pairs.
    assert cosines[0] > 0.5
    assert cosines[1] < 0.1


def test_the_warm_up_is_a_tenth_of_a_short_run():
    given = {"model": "m", "data": "d"}
    assert AdaptConfig(**given).warmup == 50
    assert AdaptConfig(**given, steps=30).warmup == 3
    assert AdaptConfig(**given, steps=30, warmup=20).warmup == 20


def test_images_are_turned_as_their_camera_says(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0] = 255  # a light row at the top, once turned
    turned = Image.fromarray(np.rot90(pixels).copy())
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned clockwise by a quarter
    turned.save(tmp_path / "turned.png", exif=orientation)
    image = read_image(tmp_path / "turned.png", ImageFormat(8, 1, (0.0,), (1.0,)))
    assert torch.equal(image[0], torch.from_numpy(pixels / 255).float())


def test_text_is_split_without_overlap():
    data = TextFile(torch.arange(100), 5, 0.2)
    seen = [b.labels[:, -1].max().item() for b in (data.batch(0, i, 8) for i in range(50))]
    assert max(seen) < 80
    held = torch.cat([b.inputs for b in data.evaluation(2)])
    assert held.flatten().tolist() == list(range(80, 95))
    with pytest.raises(ConfigError, match="both parts must have more than length=50"):
        TextFile(torch.arange(100), 50, 0.2)


def test_a_llama_with_gradient_checkpointing_learns_the_same():
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    adapters.attach(model, adapters.HRAConfig(targets=["*_proj"], num_householder=4))
    assert adapters.num_parameters(model) == 2 * 4 * (6 * 16 + 24)
    tokens = torch.randint(32, (2, 10))
    parameters = list(adapters.parameters(model).values())

    def gradients():
        loss = model(tokens, labels=tokens).loss
        return torch.autograd.grad(loss, parameters)

    model.train()
    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(), plain, strict=True):
        assert torch.equal(a, b)
