"""The settings of `householder adapt`, declared once as those of `householder train` are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from householder.train.errors import ConfigError
from householder.train.settings import Settings, check_names, field_types, setting

KINDS = ("hra", "two-sided", "hta", "lora")


@dataclass(frozen=True)
class AdaptConfig(Settings):
    """The settings of one adaptation.

    Raises:
        ConfigError: a value is of the wrong type or out of range.

    Examples:
        >>> AdaptConfig(model="google/vit-base-patch16-224", data="birds", rank=4).kind
        'hra'
    """

    model: str | None = setting(
        None,
        "Base model: timm:<name>, a transformers name, or a local folder of either.",
        section="Base model",
    )
    pretrained: bool = setting(
        True, "Load the trained weights; without them the model starts anew.", section="Base model"
    )
    dtype: str = setting(
        "float32",
        "Precision of the base model's weights; adapters stay float32.",
        section="Base model",
        choices=("float32", "bfloat16"),
    )

    data: str | None = setting(
        None,
        "A folder with one folder of images per class, or a text file.",
        section="Data",
    )
    eval_fraction: float = setting(
        0.1, "Part of the data kept for evaluation.", section="Data", above=0, below=1
    )
    length: int = setting(256, "Tokens of a training text.", section="Data", at_least=2)
    tokenizer: str = setting(
        "auto",
        "The base model's own, or bytes.",
        section="Data",
        choices=("auto", "bytes"),
    )

    kind: str = setting("hra", "The adapter.", section="Adapter", choices=KINDS)
    rank: int = setting(
        8,
        "Reflectors (hra, two-sided) or rank (hta's additive term, lora).",
        section="Adapter",
        at_least=0,
    )
    targets: str | None = setting(
        None,
        "Layers to adapt, names or patterns with commas between; default: all linear layers but "
        "the head.",
        section="Adapter",
    )

    orthogonality: float = setting(
        0.0,
        "Weight of hra's regularisation, which keeps reflectors orthogonal to one another.",
        section="Adapter",
        at_least=0,
    )

    steps: int = setting(500, "Optimizer steps.", section="Optimizer", at_least=1)
    batch_size: int = setting(32, "Images or texts per step.", section="Optimizer", at_least=1)
    lr: float = setting(1e-3, "Peak learning rate of AdamW.", section="Optimizer", above=0)
    weight_decay: float = setting(1e-4, "AdamW's weight decay.", section="Optimizer", at_least=0)
    warmup: int | None = setting(
        None,
        "Steps of linear warm-up; default: a tenth of the steps, at most 50.",
        section="Optimizer",
        at_least=0,
    )
    schedule: str = setting(
        "cosine", "After the warm-up.", section="Optimizer", choices=("cosine", "constant")
    )
    min_lr: float = setting(0.0, "Where the cosine ends.", section="Optimizer", at_least=0)
    grad_clip: float = setting(
        1.0, "Largest norm of the gradient; 0: none.", section="Optimizer", at_least=0
    )

    seed: int = setting(0, "Of the adapter, the split and the order.", section="Run", at_least=0)
    device: str = setting("auto", "auto, cpu, cuda or cuda:<n>.", section="Run", may_change=True)
    checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass: less memory, more time.",
        section="Run",
        may_change=True,
    )
    log_interval: int = setting(
        10, "Steps between lines of the metrics.", section="Run", at_least=1, may_change=True
    )
    checkpoint_interval: int = setting(
        100, "Steps between checkpoints.", section="Run", at_least=1, may_change=True
    )
    merge: bool = setting(
        True, "Also write the model with the adapter merged.", section="Run", may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup is None:
            object.__setattr__(self, "warmup", min(50, self.steps // 10))
        for name, example in (("model", "timm:vit_base_patch16_224"), ("data", "a folder")):
            if getattr(self, name) is None:
                raise ConfigError(f"--{name} must be given, for example {example}")
        if self.rank < 1 and self.kind != "hta":
            raise ConfigError(
                f"`rank` must be at least 1 with kind={self.kind}, got {self.rank}; hta takes 0"
            )
        if self.orthogonality and self.kind != "hra":
            raise ConfigError(
                f"`orthogonality` must be 0 with kind={self.kind}, got {self.orthogonality}; it "
                "regularises hra"
            )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> AdaptConfig:
        """Make a config from settings by name.

        Raises:
            ConfigError: a setting is unknown or cannot be.
        """
        check_names(settings, field_types(cls), "settings")
        return cls(**settings)
