"""What a layer does between its projections and the recurrence, as options of `delta_product`.

    q, k ← x / √(Σ x² + eps)                       `qk_norm="l2"`, over the K entries of each head
    β ← σ(x)  or  2σ(x)                            `beta_activation="sigmoid"`, `"2sigmoid"`
    g ← −exp(A_log) · softplus(a + dt_bias)        `gate_activation="softplus"`

`definition` says it in PyTorch, differentiable to any order: the reference and the chunked form run
it. The Triton form runs one kernel each way, behind `Activate`. For the gradient of the norms that
keeps the unit vectors, which the recurrence keeps in any case, and one number a row:

    dx = r (dy − y (y · dy))        with y = r x,  r = 1 / √(Σ x² + eps)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from householder.ops import _checks
from householder.ops._dispatch import (
    apply,
    contiguous_like,
    first_order_only,
    fold_into_heads,
    keep_nothing,
    register,
    unfold_from_heads,
    with_signature,
    without_autocast,
)
from householder.ops.normalization import l2_normalize
from householder.ops.wy import compute_dtype

BETA_SCALES = {"sigmoid": 1.0, "2sigmoid": 2.0}


def sigmoid_beta(logits: Tensor, scale: float) -> Tensor:
    """Return `scale · σ(logits)`, in float32 at least.

    Just below 2, bfloat16 has steps of 2⁻⁷, and a reflection whose beta is off by one of them
    shrinks its key's direction by nearly 1 % at every token.
    """
    beta = logits.to(compute_dtype(logits)).sigmoid()
    return beta if scale == 1 else scale * beta


def softplus_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
    """Return `−exp(A_log) · softplus(a + dt_bias)` for `a [..., HV]`, in float32 at least."""
    dtype = compute_dtype(a)
    a = a.to(dtype) if dt_bias is None else a.to(dtype) + dt_bias.to(dtype)
    return -A_log.to(dtype).exp() * F.softplus(a)


@without_autocast
def definition(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    qk_eps: float | None,
    beta_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q, k, β and g as the recurrence takes them, of whole sequences or of one token.

    Args:
        q: `[..., H, K]`; it keeps its dtype, as does k.
        k: `[..., N, H, K]`.
        beta: `[..., N, HV]`.
        g: `[..., HV]` or None.
        A_log: `[HV]`; None leaves g as it is.
        dt_bias: `[HV]` or None.
        qk_eps: None leaves q and k as they are.
        beta_scale: None leaves β as it is.
    """
    if qk_eps is not None:
        q, k = l2_normalize(q, qk_eps), l2_normalize(k, qk_eps)
    if beta_scale is not None:
        beta = sigmoid_beta(beta, beta_scale)
    if g is not None and A_log is not None:
        g = softplus_gate(g, A_log, dt_bias)
    return q, k, beta, g


def activate(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    qk_eps: float | None,
    beta_scale: float | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Do what `definition` says, for whole sequences; with one kernel if `form` is "triton"."""
    args = (q, k, beta, g, A_log, dt_bias, qk_eps, beta_scale)
    if form != "triton":
        return definition(*args)
    if qk_eps is None and beta_scale is None and A_log is None:
        return q, k, beta, g
    unit_q, unit_k, active_beta, log_gate, *_ = apply(Activate, *args)
    if qk_eps is not None:
        q, k = unit_q, unit_k
    if beta_scale is not None:
        beta = active_beta
    return q, k, beta, g if A_log is None else log_gate


def check_activations(
    op: str,
    qk_norm: str | None,
    qk_norm_eps: float,
    beta_activation: str | None,
    gate_activation: str | None,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    HV: int,
) -> tuple[float | None, float | None]:
    """Check the options and return `(qk_eps, beta_scale)`, each None where not asked for."""
    _check_option(op, "qk_norm", qk_norm, ("l2",))
    _check_option(op, "beta_activation", beta_activation, tuple(BETA_SCALES))
    _check_option(op, "gate_activation", gate_activation, ("softplus",))
    qk_eps = None if qk_norm is None else _checks.check_number(op, "qk_norm_eps", qk_norm_eps)
    if qk_eps is not None and not qk_eps > 0:
        raise ValueError(
            f"{op}: `qk_norm_eps` must be greater than 0, got {qk_norm_eps}; "
            "without it a zero vector would become NaN"
        )
    if gate_activation is not None:
        for name, x in (("g", g), ("A_log", A_log)):
            if x is None:
                raise ValueError(
                    f'{op}: gate_activation="softplus" needs `g` and `A_log`, got `{name}` None; '
                    "give the projection as `g`, and `A_log` [HV]"
                )
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is None:
            continue
        if gate_activation is None:
            raise ValueError(
                f'{op}: `{name}` must come with gate_activation="softplus", got '
                "gate_activation=None; set it, or leave the parameter out"
            )
        _checks.check_shape(op, name, x, "[HV]", (HV,))
    return qk_eps, None if beta_activation is None else BETA_SCALES[beta_activation]


def _check_option(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        names = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(
            f"{op}: `{name}` must be None or one of {names}, got {value!r}; pick one of them"
        )


def _forward(*args: Any) -> tuple[Tensor, ...]:
    from householder.ops.delta_product import triton

    return triton.activate(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    from householder.ops.delta_product import triton

    return triton.activate_backward(*args)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    qk_eps: float | None,
    beta_scale: float | None,
) -> tuple[Tensor, ...]:
    def empty(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        # An op returns tensors only: what was not asked for is an empty one.
        return q.new_empty(0) if x is None else contiguous_like(x, dtype=dtype)

    norm = qk_eps is not None
    return (
        empty(q if norm else None),
        empty(k if norm else None),
        empty(None if beta_scale is None else beta, torch.float32),
        empty(None if A_log is None else g, torch.float32),
        empty(q[..., 0] if norm else None, torch.float32),
        empty(k[..., 0] if norm else None, torch.float32),
    )


def _backward_fake(
    dq: Tensor | None,
    dk: Tensor | None,
    dbeta: Tensor | None,
    dg: Tensor | None,
    q: Tensor,
    k: Tensor,
    q_factor: Tensor,
    k_factor: Tensor,
    beta: Tensor,
    g: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    beta_scale: float | None,
) -> tuple[Tensor, ...]:
    pairs = ((dq, q), (dk, k), (dbeta, beta), (dg, g), (dg, A_log), (dg, dt_bias))
    return tuple(
        q.new_empty(0) if dx is None or x is None else contiguous_like(x) for dx, x in pairs
    )


# On a CPU it is Triton's interpreter that runs these kernels.
activate_op = register(
    "delta_product_activate",
    "(Tensor q, Tensor k, Tensor beta, Tensor? g, Tensor? A_log, Tensor? dt_bias, float? qk_eps, "
    "float? beta_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    kernel=_forward,
)
activate_backward_op = register(
    "delta_product_activate_backward",
    "(Tensor? dq, Tensor? dk, Tensor? dbeta, Tensor? dg, Tensor q, Tensor k, Tensor q_factor, "
    "Tensor k_factor, Tensor beta, Tensor? g, Tensor? A_log, Tensor? dt_bias, float? beta_scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    kernel=_backward,
)

# The head axis of q, k, beta, g, A_log and dt_bias, where vmap puts a batched dimension.
_HEADS = (2, 3, 3, 2, 0, 0)
# Of q, k, beta, g and the factors of q's and k's rows.
_OUTPUT_HEADS = (2, 3, 3, 2, 2, 3)


def _unfold_all(
    outputs: tuple[Tensor, ...], present: tuple[bool, ...], size: int, heads: tuple[int, ...]
) -> tuple[Any, Any]:
    """Undo the folding; what is not present is an empty tensor and has no batched dimension."""
    split = tuple(
        (unfold_from_heads(x, size, axis), axis) if there else (x, None)
        for x, there, axis in zip(outputs, present, heads, strict=True)
    )
    return tuple(x for x, _ in split), tuple(axis for _, axis in split)


class Activate(torch.autograd.Function):
    """Differentiable `(q, k, beta, g, A_log, dt_bias, qk_eps, beta_scale)`, by the kernels.

    Gives q, k, β, g, and the factors r of q's and k's rows; empty tensors in place of what was not
    asked for.
    """

    @staticmethod
    @with_signature
    def forward(
        q: Tensor,
        k: Tensor,
        beta: Tensor,
        g: Tensor | None,
        A_log: Tensor | None,
        dt_bias: Tensor | None,
        qk_eps: float | None,
        beta_scale: float | None,
    ) -> tuple[Tensor, ...]:
        return activate_op(q, k, beta, g, A_log, dt_bias, qk_eps, beta_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, beta, g, A_log, dt_bias, qk_eps, ctx.beta_scale = inputs
        q, k, _, _, q_factor, k_factor = output
        norm = qk_eps is not None
        ctx.asked_for = (norm, norm, ctx.beta_scale is not None, A_log is not None)
        ctx.mark_non_differentiable(q_factor, k_factor)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, q_factor, k_factor, beta, g, A_log, dt_bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # A compiler's graphs hold zeros as gradients of the empty tensors, too.
        given = tuple(
            dx if asked else None for dx, asked in zip(grads, ctx.asked_for, strict=False)
        )
        dg = given[3]
        saved = ctx.saved_tensors  # Once: activation checkpointing hands each out a single time.
        results = apply(ActivateBackward, *given, *saved, ctx.beta_scale)
        *_, dt_bias = saved
        sources = (*given, dg, None if dt_bias is None else dg)
        grads = tuple(
            None if source is None else x for source, x in zip(sources, results, strict=True)
        )
        return *grads, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        *tensors, qk_eps, beta_scale = args
        folded = (
            fold_into_heads(x, dim, size, heads)
            for x, dim, heads in zip(tensors, in_dims[:6], _HEADS, strict=True)
        )
        outputs = Activate.apply(*folded, qk_eps, beta_scale)
        norm, gate = qk_eps is not None, args[4] is not None
        present = (norm, norm, beta_scale is not None, gate, norm, norm)
        return _unfold_all(outputs, present, size, _OUTPUT_HEADS)


class ActivateBackward(torch.autograd.Function):
    """The gradient, itself not differentiable: the arguments are those of `BACKWARD`."""

    @staticmethod
    @with_signature
    def forward(
        dq: Tensor | None,
        dk: Tensor | None,
        dbeta: Tensor | None,
        dg: Tensor | None,
        q: Tensor,
        k: Tensor,
        q_factor: Tensor,
        k_factor: Tensor,
        beta: Tensor,
        g: Tensor | None,
        A_log: Tensor | None,
        dt_bias: Tensor | None,
        beta_scale: float | None,
    ) -> tuple[Tensor, ...]:
        saved = (q, k, q_factor, k_factor, beta, g, A_log, dt_bias)
        return activate_backward_op(dq, dk, dbeta, dg, *saved, beta_scale)

    setup_context = staticmethod(keep_nothing)
    backward = first_order_only("delta_product: the Triton form")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        dq, dk, dbeta, dg, *saved, beta_scale = args
        *_, dt_bias = saved
        heads = (*_HEADS[:4], 2, 3, 2, 3, *_HEADS[2:])
        # What has no gradient may be an empty tensor, which has no heads, and is not looked at.
        needed = (dq, dk, dbeta, dg, dq, dk, dq, dk, True, True, True, True)
        folded = (
            x if there is None else fold_into_heads(x, dim, size, axis)
            for x, there, dim, axis in zip(args[:12], needed, in_dims[:12], heads, strict=True)
        )
        grads = ActivateBackward.apply(*folded, beta_scale)
        gate = dg is not None
        present = (dq is not None, dk is not None, dbeta is not None, gate, gate)
        return _unfold_all(grads, (*present, gate and dt_bias is not None), size, _HEADS)
