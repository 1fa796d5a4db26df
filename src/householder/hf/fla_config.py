"""Configs of flash-linear-attention's models in our words, and ours in theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from householder.models import CausalLM, CausalLMConfig
from householder.nn import MIXERS

_PATH = ("path_attention", "forgetting_path_attention")
_PATH_RANK = 32
_ATTENTIONS = ("rotary_attention", "sliding_window_attention")


class ConversionError(ValueError):
    """A checkpoint that cannot be converted exactly."""


def config_from_fla(theirs: Mapping[str, Any]) -> CausalLMConfig:
    """Return the config of the same model here.

    Args:
        theirs: the content of their `config.json`.

    Raises:
        ConversionError: it says something that no config of ours can.
    """
    kind = str(theirs.get("model_type"))
    if kind not in READERS:
        raise ConversionError(
            f"from_fla: `model_type` must be one of {', '.join(READERS)}, got {kind!r}; there is "
            "no such model here"
        )
    for name, only in {
        "hidden_act": ("swish", "silu"),
        "output_gate_activation": ("swish", "silu"),
        "attnres_block_size": (None,),
        "use_beta": (True,),
        "use_output_norm": (True,),
        "conv_bias": (False,),
        "elementwise_affine": (True,),
    }.items():
        if theirs.get(name, only[0]) not in only:
            raise ConversionError(
                f"from_fla: `{name}` must be {only[0]!r}, got {theirs[name]!r}; there is no such "
                "layer here"
            )
    width, ratio = theirs.get("intermediate_size"), theirs.get("hidden_ratio") or 4
    if width is None:
        width = -(-int(theirs["hidden_size"] * ratio * 2 / 3) // 256) * 256
    fields = {
        "vocab_size": theirs["vocab_size"],
        "d_model": theirs["hidden_size"],
        "num_layers": theirs["num_hidden_layers"],
        "mlp_width": width,
        "norm_eps": theirs.get("norm_eps", 1e-6),
        "tie_embeddings": theirs.get("tie_word_embeddings", False),
        **READERS[kind](theirs),
    }
    return CausalLMConfig.from_dict(_with_attention(fields, theirs.get("attn")))


def _read_delta_net(theirs: Mapping[str, Any]) -> dict[str, Any]:
    heads = theirs["num_heads"]
    key, value = (
        theirs["hidden_size"] * theirs.get(name, 1.0) / heads for name in ("expand_k", "expand_v")
    )
    return {
        "pattern": "delta_net",
        "num_heads": heads,
        "head_dim": round(key),
        "expand_v": value / key,
        "use_output_gate": theirs.get("use_gate", False),
        "qk_activation": theirs.get("qk_activation", "silu"),
        "qk_norm": theirs.get("qk_norm", "l2"),
        **_read_shared(theirs),
    }


def _read_gated_deltanet(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "pattern": "gated_delta_net",
        "use_output_gate": theirs.get("use_gate", True),
        **_read_heads(theirs),
        **_read_shared(theirs),
    }


def _read_gated_deltaproduct(theirs: Mapping[str, Any]) -> dict[str, Any]:
    gated = theirs.get("use_forget_gate", False)
    return {
        "pattern": "gated_delta_product" if gated else "delta_product",
        "num_householder": theirs.get("num_householder", 1),
        "use_output_gate": theirs.get("use_output_gate", True),
        **_read_heads(theirs),
        **_read_shared(theirs),
    }


def _read_heads(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_heads": theirs["num_heads"],
        "head_dim": theirs["head_dim"],
        "num_value_heads": theirs.get("num_v_heads"),
        "expand_v": float(theirs.get("expand_v", 2.0)),
    }


def _read_shared(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "allow_neg_eigval": theirs.get("allow_neg_eigval", False),
        "use_short_conv": theirs.get("use_short_conv", True),
        "conv_size": theirs.get("conv_size", 4),
    }


def _read_path_attn(theirs: Mapping[str, Any]) -> dict[str, Any]:
    heads = theirs["num_heads"]
    head_dim = theirs["hidden_size"] // heads
    key_heads = theirs.get("num_kv_heads") or heads
    low_rank = theirs.get("use_low_rank_w", True)
    convolved = theirs.get("use_w_shortconv", True)
    return {
        "pattern": _PATH[1] if theirs.get("use_forget_gate", False) else _PATH[0],
        "attention_heads": heads,
        "attention_key_heads": key_heads,
        "head_dim": head_dim,
        "path_w_rank": _PATH_RANK if low_rank else key_heads * head_dim,
        "use_short_conv": convolved,
        # Without the convolution theirs drops the activation too, which is a part of it.
        "path_w_activation": "silu" if convolved else "identity",
        # Theirs scales the gates like the inner products; the paper does not.
        "path_gate_scale": head_dim**-0.5,
    }


READERS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "delta_net": _read_delta_net,
    "gated_deltanet": _read_gated_deltanet,
    "gated_deltaproduct": _read_gated_deltaproduct,
    "path_attn": _read_path_attn,
}


def _with_attention(fields: dict[str, Any], attn: Any) -> dict[str, Any]:
    """Return the fields with the layers that are rotary attention in theirs."""
    if not attn:
        return fields
    specs = [attn] if isinstance(attn, Mapping) else list(attn)
    if len(specs) != 1 or specs[0].get("qkv_bias"):
        raise ConversionError(
            f"from_fla: `attn` must be one kind of attention without biases, got {attn}; there is "
            "no such mixture here"
        )
    (spec,) = specs
    window, heads = spec.get("window_size"), spec["num_heads"]
    names = [fields["pattern"]] * fields["num_layers"]
    for layer in spec["layers"]:
        names[layer] = _ATTENTIONS[0] if window is None else _ATTENTIONS[1]
    return {
        **fields,
        "pattern": ",".join(names),
        "attention_heads": heads,
        "attention_key_heads": spec.get("num_kv_heads") or heads,
        "attention_head_dim": fields["d_model"] // heads,
        "rope_base": float(spec.get("rope_theta") or 10_000.0),
        **({} if window is None else {"window": window}),
    }


def config_to_fla(ours: CausalLMConfig) -> dict[str, Any]:
    """Return the content of the `config.json` of the same model there.

    Raises:
        ConversionError: no model there is the same.
    """
    names = ours.layer_names()
    kinds = {name for name in names if name not in _ATTENTIONS}
    if len(kinds) != 1 or not kinds <= {*MIXERS, *_PATH}:
        raise ConversionError(
            "to_fla: `pattern` must be one recurrent mixer with or without rotary attention, or "
            f"PaTH, got {', '.join(sorted(set(names)))}; there is no such model there"
        )
    (kind,) = kinds
    block: Any = CausalLM(ours, device="meta").layers[names.index(kind)]
    mixer = block.mixer
    shared = {
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.d_model,
        "num_hidden_layers": ours.num_layers,
        "intermediate_size": block.mlp.up_proj.out_features,
        "norm_eps": ours.norm_eps,
        "tie_word_embeddings": ours.tie_embeddings,
        "hidden_act": "swish",
    }
    if kind in _PATH:
        return {**shared, **_write_path_attn(ours, kind, names, mixer)}
    return {**shared, **_write_recurrent(ours, kind, mixer), **_write_attention(ours, names)}


def _write_path_attn(
    ours: CausalLMConfig, kind: str, names: tuple[str, ...], mixer: Any
) -> dict[str, Any]:
    gated = kind == _PATH[1]
    activation = "silu" if ours.use_short_conv else "identity"
    required = {
        "pattern": (set(names) == {kind}, "PaTH alone", ours.pattern),
        "head_dim": (
            mixer.head_dim * mixer.num_heads == ours.d_model,
            "d_model / heads",
            mixer.head_dim,
        ),
        "path_w_activation": (
            ours.path_w_activation == activation,
            activation,
            ours.path_w_activation,
        ),
        "attention_qk_norm": (not ours.attention_qk_norm, False, ours.attention_qk_norm),
        "path_w_rank": (
            ours.path_w_rank in (_PATH_RANK, mixer.num_key_heads * mixer.head_dim),
            f"{_PATH_RANK} or H * K",
            ours.path_w_rank,
        ),
        "attention_norm_eps": (ours.attention_norm_eps == 1e-6, 1e-6, ours.attention_norm_eps),
        "path_gate_scale": (
            not gated or math.isclose(ours.path_gate_scale, mixer.head_dim**-0.5),
            "K^(-1/2)",
            ours.path_gate_scale,
        ),
    }
    for name, (fits, wanted, got) in required.items():
        if not fits:
            raise ConversionError(
                f"to_fla: `{name}` must be {wanted}, got {got}; there is no such layer there"
            )
    return {
        "model_type": "path_attn",
        "architectures": ["PaTHAttentionForCausalLM"],
        "num_heads": mixer.num_heads,
        "num_kv_heads": mixer.num_key_heads,
        "use_forget_gate": gated,
        "use_w_shortconv": ours.use_short_conv,
        # Theirs has rank 32, or one projection, into which our two are multiplied.
        "use_low_rank_w": ours.path_w_rank == _PATH_RANK,
    }


def _write_recurrent(ours: CausalLMConfig, kind: str, mixer: Any) -> dict[str, Any]:
    shared = {
        "num_heads": mixer.num_heads,
        "allow_neg_eigval": mixer.allow_neg_eigval,
        "use_short_conv": ours.use_short_conv,
        "conv_size": ours.conv_size,
    }
    if kind == "delta_net":
        if mixer.num_value_heads != mixer.num_heads or ours.qk_norm == "none":
            raise ConversionError(
                'to_fla: `num_value_heads` must be num_heads and `qk_norm` "l2" or "sum" in '
                f"DeltaNet, got {mixer.num_value_heads} and {ours.qk_norm!r}; there is no such "
                "layer there"
            )
        return {
            "model_type": "delta_net",
            "architectures": ["DeltaNetForCausalLM"],
            "expand_k": mixer.num_heads * mixer.head_dim / ours.d_model,
            "expand_v": mixer.num_heads * mixer.value_head_dim / ours.d_model,
            "use_gate": mixer.use_output_gate,
            "qk_activation": ours.qk_activation,
            "qk_norm": ours.qk_norm,
            **shared,
        }
    if (ours.qk_activation, ours.qk_norm) != ("silu", "l2"):
        raise ConversionError(
            "to_fla: `qk_activation` must be 'silu' and `qk_norm` 'l2' but in DeltaNet, got "
            f"{ours.qk_activation!r} and {ours.qk_norm!r}; there is no such layer there"
        )
    heads = {
        "head_dim": mixer.head_dim,
        "num_v_heads": mixer.num_value_heads,
        "expand_v": mixer.value_head_dim / mixer.head_dim,
    }
    if kind == "gated_delta_net":
        return {
            "model_type": "gated_deltanet",
            "architectures": ["GatedDeltaNetForCausalLM"],
            "use_gate": mixer.use_output_gate,
            **heads,
            **shared,
        }
    if mixer.num_value_heads != mixer.num_heads:
        raise ConversionError(
            f"to_fla: `num_value_heads` must be num_heads={mixer.num_heads} in DeltaProduct, got "
            f"{mixer.num_value_heads}; their config has no such field"
        )
    del heads["num_v_heads"]
    return {
        "model_type": "gated_deltaproduct",
        "architectures": ["GatedDeltaProductForCausalLM"],
        "use_output_gate": mixer.use_output_gate,
        "use_forget_gate": kind == "gated_delta_product",
        "num_householder": mixer.num_householder,
        **heads,
        **shared,
    }


def _write_attention(ours: CausalLMConfig, names: tuple[str, ...]) -> dict[str, Any]:
    kinds = {name for name in names if name in _ATTENTIONS}
    if not kinds:
        return {}
    if len(kinds) > 1 or ours.attention_qk_norm:
        raise ConversionError(
            "to_fla: attention layers must be of one kind and without `attention_qk_norm`, got "
            f"{', '.join(sorted(kinds))}; there is no such mixture there"
        )
    (kind,) = kinds
    layers = [i for i, name in enumerate(names) if name == kind]
    attention: Any = CausalLM(ours, device="meta").layers[layers[0]].mixer
    if attention.num_heads * attention.head_dim != ours.d_model:
        raise ConversionError(
            f"to_fla: `attention_head_dim` must be d_model / heads, got {attention.head_dim}; "
            "there is no such layer there"
        )
    return {
        "attn": {
            "layers": layers,
            "num_heads": attention.num_heads,
            "num_kv_heads": attention.num_key_heads,
            "qkv_bias": False,
            "rope_theta": ours.rope_base,
            "window_size": attention.window,
        }
    }
