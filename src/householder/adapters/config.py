"""What an adapter is made of: one frozen dataclass per kind, which JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from householder.adapters.errors import AdapterError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings that every kind of adapter has.

    Args:
        targets: the layers to adapt: names, endings of names after a dot ("q_proj"), or shell
            patterns of either ("blocks.*.attn.*"). A pattern passes over modules that cannot be
            adapted; a name that stands for one is an error.
        exclude: layers to leave out, in the same form.
        train_also: modules to train whole beside the adapters, in the same form, such as a new
            classifier head. They are copied; the adapter owns, saves and switches the copy.
        dtype: of the adapter's parameters: "float32", "float64" or "bfloat16". None is the layer's
            own dtype, but at least float32.

    Raises:
        AdapterError: a setting cannot be.
    """

    kind: ClassVar[str] = ""

    targets: str | Sequence[str]
    exclude: str | Sequence[str] = ()
    train_also: str | Sequence[str] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "train_also"):
            value = getattr(self, name)
            alone = isinstance(value, str) or not isinstance(value, Iterable)
            names = (value,) if alone else tuple(value)
            if not all(isinstance(entry, str) and entry for entry in names):
                raise AdapterError(
                    f"{type(self).__name__}: `{name}` must be names or patterns, got {value!r}; "
                    'give for example ["q_proj", "v_proj"]'
                )
            object.__setattr__(self, name, names)
        if not self.targets and not self.train_also:
            raise AdapterError(
                f"{type(self).__name__}: `targets` must name at least one layer, got none; "
                'give for example ["q_proj", "v_proj"], or "*" for every layer'
            )
        if self.dtype is not None and self.dtype not in list(DTYPES):
            raise AdapterError(
                f"{type(self).__name__}: `dtype` must be one of {', '.join(DTYPES)} or None, got "
                f"{self.dtype!r}; None is the layer's own, and at least float32"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values; `config_from_dict` undoes it."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    """Householder reflection adaptation: W ← W Q with Q a product of N orthogonal reflectors.

    Args:
        num_householder: N, the number of reflectors per layer.
        orthogonalize: None leaves the reflectors free (add `orthogonality_penalty` to the loss for
            the regularised form). "halves" makes every other one orthogonal to the rest of its
            half: Q = (I − 2 EᵀE)(I − 2 OᵀO) with orthonormal rows in E (reflectors 0, 2, …) and O
            (1, 3, …). "all" makes all orthogonal, Q = I − 2 EᵀE, as in the paper's strict form and
            peft's `apply_GS`; such a Q is symmetric with N eigenvalues −1 and never the identity.
        init: "identity" starts from W itself, by pairs of equal reflectors (needs an even N);
            "random" from a random Q.

    Raises:
        AdapterError: a setting cannot be, or two contradict each other.

    References:
        - Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
          Adaptation (Yuan, Liu, Xu, 2024), https://arxiv.org/abs/2405.17484

    Examples:
        >>> HRAConfig(targets=["q_proj", "v_proj"], num_householder=4).num_householder
        4
    """

    kind: ClassVar[str] = "hra"

    num_householder: int = 8
    orthogonalize: str | None = None
    init: str = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "num_householder", 1)
        _check_choice(self, "orthogonalize", (None, "halves", "all"))
        _check_choice(self, "init", ("identity", "random"))
        if self.init == "identity" and self.orthogonalize == "all":
            raise AdapterError(
                'HRAConfig: orthogonalize="all" is never the identity (N of its eigenvalues are '
                '−1), got init="identity"; give init="random", or orthogonalize="halves", which '
                "starts as the identity"
            )
        if self.init == "identity" and self.num_householder % 2:
            raise AdapterError(
                'HRAConfig: init="identity" pairs the reflectors, so `num_householder` must be '
                f'even, got {self.num_householder}; give an even number or init="random"'
            )


@dataclass(frozen=True, kw_only=True)
class HTAConfig(AdapterConfig):
    """Householder transformation adaptation: ΔW = H_out diag(d) H_in + U V.

    H = I − v vᵀ on each side, with neither a factor 2 nor a normalisation (as published; it is
    orthogonal where ‖v‖² = 2, which is how v starts), a learned diagonal d, and a term of low rank.
    The adapter starts as the identity: d = 0 and U = 0. H_out diag(d) H_in is diag(d) and a matrix
    of rank 2, so that ΔW x costs what a LoRA of rank + 2 does and a pass over x.

    Args:
        rank: of the additive term; published as D′, 1 in the main tables. 0 leaves the term out.
        form: "lora": W ← W + ΔW. "adapter": W ← (I + ΔW) W with a square ΔW on the layer's output,
            for the last layer of an attention or an MLP; the bias is turned with it.
        splits: layers whose output is several projections side by side, by name ending or pattern:
            {"qkv": 3} adapts each third of a fused projection by itself.

    Raises:
        AdapterError: a setting cannot be.

    References:
        - Efficient Adaptation of Pre-trained Vision Transformer via Householder Transformation
          (Dong et al., 2024), https://arxiv.org/abs/2410.22952

    Examples:
        >>> HTAConfig(targets="blocks.*.attn.*", splits={"qkv": 3}).rank
        1
    """

    kind: ClassVar[str] = "hta"

    rank: int = 1
    form: str = "lora"
    splits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "rank", 0)
        _check_choice(self, "form", ("lora", "adapter"))
        if not isinstance(self.splits, Mapping):
            raise AdapterError(
                f"HTAConfig: `splits` must give numbers of parts by name, got {self.splits!r}; "
                'give for example {"qkv": 3}'
            )
        for name, parts in self.splits.items():
            if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
                raise AdapterError(
                    f"HTAConfig: `splits` must give numbers of parts, got {parts!r} for {name!r}; "
                    'give for example {"qkv": 3}'
                )
        object.__setattr__(self, "splits", dict(self.splits))


@dataclass(frozen=True, kw_only=True)
class TwoSidedConfig(AdapterConfig):
    """Orthogonal adaptation from both sides: W ← Q_out diag(m) W Q_in.

    Both Q are products of N orthogonal reflectors, applied with the exact triangular solve; m is
    there with `scaled`. Starts as the identity: paired reflectors, m = 1. Published as HOFT
    (without m) and SHOFT (with m).

    Args:
        num_householder: N, the number of reflectors per side; even.
        scaled: whether to learn m.

    Raises:
        AdapterError: a setting cannot be.

    References:
        - HOFT: Householder Orthogonal Fine-tuning (Moreno Arcas et al., 2025),
          https://arxiv.org/abs/2505.16531

    Examples:
        >>> TwoSidedConfig(targets="*", num_householder=4, scaled=True).scaled
        True
    """

    kind: ClassVar[str] = "two_sided"

    num_householder: int = 8
    scaled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self, "num_householder", 1)
        if self.num_householder % 2:
            raise AdapterError(
                "TwoSidedConfig: `num_householder` must be even, since equal pairs make the "
                f"identity at the start, got {self.num_householder}; one more will do"
            )


KINDS: dict[str, type[AdapterConfig]] = {c.kind: c for c in (HRAConfig, HTAConfig, TwoSidedConfig)}


def config_from_dict(settings: Mapping[str, Any]) -> AdapterConfig:
    """Make a config from what `AdapterConfig.to_dict` returned.

    Raises:
        AdapterError: the kind or a setting is unknown, or a value cannot be.
    """
    settings = dict(settings)
    kind = settings.pop("kind", None)
    if kind not in KINDS:
        raise AdapterError(
            f"adapters: `kind` must be one of {', '.join(KINDS)}, got {kind!r}; "
            "load it with the version of householder that wrote it"
        )
    known = {f.name for f in dataclasses.fields(KINDS[kind])}
    if unknown := sorted(settings.keys() - known):
        raise AdapterError(
            f"adapters: {kind} has no setting {', '.join(unknown)}; "
            "load it with the version of householder that wrote it"
        )
    return KINDS[kind](**settings)


def _check_count(config: AdapterConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise AdapterError(
            f"{type(config).__name__}: `{name}` must be an integer of at least {least}, got "
            f"{value!r}; leave it out for the default"
        )


def _check_choice(config: AdapterConfig, name: str, choices: Sequence[str | None]) -> None:
    value = getattr(config, name)
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise AdapterError(
            f"{type(config).__name__}: `{name}` must be one of {names}, got {value!r}; "
            "leave it out for the default"
        )
