"""Argument checks that more than one op needs, with the errors they raise."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor


def check_tensor(op: str, name: str, x: object) -> None:
    """Raise TypeError unless `x` is a tensor."""
    if not isinstance(x, Tensor):
        got, remedy = ("None", "give one") if x is None else (type(x).__name__, "convert it first")
        raise TypeError(f"{op}: `{name}` must be a tensor, got {got}; {remedy}")


def check_tensors(
    op: str,
    tensors: Mapping[str, Tensor | None],
    *,
    optional: Collection[str] = (),
    allow_complex: bool = False,
) -> None:
    """Raise unless all are floating-point tensors on one device; those in `optional` may be None.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: two are on different devices.
    """
    for name, x in tensors.items():
        if x is not None or name not in optional:
            check_tensor(op, name, x)
    check_floating(op, tensors, allow_complex)
    check_same_device(op, tensors)


def check_shape(
    op: str, name: str, x: Tensor, axes: str, shape: Sequence[int], **sources: Tensor
) -> None:
    """Raise ValueError unless `x` has the given shape; `axes` names it, as in "[B, T, H]".

    The sizes are those of `sources`: the error shows them, since it may be one of these that is
    wrong.
    """
    if tuple(x.shape) != tuple(shape):
        given = " and ".join(f"`{name}` {list(x.shape)}" for name, x in sources.items())
        raise ValueError(
            f"{op}: `{name}` must be {axes} = {list(shape)}, got shape {list(x.shape)}; "
            f"the sizes come from {given or 'the other arguments'}, see the docstring"
        )


def check_number(op: str, name: str, value: object) -> float:
    """Return a number as a float.

    Raises:
        TypeError: it is none. A tensor is refused too: its gradient would be lost without a word,
            and reading it would wait for the device.
    """
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Tensor):
        got, remedy = "a tensor", "give a float, or multiply a tensor argument by it"
    else:
        got, remedy = repr(value), "give a float"
    raise TypeError(f"{op}: `{name}` must be a number, got {got}; {remedy}")


def check_int(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is an int, traced or not; a bool is none here."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: `{name}` must be an int, got {value!r}; give a count")


def check_floating(
    op: str, tensors: Mapping[str, Tensor | None], allow_complex: bool = False
) -> None:
    """Raise TypeError unless every tensor is floating point (or complex, where allowed)."""
    for name, x in tensors.items():
        if x is None or x.is_floating_point() or (allow_complex and x.is_complex()):
            continue
        kind = "real or complex floating point" if allow_complex else "real floating point"
        raise TypeError(f"{op}: `{name}` must be {kind}, got {x.dtype}; convert it with .to(...)")


def check_same_device(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless all tensors are on the first one's device."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first, reference = next(iter(given.items()))
    for name, x in given.items():
        if x.device != reference.device:
            raise ValueError(
                f"{op}: all tensors must be on one device, got `{first}` on {reference.device} and "
                f"`{name}` on {x.device}; move them with .to(device)"
            )


def check_scale(op: str, scale: float | None, K: int) -> float:
    """Return the factor on inner products of K entries: `scale`, or K⁻¹ᐟ² if None."""
    return K**-0.5 if scale is None else check_number(op, "scale", scale)


def check_writable(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError if places of `x` share memory, so that what is written there is lost."""
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"{op}: `{name}` must have memory of its own for every entry, got strides "
            f"{list(x.stride())} of an expanded tensor; give {name}.clone()"
        )


def check_cu_seqlens(op: str, cu_seqlens: Tensor, x: Tensor) -> int:
    """Check the bounds of the packed batch `x [B, T, ...]`, and return how many sequences it holds.

    The values are read only where that costs nothing: on the CPU, and not while compiling.
    """
    check_tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: `cu_seqlens` must be int32 [S + 1] with S ≥ 1, got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}; give the S + 1 bounds 0 = b_0 ≤ … ≤ b_S = T as int32"
        )
    B, T = x.shape[:2]
    if B != 1:
        raise ValueError(
            f"{op}: with `cu_seqlens` the batch must be packed as B = 1, got B = {B}; "
            "concatenate the sequences along T"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"{op}: `cu_seqlens` must be on {x.device} as the other tensors are, got "
            f"{cu_seqlens.device}; move it with .to(device)"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != T or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(
                f"{op}: `cu_seqlens` must rise from 0 to T = {T}, got {_shorten(bounds)}; "
                "give cumulative sequence lengths"
            )
    return cu_seqlens.shape[0] - 1


def _shorten(values: list[int]) -> str:
    return (
        str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:7]))}, …, {values[-1]}]"
    )
