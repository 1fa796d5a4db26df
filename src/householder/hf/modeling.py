"""Our language models as models of transformers: saved, loaded, looked up and generated from.

Importing this module registers them with `AutoConfig` and `AutoModelForCausalLM`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from householder.hf.cache import MAX_ROLLBACK, HouseholderCache
from householder.hf.configuration import HouseholderConfig
from householder.hf.gated_delta_functions import packed_bounds
from householder.models import CausalLM
from householder.models.pretrained import MODEL_TYPE
from householder.nn import PaTHAttention
from householder.ops import linear_cross_entropy

IGNORE_INDEX = -100
"""The label of a position that has no part in the loss."""


class HouseholderForCausalLM(PreTrainedModel, GenerationMixin):
    """A `CausalLM` that transformers can train, save, load and generate from.

    The folders that `householder train --text` and `save_causal_lm` write can be loaded as they
    are.

    Args:
        config: a `HouseholderConfig`.

    Examples:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from householder.hf.modeling import HouseholderConfig
        >>> config = HouseholderConfig(vocab_size=64, d_model=32, num_layers=2, head_dim=16)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> prompt = torch.randint(1, 64, (1, 5))
        >>> model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0).shape
        torch.Size([1, 9])
    """

    config_class = HouseholderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = False
    _supports_cache_class = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: HouseholderConfig) -> None:
        super().__init__(config)
        self.model = CausalLM(config.lm_config())
        for module in self.model.modules():
            if isinstance(module, PaTHAttention):
                module.max_rollback = max(module.max_rollback, MAX_ROLLBACK)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every module of ours draws its own parameters when it is made."""

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embeddings."""
        return self.model.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embeddings; with tied embeddings the head's weight too."""
        self.model.embeddings = value
        # As `resize_token_embeddings` asks for; it tells the config of transformers itself.
        size = value.weight.shape[0]
        self.model.config = dataclasses.replace(self.model.config, vocab_size=size)

    def get_output_embeddings(self) -> nn.Linear | None:
        """Return the head, or `None` where the embeddings are its weight."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    def gradient_checkpointing_enable(self, *_: Any, **options: Any) -> None:
        """Make a block's inner values anew in the backward pass."""
        self.model.checkpoint_activations = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep a block's inner values."""
        self.model.checkpoint_activations = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether a block's inner values are made anew."""
        return self.model.checkpoint_activations

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HouseholderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, the loss if there are labels, and the cache if it is used.

        Args:
            input_ids: int64 `[B, T]`; with a cache, the tokens it does not hold yet.
            attention_mask: `[B, T']`, 0 for what fills rows up in front (or, without a cache,
                behind). It is read where sequences begin, and ignored afterwards.
            past_key_values: a `HouseholderCache`, which is changed.
            labels: int64 `[B, T]`, the tokens themselves, −100 where nothing is asked; they are
                shifted here. The logits are returned too, but in training mode with the config's
                `skip_training_logits`.
            use_cache: return a cache.
            logits_to_keep: of how many of the last positions, or of which, logits are wanted; all
                if 0.
            return_dict: must not be False.
            cu_seq_lens_q: bounds of packed sequences, int32 `[S + 1]`; then B = 1.
            seq_idx: in their place, the number of each token's sequence `[1, T]`.
            position_ids: in their place, positions `[1, T]`, which begin anew in every sequence;
                elsewhere they mean nothing, and with a cache or `attention_mask` they are ignored.
            num_items_in_batch: what the summed loss is divided by, which `Trainer` gives where
                several calls make one step; `None` for how many labels are asked.
            **options: others that transformers passes.

        Raises:
            ValueError: a shape, `attention_mask` or the cache does not fit.
            NotImplementedError: embeddings are given in place of tokens, or packed sequences with a
                cache.
        """
        if input_ids is None or options.get("inputs_embeds") is not None:
            raise NotImplementedError(
                "HouseholderForCausalLM: `input_ids` must be given, got `inputs_embeds` or "
                "nothing; give the tokens' numbers"
            )
        if return_dict is False:
            raise NotImplementedError(
                "HouseholderForCausalLM: `return_dict` must not be False; read the fields by name"
            )
        cache = self._cache(past_key_values, use_cache)
        bounds = packed_bounds(cu_seq_lens_q, seq_idx)
        if bounds is None and cache is None and attention_mask is None:
            bounds = _restarts(position_ids)
        if bounds is not None and cache is not None:
            raise NotImplementedError(
                "HouseholderForCausalLM: packed sequences must begin and end in one call, got "
                f"{len(bounds) - 1} of them and a cache; give use_cache=False, or rows of a batch"
            )
        beginning = cache is None or cache.seen == 0
        mask = _padding(attention_mask, input_ids, cache is not None) if beginning else None
        extra = 0
        if cache is None:
            hidden = self.model.hidden(input_ids, cu_seqlens=bounds, mask=mask)
        else:
            tokens, mask, extra = cache.take(input_ids, mask)
            hidden, cache.states = self.model.hidden(
                tokens,
                states=None if mask is not None else cache.states,
                mask=mask,
                return_states=True,
            )
            hidden = hidden[:, extra:]
        loss, logits = None, None
        if labels is not None:
            loss = linear_cross_entropy(hidden[:, :-1], self.model.head_weight, labels[:, 1:])
            if num_items_in_batch is not None:
                loss = loss * ((labels[:, 1:] != IGNORE_INDEX).sum() / num_items_in_batch)
        if loss is None or not (self.training and self.config.skip_training_logits):
            logits = self.model.logits(hidden[:, _kept(logits_to_keep)])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _cache(
        self, past: HouseholderCache | None, use_cache: bool | None
    ) -> HouseholderCache | None:
        if isinstance(past, HouseholderCache):
            return past
        if past is not None and past.get_seq_length() > 0:
            raise ValueError(
                "HouseholderForCausalLM: `past_key_values` must be a HouseholderCache, got "
                f"{type(past).__name__}; let the model make it"
            )
        # Decoding has no gradients; in training a cache would only cost memory.
        wanted = use_cache if use_cache is not None else past is not None
        if not wanted:
            return None
        return HouseholderCache(self.model)

    def _prepare_cache_for_generation(  # type: ignore[override] # the rest means nothing here
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **options: Any
    ) -> None:
        """Make a cache of ours: none of transformers' own fits."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                "HouseholderForCausalLM: `cache_implementation` must be None, got "
                f"{generation_config.cache_implementation!r}; the model has a cache of its own"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HouseholderCache(self.model)


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    """Return which positions' logits are wanted."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-logits_to_keep, None) if logits_to_keep else slice(None)


def _restarts(position_ids: Tensor | None) -> Tensor | None:
    """Return the bounds of packed sequences, at whose beginnings positions do not go on."""
    if position_ids is None:
        return None
    restarts = position_ids.diff() != 1
    return packed_bounds(None, F.pad(restarts.cumsum(-1), (1, 0))) if restarts.any() else None


def _padding(attention_mask: Tensor | None, input_ids: Tensor, cached: bool) -> Tensor | None:
    """Return which tokens are meant, or None if all are, or those behind are not."""
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"HouseholderForCausalLM: `attention_mask` must be {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}; give 1 for a token and 0 for what fills a row up"
        )
    mask = attention_mask.bool()
    if bool(mask.all()):
        return None
    if bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return mask
    if not cached and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return None  # nobody sees what stands behind
    raise ValueError(
        "HouseholderForCausalLM: `attention_mask` must be 0 in front of the tokens of a row and 1 "
        "from there on, got another; pad on the left (tokenizer.padding_side = 'left')"
    )


AutoConfig.register(MODEL_TYPE, HouseholderConfig, exist_ok=True)
AutoModelForCausalLM.register(HouseholderConfig, HouseholderForCausalLM, exist_ok=True)
