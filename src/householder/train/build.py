"""From settings to a model and a device."""

from __future__ import annotations

import torch

from householder.models import SequenceTagger
from householder.train.config import TrainConfig
from householder.train.errors import ConfigError
from householder.train.tasks import Task

_DEVICES = (
    "`device` must be auto, cpu, cuda or cuda:<n>, got {!r}; auto takes a GPU if there is one"
)


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the first GPU when there is one, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(_DEVICES.format(name)) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(_DEVICES.format(name))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"`device` is {name!r}, but PyTorch sees {torch.cuda.device_count()} GPUs here; "
            "use --device cpu or install a CUDA build of PyTorch"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


# Below this many numbers in a layer's activations a second thread gains little (15% measured at
# 16 × 32 tokens, d = 64, on two cores of an AMD EPYC) and loses much when another process wants
# the core (a step then took three times as long).
SMALL_STEP = 1 << 17


def cpu_threads(config: TrainConfig) -> int:
    """Return the number of CPU threads to train with.

    It is `config.threads`; by default 1 when batch_size · length · d_model is below 2¹⁷, so that
    the result does not depend on the number of cores either, and PyTorch's choice above.
    """
    if config.threads is not None:
        return config.threads
    small = config.batch_size * config.length * config.d_model < SMALL_STEP
    return 1 if small else torch.get_num_threads()


def build_model(config: TrainConfig, task: Task) -> SequenceTagger:
    """Make the model that the settings describe, its weights drawn from PyTorch's global generator.

    Args:
        config: the section "Model" of the settings.
        task: gives the vocabulary and the classes.

    Returns:
        A module from tokens int64 `[B, L]` to logits `[B, L, num_classes]`.

    Raises:
        ConfigError: the settings do not fit together.
    """
    from householder.nn import DeltaProductMixer, PaTHAttention

    try:
        model = SequenceTagger(
            task.vocab_size,
            task.num_classes,
            d_model=config.d_model,
            num_layers=config.num_layers,
            mixer=config.mixer,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_householder=config.num_householder,
            allow_neg_eigval=config.allow_neg_eigval,
            use_short_conv=config.use_short_conv,
            mlp_width=config.mlp_width,
            tie_embeddings=config.tie_embeddings,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(str(error)) from error
    for module in model.modules():
        if isinstance(module, (DeltaProductMixer, PaTHAttention)):
            module.impl = config.impl
    return model
