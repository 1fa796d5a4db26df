"""The definition of `householder_product`: one readable loop over reflectors.

Runs on any device and in any floating or complex dtype; PyTorch differentiates it to any order.
"""

from __future__ import annotations

from torch import Tensor

from householder.ops._dispatch import without_autocast
from householder.ops.wy import compute_dtype


@without_autocast
def forward(x: Tensor, reflectors: Tensor, beta: Tensor) -> Tensor:
    """Return `H_{N−1} … H_0 x` for rows `x [G, M, D]`, reflectors `[G, N, D]`, beta `[G, N]`."""
    dtype = compute_dtype(x, reflectors, beta)
    y, K, b = x.to(dtype), reflectors.to(dtype), beta.to(dtype)
    for j in range(K.shape[1]):
        k = K[:, None, j]
        y = y - b[:, j, None, None] * (k.conj() * y).sum(-1, keepdim=True) * k
    return y.to(x.dtype)
