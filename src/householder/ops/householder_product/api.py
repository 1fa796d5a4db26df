"""The public function `householder_product`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from householder.ops import _checks
from householder.ops._dispatch import check_impl
from householder.ops.householder_product import reference
from householder.ops.householder_product.op import (
    CompiledHouseholderProduct,
    HouseholderProductFunction,
)
from householder.ops.wy import result_dtype

IMPLS = ("chunk", "reference")


def householder_product(
    x: Tensor,
    reflectors: Tensor,
    beta: Tensor,
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
        beta: `[*, N]`. The batch dimensions `*` broadcast against those of `x` (its last excluded)
            from the right: one product each for `x [B, M, D]` has reflectors `[B, 1, N, D]`.
        transpose: apply the transpose (for complex reflectors the conjugate transpose) instead.
        impl: `"chunk"`, `"reference"` (a loop over reflectors), or `"auto"`, which is `"chunk"`.

    Returns:
        y, of the shape `x` and the batch dimensions broadcast to, in the promoted dtype of `x` and
        `reflectors` (complex if `beta` is). For bfloat16 and float16, inner products and solves run
        in float32, and `beta` may be float32 for a product as orthogonal as that.

    Raises:
        ValueError: a shape or device does not fit, or `impl` is unknown.
        TypeError: an argument is no tensor, or neither floating point nor complex.

    Gradients:
        Every order, in reverse and forward mode, with `torch.func`. Inside `torch.compile`: first
        order, reverse mode (PyTorch does not compile double backward).

    Examples:
        >>> import torch
        >>> from householder import householder_product
        >>> k = torch.tensor([[1.0, 0.0], [1.0, -1.0]])  # mirror the first axis, then swap the two
        >>> householder_product(torch.tensor([3.0, 5.0]), k, torch.tensor([2.0, 1.0]))
        tensor([ 5., -3.])

    References:
        - A Storage-Efficient WY Representation for Products of Householder Transformations
          (Schreiber and Van Loan, 1989), https://doi.org/10.1137/0910005
    """
    op = "householder_product"
    check_impl(op, impl, IMPLS)
    tensors = {"x": x, "reflectors": reflectors, "beta": beta}
    for name, value in tensors.items():
        _checks.check_tensor(op, name, value)
    _checks.check_floating(op, tensors, allow_complex=True)
    _checks.check_same_device(op, tensors)
    _check_shapes(op, x, reflectors, beta)

    dtype = result_dtype(x, reflectors, beta)
    if transpose:
        reflectors, beta = reflectors.flip(-2), beta.flip(-1).conj()
    x, reflectors, beta, shape, order = _canonical(x.to(dtype), reflectors, beta)
    if reflectors.shape[1] == 0 or x.numel() == 0:
        y = x.clone()
    elif impl == "reference":
        y = reference.forward(x, reflectors, beta)
    elif torch.compiler.is_compiling():
        y = CompiledHouseholderProduct.apply(x, reflectors, beta)
    else:
        y = HouseholderProductFunction.apply(x, reflectors, beta)
    return y.reshape(shape).permute(order)


def _check_shapes(op: str, x: Tensor, reflectors: Tensor, beta: Tensor) -> None:
    if x.dim() < 1 or reflectors.dim() < 2 or reflectors.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{op}: `reflectors` must be [*, N, D] with the D of `x` [..., D], got shapes "
            f"{list(reflectors.shape)} and {list(x.shape)}; "
            "one reflector is reflectors.unsqueeze(-2)"
        )
    if beta.dim() < 1 or beta.shape[-1] != reflectors.shape[-2]:
        raise ValueError(
            f"{op}: `beta` must be [*, N] with N = {reflectors.shape[-2]} as in `reflectors`, got "
            f"shape {list(beta.shape)}; give one coefficient a reflector"
        )
    try:
        torch.broadcast_shapes(x.shape[:-1], reflectors.shape[:-2], beta.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{op}: the batch dimensions must broadcast, got `x` {list(x.shape[:-1])}, "
            f"`reflectors` {list(reflectors.shape[:-2])} and `beta` {list(beta.shape[:-1])}; one "
            "product for each group of vectors needs a dimension of 1 in the vectors' place"
        ) from None


def _canonical(
    x: Tensor, reflectors: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], list[int]]:
    """Bring the arguments to `[G, M, D]`, `[G, N, D]`, `[G, N]`.

    Batch dimensions that the product does not have, or has as 1, become the rows M: they share
    one triangle and meet it in matrix products. Also returns what brings the result back: its
    shape with the dimensions of G first, and the permutation to their places.
    """
    N, D = reflectors.shape[-2:]
    own = torch.broadcast_shapes(reflectors.shape[:-2], beta.shape[:-1])
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
    beta = beta.expand(*own, N).reshape(G, N)
    return x.reshape(G, M, D), reflectors, beta, tuple(x.shape), [*order, -1]
