"""Which form of an op runs, and how an op is registered with PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMESPACE = "householder"

Function = TypeVar("Function", bound=Callable[..., Any])

# What the Triton kernels of every op are made for: dtypes, and K and V up to TRITON_MAX_DIM.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_MAX_DIM = 256
# How many sizes of calls are remembered; what is kept of one takes a few kilobytes at most.
MOST_KNOWN = 1024
# Devices of which one cannot even ask whether autocast is on. PyTorch would say so of each, but
# Dynamo 2.11 does not trace that question.
_WITHOUT_AUTOCAST = ("meta", "lazy", "vulkan")
_PLAIN = (str, float, int, bool, type(None))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # something forbids its import
        return False


# Looked up once: the choice of a form must not change in between, nor break a compiled graph.
HAS_TRITON = _is_installed("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, as in tests


def check_impl(op: str, impl: str, available: Sequence[str]) -> None:
    """Raise ValueError unless `impl` names one of the op's forms."""
    if impl != "auto" and impl not in available:
        names = ", ".join(f'"{name}"' for name in ("auto", *available))
        raise ValueError(
            f'{op}: `impl` must be one of {names}, got "{impl}"; "auto" suits most uses'
        )


def why_not_triton(tensors: Mapping[str, Tensor | None], sizes: Mapping[str, int]) -> str | None:
    """Return why no Triton kernel can take these inputs, or None if nothing is in the way.

    A pure function of device, dtypes and sizes, and of whether triton is installed. The tensors are
    on one device; `sizes` are dimensions whose whole rows the kernels load.
    """
    device = next(x.device for x in tensors.values() if x is not None)
    if device.type != "cuda" and not INTERPRETING:
        return f"it needs tensors on a CUDA device, got {device}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    for name, x in tensors.items():
        if x is not None and x.dtype not in TRITON_DTYPES:
            return f"it takes float32, bfloat16 and float16, got `{name}` in {x.dtype}"
    for name, size in sizes.items():
        if size % 16 or not 0 < size <= TRITON_MAX_DIM:
            return f"{name} must be a multiple of 16 up to {TRITON_MAX_DIM}, got {size}"
    return None


def runs_triton(
    op: str, impl: str, device: torch.device, why_not: Callable[[], str | None]
) -> bool:
    """Return whether `impl` means the Triton form; raise if that cannot take the inputs.

    `why_not` says why it cannot, if so.
    """
    if impl not in ("auto", "triton") or (impl == "auto" and device.type != "cuda"):
        return False
    reason = why_not()
    if reason is not None and impl == "triton":
        raise NotImplementedError(
            f'{op}: impl="triton" cannot run: {reason}; impl="auto" chooses a form that can'
        )
    return reason is None


def register(name: str, schema: str, fake: Callable[..., Any], kernel: Callable[..., Any]) -> Any:
    """Define `householder::name`, with its fake kernel and its kernel, on the CPU and on CUDA.

    `torch.library.define` and `impl` cost a third of the host time of `custom_op` (measured on an
    H200's host).

    Returns:
        The op, to be called.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        torch.library.impl(qualified, device, kernel)
    torch.library.register_fake(qualified, fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def with_signature(function: Function) -> Function:
    """Let `function` remember its signature, for the `forward` of an `autograd.Function`.

    `apply` asks for it at every call, and reading it off the code takes longer than a kernel's
    launch.
    """
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Be the `setup_context` of an `autograd.Function` that is not differentiable."""


def first_order_only(form: str) -> Any:
    """Return the `backward` of a gradient that is not differentiable itself: it refuses.

    Args:
        form: the op and its form, as in "swiglu: the Triton form".
    """

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"{form} has first-order gradients only, and a second order was asked for; use "
            'impl="reference", which has every order'
        )

    return staticmethod(backward)


@functools.cache
def without_forward_mode(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Return `function` with a `jvp` that says what to do instead.

    Dynamo takes no function that has a `jvp`, so it is not in the function itself.
    """
    if function.jvp is not torch.autograd.Function.jvp:
        return function
    op = function.__module__.split(".ops.")[1].split(".")[0]

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{op}: this form has no forward-mode gradients, and one was asked for; use "
            'impl="reference", which has them'
        )

    return type(function.__name__, (function,), {"jvp": staticmethod(jvp)})


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call `function.apply(*args)`, at less cost where nothing is transformed or compiled.

    `apply` binds the arguments to their names again, though none has a default, and that takes as
    long as a launch. Its own last step is the one taken here; with gradients off, in a backward
    pass too, that one comes down to `forward`.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return without_forward_mode(function).apply(*args)
    if not torch.is_grad_enabled():
        return function.forward(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def is_plain_call() -> bool:
    """Return whether nothing but PyTorch's reverse mode looks at a call.

    What is compiled, transformed by `torch.func` or differentiated in forward mode goes through an
    `autograd.Function` even where no gradient is wanted.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep what took time to make, until it is too much: lengths may change at every call."""
    if len(known) >= MOST_KNOWN:
        known.clear()
    known[key] = value


def examined(
    known: dict[Any, Any],
    examine: Callable[..., Any],
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> Any:
    """Return `examine(*tensors, *options)`, or what is `known` of such a call.

    Nothing of the tensors but their shapes, dtypes and devices may matter to it.
    """
    plain = all(type(x) in _PLAIN for x in options) and not torch.compiler.is_compiling()
    # By type too: 2 and 2.0, 1 and True are equal, and not as good.
    key: list[Any] = [options, *map(type, options)]
    for x in tensors:
        if x is None:
            key.append(None)
        elif type(x) in (Tensor, torch.nn.Parameter):
            key.append((x.shape, x.dtype, x.device))
        else:  # no tensor at all, or one whose shape may be a symbol
            plain = False
    if not plain:
        return examine(*tensors, *options)
    place = tuple(key)
    found = known.get(place)
    if found is None:
        found = examine(*tensors, *options)
        remember(known, place, found)
    return found


def without_autocast(function: Function) -> Function:
    """Run a form of an op with autocast off: it chooses the dtypes of its products itself.

    A state sums over all tokens, and rounding it at each of them would add up. The first argument
    must be a tensor; it tells the device.
    """

    @functools.wraps(function)
    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with autocast_off(x.device):
            return function(x, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off on the device."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype in which autocast makes products on the device, or None where it is off."""
    if device.type in _WITHOUT_AUTOCAST or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def contiguous_like(x: Tensor, **options: Any) -> Tensor:
    """Return an uninitialised contiguous tensor of x's shape, whatever x's strides are."""
    return torch.empty_like(x, memory_format=torch.contiguous_format, **options)


def fold_into_heads(x: Tensor | None, dim: int | None, size: int, heads: int) -> Tensor | None:
    """Join the dimension `dim` that vmap batches, of `size`, to the head axis of `x`.

    Heads are independent. The batched dimension goes before them, which keeps each group of value
    heads beside its key head.
    """
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, heads).flatten(heads, heads + 1)


def unfold_from_heads(x: Tensor, size: int, heads: int) -> Tensor:
    """Undo `fold_into_heads`; the batched dimension comes to lie at `heads`."""
    return x.unflatten(heads, (size, x.shape[heads] // size))
