"""The adapters of one layer: how each kind changes y = W x + b.

A kind says it twice. `forward` changes the function, so that any layer can be adapted whose weight
cannot be read, and no weight is formed; `adapt` changes W and b themselves, for merging and for
convolutions. The tests hold the two together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from householder.adapters.config import (
    AdapterConfig,
    HRAConfig,
    HTAConfig,
    TwoSidedConfig,
)
from householder.adapters.errors import AdapterError
from householder.adapters.targets import LayerShape, matches
from householder.maps import HouseholderProduct
from householder.ops import householder_product
from householder.ops.wy import compute_dtype, triangle_dtype

Call = Callable[[Tensor], Tensor]


class AdapterLayer(nn.Module, ABC):
    """One named adapter of one layer.

    A subclass must agree with itself: `forward` computes W' x + b' for the W', b' that `adapt`
    returns, and `restore` undoes `adapt`.
    """

    @abstractmethod
    def forward(self, call: Call, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W' x + b', given x, the function x ↦ W x + b, and b."""

    @abstractmethod
    def adapt(self, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W' and b', in at least float32."""

    @abstractmethod
    def restore(self, W: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
        """Return the W and b of which `adapt` made these.

        Args:
            W: the changed matrix.
            bias: the changed bias.
            eps: the relative precision with which W was stored.

        Raises:
            AdapterError: the change cannot be undone at this precision.
        """

    def adapted_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return b' alone; most kinds leave it."""
        return bias

    def change(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return W' − W as an exact product B A of low rank, with `B [out, r]`, `A [r, in]`.

        Raises:
            AdapterError: this kind's change is not of low rank.
        """
        raise AdapterError(
            f"{type(self).__name__}: its change of the weight is not of low rank and no LoRA can "
            "hold it; merge it into the model instead"
        )


class HRALayer(AdapterLayer):
    """W' = W Q with Q = H_{N−1} … H_0: the layer reads Q x.

    Attributes:
        reflectors: `[N, in]`, reflector 0 acting first on x; of any lengths.
    """

    def __init__(self, config: HRAConfig, shape: LayerShape, name: str) -> None:
        super().__init__()
        N, D = config.num_householder, shape.in_features
        self.orthogonalize = config.orthogonalize
        most = {None: N, "halves": 2 * D, "all": D}[config.orthogonalize]
        if most < N:
            raise AdapterError(
                f"HRAConfig: {name} has {D} inputs, which cannot hold {N} reflectors with "
                f"orthogonalize={config.orthogonalize!r}; at most {most} fit"
            )
        self.reflectors = nn.Parameter(_paired(N, D, config.init == "identity"))

    def directions(self) -> Tensor:
        """Return the reflectors of Q, orthogonalised if asked."""
        k: Tensor = self.reflectors
        if self.orthogonalize == "all":
            k = _orthonormal(k)
        elif self.orthogonalize == "halves":
            # The odd half acts first; within a half the order does not matter.
            k = torch.cat([_orthonormal(k[1::2]), _orthonormal(k[0::2])])
        return k

    def product(self) -> HouseholderProduct:
        """Return Q."""
        return HouseholderProduct.orthogonal(self.directions())

    def forward(self, call: Call, x: Tensor, bias: Tensor | None) -> Tensor:
        return call(_turn(self.directions(), x))

    def adapt(self, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.product().mT(W.to(compute_dtype(W))), bias

    def restore(self, W: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
        return self.product()(W.to(compute_dtype(W))), bias

    def change(self, W: Tensor) -> tuple[Tensor, Tensor]:
        K, T = _compact_wy(self.product())
        B = -(W.to(T.dtype) @ K.mT) @ T
        dtype = compute_dtype(W, self.reflectors)
        return B.to(dtype), K.to(dtype)

    def penalty(self) -> Tensor:
        """Return ‖K Kᵀ − I‖² of the reflectors at unit length: 0 where they are orthogonal."""
        k = F.normalize(self.reflectors.to(compute_dtype(self.reflectors)), dim=-1)
        eye = torch.eye(len(k), dtype=k.dtype, device=k.device)
        return (k @ k.mT - eye).square().sum()


class TwoSidedLayer(AdapterLayer):
    """W' = Q_out diag(m) W Q_in; the bias stays.

    Attributes:
        input_reflectors: `[N, in]` of Q_in, reflector 0 acting first.
        output_reflectors: `[N, out]` of Q_out.
        scale: m `[out]`, or None.
    """

    def __init__(self, config: TwoSidedConfig, shape: LayerShape, name: str) -> None:
        super().__init__()
        N = config.num_householder
        self.input_reflectors = nn.Parameter(_paired(N, shape.in_features, True))
        self.output_reflectors = nn.Parameter(_paired(N, shape.out_features, True))
        self.scale = nn.Parameter(torch.ones(shape.out_features)) if config.scaled else None

    def products(self) -> tuple[HouseholderProduct, HouseholderProduct]:
        """Return Q_out and Q_in."""
        return (
            HouseholderProduct.orthogonal(self.output_reflectors),
            HouseholderProduct.orthogonal(self.input_reflectors),
        )

    def forward(self, call: Call, x: Tensor, bias: Tensor | None) -> Tensor:
        y = call(_turn(self.input_reflectors, x))
        # Under autocast y is narrower than the bias.
        bias = None if bias is None else bias.to(y.dtype)
        y = y if bias is None else y - bias
        y = y if self.scale is None else y * self.scale.to(y.dtype)
        y = _turn(self.output_reflectors, y)
        return y if bias is None else y + bias

    def adapt(self, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        Q_out, Q_in = self.products()
        W = Q_in.mT(W.to(compute_dtype(W)))
        W = W if self.scale is None else self.scale.unsqueeze(-1) * W
        return Q_out(W.mT).mT, bias

    def restore(self, W: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
        Q_out, Q_in = self.products()
        W = Q_out.mT(W.to(compute_dtype(W)).mT).mT
        if self.scale is not None:
            sizes = self.scale.abs()
            if not bool(sizes.min() > 8 * eps * sizes.max()):
                raise AdapterError(
                    "TwoSidedConfig: a scale has become 0 to the precision of the weight, so that "
                    "the merged weight no longer tells the original; merge with keep_base=True"
                )
            W = W / self.scale.unsqueeze(-1)
        return Q_in(W), bias


class HTALayer(AdapterLayer):
    """ΔW = H_out diag(d) H_in + U V with H = I − v vᵀ, beside W or behind it.

    With P parts (a fused projection) the outputs fall into P equal runs, each with its own ΔW.

    Attributes:
        input_reflector: `[P, in]`, v of H_in.
        output_reflector: `[P, out / P]`, v of H_out.
        diagonal: d `[P, min(in, out / P)]`.
        down: V `[P, rank, in]`.
        up: U `[P, out / P, rank]`.
    """

    def __init__(self, config: HTAConfig, shape: LayerShape, name: str) -> None:
        super().__init__()
        self.behind = config.form == "adapter"
        P = next((p for entry, p in config.splits.items() if matches(name, entry)), 1)
        if shape.out_features % P:
            raise AdapterError(
                f"HTAConfig: `splits` asks for {P} equal parts of {name}, which has "
                f"{shape.out_features} outputs; give a number that divides them"
            )
        out = shape.out_features // P
        D = out if self.behind else shape.in_features
        if self.behind and P > 1:
            raise AdapterError(
                f'HTAConfig: form="adapter" acts behind a whole layer, got `splits` for {name}; '
                'use form="lora" for fused projections'
            )
        self.input_reflector = nn.Parameter(_orthogonal_vectors(P, D))
        self.output_reflector = nn.Parameter(_orthogonal_vectors(P, out))
        self.diagonal = nn.Parameter(torch.zeros(P, min(D, out)))
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        if config.rank:
            bound = 1 / math.sqrt(D)
            self.down = nn.Parameter(torch.empty(P, config.rank, D).uniform_(-bound, bound))
            self.up = nn.Parameter(torch.zeros(P, out, config.rank))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A `[P · (rank + 2), in]` and B `[out, P · (rank + 2)]` of ΔW = diag(d) + B A.

        With a = v_out, b = v_in, D the matrix with d on its diagonal, and n = −d,

            (I − a aᵀ) D (I − b bᵀ) = D + a (N ᵀa − (aᵀN b) b)ᵀ + (N b) bᵀ

        where N has n on its diagonal. Of several parts B holds the blocks.
        """
        a, b, n = self.output_reflector, self.input_reflector, -self.diagonal
        most = n.shape[-1]
        n_a = F.pad(a[:, :most] * n, (0, b.shape[-1] - most))
        n_b = F.pad(b[:, :most] * n, (0, a.shape[-1] - most))
        both = torch.linalg.vecdot(n_a, b).unsqueeze(-1)
        down = [torch.addcmul(n_a, both, b, value=-1).unsqueeze(1), b.unsqueeze(1)]
        up = [a.unsqueeze(2), n_b.unsqueeze(2)]
        if self.down is not None and self.up is not None:
            down.append(self.down)
            up.append(self.up)
        A, B = torch.cat(down, dim=1).flatten(0, 1), torch.cat(up, dim=2)
        return A, B[0] if len(B) == 1 else torch.block_diag(*B)

    def additive(self, x: Tensor) -> Tensor:
        """Return ΔW x, at the cost of a LoRA of rank + 2 and a pass over x."""
        x = _narrow(x)
        A, B = (factor.to(x.dtype) for factor in self.factors())
        # Of rows that are no multiples of 16 bytes the tensor cores make nothing.
        if x.is_cuda and (missing := -len(A) % 8):
            A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
        d = self.diagonal.to(x.dtype)
        P, most, out = *d.shape, self.output_reflector.shape[-1]
        y = F.linear(F.linear(x, A), B)
        if P == 1 and most == out:
            return torch.addcmul(y, x[..., :most], d[0])
        scaled = x[..., :most].unsqueeze(-2) * d
        return y + F.pad(scaled, (0, out - most)).flatten(-2)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return ΔW `[out, in]`."""
        A, B = self.factors()
        W = B.to(dtype) @ A.to(dtype)
        P, most = self.diagonal.shape
        # A view: the diagonal of each part.
        W.unflatten(0, (P, -1)).diagonal(dim1=1, dim2=2)[:, :most] += self.diagonal.to(dtype)
        return W

    def forward(self, call: Call, x: Tensor, bias: Tensor | None) -> Tensor:
        y = call(x)
        return y + self.additive(y if self.behind else x).to(y.dtype)

    def adapted_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or not self.behind:
            return bias
        return bias + self.additive(bias).to(bias.dtype)

    def adapt(self, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = W.to(compute_dtype(W))
        change = self.additive(wide.mT).mT if self.behind else self.dense(wide.dtype)
        return wide + change, self.adapted_bias(bias)

    def restore(self, W: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
        wide = W.to(compute_dtype(W))
        if not self.behind:
            return wide - self.dense(wide.dtype), bias
        factor = torch.eye(len(W), dtype=torch.float64, device=W.device)
        factor = factor + self.dense(factor.dtype)
        inverse, info = torch.linalg.inv_ex(factor)
        condition = float(factor.norm() * inverse.norm()) / len(W)
        if int(info) or not condition * eps < 0.01:
            raise AdapterError(
                f"HTAConfig: I + ΔW has become singular to the weight's precision (condition "
                f"{condition:.0e}), so that the merged weight no longer tells the original; merge "
                "with keep_base=True"
            )
        restored = None if bias is None else (inverse @ bias.to(inverse.dtype)).to(bias.dtype)
        return (inverse @ wide.to(inverse.dtype)).to(wide.dtype), restored


class Replacement(nn.Module):
    """A module's trained copy, which takes its place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def make_layer(config: AdapterConfig, shape: LayerShape, name: str) -> AdapterLayer:
    """Make the adapter of one layer.

    Args:
        config: of any kind.
        shape: of the layer.
        name: the layer's full name, for `splits` and for errors.

    Raises:
        AdapterError: the layer's sizes do not suit the settings.
    """
    if isinstance(config, HRAConfig):
        return HRALayer(config, shape, name)
    if isinstance(config, HTAConfig):
        return HTALayer(config, shape, name)
    if isinstance(config, TwoSidedConfig):
        return TwoSidedLayer(config, shape, name)
    raise AdapterError(
        f"adapters: `config` must be an HRAConfig, HTAConfig or TwoSidedConfig, got "
        f'{type(config).__name__}; adapters.HRAConfig(targets="q_proj") will do'
    )


def _turn(k: Tensor, x: Tensor) -> Tensor:
    """Return Q x for the orthogonal product of the reflectors k, in the dtype of the layer's input.

    In half precision the reflectors are rounded too, as autocast rounds other weights. Q stays
    orthogonal to float32's rounding, and Q x changes by less than its own rounding: the change is
    along k alone.
    """
    x = _narrow(x)
    half = x.dtype in (torch.bfloat16, torch.float16)
    return householder_product(x, k.to(x.dtype) if half else k).to(x.dtype)


def _narrow(x: Tensor) -> Tensor:
    """Return x as autocast would round it in front of a layer."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _orthogonal_vectors(P: int, D: int) -> Tensor:
    """Draw vectors with ‖v‖² = 2, for which I − v vᵀ is a reflection."""
    return math.sqrt(2) * F.normalize(torch.randn(P, D), dim=-1)


def _paired(N: int, D: int, identity: bool) -> Tensor:
    """Draw reflectors; equal pairs, whose product is the identity, if asked.

    Uniform in ±√(2/N), as peft draws them: only directions matter, but the size of the entries
    is the scale on which an optimizer's steps act, so that published learning rates carry over.
    """
    bound = math.sqrt(2 / N)
    half = torch.empty(N // 2 if identity else N, D).uniform_(-bound, bound)
    return half.repeat_interleave(2, dim=0) if identity else half


def _orthonormal(k: Tensor) -> Tensor:
    """Return an orthonormal basis, in rows, of what the rows span, as Gram-Schmidt would."""
    return torch.linalg.qr(k.to(compute_dtype(k)).mT).Q.mT


def _compact_wy(product: HouseholderProduct) -> tuple[Tensor, Tensor]:
    """Return K and T of Q = I − Kᵀ T K, as wide as triangles are computed."""
    K = product.reflectors
    K = K.to(triangle_dtype(compute_dtype(K), K.device))
    beta = HouseholderProduct(K).beta
    eye = torch.eye(len(K), dtype=K.dtype, device=K.device)
    L = eye + (beta.unsqueeze(-1) * (K @ K.mT)).tril(-1)
    return K, torch.linalg.solve_triangular(L, torch.diag(beta), upper=False, unitriangular=True)
