"""The settings of a language model's training on text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from householder.models import PRESETS, CausalLM, CausalLMConfig
from householder.models.causal_lm_config import SLIDING_WINDOW
from householder.nn import MIXERS
from householder.train.config import takes_several
from householder.train.errors import ConfigError
from householder.train.settings import Settings, setting

_DATA, _MODEL, _OPTIMIZER = "Text", "Language model", "Optimizer"
_EVALUATION, _RUN = "Evaluation", "Run"


@dataclass(frozen=True)
class TextConfig(Settings):
    """The settings of one training run on text.

    Lengths are in tokens, the batch in windows of `context` tokens.

    Raises:
        ConfigError: a value is of the wrong type, out of range, or contradicts another.

    Examples:
        >>> config = TextConfig(preset="10m", pattern="delta_product,swa", steps=200)
        >>> config.model_config(vocab_size=257).vocab_size
        320
    """

    tokenizer: str = setting(
        "bytes", "bytes, or a tokenizer.json of the tokenizers library.", section=_DATA
    )
    context: int = setting(1024, "Tokens in a window.", section=_DATA, at_least=2)
    validation: float = setting(
        0.05, "Share of the text held out, in whole documents.", section=_DATA, above=0, below=1
    )
    separate_documents: bool = setting(
        True, "Documents in a window do not see one another.", section=_DATA
    )
    max_tokens: int | None = setting(
        None, "Read no more text than this.", section=_DATA, at_least=1
    )

    preset: str = setting(
        "10m", "Width, depth and head size of a named size.", section=_MODEL, choices=tuple(PRESETS)
    )
    pattern: str = setting(
        "gated_delta_net",
        "Mixers of the layers, repeated: delta_net or delta, gated_delta_net or gated_delta, "
        "delta_product, gated_delta_product, path, path_fox, rope, fox, swa, joined by commas.",
        section=_MODEL,
    )
    global_layers: str = setting(
        "", "Layers, from 0, with rotary attention in place of the pattern's: 1,12.", section=_MODEL
    )
    window: int | None = setting(
        None, "Tokens that an swa layer sees; default: 1024.", section=_MODEL, at_least=1
    )
    expand_v: float | None = setting(
        None, "Value size / key size; default: as the mixer publishes.", section=_MODEL, above=0
    )
    tie_embeddings: bool = setting(True, "Use the embeddings as the head.", section=_MODEL)
    num_householder: int | None = setting(
        None,
        "Householder reflections per token (N) of product mixers; default: 2.",
        section=_MODEL,
        at_least=1,
    )
    num_layers: int | None = setting(
        None, "Blocks of mixer and MLP; default: the preset's.", section=_MODEL, at_least=1
    )
    d_model: int | None = setting(
        None, "Width of the residual stream; default: the preset's.", section=_MODEL, at_least=1
    )
    num_heads: int | None = setting(
        None, "Heads of recurrent mixers; default: by width.", section=_MODEL, at_least=1
    )
    head_dim: int | None = setting(
        None, "Key size of a head; default: the preset's.", section=_MODEL, at_least=1
    )
    mlp_width: int | None = setting(
        None, "Inner width of the SwiGLU MLP; default: by width.", section=_MODEL, at_least=1
    )
    allow_neg_eigval: bool | None = setting(
        None, "Let β range over (0, 2); default: as the mixer publishes.", section=_MODEL
    )
    use_short_conv: bool = setting(True, "Short causal convolutions in the mixers.", section=_MODEL)

    steps: int = setting(1000, "Optimizer steps.", section=_OPTIMIZER, at_least=1)
    batch_size: int = setting(16, "Windows per step.", section=_OPTIMIZER, at_least=1)
    accumulate: int = setting(
        1,
        "Parts into which a step's windows are divided, one after the other.",
        section=_OPTIMIZER,
        at_least=1,
        may_change=True,
    )
    lr: float = setting(1e-3, "Peak learning rate of AdamW.", section=_OPTIMIZER, above=0)
    schedule: str = setting(
        "cosine",
        "Learning rate after warmup.",
        section=_OPTIMIZER,
        choices=("cosine", "wsd", "constant"),
    )
    warmup: int = setting(50, "Steps of rising learning rate.", section=_OPTIMIZER, at_least=0)
    decay: float = setting(
        0.2,
        "Share of the steps at the end in which wsd falls to min-lr.",
        section=_OPTIMIZER,
        above=0,
        below=1,
    )
    min_lr: float = setting(1e-4, "Learning rate at the end.", section=_OPTIMIZER, at_least=0)
    weight_decay: float = setting(
        0.1, "Decoupled weight decay, on matrices only.", section=_OPTIMIZER, at_least=0
    )
    beta1: float = setting(
        0.9, "AdamW's decay of the first moment.", section=_OPTIMIZER, at_least=0, below=1
    )
    beta2: float = setting(
        0.95, "AdamW's decay of the second moment.", section=_OPTIMIZER, at_least=0, below=1
    )
    grad_clip: float = setting(
        1.0, "Largest gradient norm; 0: no clipping.", section=_OPTIMIZER, at_least=0
    )

    eval_interval: int = setting(
        200,
        "Steps between evaluations and samples; 0: only at the end.",
        section=_EVALUATION,
        at_least=0,
        may_change=True,
    )
    eval_tokens: int = setting(
        100_000, "Tokens to evaluate each context length on.", section=_EVALUATION, at_least=1
    )
    eval_contexts: str = setting(
        "",
        "Context lengths of the final evaluation: 256,1024; default: context / 4, context, "
        "4 · context.",
        section=_EVALUATION,
    )
    sample_tokens: int = setting(
        120,
        "Tokens of the sample shown at each evaluation; 0: none.",
        section=_EVALUATION,
        at_least=0,
        may_change=True,
    )
    prompt: str = setting("", "What the sample continues.", section=_EVALUATION, may_change=True)

    seed: int = setting(0, "Seed of the order and the weights.", section=_RUN, at_least=0)
    device: str = setting("auto", "cpu, cuda, cuda:1, … or auto.", section=_RUN, may_change=True)
    dtype: str = setting(
        "float32",
        "float32, or bfloat16 for autocast over float32 weights.",
        section=_RUN,
        choices=("float32", "bfloat16"),
    )
    compile: bool = setting(False, "Compile the model.", section=_RUN, may_change=True)
    cuda_graphs: bool = setting(
        False,
        "On a GPU, record the optimizer step once and replay it: for small models, and windows "
        "whose documents see one another.",
        section=_RUN,
        may_change=True,
    )
    recompute: bool = setting(
        True,
        "On a GPU, make anew in the backward pass what is cheap; off is some percent faster.",
        section=_RUN,
        may_change=True,
    )
    checkpoint_activations: bool = setting(
        False,
        "Run blocks again in the backward pass to save memory.",
        section=_RUN,
        may_change=True,
    )
    impl: str = setting(
        "auto",
        "The form of delta_product and path_attention.",
        section=_RUN,
        choices=("auto", "chunk", "reference", "triton"),
        may_change=True,
    )
    peak_tflops: float | None = setting(
        None,
        "What a device could do, in 10¹² operations per second, for the utilisation (MFU); "
        "default: known of common GPUs.",
        section=_RUN,
        above=0,
        may_change=True,
    )
    threads: int | None = setting(
        None, "CPU threads; default: PyTorch's choice.", section=_RUN, at_least=1, may_change=True
    )
    log_interval: int = setting(10, "Steps between lines of metrics.", section=_RUN, at_least=1)
    checkpoint_interval: int = setting(
        100, "Steps between checkpoints.", section=_RUN, at_least=1, may_change=True
    )
    keep_checkpoints: int = setting(
        2, "Newest checkpoints to keep.", section=_RUN, at_least=1, may_change=True
    )
    tensorboard: bool = setting(
        False, "Write TensorBoard events too.", section=_RUN, may_change=True
    )
    wandb: bool = setting(
        False, "Write a Weights & Biases run too, offline.", section=_RUN, may_change=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lengths()
        self.model_config(vocab_size=2)
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"`accumulate` must divide batch_size={self.batch_size}, got {self.accumulate}; "
                "the parts of a step have equally many windows"
            )
        if self.cuda_graphs and (self.separate_documents or self.accumulate > 1):
            raise ConfigError(
                "`cuda_graphs` must be left out with separate documents, whose bounds differ from "
                f"step to step, and with accumulate > 1, got separate_documents="
                f"{self.separate_documents}, accumulate={self.accumulate}; give "
                "--no-separate-documents, or go without it"
            )
        if self.min_lr > self.lr:
            raise ConfigError(
                f"`min_lr` must be at most lr={self.lr}, got {self.min_lr}; the rate falls to it: "
                "give a smaller --min-lr too"
            )

    def lengths(self) -> tuple[int, ...]:
        """Return the context lengths of the final evaluation."""
        if not self.eval_contexts:
            return max(1, self.context // 4), self.context, 4 * self.context
        return _numbers("eval_contexts", self.eval_contexts, at_least=1)

    def model_config(self, vocab_size: int) -> CausalLMConfig:
        """Return the model's config.

        Args:
            vocab_size: of the tokenizer. The model's is the next multiple of 64, for the speed of
                its products on a GPU; nothing is ever trained to answer with the rest.

        Raises:
            ConfigError: the settings do not fit together.
        """
        sizes = ("num_layers", "d_model", "num_heads", "head_dim", "mlp_width")
        options = {
            name: getattr(self, name)
            for name in (*sizes, "expand_v", "num_householder", "allow_neg_eigval")
            if getattr(self, name) is not None
        }
        try:
            return CausalLMConfig.preset(
                self.preset,
                -(-vocab_size // 64) * 64,
                pattern=self.pattern,
                global_layers=_numbers("global_layers", self.global_layers, at_least=0),
                window=1024 if self.window is None else self.window,
                tie_embeddings=self.tie_embeddings,
                use_short_conv=self.use_short_conv,
                **options,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    def require_effects(self) -> None:
        """Raise ConfigError if a setting is given that none of the model's layers takes."""
        layers = self.model_config(vocab_size=2).layer_names()
        recurrent, product = set(MIXERS), {name for name in MIXERS if takes_several(name)}
        takers = {"num_householder": product, "window": {SLIDING_WINDOW}}
        takers |= dict.fromkeys(("num_heads", "expand_v", "allow_neg_eigval"), recurrent)
        for name, takes in takers.items():
            if getattr(self, name) is not None and takes.isdisjoint(layers):
                raise ConfigError(
                    f"`{name}` is a setting of {', '.join(sorted(takes))}, and no layer of "
                    f"{self.pattern!r} is one, got {getattr(self, name)}; leave it out, or give "
                    "another --pattern"
                )

    def make_model(self, vocab_size: int, *, device: torch.device | str | None = None) -> CausalLM:
        """Return a new model.

        Args:
            vocab_size: of the tokenizer, as in `model_config`.
            device: of the parameters; on "meta" it only shows whether there can be such a model.

        Raises:
            ConfigError: a mixer does not take the settings.
        """
        try:
            return CausalLM(self.model_config(vocab_size), impl=self.impl, device=device)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error


def _numbers(name: str, text: str, *, at_least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError as error:
        raise ConfigError(
            f"`{name}` must be numbers such as 1 or 1,2, got {text!r}; put commas between them"
        ) from error
    if any(number < at_least for number in numbers):
        raise ConfigError(
            f"`{name}` must be numbers of at least {at_least}, got {text!r}; drop the smaller ones"
        )
    return numbers
