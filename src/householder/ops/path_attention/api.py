"""The public function `path_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from householder.ops import _checks
from householder.ops._dispatch import apply, check_impl, examined, runs_triton
from householder.ops.path_attention import reference
from householder.ops.path_attention.op import PathAttention, why_not_triton

IMPLS = ("triton", "chunk", "reference")
# Calls whose arguments have been examined, by shapes, dtypes and devices.
_KNOWN_CALLS: dict[Any, str] = {}


def path_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    initial: Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend with the product of the reflectors between two tokens as their relative position.

    Per head, with H_t = I − β_t w_t w_tᵀ, causal softmax attention over the logits

        a_ij = scale · k_jᵀ H_{j+1} ⋯ H_i q_i + g_{j+1} + … + g_i        j ≤ i
        o_i = Σ_j softmax_j(a_ij) v_j

    The reflector and the gate of a token act on what is between it and earlier tokens, not on its
    own key. Nothing is normalised here: for reflectors, give unit w (β = 2 reflects, β = 1
    projects, β = 0 gives attention without positions).

    Args:
        q: queries `[B, T, HQ, K]`. HQ is a multiple of H: query head h attends to key head
            `h // (HQ // H)`.
        k: keys `[B, T, H, K]`.
        v: values `[B, T, H, V]`.
        w: reflectors `[B, T, H, K]`; best float32, whatever q, k and v are in: an error of a
            reflector counts once for every pair of tokens that has it between them. The kernels
            multiply such w in two float16 halves beside half q, k and v.
        beta: coefficients `[B, T, H]`; with unit w, [0, 2] never lengthens a vector.
        g: forget gates `[B, T, HQ]`, natural logarithm, ≤ 0 (`-inf` hides all earlier tokens), or
            None. `scale` does not act on them.
        scale: factor on the inner products; `K ** -0.5` if None.
        sinks: one more logit per query head, `[HQ]`, or None. It takes its part of the softmax and
            has no value, so that a head may attend to nothing.
        window: how many tokens a query sees, its own included; all earlier ones if None.
        cu_seqlens: bounds of S packed sequences along T, int32 `[S + 1]`, from 0 to T, on the
            device of the tensors; then B = 1. Sequences may be empty.
        initial: k, v, w and beta, and g if `g` is given, of T0 tokens before the first query, as a
            tuple of tensors `[B, T0, …]`; T0 may be 0. Every query sees them, and windows and sinks
            count them, as if the sequence had begun with them. Not with `cu_seqlens`.
        impl: `"triton"` (kernels for CUDA; K and V multiples of 16 up to 256; float32, bfloat16 or
            float16), `"chunk"` (the same algorithm as PyTorch's matrix products, on any device),
            `"reference"` (a loop over tokens), or `"auto"`: `"triton"` on CUDA for what it takes,
            and `"chunk"` otherwise.

    Returns:
        o `[B, T, HQ, V]` in v's dtype. Products of bfloat16 and float16 inputs are summed in
        float32; `"chunk"` and `"reference"` also multiply in float32.

    Raises:
        ValueError: a shape, device, `window`, `cu_seqlens` or `initial` does not fit, or `impl` is
            unknown.
        TypeError: an argument has the wrong type, or is not real floating point; or a part of
            `initial` has another dtype than the argument that it precedes.
        NotImplementedError: `impl="triton"` cannot take the inputs, or a gradient of the second
            order or in forward mode is asked for of a form other than the reference.

    Gradients:
        First order, in closed form, to every floating-point tensor, those of `initial` among them
        (`torch.func` grad, vmap and jacrev included). Higher orders and forward mode:
        `impl="reference"`.

    Examples:
        >>> import torch
        >>> from householder import path_attention
        >>> B, T, HQ, H, K, V = 1, 6, 4, 2, 8, 5
        >>> q, k, v = torch.randn(B, T, HQ, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
        >>> w = torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1)
        >>> path_attention(q, k, v, w, 2 * torch.rand(B, T, H)).shape
        torch.Size([1, 6, 4, 5])

        The product of no reflectors is ordinary attention:

        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> o = path_attention(q, k, v, w, torch.zeros(B, T, H))
        >>> heads_first = (x.transpose(1, 2) for x in (q, k, v))
        >>> plain = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        >>> torch.allclose(o, plain.transpose(1, 2), atol=1e-5)
        True

        The second part of a sequence, after the first one:

        >>> first, second = ([x[:, part] for x in (k, v, w)] for part in (slice(4), slice(4, 6)))
        >>> beta = torch.rand(B, T, H)
        >>> o = path_attention(
        ...     q[:, 4:], *second, beta[:, 4:], initial=(*first, beta[:, :4])
        ... )
        >>> torch.allclose(o, path_attention(q, k, v, w, beta)[:, 4:], atol=1e-5)
        True

    References:
        - PaTH Attention: Position Encoding via Accumulating Householder Transformations (Yang et
          al., 2025), https://arxiv.org/abs/2505.16381
        - Forgetting Transformer: Softmax Attention with a Forget Gate (Lin et al., 2025),
          https://arxiv.org/abs/2503.02130
    """
    tensors = (q, k, v, w, beta, g, sinks, cu_seqlens, *_name_parts(initial))
    form = examined(_KNOWN_CALLS, _examine, tensors, (initial is not None, window, impl))
    if cu_seqlens is not None:
        _checks.check_cu_seqlens("path_attention", cu_seqlens, q)
    scale = _checks.check_scale("path_attention", scale, k.shape[-1])
    if initial is not None:
        of_keys = zip(initial, (k, v, w, beta), strict=False)
        k, v, w, beta = (torch.cat([before, x], dim=1) for before, x in of_keys)
        g = None if g is None else torch.cat([initial[4], g], dim=1)
    args = (q, k, v, w, beta, g, sinks, scale, window, cu_seqlens)
    if form == "reference":
        return reference.forward(*args)
    o, _ = apply(PathAttention, *args, form)
    return o.to(v.dtype)


def _examine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    *others: Any,
) -> str:
    """Check the arguments of `path_attention` and return the form that runs.

    The others are the parts of `initial`, whether there are any, `window` and `impl`.
    """
    *parts, has_initial, window, impl = others
    check_impl("path_attention", impl, IMPLS)
    check_inputs("path_attention", q, k, v, w, beta, g, sinks, window, cu_seqlens)
    if has_initial:
        _check_initial("path_attention", (k, v, w, beta, g), parts, cu_seqlens)
    if impl == "reference":
        return impl
    beside = {"w": w, "beta": beta, "g": g, "sinks": sinks}
    kernels = runs_triton(
        "path_attention", impl, q.device, lambda: why_not_triton(q, k, v, **beside)
    )
    return "triton" if kernels else "chunk"


def check_inputs(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    beta: Tensor,
    g: Tensor | None,
    sinks: Tensor | None,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise unless the arguments of the op, or of one like it, fit together."""
    tensors = {"q": q, "k": k, "v": v, "w": w, "beta": beta, "g": g, "sinks": sinks}
    _checks.check_tensors(op, tensors, optional=("g", "sinks"))
    for name, x, axes in (("q", q, "[B, T, HQ, K]"), ("v", v, "[B, T, H, V]")):
        if x.dim() != 4:
            raise ValueError(
                f"{op}: `{name}` must be {axes}, got shape {list(x.shape)}; "
                "tokens are the second axis and heads the third"
            )
    B, T, HQ, K = q.shape
    H = v.shape[2]
    if K < 1:
        raise ValueError(
            f"{op}: `q` must have K ≥ 1 entries a head, got shape {list(q.shape)}; give wider heads"
        )
    if H == 0 or HQ % H:
        raise ValueError(
            f"{op}: the query heads of `q` must be a multiple of the key heads of `v`, "
            f"got HQ = {HQ} and H = {H}; repeat or drop heads"
        )
    sources = {"q": q, "v": v}
    _checks.check_shape(op, "v", v, "[B, T, H, V]", (B, T, H, v.shape[3]), q=q)
    for name, x in (("k", k), ("w", w)):
        _checks.check_shape(op, name, x, "[B, T, H, K]", (B, T, H, K), **sources)
    _checks.check_shape(op, "beta", beta, "[B, T, H]", (B, T, H), **sources)
    if g is not None:
        _checks.check_shape(op, "g", g, "[B, T, HQ]", (B, T, HQ), q=q)
    if sinks is not None:
        _checks.check_shape(op, "sinks", sinks, "[HQ]", (HQ,), q=q)
    _check_window(op, window)
    if cu_seqlens is not None:
        _checks.check_cu_seqlens(op, cu_seqlens, q)


# The parts of `initial`, of which the last one may be absent.
_PARTS = {
    "k": "[B, T0, H, K]", "v": "[B, T0, H, V]", "w": "[B, T0, H, K]", "beta": "[B, T0, H]",
    "g": "[B, T0, HQ]",
}  # fmt: skip


def _name_parts(initial: Sequence[Tensor] | None) -> tuple[Tensor | None, ...]:
    """Return k, v, w, beta and g of the tokens before the first query, None for what is absent."""
    if initial is None:
        return (None,) * len(_PARTS)
    if not isinstance(initial, (tuple, list)) or len(initial) not in (4, 5):
        number = f" of {len(initial)}" if isinstance(initial, (tuple, list)) else ""
        raise TypeError(
            "path_attention: `initial` must be a tuple (k, v, w, beta), or (k, v, w, beta, g) with "
            f"gates, got {type(initial).__name__}{number}; give those of the tokens before the "
            "first query"
        )
    return (*initial, *(None,) * (len(_PARTS) - len(initial)))


def _check_initial(
    op: str,
    arguments: Sequence[Tensor | None],
    parts: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
) -> None:
    """Raise unless `parts`, of the tokens before, fit to k, v, w, beta and g."""
    if cu_seqlens is not None:
        raise ValueError(
            f"{op}: `initial` must be None where `cu_seqlens` packs sequences, got both; call the "
            "op once per sequence, or pack each sequence's earlier tokens with it"
        )
    if (parts[4] is None) != (arguments[4] is None):
        given, absent = ("g", "initial g") if parts[4] is None else ("initial g", "g")
        raise ValueError(
            f"{op}: `initial` must have g as its fifth part exactly where `g` is given, got "
            f"`{given}` and no `{absent}`; gates of no effect are zeros"
        )
    named = {f"initial {name}": part for name, part in zip(_PARTS, parts, strict=True)}
    _checks.check_tensors(op, named, optional=("initial g",))
    _checks.check_same_device(op, {"k": arguments[0], **named})
    k = named["initial k"]
    T0 = k.shape[1] if k is not None and k.dim() > 1 else 0
    for (name, part), axes, x in zip(named.items(), _PARTS.values(), arguments, strict=True):
        if part is None or x is None:
            continue
        _checks.check_shape(op, name, part, axes, (x.shape[0], T0, *x.shape[2:]))
        if part.dtype != x.dtype:
            raise TypeError(
                f"{op}: `{name}` must have the dtype of what it precedes, {x.dtype}, got "
                f"{part.dtype}; convert one of them with .to(...)"
            )


def _check_window(where: str, window: object) -> None:
    """Raise unless `window` is None or a whole number of tokens, at least 1."""
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(
            f"{where}: `window` must be an int or None, got {window!r}; "
            "give the number of tokens a query sees"
        )
    if window < 1:
        raise ValueError(
            f"{where}: `window` must be at least 1, got {window}; a query sees its own token"
        )
