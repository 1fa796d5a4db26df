"""The settings of one training run on a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from householder.nn import ATTENTIONS, MIXERS
from householder.train.errors import ConfigError
from householder.train.settings import Settings, setting


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The settings of one training run; `householder train --help` says what each of them means.

    Every field is checked when the object is made; the lengths are in supervised tokens (a leading
    BOS token is not counted), the batch in sequences.

    Raises:
        ConfigError: a value is of the wrong type, out of range, or contradicts another.

    Examples:
        >>> config = TrainConfig(task="s3", num_householder=2, steps=100)
        >>> config.eval_length
        128
        >>> TrainConfig(steps=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        householder.train.errors.ConfigError: `steps` must be at least 1, got 0; it means: Opt...
    """

    task: str = setting(
        "s3", "What to learn: s3, s4, a5, s5, z<m>, d<m>, parity, mqar, …", section="Task"
    )
    length: int = setting(32, "Training length in tokens.", section="Task", at_least=1)
    min_length: int | None = setting(
        None,
        "Draw each sequence's length uniformly from min-length to length, for tasks that pad; "
        "default: always length.",
        section="Task",
        at_least=1,
    )
    start_length: int | None = setting(
        None,
        "Train on prefixes that grow from this length to length, in equal ratios, over the first "
        "growth-steps; for tasks supervised at every token. Default: always length.",
        section="Task",
        at_least=1,
    )
    growth_steps: int | None = setting(
        None,
        "Steps over which prefixes grow; default: half of steps, with start-length.",
        section="Task",
        at_least=1,
    )
    num_samples: int | None = setting(
        None,
        "Size of a fixed training set, reshuffled every epoch; default: fresh data every step.",
        section="Task",
        at_least=1,
    )

    mixer: str = setting(
        "delta_product",
        "The sequence mixer.",
        section="Model",
        choices=(*MIXERS, *ATTENTIONS),
    )
    num_householder: int = setting(
        2, "Householder reflections per token (N).", section="Model", at_least=1
    )
    num_layers: int = setting(1, "Blocks of mixer and MLP.", section="Model", at_least=1)
    d_model: int = setting(64, "Width of the residual stream.", section="Model", at_least=1)
    num_heads: int = setting(4, "Heads of each mixer.", section="Model", at_least=1)
    head_dim: int | None = setting(
        None,
        "Key and value size of a head; default: d-model / num-heads.",
        section="Model",
        at_least=1,
    )
    mlp_width: int | None = setting(
        None,
        "Inner width of the SwiGLU MLP, 0: none; default: 8/3 · d-model rounded up to a multiple "
        "of 256.",
        section="Model",
        at_least=0,
    )
    tie_embeddings: bool = setting(
        False,
        "Read the labels with the embeddings' weights, for tasks whose labels are tokens.",
        section="Model",
    )
    allow_neg_eigval: bool = setting(
        True, "Let β range over (0, 2), so that eigenvalues reach −1.", section="Model"
    )
    use_short_conv: bool = setting(
        False, "Short causal convolutions before the recurrence.", section="Model"
    )

    steps: int | None = setting(
        None,
        "Optimizer steps; default: 1600, or what epochs come to.",
        section="Optimizer",
        at_least=1,
    )
    epochs: int | None = setting(
        None,
        "Passes over the num-samples sequences, in place of steps.",
        section="Optimizer",
        at_least=1,
    )
    batch_size: int = setting(16, "Sequences per step.", section="Optimizer", at_least=1)
    lr: float = setting(2e-3, "Peak learning rate of AdamW.", section="Optimizer", above=0)
    schedule: str = setting(
        "cosine", "Learning rate after warmup.", section="Optimizer", choices=("cosine", "constant")
    )
    warmup: int = setting(
        20,
        "Steps over which the learning rate rises linearly from 0.",
        section="Optimizer",
        at_least=0,
    )
    min_lr: float = setting(
        0.0, "Learning rate at which the cosine ends.", section="Optimizer", at_least=0
    )
    weight_decay: float = setting(
        0.1, "Decoupled weight decay, on matrices only.", section="Optimizer", at_least=0
    )
    beta1: float = setting(
        0.9, "AdamW's decay of the first moment.", section="Optimizer", at_least=0, below=1
    )
    beta2: float = setting(
        0.95, "AdamW's decay of the second moment.", section="Optimizer", at_least=0, below=1
    )
    grad_clip: float = setting(
        1.0, "Largest gradient norm; 0: no clipping.", section="Optimizer", at_least=0
    )

    eval_length: int | None = setting(
        None, "Evaluate up to this length; default: 4 × length.", section="Evaluation", at_least=1
    )
    eval_samples: int = setting(
        1024, "Held-out sequences to evaluate on.", section="Evaluation", at_least=1
    )
    eval_interval: int = setting(
        0,
        "Steps between evaluations while training; 0: only at the end.",
        section="Evaluation",
        at_least=0,
    )
    stop_when_solved: int = setting(
        0,
        "Stop after this many evaluations in a row reach solved-accuracy at the training length; "
        "0: never.",
        section="Evaluation",
        at_least=0,
    )
    solved_accuracy: float = setting(
        0.999, "The accuracy that counts as solved.", section="Evaluation", above=0
    )

    seed: int = setting(
        0, "Seed of the data, the weights and the evaluation.", section="Run", at_least=0
    )
    device: str = setting(
        "auto",
        "cpu, cuda, cuda:1, … or auto: a GPU when there is one.",
        section="Run",
        may_change=True,
    )
    dtype: str = setting(
        "float32",
        "float32, or bfloat16 for autocast over float32 weights.",
        section="Run",
        choices=("float32", "bfloat16"),
    )
    impl: str = setting(
        "auto",
        "The form of delta_product or path_attention that runs.",
        section="Run",
        choices=("auto", "chunk", "reference", "triton"),
        may_change=True,
    )
    compile: bool = setting(
        False,
        "Compile the blocks of the model, anew for every length.",
        section="Run",
        may_change=True,
    )
    cuda_graphs: bool = setting(
        False,
        "On a GPU, record the optimizer step once and replay it: several times as fast where the "
        "model is small.",
        section="Run",
        may_change=True,
    )
    threads: int | None = setting(
        None,
        "CPU threads; default: 1 for small steps, else what PyTorch chooses.",
        section="Run",
        at_least=1,
        may_change=True,
    )
    log_interval: int = setting(
        10, "Steps between lines of metrics.jsonl.", section="Run", at_least=1
    )
    checkpoint_interval: int = setting(
        100, "Steps between checkpoints.", section="Run", at_least=1, may_change=True
    )
    keep_checkpoints: int = setting(
        2, "Newest checkpoints to keep.", section="Run", at_least=1, may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_together()
        self._fill_in()

    def _check_together(self) -> None:
        if self.min_length is not None and self.min_length > self.length:
            raise ConfigError(
                f"`min_length` must be at most length={self.length}, got {self.min_length}; "
                "sequences are between the two"
            )
        if self.start_length is None and self.growth_steps is not None:
            raise ConfigError(
                "`growth_steps` needs `start_length`, got it alone; give the prefixes' first length"
            )
        if self.start_length is not None and self.start_length > self.length:
            raise ConfigError(
                f"`start_length` must be at most length={self.length}, got {self.start_length}; "
                "prefixes grow from it to length"
            )
        if self.start_length is not None and self.compile:
            raise ConfigError(
                "`compile` must be left out with `start_length`: every length of the growing "
                "prefixes would be compiled anew; `cuda_graphs` serves them"
            )
        if self.epochs is not None and self.num_samples is None:
            raise ConfigError(
                f"`epochs` needs `num_samples`, got epochs={self.epochs} of fresh data, which has "
                "no end; give `num_samples`, or `steps` in its place"
            )
        if self.eval_length is not None and self.eval_length < self.length:
            raise ConfigError(
                f"`eval_length` must be at least length={self.length}, got {self.eval_length}; "
                "the evaluation tells the accuracy at the training length too"
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ConfigError(
                f"`d_model` must be a multiple of num_heads={self.num_heads}, got {self.d_model}; "
                "change it or give `head_dim`"
            )
        if self.num_householder != 1 and not takes_several(self.mixer):
            raise ConfigError(
                f"`num_householder` must be 1 with mixer={self.mixer}, got {self.num_householder}; "
                "delta_product and gated_delta_product take more"
            )
        if self.stop_when_solved and not self.eval_interval:
            raise ConfigError(
                f"`stop_when_solved` counts evaluations while training, got "
                f"{self.stop_when_solved} without any; give `eval_interval` too"
            )
        if self.solved_accuracy > 1:
            raise ConfigError(
                f"`solved_accuracy` must be at most 1, got {self.solved_accuracy}; give a share, "
                "not per cent"
            )

    def _fill_in(self) -> None:
        """Replace the defaults that depend on other fields by their values."""
        steps = 1600 if self.steps is None else self.steps
        if self.epochs is not None:
            assert self.num_samples is not None  # checked together
            steps = self.epochs * math.ceil(self.num_samples / self.batch_size)
            if self.steps not in (None, steps):
                raise ConfigError(
                    f"`steps` and `epochs` contradict each other: epochs={self.epochs} of "
                    f"{self.num_samples} samples are {steps} steps, got steps={self.steps}; give "
                    "one of the two"
                )
        growth_steps = self.growth_steps
        if self.start_length is not None and growth_steps is None:
            growth_steps = max(1, steps // 2)
        for name, value in {
            "steps": steps,
            "growth_steps": growth_steps,
            "eval_length": 4 * self.length if self.eval_length is None else self.eval_length,
            "head_dim": self.d_model // self.num_heads if self.head_dim is None else self.head_dim,
        }.items():
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """The run's short name, also that of its folder: `s3-N2`, `a5-path-attention-L3`."""
        mixer = "" if self.mixer == "delta_product" else f"-{self.mixer.replace('_', '-')}"
        number = f"-N{self.num_householder}" if self.mixer in MIXERS else ""
        layers = "" if self.num_layers == 1 else f"-L{self.num_layers}"
        return f"{self.task}{mixer}{number}{layers}"


def takes_several(mixer: str) -> bool:
    """Return whether a mixer can have more than one reflection per token."""
    return mixer in ("delta_product", "gated_delta_product")


# What the publications call them.
MIXER_TITLES = {
    "delta_net": "DeltaNet",
    "gated_delta_net": "Gated DeltaNet",
    "delta_product": "DeltaProduct",
    "gated_delta_product": "Gated DeltaProduct",
    "path_attention": "PaTH",
    "forgetting_path_attention": "PaTH-FoX",
    "rotary_attention": "RoPE",
    "forgetting_attention": "FoX",
}


def run_titles(configs: Sequence[TrainConfig]) -> list[str]:
    """Return for each of some runs what distinguishes it from the others, for tables and pictures.

    Examples:
        >>> run_titles([TrainConfig(num_householder=n) for n in (1, 2)])
        ['N = 1', 'N = 2']
        >>> mixers = ("path_attention", "rotary_attention")
        >>> run_titles([TrainConfig(mixer=m, num_householder=1, num_layers=2) for m in mixers])
        ['PaTH', 'RoPE']
    """
    differ = {
        name: len({getattr(config, name) for config in configs}) > 1
        for name in ("mixer", "num_layers", "num_householder")
    }
    titles = []
    for config in configs:
        layers = "1 layer" if config.num_layers == 1 else f"{config.num_layers} layers"
        parts = [MIXER_TITLES[config.mixer]] if differ["mixer"] else []
        parts += [layers] if differ["num_layers"] else []
        # Mixers that take one reflection are not told apart by having one.
        number = differ["num_householder"] and (not differ["mixer"] or takes_several(config.mixer))
        parts += [f"N = {config.num_householder}"] if number else []
        # A run alone is named by what its publication varies.
        alone = f"N = {config.num_householder}"
        alone = alone if config.mixer in MIXERS else MIXER_TITLES[config.mixer]
        titles.append(", ".join(parts) or alone)
    return titles
