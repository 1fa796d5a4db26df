"""The benchmark cases: what is computed, by whom, and how each answer is checked.

A case has several variants of one computation. `make` draws the inputs and returns, per variant, a
function of no arguments that runs it once and returns what is compared with the reference. A
variant whose package is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

from householder import HouseholderProduct, delta_product, path_attention
from householder.nn import parametrizations
from householder.testing import delta_product_inputs, path_attention_inputs

Results = dict[str, Tensor]
Variants = dict[str, Callable[[], Results]]


@dataclass(frozen=True)
class Case:
    """One row of the table for each variant."""

    name: str
    make: Callable[..., Variants]
    options: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    # How far a variant may be from the float64 reference, relatively. The accuracy rule itself is
    # tested in tests/; here it is enough that nobody is timed on another computation.
    tolerance: float = 1e-4
    repeats: int = 15

    def variants(self) -> Variants:
        """Draw the inputs and return the functions to time."""
        return self.make(**self.options)


def apply_product(D: int, N: int, columns: int = 32) -> Variants:
    """Q X and its gradients, for Q the first N columns of a product of N reflectors.

    That is what `torch.linalg.householder_product` makes. The others apply the whole product to X
    continued by zeros, which is the same.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(D, N, generator=generator).tril(-1).requires_grad_()
    x = torch.randn(N, columns, generator=generator).requires_grad_()
    dy = torch.randn(D, columns, generator=generator)

    # As in torch.nn.utils.parametrizations.orthogonal: a unit diagonal and the tau that reflects.
    def tau(a: Tensor) -> Tensor:
        return 2 / (1 + a.tril(-1).square().sum(0))

    def continued(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, D - N))

    def finish(y: Tensor, *inputs: Tensor) -> Results:
        da, dx = torch.autograd.grad(y, inputs, dy.to(y.dtype))
        return {"y": y.detach(), "da": da.tril(-1), "dx": dx}

    def householder() -> Results:
        product = HouseholderProduct.from_lapack(a, tau(a))
        return finish(product(continued(x).mT).mT, a, x)

    def torch_linalg() -> Results:
        return finish(torch.linalg.householder_product(a, tau(a)) @ x, a, x)

    def torch_ormqr() -> Results:
        return finish(torch.ormqr(a, tau(a), continued(x)), a, x)

    def reference() -> Results:
        wide = [t.detach().double().requires_grad_() for t in (a, x)]
        return finish(torch.linalg.householder_product(wide[0], tau(wide[0])) @ wide[1], *wide)

    return {
        "reference": reference,
        "householder": householder,
        "torch.linalg.householder_product": torch_linalg,
        "torch.ormqr": torch_ormqr,
    }


def orthogonal_weight(D: int, M: int, step: bool, rows: int = 32) -> Variants:
    """Form a D × M weight with orthonormal columns from M vectors, or make a training step with it.

    The step applies the linear layer to 32 rows and takes the gradients of vectors and rows. All
    start from the vectors of PyTorch's own parametrization, whose D × D base is the identity here.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(D, M, generator=generator).tril(-1) - torch.eye(D, M)
    x = torch.randn(rows, M, generator=generator).requires_grad_()
    dy = torch.randn(rows, D, generator=generator)

    def finish(weight: Tensor, vectors: Tensor, x: Tensor, in_rows: bool = False) -> Results:
        if not step:
            return {"weight": weight.detach()}
        y = x @ weight.mT
        da, dx = torch.autograd.grad(y, (vectors, x), dy.to(y.dtype))
        da = da.flip(0).mT if in_rows else da
        return {"y": y.detach(), "dx": dx, "da": da.tril(-1)}

    def peer(trivialized: bool) -> nn.Module:
        layer = nn.Linear(M, D, bias=False)
        torch_parametrizations.orthogonal(
            layer, orthogonal_map="householder", use_trivialization=trivialized
        )
        with torch.no_grad():
            layer.parametrizations["weight"].original.copy_(a)
        if trivialized:
            layer.parametrizations["weight"][0].base = torch.eye(D)
        return layer

    ours = parametrizations.orthogonal(nn.Linear(M, D, bias=False))
    with torch.no_grad():
        ours.parametrizations["weight"].original.copy_((a.tril(-1) + torch.eye(D, M)).mT.flip(0))
        ours.parametrizations["weight"][0].signs.fill_(-1)

    def run(layer: nn.Module, x: Tensor = x) -> Callable[[], Results]:
        vectors = layer.parametrizations["weight"].original
        return lambda: finish(layer.weight, vectors, x, in_rows=layer is ours)

    def loop() -> Results:
        leaf = a.detach().requires_grad_()
        columns = (leaf.tril(-1) + torch.eye(D, M)).unbind(-1)
        weight = -torch.eye(D, M)
        for v in reversed(columns):
            weight = weight - 2 / v.square().sum() * torch.outer(v, v @ weight)
        return finish(weight, leaf, x)

    exact = peer(trivialized=False).double()
    variants: Variants = {
        "reference": run(exact, x.detach().double().requires_grad_()),
        "householder": run(ours),
        "torch parametrization, its default base": run(peer(trivialized=True)),
        "torch parametrization, no base": run(peer(trivialized=False)),
    }
    # Each turn of the loop keeps a whole weight for the gradient: 1.5 GiB for 512 × 512.
    return variants | {"Python loop": loop} if M <= 64 else variants


def gated_delta_rule(B: int, T: int, H: int, D: int, dtype: str = "float32") -> Variants:
    """The gated delta rule, N = 1, forward and backward."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    inputs = delta_product_inputs(
        B, T, 1, H, D, D, decay=0.05, with_initial_state=False, dtype=dtypes[dtype]
    )
    names = ("q", "k", "v", "beta", "g")
    leaves = {n: inputs[n].requires_grad_() for n in names}  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(B, T, H, D, generator=generator).to(dtypes[dtype])

    def finish(o: Tensor, leaves: dict[str, Tensor]) -> Results:
        grads = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
        return {"o": o.detach()} | {f"d{n}": d for n, d in zip(names, grads, strict=True)}

    def householder() -> Results:
        return finish(delta_product(**leaves)[0], leaves)

    def reference() -> Results:
        wide = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
        return finish(delta_product(**wide)[0], wide)

    variants: Variants = {"reference": reference, "householder": householder}
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except ImportError:
        return variants

    def transformers() -> Results:
        q, k, v, beta, g = leaves.values()
        flat = (q, k.squeeze(2), v.squeeze(2), g, beta.squeeze(2))
        return finish(torch_chunk_gated_delta_rule(*flat)[0], leaves)

    return variants | {"transformers qwen3_next, chunked": transformers}


def long_sequence(T: int, N: int = 1) -> Variants:
    """One head of 64 over a long sequence, forward and backward, to see the cost grow."""
    inputs = delta_product_inputs(
        1, T, N, 1, 64, 64, decay=0.05, with_initial_state=False, dtype=torch.float32
    )
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if x is not None}

    def householder() -> Results:
        o, _ = delta_product(**leaves)
        dk, dv = torch.autograd.grad(o.sum(), (leaves["k"], leaves["v"]))
        return {"o": o.detach(), "dk": dk, "dv": dv}

    return {"householder": householder}


def attention(B: int, T: int, H: int, D: int) -> Variants:
    """Softmax attention, forward and backward, float32.

    The reflectors are drawn with β = 0, where PaTH is attention without positions: the results can
    be compared with PyTorch's, and the time does not depend on β. PyTorch's form has no w and β to
    differentiate.
    """
    inputs = path_attention_inputs(B, T, H, D, D, strength=0.0, decay=None, dtype=torch.float32)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if x is not None}
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(B, T, H, D, generator=generator)

    def finish(o: Tensor, leaves: dict[str, Tensor]) -> Results:
        grads = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
        shared = zip(("q", "k", "v"), grads, strict=False)
        return {"o": o.detach()} | {f"d{n}": d for n, d in shared}

    def householder() -> Results:
        return finish(path_attention(**leaves), leaves)

    def reference() -> Results:
        wide = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
        return finish(path_attention(**wide), wide)

    def sdpa() -> Results:
        qkv = {n: leaves[n] for n in ("q", "k", "v")}
        heads_first = (x.transpose(1, 2) for x in qkv.values())
        o = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
        return finish(o.transpose(1, 2), qkv)

    return {"reference": reference, "householder": householder, "torch SDPA, no positions": sdpa}


CASES = [
    *(
        Case(f"apply-{D}x{N}", apply_product, {"D": D, "N": N}, group="apply")
        for D, N in ((512, 512), (1024, 64), (2048, 32))
    ),
    *(
        Case(
            f"orthogonal-weight-{kind}-{D}x{M}",
            orthogonal_weight,
            {"D": D, "M": M, "step": kind == "step"},
            group="orthogonal-weight",
        )
        for D, M in ((1024, 64), (512, 512))
        for kind in ("form", "step")
    ),
    *(
        Case(
            f"gated-delta-{B}x{T}x{H}x{D}-{dtype}",
            gated_delta_rule,
            {"B": B, "T": T, "H": H, "D": D, "dtype": dtype},
            group="gated-delta",
            tolerance=1e-4 if dtype == "float32" else 3e-2,
        )
        for B, T, H, D in ((1, 2048, 8, 64), (4, 512, 8, 64), (1, 2048, 8, 128))
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Case(
            f"path-attention-{B}x{T}x{H}x{D}",
            attention,
            {"B": B, "T": T, "H": H, "D": D},
            group="path-attention",
        )
        for B, T, H, D in ((1, 2048, 8, 64), (1, 2048, 8, 128), (4, 512, 8, 64))
    ),
    *(
        Case(f"length-{T}-n{N}", long_sequence, {"T": T, "N": N}, group="length", repeats=5)
        for N in (1, 2)
        for T in (1 << e for e in range(10, 19))
    ),
]
