"""Checks of options and inputs; an error says what was required, what came, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

from householder.ops._checks import check_cu_seqlens, check_floating, check_tensor


def check_positive_int(where: str, name: str, value: object) -> None:
    """Raise unless `value` is an int of at least 1 (a bool is not an int here)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{where}: `{name}` must be an int, got {value!r}; pass a whole number >= 1"
        )
    if value < 1:
        raise ValueError(f"{where}: `{name}` must be at least 1, got {value}; pass a larger number")


def check_positive_float(where: str, name: str, value: object) -> None:
    """Raise unless `value` is a number greater than 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: `{name}` must be a number, got {value!r}; pass a float > 0")
    if not value > 0:
        raise ValueError(f"{where}: `{name}` must be greater than 0, got {value}; pass a float > 0")


def check_choice(where: str, name: str, value: object, choices: Iterable[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    names = sorted(choices)
    if value not in names:
        listed = ", ".join(repr(n) for n in names)
        raise ValueError(
            f"{where}: `{name}` must be one of {listed}, got {value!r}; pick one of them"
        )


def default_head_dim(
    where: str, d_model: int, num_heads: int, key_share: Fraction = Fraction(1)
) -> int:
    """Return K with H · K = key_share · d_model, or raise where that is not a whole number."""
    head_dim = key_share * d_model / num_heads
    if head_dim.denominator != 1:
        raise ValueError(
            f"{where}: without `head_dim`, {key_share} * d_model must be a multiple of "
            f"num_heads={num_heads}, got d_model={d_model}; set head_dim"
        )
    return int(head_dim)


def check_sequences(where: str, x: Tensor, channels: int, cu_seqlens: Tensor | None) -> int:
    """Check `x [B, T, channels]` and `cu_seqlens`, and return how many sequences they hold."""
    check_tensor(where, "x", x)
    check_floating(where, {"x": x})
    if x.dim() != 3 or x.shape[-1] != channels:
        raise ValueError(
            f"{where}: `x` must be [B, T, {channels}], got shape {list(x.shape)}; "
            "put the features last, and give a single token the axis T = 1"
        )
    if cu_seqlens is None:
        return x.shape[0]
    return check_cu_seqlens(where, cu_seqlens, x)


def check_token(where: str, x: Tensor, d_model: int) -> None:
    """Raise unless `x` is one token of each sequence, `[B, d_model]`."""
    if x.dim() != 2 or x.shape[-1] != d_model:
        raise ValueError(
            f"{where}.step: `x` must be [B, d_model={d_model}], got shape {list(x.shape)}; "
            "use forward for more than one token"
        )


def check_mask(
    where: str, mask: Tensor, x: Tensor, state: object, cu_seqlens: Tensor | None
) -> None:
    """Raise unless `mask` says which tokens of `x [B, T, D]` fill rows up in front."""
    if state is not None or cu_seqlens is not None:
        raise ValueError(
            f"{where}: `mask` must come at the beginning of rows of a batch, got it with "
            f"{'`cu_seqlens`' if state is None else 'a state'}; give it to the first call alone"
        )
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(
            f"{where}: `mask` must be bool {list(x.shape[:2])}, got {mask.dtype} "
            f"{list(mask.shape)}; give True for every token and False in front of them"
        )


def check_state_type(where: str, state: object, kind: type) -> None:
    """Raise TypeError unless `state` is of the kind that this layer makes."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{where}: `state` must be a {kind.__name__}, got {type(state).__name__}; make it with "
            "init_state or reserve, or give what this layer returned"
        )


def check_state_tensor(where: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless `x` has the shape that this mixer and this batch give it."""
    if x.shape != shape:
        raise ValueError(
            f"{where}: `{name}` must be {list(shape)}, got shape {list(x.shape)}; "
            "use a state of this mixer and of this batch size"
        )
