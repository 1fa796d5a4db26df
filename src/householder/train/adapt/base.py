"""Base models by name, from timm and transformers or a local folder of either."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from householder.train.adapt.config import AdaptConfig
from householder.train.adapt.data import (
    AdaptData,
    ImageFolder,
    ImageFormat,
    TextFile,
    image_classes,
    read_tokens,
)
from householder.train.errors import ConfigError

TIMM = "timm:"


@dataclass(frozen=True)
class Base:
    """A base model with what belongs to it.

    Attributes:
        model: the model.
        head: full name of the new classifier, or None for a language model.
        data: what to train on.
        save: writes the model to a folder from which it can be loaded again.
        checkpointing: switches recomputation of activations on.
    """

    model: nn.Module
    head: str | None
    data: AdaptData
    save: Callable[[nn.Module, Path], None]
    checkpointing: Callable[[nn.Module], None]


def load_base(config: AdaptConfig) -> Base:
    """Load the base model and the data that the settings name.

    The weights of a new classifier, and all weights without `pretrained`, come from PyTorch's
    global generator.

    Raises:
        ConfigError: a package, the model or the data is missing or does not fit.
    """
    assert config.model is not None
    assert config.data is not None
    data = Path(config.data)
    if data.is_dir():
        classes = len(image_classes(data))
        if config.model.startswith(TIMM) or _is_timm_folder(Path(config.model)):
            return _timm_base(config, data, classes)
        return _image_base(config, data, classes)
    if data.is_file() and config.model.startswith(TIMM):
        raise ConfigError(
            f"{config.model} takes images, and {data} is a file; --data must be a folder with one "
            "folder of images per class, or --model a language model of transformers"
        )
    if not data.is_file():
        raise ConfigError(
            f"{data}: there is no such folder or file; --data takes a folder with one folder of "
            "images per class, or a text file"
        )
    return _text_base(config, data)


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return a model's logits, whether it returns a tensor or transformers' output object."""
    out = model(inputs)
    return out if isinstance(out, Tensor) else out.logits


def _is_timm_folder(folder: Path) -> bool:
    """Tell whether a folder is a model that timm saved: its config names an architecture."""
    return "architecture" in _config_of(folder)


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise ConfigError(
            f"{folder / 'config.json'}: is no JSON: {error}; take the folder as it was saved"
        ) from error


def _timm_base(config: AdaptConfig, data: Path, classes: int) -> Base:
    timm = _package("timm", "pip install 'householder[timm]', with the torchvision for this torch")
    assert config.model is not None
    name = config.model.removeprefix(TIMM)
    if Path(name).is_dir():
        name = f"local-dir:{name}"
    try:
        model = timm.create_model(name, pretrained=config.pretrained, num_classes=classes)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"timm cannot make {name!r}: {_first_line(error)}; timm.list_models() names the "
            "models, --no-pretrained needs no download"
        ) from error
    settings = timm.data.resolve_model_data_config(model)
    channels, size, _ = settings["input_size"]
    form = ImageFormat(size, channels, tuple(settings["mean"]), tuple(settings["std"]))
    classifier = model.pretrained_cfg["classifier"]
    head = classifier if isinstance(classifier, str) else classifier[-1]

    def save(model: nn.Module, folder: Path) -> None:
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)

    images = ImageFolder(data, form, config.eval_fraction, config.seed)
    return Base(model, head, images, save, lambda m: m.set_grad_checkpointing(True))  # type: ignore[operator]


def _image_base(config: AdaptConfig, data: Path, classes: int) -> Base:
    transformers = _package("transformers", "pip install 'householder[adapters]'")
    with _quiet(transformers):
        settings = _settings(transformers, config, num_labels=classes)
        model = _make(
            transformers.AutoModelForImageClassification,
            "a folder of images needs a model that classifies images",
            config,
            settings,
            ignore_mismatched_sizes=True,  # the classifier is a new one
        )
    linear = [n for n, m in model.named_modules() if getattr(m, "out_features", 0) == classes]
    if not linear:
        raise ConfigError(
            f"{config.model}: must have a linear layer of {classes} outputs, the classifier, and "
            "has none; adapt it in Python, with householder.adapters"
        )
    processing = _optional_json(transformers, config.model, "preprocessor_config.json")
    size = getattr(settings, "image_size", 224)
    channels = getattr(settings, "num_channels", 3)
    form = ImageFormat(
        size if isinstance(size, int) else size[0],
        channels,
        tuple(processing.get("image_mean", [0.5] * channels)),
        tuple(processing.get("image_std", [0.5] * channels)),
    )

    def save(model: nn.Module, folder: Path) -> None:
        with _quiet(transformers):
            model.save_pretrained(str(folder))  # type: ignore[operator]
        if processing:
            text = json.dumps(processing, indent=2)
            (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")

    images = ImageFolder(data, form, config.eval_fraction, config.seed)
    return Base(model, linear[-1], images, save, _checkpoint_transformers)


def _text_base(config: AdaptConfig, data: Path) -> Base:
    transformers = _package("transformers", "pip install 'householder[adapters]'")
    with _quiet(transformers):
        settings = _settings(transformers, config)
        model = _make(
            transformers.AutoModelForCausalLM,
            "a text file needs a causal language model",
            config,
            settings,
        )
    tokenizer = None
    if config.tokenizer == "auto":
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{config.model}: has no tokenizer: {_first_line(error)}; --tokenizer bytes takes "
                "each byte for a token"
            ) from error
    tokens = read_tokens(data, tokenizer)
    largest = int(tokens.max())
    if largest >= settings.vocab_size:
        raise ConfigError(
            f"{config.model}: must have a vocabulary above {largest}, the text's largest token, "
            f"has {settings.vocab_size}; use the model's own tokenizer"
        )

    def save(model: nn.Module, folder: Path) -> None:
        with _quiet(transformers):
            model.save_pretrained(str(folder))  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))

    text = TextFile(tokens, config.length, config.eval_fraction)
    return Base(model, None, text, save, _checkpoint_transformers)


def _settings(transformers: Any, config: AdaptConfig, **options: Any) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(config.model, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"transformers cannot find {config.model!r}: {_first_line(error)}; give a name of its "
            "hub, a local folder with config.json, or timm:<name>"
        ) from error


def _make(kind: Any, needed: str, config: AdaptConfig, settings: Any, **options: Any) -> nn.Module:
    """Make a model of one of transformers' kinds; `needed` says why that kind."""
    try:
        if not config.pretrained:
            return kind.from_config(settings)
        return kind.from_pretrained(config.model, config=settings, dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError) as error:
        if "Unrecognized configuration class" in str(error):
            raise ConfigError(
                f"{config.model}: {needed}, and transformers has none of type "
                f"{settings.model_type!r}; give another --model or other --data"
            ) from error
        raise ConfigError(
            f"transformers cannot load {config.model!r}: {_first_line(error)}; --no-pretrained "
            "starts without trained weights"
        ) from error


def _optional_json(transformers: Any, name: str | None, file: str) -> dict[str, Any]:
    try:
        path = transformers.utils.cached_file(name, file)
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return {}


def _checkpoint_transformers(model: nn.Module) -> None:
    # The second name is that of transformers before 5.2x.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the report of a load for the time of the block: that a classifier is new is meant."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _package(name: str, remedy: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} cannot be imported ({error}); {remedy}") from error


def _first_line(error: Exception) -> str:
    """Return an error's first line without the stop at its end, for a sentence that goes on."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:;")
