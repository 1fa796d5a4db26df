"""The published layers of the family, each a `DeltaProductMixer` with its options set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar, TypedDict

import torch
from typing_extensions import Unpack

from householder.nn._checks import check_positive_float, check_positive_int, default_head_dim
from householder.nn.mixer import DeltaProductMixer


class MixerOptions(TypedDict, total=False):
    """Options that every published layer hands on to `DeltaProductMixer`.

    Those that the layer fixes are accepted only with the value it fixes.
    """

    num_value_heads: int | None
    use_forget_gate: bool
    use_short_conv: bool
    conv_size: int
    qk_activation: str
    qk_norm: str
    qk_norm_eps: float
    norm_eps: float
    init_std: float | None
    num_layers: int | None
    recompute: bool
    impl: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class PublishedMixer(DeltaProductMixer):
    """What the published layers share: head sizes by rule, and a forget gate that is fixed.

    Args:
        d_model: size of the input and output vectors.
        num_heads: H.
        head_dim: K; `None` for KEY_SHARE · d_model / num_heads.
        expand_v: V / K.
        **options: options of `DeltaProductMixer`.
    """

    # How much of d_model the keys of all heads fill where `head_dim` is left out.
    KEY_SHARE: ClassVar[Fraction] = Fraction(1)

    def __init__(
        self, d_model: int, *, num_heads: int, head_dim: int | None, expand_v: float, **options: Any
    ) -> None:
        key_dim, value_dim = _head_dims(
            type(self).__name__, d_model, num_heads, head_dim, expand_v, self.KEY_SHARE
        )
        super().__init__(
            d_model,
            num_heads=num_heads,
            head_dim=key_dim,
            value_head_dim=value_dim,
            **{**self.FIXED, **options},
        )


class DeltaNet(PublishedMixer):
    """One reflection per token, no gates.

    Args:
        d_model: size of the input and output vectors.
        num_heads: H.
        head_dim: K; `None` for d_model / num_heads.
        expand_v: V / K.
        use_output_gate: as in `DeltaProductMixer`; not in the published layer.
        allow_neg_eigval: `False` in the first paper below; `True` is what the second one changes.
        **options: any other option of `DeltaProductMixer`.

    Examples:
        >>> DeltaNet(32)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])

    References:
        Parallelizing Linear Transformers with the Delta Rule over Sequence Length (Yang, Wang,
        Zhang, Shen, Kim, 2024), https://arxiv.org/abs/2406.06484
        Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues (Grazzi, Siems, Zela,
        Franke, Hutter, Pontil, 2024), https://arxiv.org/abs/2411.12537
    """

    FIXED: ClassVar[Mapping[str, object]] = {"num_householder": 1, "use_forget_gate": False}

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        use_output_gate: bool = False,
        allow_neg_eigval: bool = False,
        **options: Unpack[MixerOptions],
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            allow_neg_eigval=allow_neg_eigval,
            **options,
        )


class GatedDeltaNet(PublishedMixer):
    """One reflection per token, a forget gate and an output gate.

    Args:
        d_model: size of the input and output vectors.
        num_heads: H.
        head_dim: K; `None` for ¾ d_model / num_heads.
        expand_v: V / K.
        use_output_gate: as in `DeltaProductMixer`.
        allow_neg_eigval: as in `DeltaProductMixer`.
        **options: any other option of `DeltaProductMixer`.

    Examples:
        >>> GatedDeltaNet(48)(torch.randn(2, 5, 48)).shape
        torch.Size([2, 5, 48])

    References:
        Gated Delta Networks: Improving Mamba2 with Delta Rule (Yang, Kautz, Hatamizadeh, 2024),
        https://arxiv.org/abs/2412.06464
    """

    KEY_SHARE: ClassVar[Fraction] = Fraction(3, 4)
    FIXED: ClassVar[Mapping[str, object]] = {"num_householder": 1, "use_forget_gate": True}

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 6,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        use_output_gate: bool = True,
        allow_neg_eigval: bool = False,
        **options: Unpack[MixerOptions],
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            allow_neg_eigval=allow_neg_eigval,
            **options,
        )


class DeltaProduct(PublishedMixer):
    """Several reflections per token, no gates.

    Args:
        d_model: size of the input and output vectors.
        num_heads: H.
        head_dim: K; `None` for d_model / num_heads.
        num_householder: N, reflections per token.
        expand_v: V / K.
        use_output_gate: as in `DeltaProductMixer`; not in the published layer.
        allow_neg_eigval: as in `DeltaProductMixer`.
        **options: any other option of `DeltaProductMixer`.

    Examples:
        >>> DeltaProduct(32, num_householder=3)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])

    References:
        DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products (Siems,
        Carstensen, Zela, Hutter, Pontil, Grazzi, 2025), https://arxiv.org/abs/2502.10297
    """

    FIXED: ClassVar[Mapping[str, object]] = {"use_forget_gate": False}

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        num_householder: int = 2,
        expand_v: float = 1.0,
        use_output_gate: bool = False,
        allow_neg_eigval: bool = True,
        **options: Unpack[MixerOptions],
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            head_dim=head_dim,
            num_householder=num_householder,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            allow_neg_eigval=allow_neg_eigval,
            **options,
        )


class GatedDeltaProduct(PublishedMixer):
    """Several reflections per token, a forget gate and an output gate.

    Args:
        d_model: size of the input and output vectors.
        num_heads: H.
        head_dim: K; `None` for ¾ d_model / num_heads.
        num_householder: N, reflections per token.
        expand_v: V / K.
        use_output_gate: as in `DeltaProductMixer`.
        allow_neg_eigval: as in `DeltaProductMixer`.
        **options: any other option of `DeltaProductMixer`.

    Examples:
        >>> GatedDeltaProduct(48, num_householder=3)(torch.randn(2, 5, 48)).shape
        torch.Size([2, 5, 48])

    References:
        DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products (Siems,
        Carstensen, Zela, Hutter, Pontil, Grazzi, 2025), https://arxiv.org/abs/2502.10297
    """

    KEY_SHARE: ClassVar[Fraction] = Fraction(3, 4)
    FIXED: ClassVar[Mapping[str, object]] = {"use_forget_gate": True}

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 6,
        head_dim: int | None = None,
        num_householder: int = 2,
        expand_v: float = 2.0,
        use_output_gate: bool = True,
        allow_neg_eigval: bool = True,
        **options: Unpack[MixerOptions],
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            head_dim=head_dim,
            num_householder=num_householder,
            expand_v=expand_v,
            use_output_gate=use_output_gate,
            allow_neg_eigval=allow_neg_eigval,
            **options,
        )


MIXERS: Mapping[str, type[PublishedMixer]] = {
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "delta_product": DeltaProduct,
    "gated_delta_product": GatedDeltaProduct,
}
"""The published layers by the name a configuration file gives them."""


def _head_dims(
    where: str,
    d_model: int,
    num_heads: int,
    head_dim: int | None,
    expand_v: float,
    key_share: Fraction,
) -> tuple[int, int]:
    """Return K and V: where `head_dim` is left out, the H keys share `key_share · d_model`."""
    check_positive_int(where, "d_model", d_model)
    check_positive_int(where, "num_heads", num_heads)
    check_positive_float(where, "expand_v", expand_v)
    if head_dim is None:
        head_dim = default_head_dim(where, d_model, num_heads, key_share)
    check_positive_int(where, "head_dim", head_dim)
    value_head_dim = head_dim * expand_v
    if not math.isclose(value_head_dim, round(value_head_dim), rel_tol=1e-6):
        raise ValueError(
            f"{where}: `expand_v` times head_dim={head_dim} must be a whole number, got "
            f"{expand_v} * {head_dim} = {value_head_dim}; change one of the two"
        )
    return head_dim, round(value_head_dim)
