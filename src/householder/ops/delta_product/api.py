"""The public functions `delta_product` and `delta_product_step`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from householder.ops import _checks
from householder.ops._dispatch import apply, check_impl, examined, runs_triton
from householder.ops.delta_product import reference
from householder.ops.delta_product.activations import activate, check_activations, definition
from householder.ops.delta_product.op import (
    DeltaProduct,
    delta_product_step_inplace_op,
    delta_product_step_op,
    why_not_triton,
)
from householder.ops.wy import compute_dtype

IMPLS = ("triton", "chunk", "reference")


def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_norm: str | None = None,
    qk_norm_eps: float = 1e-6,
    beta_activation: str | None = None,
    gate_activation: str | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    recompute: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Run a matrix state through products of N Householder transformations per token.

    Per head, with the state S (K × V), at every token t:

        S ← exp(g_t) S
        S ← (I − β_tj k_tj k_tjᵀ) S + β_tj k_tj v_tjᵀ        for j = 0 … N−1
        o_t = scale · Sᵀ q_t

    N = 1 is the delta rule of DeltaNet, with `g` that of Gated DeltaNet; N > 1 is DeltaProduct.
    For reflectors, give unit keys (β = 2 reflects, β = 1 projects). What a layer does to its
    projections in front of that can be left to the call, which fuses it:

        q, k ← x / √(Σ x² + qk_norm_eps)              with qk_norm="l2"
        β ← σ(β), or 2σ(β)                            with beta_activation="sigmoid", "2sigmoid"
        g ← −exp(A_log) · softplus(g + dt_bias)       with gate_activation="softplus"

    Args:
        q: queries `[B, T, H, K]`.
        k: keys `[B, T, N, H, K]`, reflector j = 0 applied first.
        v: values `[B, T, N, HV, V]`. HV is a multiple of H: value head h uses query and key head
            `h // (HV // H)`.
        beta: coefficients `[B, T, N, HV]`; with unit keys, [0, 2] keeps the state bounded. With
            `beta_activation`, any numbers.
        g: forget gates `[B, T, HV]`, natural logarithm, ≤ 0 (`-inf` resets the state), or None.
            With `gate_activation`, any numbers.
        scale: factor on the output; `K ** -0.5` if None.
        initial_state: `[B, HV, K, V]`, or `[S, HV, K, V]` with `cu_seqlens`; zeros if None.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: bounds of S packed sequences along T, int32 `[S + 1]`, from 0 to T, on the
            device of the tensors; then B = 1. Sequences may be empty.
        qk_norm: `"l2"` brings q and k to unit length over each head's K, in float32 at least and
            rounded to their dtype; None takes them as they are.
        qk_norm_eps: added to the squared length, so that a zero vector stays zero.
        beta_activation: `"sigmoid"` (β in (0, 1)), `"2sigmoid"` (β in (0, 2), which lets a
            reflection reverse a direction), in float32 at least; or None.
        gate_activation: `"softplus"`, in float32 at least, which needs `g` and `A_log`; or None.
        A_log: logarithms of the gates' rates `[HV]`; only with `gate_activation`.
        dt_bias: added to `g` `[HV]`, or None for zero; only with `gate_activation`.
        recompute: keep only the inputs for the gradient, and make the states at the chunks' starts
            and what their tokens write anew in the backward pass: less memory for more time. In
            bfloat16 with K = V = 128 these are 3.6 times v. The reference keeps all it does.
        impl: `"chunk"` (blocked into matrix products, on any device), `"reference"` (a loop over
            tokens), `"triton"` (GPU kernels, for float32, bfloat16 and float16, K and V multiples
            of 16 up to 256, N ≤ 8), or `"auto"`, which is `"triton"` on a CUDA device for what
            the kernels take, and `"chunk"` otherwise.

    Returns:
        o `[B, T, HV, V]` in v's dtype, and the final state, shaped as `initial_state`, or None.
        The state is float32 for bfloat16 and float16 inputs, which are computed with in float32.

    Raises:
        ValueError: a shape, device or `cu_seqlens` does not fit, `impl` or another option is
            unknown, or options contradict one another.
        TypeError: an argument has the wrong type, or is not real floating point.
        NotImplementedError: `impl="triton"` cannot take the inputs, or a gradient of the second
            order or in forward mode is asked for of a form other than the reference.

    Gradients:
        First order, in closed form, to every floating-point tensor (`torch.func` grad, vmap and
        jacrev included). Higher orders and forward mode: `impl="reference"`.

    Examples:
        >>> import torch
        >>> from householder import delta_product
        >>> B, T, N, H, K, V = 1, 6, 2, 3, 8, 4
        >>> q, k = torch.randn(B, T, H, K), torch.randn(B, T, N, H, K)
        >>> k = torch.nn.functional.normalize(k, dim=-1)
        >>> v, beta = torch.randn(B, T, N, H, V), 2 * torch.rand(B, T, N, H)
        >>> o, state = delta_product(q, k, v, beta, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 6, 3, 4]), torch.Size([1, 3, 8, 4]))

        From projections, with the forget gate of Gated DeltaNet:

        >>> k, logits, a = torch.randn(B, T, N, H, K), torch.randn(B, T, N, H), torch.randn(B, T, H)
        >>> o, _ = delta_product(
        ...     q, k, v, logits, a, qk_norm="l2", beta_activation="2sigmoid",
        ...     gate_activation="softplus", A_log=torch.zeros(H), dt_bias=torch.zeros(H),
        ... )

    References:
        - Parallelizing Linear Transformers with the Delta Rule over Sequence Length (Yang et al.,
          2024), https://arxiv.org/abs/2406.06484
        - Gated Delta Networks: Improving Mamba2 with Delta Rule (Yang et al., 2024),
          https://arxiv.org/abs/2412.06464
        - DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products
          (Siems et al., 2025), https://arxiv.org/abs/2502.10297
    """
    tensors = (q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens)
    options = (qk_norm, qk_norm_eps, beta_activation, gate_activation, impl)
    (qk_eps, beta_scale), form = examined(_KNOWN_SEQUENCES, _examine_sequences, tensors, options)
    if cu_seqlens is not None:
        _checks.check_cu_seqlens("delta_product", cu_seqlens, v)
    scale = _checks.check_scale("delta_product", scale, k.shape[-1])
    q, k, beta, g = activate(q, k, beta, g, A_log, dt_bias, qk_eps, beta_scale, form)
    if impl == "reference":
        o, state = reference.forward(q, k, v, beta, g, scale, initial_state, cu_seqlens)
    else:
        save = (
            not recompute
            and torch.is_grad_enabled()
            and any(x is not None and x.requires_grad for x in (q, k, v, beta, g, initial_state))
        )
        args = (q, k, v, beta, g, scale, initial_state, cu_seqlens)
        o, state, *_ = apply(DeltaProduct, *args, save, form)
    return o, state if output_final_state else None


def delta_product_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    state: Tensor,
    inplace: bool = False,
    scale: float | None = None,
    qk_norm: str | None = None,
    qk_norm_eps: float = 1e-6,
    beta_activation: str | None = None,
    gate_activation: str | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advance the state of `delta_product` by one token.

    The recurrence is that of `delta_product`; calling this for each token in turn gives the same
    outputs and the same final state, to rounding.

    Args:
        q: query `[B, H, K]`.
        k: keys `[B, N, H, K]`, reflector j = 0 applied first.
        v: values `[B, N, HV, V]`, HV a multiple of H.
        beta: coefficients `[B, N, HV]`.
        g: forget gate `[B, HV]`, natural logarithm, ≤ 0, or None.
        state: `[B, HV, K, V]`; it is not changed, unless `inplace` is set.
        inplace: write the new state where the old one is, in float32 or wider: no second state is
            in memory, and a CUDA graph that has captured the call can be replayed for token after
            token. Without gradients: use it under `torch.no_grad`.
        scale: factor on the output; `K ** -0.5` if None.
        qk_norm: as in `delta_product`, and so are the five options that follow.
        qk_norm_eps: added to the squared length.
        beta_activation: `"sigmoid"`, `"2sigmoid"` or None.
        gate_activation: `"softplus"` or None.
        A_log: logarithms of the gates' rates `[HV]`.
        dt_bias: added to `g` `[HV]`.
        impl: `"reference"` (N rank-one updates), `"triton"` (one GPU kernel, without gradients: use
            it under `torch.no_grad`), or `"auto"`, which is `"triton"` on a CUDA device with
            gradients off for what the kernel takes, and `"reference"` otherwise.

    Returns:
        o `[B, HV, V]` in v's dtype, and the new state, in float32 or wider; with `inplace` that is
        `state`.

    Raises:
        ValueError: a shape or device does not fit, `impl` or another option is unknown, options
            contradict one another, or with `inplace` entries of `state` share memory.
        TypeError: an argument has the wrong type, or is not real floating point.
        NotImplementedError: `impl="triton"` cannot take the inputs, or gradients are on with it or
            with `inplace`.

    Gradients:
        Of the reference, every order, in reverse and forward mode.

    Examples:
        >>> import torch
        >>> from householder import delta_product_step
        >>> B, N, H, K, V = 2, 1, 3, 8, 4
        >>> q, k, v = torch.randn(B, H, K), torch.randn(B, N, H, K), torch.randn(B, N, H, V)
        >>> o, state = delta_product_step(
        ...     q, k, v, torch.rand(B, N, H), state=torch.zeros(B, H, K, V)
        ... )
        >>> o.shape, state.shape
        (torch.Size([2, 3, 4]), torch.Size([2, 3, 8, 4]))
    """
    tensors = (q, k, v, beta, g, state, A_log, dt_bias)
    options = (qk_norm, qk_norm_eps, beta_activation, gate_activation, impl)
    (qk_eps, beta_scale), use_triton, dtype = examined(
        _KNOWN_TOKENS, _examine_token, tensors, (*options, inplace, torch.is_grad_enabled())
    )
    scale = _checks.check_scale("delta_product_step", scale, k.shape[-1])
    if inplace:
        _checks.check_writable("delta_product_step", "state", state)
    state = state.to(dtype)
    if use_triton:
        args = (q, k, v, beta, g, scale, state, A_log, dt_bias, qk_eps, beta_scale)
        if inplace:
            return delta_product_step_inplace_op(*args), state
        return delta_product_step_op(*args)
    q, k, beta, g = definition(q, k, beta, g, A_log, dt_bias, qk_eps, beta_scale)
    o, new_state = reference.step(q, k, v, beta, g, scale, state)
    return o.to(v.dtype), state.copy_(new_state) if inplace else new_state


# What was found of calls by shapes, dtypes, devices and options: see `examined`.
_KNOWN_SEQUENCES: dict[Any, Any] = {}
_KNOWN_TOKENS: dict[Any, Any] = {}
Activations = tuple[float | None, float | None]


def _examine_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_norm: str | None,
    qk_norm_eps: float,
    beta_activation: str | None,
    gate_activation: str | None,
    impl: str,
) -> tuple[Activations, str]:
    """Check the arguments of `delta_product`; return its activations and the form that runs."""
    op = "delta_product"
    check_impl(op, impl, IMPLS)
    _check_sequence_inputs(q, k, v, beta, g, initial_state, cu_seqlens, A_log, dt_bias)
    options = (qk_norm, qk_norm_eps, beta_activation, gate_activation)
    activations = check_activations(op, *options, g, A_log, dt_bias, v.shape[3])
    others = {"beta": beta, "g": g, "initial_state": initial_state}
    use_triton = _runs_triton(op, impl, q, k, v, **others)
    return activations, "triton" if use_triton else "chunk"


def _examine_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    qk_norm: str | None,
    qk_norm_eps: float,
    beta_activation: str | None,
    gate_activation: str | None,
    impl: str,
    inplace: bool,
    with_gradients: bool,
) -> tuple[Activations, bool, torch.dtype]:
    """Check the arguments of `delta_product_step`.

    Returns its activations, whether the Triton form runs, and the dtype to bring the state to.
    """
    op = "delta_product_step"
    check_impl(op, impl, ("triton", "reference"))
    gate = {"g": g, "A_log": A_log, "dt_bias": dt_bias}
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "state": state, **gate}
    _checks.check_tensors(op, tensors, optional=gate)
    if v.dim() != 4:
        raise ValueError(
            f"{op}: `v` must be [B, N, HV, V], got shape {list(v.shape)}; "
            "give one token, with its N reflections on the second axis"
        )
    B, N, HV, V = v.shape
    H, K = _key_shape(op, k, 4)
    _check_counts(op, k, v, H, K, N, HV)
    sources = {"v": v, "k": k}
    _checks.check_shape(op, "k", k, "[B, N, H, K]", (B, N, H, K), **sources)
    _checks.check_shape(op, "q", q, "[B, H, K]", (B, H, K), **sources)
    _checks.check_shape(op, "beta", beta, "[B, N, HV]", (B, N, HV), **sources)
    if g is not None:
        _checks.check_shape(op, "g", g, "[B, HV]", (B, HV), **sources)
    _checks.check_shape(op, "state", state, "[B, HV, K, V]", (B, HV, K, V), **sources)
    options = (qk_norm, qk_norm_eps, beta_activation, gate_activation)
    activations = check_activations(op, *options, g, A_log, dt_bias, HV)
    dtype = compute_dtype(q, k, v, beta, state)
    if inplace and state.dtype != dtype:
        raise TypeError(
            f"{op}: `state` must be {dtype} with inplace=True, got {state.dtype}; convert it once"
        )
    if with_gradients:
        if impl == "triton" or inplace:
            option = "inplace=True" if inplace else 'impl="triton"'
            raise NotImplementedError(
                f"{op}: {option} has no gradients, and gradients are on; "
                'use torch.no_grad() or impl="reference", not in place'
            )
        return activations, False, dtype
    others = {"beta": beta, "g": g, "state": state.new_empty(0, dtype=dtype)}
    return activations, _runs_triton(op, impl, q, k, v, **others), dtype


def _runs_triton(
    op: str, impl: str, q: Tensor, k: Tensor, v: Tensor, **others: Tensor | None
) -> bool:
    """Return whether `impl` means the Triton form; raise if that cannot take these inputs."""
    return runs_triton(op, impl, v.device, lambda: why_not_triton(q, k, v, **others))


def _check_sequence_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    op = "delta_product"
    optional = {"g": g, "initial_state": initial_state, "A_log": A_log, "dt_bias": dt_bias}
    tensors = {"q": q, "k": k, "v": v, "beta": beta, **optional}
    _checks.check_tensors(op, tensors, optional=optional)
    if v.dim() != 5:
        raise ValueError(
            f"{op}: `v` must be [B, T, N, HV, V], got shape {list(v.shape)}; "
            "for N = 1 insert the axis with v.unsqueeze(2)"
        )
    B, T, N, HV, V = v.shape
    H, K = _key_shape(op, k, 5)
    _check_counts(op, k, v, H, K, N, HV)
    sources = {"v": v, "k": k}
    _checks.check_shape(op, "k", k, "[B, T, N, H, K]", (B, T, N, H, K), **sources)
    _checks.check_shape(op, "q", q, "[B, T, H, K]", (B, T, H, K), **sources)
    _checks.check_shape(op, "beta", beta, "[B, T, N, HV]", (B, T, N, HV), **sources)
    if g is not None:
        _checks.check_shape(op, "g", g, "[B, T, HV]", (B, T, HV), **sources)
    sequences, axes = B, "[B, HV, K, V]"
    if cu_seqlens is not None:
        sequences, axes = _checks.check_cu_seqlens(op, cu_seqlens, v), "[S, HV, K, V]"
        sources["cu_seqlens"] = cu_seqlens
    if initial_state is not None:
        shape = (sequences, HV, K, V)
        _checks.check_shape(op, "initial_state", initial_state, axes, shape, **sources)


def _key_shape(op: str, k: Tensor, dims: int) -> tuple[int, int]:
    if k.dim() != dims:
        axes = "[B, T, N, H, K]" if dims == 5 else "[B, N, H, K]"
        raise ValueError(
            f"{op}: `k` must be {axes}, got shape {list(k.shape)}; "
            f"for N = 1 insert the axis with k.unsqueeze({dims - 3})"
        )
    return k.shape[-2], k.shape[-1]


def _check_counts(op: str, k: Tensor, v: Tensor, H: int, K: int, N: int, HV: int) -> None:
    if N < 1:
        raise ValueError(
            f"{op}: `v` must hold N ≥ 1 values a token, got shape {list(v.shape)}; "
            "where nothing is to be written, give β = 0"
        )
    if K < 1:
        raise ValueError(
            f"{op}: `k` must have K ≥ 1 entries a head, got shape {list(k.shape)}; give wider keys"
        )
    if H == 0 or HV % H:
        raise ValueError(
            f"{op}: the value heads of `v` must be a multiple of the key heads of `k`, "
            f"got HV = {HV} and H = {H}; repeat or drop heads"
        )
