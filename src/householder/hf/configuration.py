"""The config of our language models as transformers knows configs."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from householder.models import CausalLMConfig
from householder.models.pretrained import MODEL_TYPE

_FIELDS = [field.name for field in dataclasses.fields(CausalLMConfig)]


class HouseholderConfig(PretrainedConfig):
    """A `CausalLMConfig` that transformers can save, load and look up.

    Args:
        skip_training_logits: where a model in training mode is given labels, return the loss alone:
            then all logits are never in memory, which `Trainer` does not look at.
        **options: fields of `CausalLMConfig`, and those of every `PretrainedConfig`.

    Examples:
        >>> config = HouseholderConfig(vocab_size=256, d_model=32, pattern="delta_product")
        >>> config.hidden_size, config.num_hidden_layers
        (32, 8)
        >>> config.lm_config().pattern
        'delta_product'
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012 - as transformers declares it
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "mlp_width",
    }

    def __init__(self, *, skip_training_logits: bool = False, **options: Any) -> None:
        self.skip_training_logits = skip_training_logits
        # transformers makes one without arguments to learn the defaults: bytes and one more.
        fields = {"vocab_size": 257}
        fields |= {name: options.pop(name) for name in _FIELDS if name in options}
        # What transformers ties by itself is nothing: with tied embeddings there is no head.
        options.pop("tie_word_embeddings", None)
        for name, value in CausalLMConfig.from_dict(fields).to_dict().items():
            setattr(self, name, value)
        options.setdefault("bos_token_id", None)
        options.setdefault("eos_token_id", None)
        options.setdefault("pad_token_id", None)
        options["tie_word_embeddings"] = False
        super().__init__(**options)

    def lm_config(self) -> CausalLMConfig:
        """Return the config of the model itself."""
        return CausalLMConfig.from_dict({name: getattr(self, name) for name in _FIELDS})
