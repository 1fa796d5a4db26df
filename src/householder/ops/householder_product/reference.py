"""The definition of `householder_product`: one readable loop over reflectors.

Runs on any device and in any floating or complex dtype; PyTorch differentiates it to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from householder.ops._dispatch import without_autocast
from householder.ops.wy import compute_dtype


@without_autocast
def forward(x: Tensor, reflectors: Tensor, beta: Tensor | None) -> Tensor:
    """Return `H_{N−1} … H_0 x` for rows `x [G, M, D]`, reflectors `[G, N, D]`, beta `[G, N]`.

    Without beta the reflectors are orthogonal, β = 2 / ‖k‖², and 0 for a zero one.
    """
    dtype = compute_dtype(x, reflectors, beta)
    y, K = x.to(dtype), reflectors.to(dtype)
    if beta is None:
        squares = (K.conj() * K).sum(-1)
        beta = torch.where(squares == 0, 0, 2 / torch.where(squares == 0, 1, squares))
    b = beta.to(dtype)
    for j in range(K.shape[1]):
        k = K[:, None, j]
        y = y - b[:, j, None, None] * (k.conj() * y).sum(-1, keepdim=True) * k
    return y.to(x.dtype)
