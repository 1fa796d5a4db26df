"""Tools for testing maps and sequence ops: inputs, the accuracy rule, the laws of linear maps.

They are public so that others can hold their own maps and kernels to the same rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from householder.maps import LinearMap

__all__ = [
    "CORRELATIONS",
    "assert_as_accurate",
    "check_linear_map_laws",
    "correlated_reflectors",
    "delta_product_inputs",
    "orthogonality_error",
    "path_attention_inputs",
    "relative_error",
]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ in the Frobenius norm; NaN counts as infinite.

    If `expected` is zero the norm of `actual` itself is returned. Computed in float64.

    Args:
        actual: any shape and dtype.
        expected: of the same shape.

    Examples:
        >>> relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
        0.1
    """
    wide = torch.complex128 if expected.is_complex() or actual.is_complex() else torch.float64
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    scale = float(torch.linalg.vector_norm(expected)) or 1.0
    error = float(torch.linalg.vector_norm(actual - expected)) / scale
    return error if error == error else float("inf")


def assert_as_accurate(
    actual: Tensor,
    plain: Tensor,
    expected: Tensor,
    *,
    factor: float = 2.0,
    name: str = "result",
) -> None:
    """Hold a result to the library's one accuracy rule.

    The error against the float64 reference may be at most `factor` times the error of the same
    computation done plainly in the tested dtype, plus one rounding step. Errors are relative, in
    the Frobenius norm; single entries may be off by twice as much relative to the largest entry,
    so that one wrong entry cannot hide in a large tensor.

    Args:
        actual: the result to test, in the tested dtype.
        plain: the same computation done plainly (say by the `reference` form) from the same inputs,
            in the same dtype.
        expected: the float64 reference, from the same inputs cast to float64.
        factor: how many times the plain error is allowed.
        name: what the message calls the result.

    Raises:
        AssertionError: the rule is broken, a value is NaN, or shapes or dtypes differ.

    Examples:
        >>> expected = torch.linspace(1, 2, 100, dtype=torch.float64).sqrt()
        >>> plain = torch.linspace(1, 2, 100).sqrt()
        >>> assert_as_accurate(plain, plain, expected)
        >>> assert_as_accurate(plain + 1e-5, plain, expected)
        Traceback (most recent call last):
        ...
        AssertionError: result: relative error 8.2e-06, allowed 2 × 3.0e-08 + 1.2e-07
    """
    if actual.shape != expected.shape or plain.shape != expected.shape:
        raise AssertionError(
            f"{name}: shapes differ: actual {list(actual.shape)}, plain {list(plain.shape)}, "
            f"expected {list(expected.shape)}"
        )
    if actual.dtype != plain.dtype:
        raise AssertionError(f"{name}: dtypes differ: actual {actual.dtype}, plain {plain.dtype}")
    if actual.numel() == 0:
        return
    step = torch.finfo(actual.dtype).eps
    error, plain_error = relative_error(actual, expected), relative_error(plain, expected)
    if not error <= factor * plain_error + step:
        raise AssertionError(
            f"{name}: relative error {error:.1e}, "
            f"allowed {factor:g} × {plain_error:.1e} + {step:.1e}"
        )
    error, plain_error = _largest_error(actual, expected), _largest_error(plain, expected)
    if not error <= 2 * (factor * plain_error + step):
        raise AssertionError(
            f"{name}: one entry is off by {error:.1e} of the largest, "
            f"allowed 2 × ({factor:g} × {plain_error:.1e} + {step:.1e})"
        )


def _largest_error(actual: Tensor, expected: Tensor) -> float:
    scale = float(expected.detach().abs().max()) or 1.0
    wide = expected.detach().to(torch.complex128 if expected.is_complex() else torch.float64)
    return float((actual.detach().to(wide.dtype) - wide).abs().max()) / scale


def orthogonality_error(Q: Tensor) -> float:
    """Return ‖QᴴQ − I‖₂ (‖QQᴴ − I‖₂ if Q is wide), computed in float64.

    It is the largest |σ² − 1| of Q's singular values σ: by so much, at most, Q changes the square
    of a vector's length. No entry of QᴴQ − I is larger, and neither is its Frobenius norm over √M.
    (The Frobenius norm itself grows with M for any computation that rounds each column.)

    Args:
        Q: `[*, D, M]`, real or complex; of a batch the worst counts. NaN counts as infinite.

    Examples:
        >>> orthogonality_error(torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.5]]))
        0.25
    """
    Q = Q.detach().to(torch.complex128 if Q.is_complex() else torch.float64)
    Q = Q if Q.shape[-2] >= Q.shape[-1] else Q.mH
    if not bool(Q.isfinite().all()):
        return float("inf")
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return float(torch.linalg.eigvalsh(Q.mH @ Q - eye).abs().max())


# How the reflectors of `correlated_reflectors` are related.
CORRELATIONS = (
    "independent", "equal", "close", "alternating", "signs", "geometric", "drifting", "pairs",
    "subspace", "lengths",
)  # fmt: skip


def correlated_reflectors(
    kind: str,
    N: int,
    D: int,
    *,
    noise: float = 1e-3,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Tensor:
    """Draw reflectors `[N, D]` that are independent, or hard cases for a compact WY form.

    Args:
        kind: one of `CORRELATIONS`: "independent"; "equal", all the same; "close", the same up to
            noise; "alternating", two in turn up to noise; "signs", the same with either sign in
            turn, up to noise; "geometric", approaching one of them by a tenth each; "drifting", a
            random walk in small steps; "pairs" of equal ones; "subspace", all in four dimensions
            up to noise; "lengths", close ones of lengths from 1e-3 to 1e3.
        N: reflectors.
        D: dimensions.
        noise: relative to the entries.
        dtype: real.
        device: of the result; the numbers are drawn on the CPU, and are the same on all.
        seed: of the draw.

    Raises:
        ValueError: there is no such kind.

    Examples:
        >>> k = correlated_reflectors("pairs", 4, 8)
        >>> torch.equal(k[0], k[1]), torch.equal(k[1], k[2])
        (True, False)
    """
    if kind not in CORRELATIONS:
        raise ValueError(
            f"correlated_reflectors: `kind` must be one of {', '.join(CORRELATIONS)}, "
            f"got {kind!r}; pick one of them"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, size: int = D) -> Tensor:
        return torch.randn(count, size, generator=generator, dtype=torch.float64)

    row = torch.arange(N, dtype=torch.float64).unsqueeze(-1)
    make = {
        "independent": lambda: draw(N),
        "equal": lambda: draw(1).expand(N, D),
        "close": lambda: draw(1) + noise * draw(N),
        "alternating": lambda: draw(2).repeat(N // 2 + 1, 1)[:N] + noise * draw(N),
        "signs": lambda: draw(1) * (-1) ** row + noise * draw(N),
        "geometric": lambda: draw(1) + 0.9**row * draw(1),
        "drifting": lambda: draw(1) + 0.02 * draw(N).cumsum(0),
        "pairs": lambda: draw(N // 2 + 1).repeat_interleave(2, dim=0)[:N],
        "subspace": lambda: draw(N, 4) @ draw(4) + noise * draw(N),
        "lengths": lambda: 10 ** (6 * row / N - 3) * (draw(1) + noise * draw(N)),
    }
    return make[kind]().to(device, dtype)


def delta_product_inputs(
    B: int = 2,
    T: int = 37,
    N: int = 2,
    H: int = 2,
    K: int = 8,
    V: int = 6,
    *,
    HV: int | None = None,
    strength: float | None = None,
    decay: float | None = 0.1,
    num_sequences: int | None = None,
    with_initial_state: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Make random arguments of `householder.delta_product`, by name.

    Args:
        B: batch; 1 with `num_sequences`.
        T: tokens.
        N: reflectors per token.
        H: key heads.
        K: key dimension.
        V: value dimension.
        HV: value heads; H if None.
        strength: β‖k‖² of every reflector (0 identity, 1 projection, 2 reflection); uniform in
            [0, 2] if None. Keys have unit length.
        decay: mean of −g over tokens; None for no gate.
        num_sequences: pack T tokens as so many sequences of random lengths, the first of them
            empty, and return `cu_seqlens`.
        with_initial_state: whether to draw an initial state.
        dtype: of everything but the initial state, which is at least float32.
        device: where to put the tensors; the values do not depend on it.
        seed: of the draw.

    Examples:
        >>> inputs = delta_product_inputs(T=5, N=3, decay=None)
        >>> inputs["k"].shape, inputs["g"]
        (torch.Size([2, 5, 3, 2, 8]), None)
    """
    draw = _Draw(seed)
    HV = H if HV is None else HV
    S = B if num_sequences is None else num_sequences
    k, beta = draw.unit(B, T, N, H, K), draw.beta(strength, B, T, N, HV)
    inputs = {
        "q": draw.normal(B, T, H, K),
        "k": k,
        "v": draw.normal(B, T, N, HV, V),
        "beta": beta,
        "g": draw.gates(decay, B, T, HV),
    }
    made = {name: None if x is None else x.to(device, dtype) for name, x in inputs.items()}
    state = draw.normal(S, HV, K, V).to(device, torch.promote_types(dtype, torch.float32))
    made["initial_state"] = state if with_initial_state else None
    made["cu_seqlens"] = draw.bounds(T, num_sequences, device)
    return made


def path_attention_inputs(
    B: int = 2,
    T: int = 37,
    H: int = 2,
    K: int = 8,
    V: int = 6,
    *,
    HQ: int | None = None,
    strength: float | None = None,
    decay: float | None = 0.1,
    with_sinks: bool = False,
    num_sequences: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Make random arguments of `householder.path_attention`, by name.

    Args:
        B: batch; 1 with `num_sequences`.
        T: tokens.
        H: key heads.
        K: key dimension.
        V: value dimension.
        HQ: query heads; H if None.
        strength: β‖w‖² of every reflector (0 identity, 1 projection, 2 reflection); uniform in
            [0, 2] if None. The w have unit length.
        decay: mean of −g over tokens; None for no gate.
        with_sinks: whether to draw sinks.
        num_sequences: pack T tokens as so many sequences of random lengths, the first of them
            empty, and return `cu_seqlens`.
        dtype: of all tensors.
        device: where to put the tensors; the values do not depend on it.
        seed: of the draw.

    Examples:
        >>> inputs = path_attention_inputs(T=5, HQ=4, decay=None)
        >>> inputs["q"].shape, inputs["w"].shape, inputs["g"]
        (torch.Size([2, 5, 4, 8]), torch.Size([2, 5, 2, 8]), None)
    """
    draw = _Draw(seed)
    HQ = H if HQ is None else HQ
    w, beta = draw.unit(B, T, H, K), draw.beta(strength, B, T, H)
    inputs = {
        "q": draw.normal(B, T, HQ, K),
        "k": draw.normal(B, T, H, K),
        "v": draw.normal(B, T, H, V),
        "w": w,
        "beta": beta,
        "g": draw.gates(decay, B, T, HQ),
        "sinks": draw.normal(HQ) if with_sinks else None,
    }
    made = {name: None if x is None else x.to(device, dtype) for name, x in inputs.items()}
    made["cu_seqlens"] = draw.bounds(T, num_sequences, device)
    return made


class _Draw:
    """Draw the tensors of the input factories, in float64 and the same for a seed everywhere."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        """Draw vectors of length 1 along the last dimension."""
        x = self.normal(*shape)
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    def beta(self, strength: float | None, *shape: int) -> Tensor:
        """Draw coefficients of unit reflectors from [0, 2], or give them all one strength."""
        beta = self.uniform(*shape) * 2
        return beta if strength is None else torch.full_like(beta, strength)

    def gates(self, decay: float | None, *shape: int) -> Tensor | None:
        """Draw log gates, −g of mean `decay`."""
        return None if decay is None else -2 * decay * self.uniform(*shape)

    def bounds(
        self, T: int, num_sequences: int | None, device: str | torch.device
    ) -> Tensor | None:
        """Cut T tokens into sequences of random lengths, the first of several empty."""
        if num_sequences is None:
            return None
        inner = (max(num_sequences - 2, 0),)
        cuts = torch.randint(0, T + 1, inner, generator=self._generator).sort().values
        bounds = [0, *([0] if num_sequences > 1 else []), *cuts.tolist(), T]
        return torch.tensor(bounds, dtype=torch.int32, device=device)


def check_linear_map_laws(
    make: Callable[..., LinearMap],
    *params: Tensor,
    invertible: bool = False,
    transforms: bool = True,
    seed: int = 0,
) -> None:
    """Check that a map obeys the laws stated in `householder.LinearMap`.

    Checked are linearity, the dot test ⟨A x, y⟩ = ⟨x, Aᴴ y⟩, agreement with the dense matrix, the
    transpose, composition, inverse and log-determinant where there are any, gradients in reverse,
    forward and second order (`gradcheck`), `torch.func.vmap` over the parameters, and
    `torch.compile(fullgraph=True)`.

    Args:
        make: builds the map from `params`.
        *params: float64 or complex128 tensors.
        invertible: require an inverse and a log-determinant.
        transforms: whether to check gradients, vmap and compile too, which is slower.
        seed: of the vectors applied.

    Raises:
        AssertionError: a law is broken; the message names it.

    Examples:
        >>> from householder import HouseholderProduct
        >>> k, beta = torch.randn(2, 4, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
        >>> check_linear_map_laws(HouseholderProduct, k, beta, invertible=True, transforms=False)
    """
    generator = torch.Generator().manual_seed(seed)
    A = make(*params)
    out_size, in_size = A.shape[-2:]
    batch = A.shape[:-2]

    def vector(size: int) -> Tensor:
        return torch.randn((*batch, size), generator=generator, dtype=torch.float64).to(A.dtype)

    x, x2, y = vector(in_size), vector(in_size), vector(out_size)
    dense = A.to_dense()
    _expect("shape", dense.shape == A.shape and A(x).shape == (*batch, out_size))
    _close("linearity", A(2 * x - 3 * x2), 2 * A(x) - 3 * A(x2))
    _close("dot test", _inner(A(x), y), _inner(x, A.mH(y)))
    _close("dense", A(x), _apply_dense(dense, x))
    _close("transpose", A.mT.to_dense(), dense.mT)
    _close("composition", (A.mH @ A)(x), A.mH(A(x)))
    _close("composition, dense", (A.mH @ A).to_dense(), dense.mH @ dense)
    try:
        inverse = A.inverse()
    except NotImplementedError:
        _expect("inverse", not invertible)
    else:
        _close("inverse", inverse(A(x)), x)
        _close("inverse, other side", A(inverse(y)), y)
        _close("log-determinant", A.logabsdet(), torch.linalg.slogdet(dense).logabsdet)
    if transforms:
        _check_transforms(make, params, x)


def _check_transforms(make: Callable[..., LinearMap], params: Sequence[Tensor], x: Tensor) -> None:
    def apply(x: Tensor, *params: Tensor) -> Tensor:
        return make(*params)(x)

    leaves = tuple(p.detach().clone().requires_grad_() for p in (x, *params))
    torch.autograd.gradcheck(apply, leaves, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(apply, leaves, check_fwd_over_rev=True)

    stacked = [torch.stack([p, 0.5 * p]) for p in params]
    each = [apply(x, *(p[i] for p in stacked)) for i in range(2)]
    batched = torch.func.vmap(apply, in_dims=(None, *(0 for _ in params)))(x, *stacked)
    _close("vmap", batched, torch.stack(each))

    torch.compiler.reset()  # each map is a new kind of argument to the same traced code
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    _close("compile", compiled(x, *params), apply(x, *params))
    plain = torch.autograd.grad(apply(*leaves).abs().square().sum(), leaves)
    traced = torch.autograd.grad(compiled(*leaves).abs().square().sum(), leaves)
    for a, b in zip(traced, plain, strict=True):
        _close("compile, gradient", a, b)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)


def _apply_dense(dense: Tensor, x: Tensor) -> Tensor:
    return (dense @ x.unsqueeze(-1)).squeeze(-1)


def _expect(law: str, holds: bool) -> None:
    if not holds:
        raise AssertionError(f"the law of {law} is broken")


def _close(law: str, actual: Tensor, expected: Tensor) -> None:
    # In float64: far above what rounding leaves of small well-conditioned maps, far below a slip.
    scale = 1.0 + float(expected.detach().abs().max()) if expected.numel() else 1.0
    error = float((actual - expected).detach().abs().max()) if expected.numel() else 0.0
    if not (actual.shape == expected.shape and error <= 1e-10 * scale):
        raise AssertionError(
            f"the law of {law} is broken: error {error:.1e}, shapes {list(actual.shape)} and "
            f"{list(expected.shape)}"
        )
