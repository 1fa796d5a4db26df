"""The public functions `householder_product` and `householder_frame`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from householder.ops import _checks
from householder.ops._dispatch import apply, check_impl, is_plain_call, runs_triton
from householder.ops.householder_product import reference
from householder.ops.householder_product.op import (
    CompiledHouseholderProduct,
    HouseholderProductFunction,
    householder_product_alone_op,
    reverse,
    why_no_kernels,
)
from householder.ops.wy import result_dtype

IMPLS = ("triton", "chunk", "reference")


def householder_product(
    x: Tensor,
    reflectors: Tensor,
    beta: Tensor | None = None,
    *,
    transpose: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Apply a product of N Householder transformations to vectors.

    y = H_{N−1} … H_1 H_0 x with H_j = I − β_j k_j k_jᴴ, on the last dimension of `x`. The product
    is applied in blocks through its compact WY form, with exact triangular solves; no D × D matrix
    is formed. β is free: `β_j = 2 / ‖k_j‖²` reflects (an orthogonal H_j), β_j = 0 is the identity,
    and zero, repeated or nearly parallel reflectors are no special cases.

    Args:
        x: vectors `[..., D]`.
        reflectors: `[*, N, D]`, any N ≥ 0; reflector 0 is applied first.
        beta: `[*, N]`, or None for an orthogonal product, β_j = 2 / ‖k_j‖² and 0 for a zero
            reflector; ‖k_j‖² must neither overflow nor vanish in float32. The batch dimensions `*`
            broadcast against those of `x` (its last excluded) from the right: one product each for
            `x [B, M, D]` has reflectors `[B, 1, N, D]`.
        transpose: apply the transpose (for complex reflectors the conjugate transpose) instead.
        impl: `"triton"` (on CUDA: float32, bfloat16, float16), `"chunk"` (matrix products of
            PyTorch, any device and dtype), `"reference"` (a loop over reflectors), or `"auto"`:
            `"triton"` on CUDA for what it takes, else `"chunk"`.

    Returns:
        y, of the shape `x` and the batch dimensions broadcast to, in the promoted dtype of `x` and
        `reflectors` (complex if `beta` is). For bfloat16 and float16, inner products are summed and
        triangles solved in float32, and `beta` may be float32 for a product as orthogonal as that;
        for float32 and complex64 triangles are solved in float64, and `beta` may be so too.
        On CUDA up to 128 reflectors go to the tensor cores in the dtype of `x`; more are computed
        in float32 all through, as `"chunk"` computes. float32 products keep float32's rounding,
        whatever TensorFloat-32 is set to.

    Raises:
        ValueError: a shape or device does not fit, or `impl` is unknown.
        TypeError: an argument is no tensor, or neither floating point nor complex.
        NotImplementedError: `impl="triton"` cannot take the inputs; the message says why.

    Gradients:
        Every order, in reverse and forward mode, with `torch.func`. Inside `torch.compile`: first
        order, reverse mode (PyTorch does not compile double backward).

    Examples:
        >>> import torch
        >>> from householder import householder_product
        >>> k = torch.tensor([[1.0, 0.0], [1.0, -1.0]])  # mirror the first axis, then swap the two
        >>> householder_product(torch.tensor([3.0, 5.0]), k, torch.tensor([2.0, 1.0]))
        tensor([ 5., -3.])
        >>> householder_product(torch.tensor([3.0, 5.0]), k)  # β = 2 / ‖k‖² are those
        tensor([ 5., -3.])

    References:
        - A Storage-Efficient WY Representation for Products of Householder Transformations
          (Schreiber and Van Loan, 1989), https://doi.org/10.1137/0910005
    """
    op = "householder_product"
    check_impl(op, impl, IMPLS)
    tensors = {"x": x, "reflectors": reflectors, "beta": beta}
    _checks.check_tensors(op, tensors, optional=("beta",), allow_complex=True)
    check_product(op, reflectors, beta)
    if x.dim() < 1 or reflectors.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{op}: `reflectors` must be [*, N, D] with the D of `x` [..., D], got shapes "
            f"{list(reflectors.shape)} and {list(x.shape)}; put the features last"
        )
    _check_batches(op, x, reflectors, beta)
    # A β that follows from the reflectors has no width of its own.
    dtype = result_dtype(x, reflectors, reflectors if beta is None else beta)
    x, reflectors, beta, shape, order = _canonical(x.to(dtype), reflectors, beta)
    if reflectors.shape[1] == 0 or x.numel() == 0:
        y = x.clone()
    else:
        y = _run(op, x, reflectors, beta, x.shape[1], transpose, impl)
    y = y.reshape(shape)
    return y if order is None else y.permute(order)


def householder_frame(
    reflectors: Tensor,
    beta: Tensor | None = None,
    num_columns: int | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Form the first M columns of a product of N Householder transformations.

    The columns of Q = H_{N−1} … H_1 H_0 with H_j = I − β_j k_j k_jᴴ. In compact WY form they are
    [I; 0] − Kᵀ T K_1, where K_1 are the first M columns of the reflectors: rows of the identity
    pick columns of K instead of being multiplied by it. Where the H_j are orthogonal so is Q, and
    its columns are a point on the Stiefel manifold.

    Args:
        reflectors: `[*, N, D]`; reflector 0 is applied first.
        beta: `[*, N]`, or None for an orthogonal product, as in `householder_product`. Its batch
            dimensions broadcast with those of `reflectors`.
        num_columns: M, between 0 and D; None means D, all of the matrix.
        impl: as in `householder_product`.

    Returns:
        `[*, D, M]`, in the dtype of `reflectors` (complex if `beta` is). In float32, on CPU and
        CUDA, ‖QᵀQ − I‖₂ of an orthogonal product (`beta=None`, N ≤ D) is at most 4 √D times
        float32's ε, however close the reflectors are to one another: Q changes the square of no
        vector's length by more. A float32 `beta` is as near to 2 / ‖k‖² as it is rounded.

    Raises:
        ValueError: a shape or device does not fit, M is not between 0 and D, or `impl` is unknown.
        TypeError: an argument has the wrong type, or is neither floating point nor complex.
        NotImplementedError: `impl="triton"` cannot take the inputs; the message says why.

    Gradients:
        As of `householder_product`.

    Examples:
        >>> import torch
        >>> from householder import householder_frame
        >>> householder_frame(torch.tensor([[1.0, -1.0, 0.0]]), num_columns=2)
        tensor([[0., 1.],
                [1., 0.],
                [0., 0.]])

    References:
        - CWY Parametrization: a Solution for Parallelized Optimization of Orthogonal and Stiefel
          Matrices (Likhosherstov et al., 2021), https://arxiv.org/abs/2004.08675
    """
    op = "householder_frame"
    check_impl(op, impl, IMPLS)
    tensors = {"reflectors": reflectors, "beta": beta}
    _checks.check_tensors(op, tensors, optional=("beta",), allow_complex=True)
    check_product(op, reflectors, beta)
    N, D = reflectors.shape[-2:]
    M = D if num_columns is None else num_columns
    _checks.check_int(op, "num_columns", M)
    if not 0 <= M <= D:
        raise ValueError(
            f"{op}: `num_columns` must be between 0 and D = {D}, got {M}; "
            "a product has no more columns than features"
        )
    _check_batches(op, None, reflectors, beta)
    batch = reflectors.shape[:-2]
    if beta is not None and beta.shape[:-1] != batch:
        batch = torch.broadcast_shapes(batch, beta.shape[:-1])
    G = math.prod(batch)
    if batch:
        beta = None if beta is None else beta.expand(*batch, N).reshape(G, N)
        reflectors = reflectors.expand(*batch, N, D).reshape(G, N, D)
    else:  # the most usual call: each step that autograd need not record is a step less
        beta = None if beta is None else beta.unsqueeze(0)
        reflectors = reflectors.unsqueeze(0)
    if G * M * N == 0:
        dtype = reflectors.dtype if beta is None else result_dtype(reflectors, beta)
        eye = torch.eye(D, M, dtype=dtype, device=reflectors.device)
        return eye.expand(*batch, D, M).clone()
    rows = _run(op, None, reflectors, beta, M, False, impl)
    return rows.reshape(*batch, M, D).mT if batch else rows.squeeze(0).mT


def _run(
    op: str,
    x: Tensor | None,
    reflectors: Tensor,
    beta: Tensor | None,
    rows: int,
    transpose: bool,
    impl: str,
) -> Tensor:
    """Run one form on `x [G, M, D]`, or on the identity's first rows."""
    if impl == "reference":
        if x is None:
            dtype = reflectors.dtype if beta is None else result_dtype(reflectors, beta)
            G, _, D = reflectors.shape
            x = torch.eye(rows, D, dtype=dtype, device=reflectors.device).expand(G, rows, D)
        if transpose:
            reflectors, beta = reverse(reflectors, beta)
        return reference.forward(x, reflectors, beta)

    given = [t for t in (x, reflectors, beta) if t is not None]
    form = "chunk"
    if runs_triton(op, impl, given[0].device, lambda: why_no_kernels(x, reflectors, beta)):
        form = "triton"
        if x is not None:
            reflectors = reflectors.to(x.dtype)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if not save and is_plain_call():
        return householder_product_alone_op(x, reflectors, beta, rows, transpose, form)
    arguments = (x, reflectors, beta, rows, transpose, save, form)
    if torch.compiler.is_compiling():
        return CompiledHouseholderProduct.apply(*arguments)[0]
    return apply(HouseholderProductFunction, *arguments)[0]


def check_product(op: str, reflectors: Tensor, beta: Tensor | None) -> None:
    """Raise ValueError unless there are reflectors `[*, N, D]`, and a coefficient for each."""
    if reflectors.dim() < 2:
        raise ValueError(
            f"{op}: `reflectors` must be [*, N, D], got shape {list(reflectors.shape)}; one "
            "reflector is reflectors.unsqueeze(-2)"
        )
    if beta is not None and (beta.dim() < 1 or beta.shape[-1] != reflectors.shape[-2]):
        raise ValueError(
            f"{op}: `beta` must be [*, N] with N = {reflectors.shape[-2]} as in `reflectors`, got "
            f"shape {list(beta.shape)}; give one coefficient a reflector"
        )


def _check_batches(op: str, x: Tensor | None, reflectors: Tensor, beta: Tensor | None) -> None:
    batches = {"x": x.shape[:-1]} if x is not None else {}
    batches["reflectors"] = reflectors.shape[:-2]
    if beta is not None:
        batches["beta"] = beta.shape[:-1]
    if not reflectors.dim() > 2 and (beta is None or beta.dim() == 1):
        return  # one product for all: the most usual calls are spared the longer way
    try:
        torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        got = ", ".join(f"`{name}` {list(batch)}" for name, batch in batches.items())
        raise ValueError(
            f"{op}: the batch dimensions must broadcast, got {got}; one product for each group of "
            "vectors needs a dimension of 1 in the vectors' place"
        ) from None


def _canonical(
    x: Tensor, reflectors: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, ...], list[int] | None]:
    """Bring the arguments to `[G, M, D]`, `[G, N, D]`, `[G, N]`.

    Batch dimensions that the product does not have, or has as 1, become the rows M: they share
    one triangle and meet it in matrix products. Also returns what brings the result back: its
    shape with the dimensions of G first, and the permutation to their places, if there is any.
    """
    N, D = reflectors.shape[-2:]
    own: tuple[int, ...] = reflectors.shape[:-2]
    if beta is not None and beta.shape[:-1] != own:
        own = torch.broadcast_shapes(own, beta.shape[:-1])
    if not own:  # one product for all rows: nothing to sort
        beta = None if beta is None else beta.unsqueeze(0)
        flat = x.reshape(1, math.prod(x.shape[:-1]), D)
        return flat, reflectors.unsqueeze(0), beta, tuple(x.shape), None
    batch = torch.broadcast_shapes(x.shape[:-1], own)
    own = (1,) * (len(batch) - len(own)) + tuple(own)
    groups = [i for i, size in enumerate(own) if size != 1]
    rows = [i for i, size in enumerate(own) if size == 1]
    G = math.prod([batch[i] for i in groups])
    M = math.prod([batch[i] for i in rows])

    x = x.expand(*batch, D).permute(*groups, *rows, -1)
    order = [(groups + rows).index(i) for i in range(len(batch))]
    # The product's own dimensions have their full size already: no copy is made for `rows`.
    reflectors = reflectors.expand(*own, N, D).reshape(G, N, D)
    beta = None if beta is None else beta.expand(*own, N).reshape(G, N)
    return x.reshape(G, M, D), reflectors, beta, tuple(x.shape), [*order, -1]
