"""`parametrizations.orthogonal` and `svd`: as PyTorch's own parametrizations, and where not so."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

from householder.nn import parametrizations
from householder.testing import assert_as_accurate, orthogonality_error

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
SHAPES = {
    "square": (6, 6),
    "tall": (9, 4),
    "wide": (3, 7),
    "batched tall": (2, 3, 5, 2),
    "batched wide": (4, 2, 5),
    "one row": (1, 4),
    "one": (1, 1),
}


class Holder(nn.Module):
    """A module of one weight."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


def orthonormal(weight: Tensor) -> Tensor:
    """Return the Q of a QR decomposition with positive diagonal, of the adjoint if wide."""
    wide = weight.shape[-2] < weight.shape[-1]
    Q, R = torch.linalg.qr(weight.mT if wide else weight)
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2)
    return Q.mT if wide else Q


class TestOrthogonal:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_starts_at_the_q_of_the_present_weight(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        module = Holder(*shape, dtype=dtype)
        before = module.weight.detach().clone()
        assert parametrizations.orthogonal(module) is module
        eps = torch.finfo(dtype).eps
        assert module.weight.shape == shape
        assert orthogonality_error(module.weight) <= 4 * eps * max(shape[-2:]) ** 0.5 + eps
        torch.testing.assert_close(
            module.weight.detach(), orthonormal(before), rtol=0, atol=100 * eps
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_assigning_sets_the_weight(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        module = parametrizations.orthogonal(Holder(*shape, dtype=dtype))
        Q = orthonormal(torch.randn(shape, dtype=dtype))
        module.weight = Q
        atol = 40 * torch.finfo(dtype).eps
        torch.testing.assert_close(module.weight.detach(), Q, rtol=0, atol=atol)
        module.weight = -Q  # for odd square ones of the other determinant
        torch.testing.assert_close(module.weight.detach(), -Q, rtol=0, atol=atol)

    @pytest.mark.parametrize("shape", [(16, 16), (40, 16), (16, 40)])
    def test_few_reflectors(self, shape: tuple[int, int]) -> None:
        module = parametrizations.orthogonal(Holder(*shape), num_householder=4)
        stack = module.parametrizations["weight"]
        assert stack.original.shape == (4, max(shape))
        assert orthogonality_error(module.weight) < 1e-14
        with torch.no_grad():
            stack.original.normal_()
        Q = module.weight.detach()
        other = parametrizations.orthogonal(Holder(*shape), num_householder=4)
        other.weight = Q
        torch.testing.assert_close(other.weight.detach(), Q, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("shape", [(32, 32), (64, 8), (8, 64)])
    def test_agrees_with_torch_where_torch_is_right(self, shape: tuple[int, int]) -> None:
        """The same matrix and gradient as PyTorch's map from the same vectors and signs."""
        theirs = torch_parametrizations.orthogonal(
            Holder(*shape, dtype=torch.float32),
            orthogonal_map="householder",
            use_trivialization=False,
        )
        X = theirs.parametrizations["weight"].original
        tall = X.detach() if shape[0] >= shape[1] else X.detach().mT
        D, M = tall.shape

        ours = parametrizations.orthogonal(Holder(*shape, dtype=torch.float32))
        stack = ours.parametrizations["weight"]
        with torch.no_grad():
            stack.original.copy_((tall.tril(-1) + torch.eye(D, M)).mT.flip(-2))
            stack[0].signs.copy_(tall.diagonal())

        exact = copy.deepcopy(theirs).double()
        assert_as_accurate(ours.weight, theirs.weight, exact.weight, name="weight")
        target = torch.randn(shape)
        for module in (ours, theirs, exact):
            (module.weight * target).sum().backward()
        wanted, plain = (
            (g if shape[0] >= shape[1] else g.mT).tril(-1)
            for g in (exact.parametrizations["weight"].original.grad, X.grad)
        )
        # What PyTorch's vectors lack, entries on and above the diagonal, have gradients here.
        found = stack.original.grad.flip(-2).mT.tril(-1)
        assert_as_accurate(found, plain, wanted, name="gradient")

    def test_where_torch_is_not_right(self) -> None:
        """PyTorch's limits, which are the reasons for this parametrization; see docs/weights.md."""
        for orthogonal_map in ("householder", "cayley", "matrix_exp"):
            half = Holder(8, 4, dtype=torch.bfloat16)
            torch_parametrizations.orthogonal(half, orthogonal_map=orthogonal_map)
            with pytest.raises((NotImplementedError, TypeError)):
                half.weight  # noqa: B018
        with pytest.raises(RuntimeError, match="than or equal to"):
            torch.linalg.householder_product(torch.randn(3, 7), torch.rand(3))
        unitary = Holder(6, 6, dtype=torch.complex64)
        with pytest.raises(ValueError, match="does not support complex"):
            torch_parametrizations.orthogonal(unitary, orthogonal_map="householder")
        thin = torch_parametrizations.orthogonal(Holder(300, 2), orthogonal_map="householder")
        assert thin.parametrizations["weight"][0].base.shape == (300, 300)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(32, 32), (48, 8), (8, 48)])
    def test_half_precision(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        eps = torch.finfo(dtype).eps
        module = parametrizations.orthogonal(Holder(*shape, dtype=dtype))
        assert module.weight.dtype == dtype
        assert orthogonality_error(module.weight) < 4 * eps
        Q = orthonormal(torch.randn(shape))
        module.weight = Q.to(dtype)
        assert (module.weight.float() - Q).abs().max() < 4 * eps
        (module.weight.float() * torch.randn(shape)).sum().backward()
        gradient = module.parametrizations["weight"].original.grad
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()
        assert gradient.any()

        single = parametrizations.orthogonal(Holder(*shape, dtype=torch.float32))
        cast = copy.deepcopy(single).to(dtype)
        assert orthogonality_error(cast.weight) < 4 * eps
        assert (cast.weight.float() - single.weight).abs().max() < 4 * eps

    def test_thin_weights_take_no_square_memory(self) -> None:
        """The square matrix of 1,000,000 rows would take 4 terabytes."""
        module = parametrizations.orthogonal(Holder(1_000_000, 2, dtype=torch.float32))
        held = [*module.parameters(), *module.buffers()]
        assert sum(x.numel() for x in held) == 2_000_002
        assert orthogonality_error(module.weight) < 1e-4
        module.weight.sin().sum().backward()
        module.weight = torch.randn(1_000_000, 2)

    def test_optimizers_keep_the_parameter(self) -> None:
        """As for torch's own: the optimizer made before holds the very tensor that is trained."""
        layer = nn.Linear(8, 8)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        parametrizations.orthogonal(layer)
        before = layer.weight.detach().clone()
        layer(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(layer.weight, before)

    @pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    def test_training_keeps_it_orthogonal_and_learns(
        self, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        module = parametrizations.orthogonal(Holder(*shape, dtype=dtype))
        target = orthonormal(torch.randn(shape, dtype=dtype))
        if shape[0] == shape[1] and not dtype.is_complex:
            target[0] *= torch.linalg.det(target @ module.weight.detach()).sign()
        # Decay shortens the reflectors, to no effect. Angles of complex ones it would pull to 0.
        reflectors, *angles = module.parameters()
        groups = [{"params": [reflectors], "weight_decay": 0.1}, {"params": angles}]
        optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=0.05)
        losses = []
        for _ in range(150):
            optimizer.zero_grad()
            loss = (module.weight - target).abs().square().sum()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            assert orthogonality_error(module.weight) < 2e-6
        assert min(losses) < 0.01 * losses[0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    def test_copies_state_dicts_and_removal(self, dtype: torch.dtype) -> None:
        module = parametrizations.orthogonal(Holder(7, 7, dtype=dtype))
        module.weight = -module.weight.detach()
        other = parametrizations.orthogonal(Holder(7, 7, dtype=dtype))
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer))
        twin = copy.deepcopy(module)
        assert torch.equal(other.weight, module.weight)
        assert torch.equal(twin.weight, module.weight)
        # A copy shares nothing.
        twin.weight = torch.eye(7, dtype=dtype)
        assert torch.equal(other.weight, module.weight)

        weight = module.weight.detach().clone()
        parametrize.remove_parametrizations(module, "weight")
        assert type(module) is Holder
        assert isinstance(module.weight, nn.Parameter)
        assert torch.equal(module.weight, weight)
        pickle.loads(pickle.dumps(module))

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("N", [None, 2])
    def test_functional_call_vmap_gradients_and_compile(self, N: int | None) -> None:
        module = parametrizations.orthogonal(Holder(4, 3), num_householder=N)
        x = torch.randn(5, 3, dtype=torch.float64)
        name = "parametrizations.weight.original"
        original = module.get_parameter(name)

        def run(original: Tensor) -> Tensor:
            return torch.func.functional_call(module, {name: original}, x)

        torch.autograd.gradcheck(run, original, check_forward_ad=True)
        torch.autograd.gradgradcheck(run, original)
        stacked = torch.stack([original.detach(), torch.randn_like(original)])
        each = torch.stack([run(k) for k in stacked])
        torch.testing.assert_close(torch.func.vmap(run)(stacked), each)
        torch.testing.assert_close(each[0], module(x))

        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))
        traced, eager = (
            torch.autograd.grad(f(x).sin().sum(), original)[0] for f in (compiled, module)
        )
        torch.testing.assert_close(traced, eager)

    def test_buffers_and_other_names(self) -> None:
        module = nn.Module()
        module.register_buffer("mixing", torch.randn(5, 5))
        parametrizations.orthogonal(module, "mixing")
        assert orthogonality_error(module.mixing) < 1e-6
        assert not list(module.parameters())

    def test_another_parametrization_may_follow(self) -> None:
        class Double(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * x

            def right_inverse(self, x: Tensor) -> Tensor:
                return x / 2

        module = parametrizations.orthogonal(Holder(6, 4))
        parametrize.register_parametrization(module, "weight", Double())
        assert orthogonality_error(module.weight / 2) < 1e-14
        Q = orthonormal(torch.randn(6, 4, dtype=torch.float64))
        module.weight = 2 * Q
        torch.testing.assert_close(module.weight, 2 * Q)

    @pytest.mark.parametrize("sizes", [(4, 8, 3), (16, 1, 2)])
    def test_flattened_filters_are_orthonormal(self, sizes: tuple[int, int, int]) -> None:
        conv = nn.Conv2d(sizes[1], sizes[0], sizes[2], bias=False)
        before = orthonormal(conv.weight.detach().flatten(1))
        parametrizations.orthogonal(conv, flatten=True)
        torch.testing.assert_close(conv.weight.detach().flatten(1), before, rtol=0, atol=1e-5)
        assert conv(torch.randn(2, sizes[1], 5, 5)).shape[1] == sizes[0]
        conv.weight = -conv.weight.detach()
        torch.testing.assert_close(conv.weight.detach().flatten(1), -before, rtol=0, atol=1e-5)

    def test_cached_is_computed_once(self) -> None:
        module = parametrizations.orthogonal(Holder(6, 4))
        with parametrize.cached():
            assert module.weight is module.weight

    @pytest.mark.parametrize("register", [parametrizations.orthogonal, parametrizations.svd])
    def test_wrong_arguments_are_named(self, register: object) -> None:
        where = f"^parametrizations.{register.__name__}: "
        with pytest.raises(ValueError, match=where + r"`name` must be .* got 'kernel' for Holder"):
            register(Holder(3, 3), "kernel")
        with pytest.raises(ValueError, match=where + r"the weight must be a matrix .*\[4\]"):
            register(nn.Linear(3, 4), "bias")
        with pytest.raises(ValueError, match=where + r"`num_householder` must be at least 1"):
            register(Holder(3, 3), num_householder=0)
        with pytest.raises(TypeError, match=where + r"`num_householder` must be an int"):
            register(Holder(3, 3), num_householder=1.5)
        parametrized = register(Holder(3, 3))
        with pytest.raises(ValueError, match=where + "must be the first parametrization"):
            register(parametrized)
        with pytest.raises(ValueError, match=where + r"the assigned weight must be \[3, 3\]"):
            parametrized.weight = torch.zeros(3, 2, dtype=torch.float64)
        with pytest.raises(ValueError, match=where + "`weight` must be finite"):
            parametrized.weight = torch.full((3, 3), torch.inf, dtype=torch.float64)
        integers = nn.Module()
        integers.register_buffer("weight", torch.ones(3, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match=where + "the weight must be real or complex"):
            register(integers)


class TestSVD:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(6, 6), (9, 4), (3, 7), (4, 3, 3, 3), (5, 2, 3)])
    def test_full_rank_keeps_the_weight(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        module = Holder(*shape, dtype=dtype)
        before = module.weight.detach().clone()
        parametrizations.svd(module)
        assert module.weight.dtype == dtype
        atol = 60 * torch.finfo(dtype).eps if dtype != torch.bfloat16 else 0.15
        torch.testing.assert_close(module.weight.detach(), before, rtol=0, atol=atol)
        if dtype == torch.bfloat16:
            return
        singular = torch.linalg.svdvals(before.flatten(1))
        found = parametrizations.singular_values(module).detach().sort(descending=True).values
        torch.testing.assert_close(found, singular, rtol=1e-4, atol=atol)

    @pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 3)])
    @pytest.mark.parametrize("rank", [1, 3])
    def test_low_rank_is_the_nearest(self, shape: tuple[int, ...], rank: int) -> None:
        module = Holder(*shape)
        U, s, Vh = torch.linalg.svd(module.weight.detach().flatten(1), full_matrices=False)
        nearest = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        parametrizations.svd(module, rank=rank)
        torch.testing.assert_close(module.weight.detach().flatten(1), nearest)

    def test_bounds_hold_for_a_convolution(self) -> None:
        conv = nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, padding=1)
        reference = copy.deepcopy(conv)
        parametrizations.svd(conv, bounds=(0.25, 0.75))
        singular = torch.linalg.svdvals(conv.weight.flatten(1))
        assert (singular > 0.25).all()
        assert (singular < 0.75).all()
        with torch.no_grad():
            conv.parametrizations["weight"].original0.normal_().mul_(100)
        singular = torch.linalg.svdvals(conv.weight.flatten(1))
        assert (singular > 0.25 - 1e-6).all()
        assert (singular < 0.75 + 1e-6).all()
        x = torch.randn(2, 4, 9, 9)
        assert conv(x).shape == reference(x).shape

    def test_the_norm_of_a_convolution_is_within_the_stated_factor(self) -> None:
        conv = nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
        parametrizations.svd(conv, bounds=(0.0, 1.0))
        matrix = torch.func.jacrev(conv)(torch.zeros(1, 2, 6, 6, dtype=torch.float64))
        norm = torch.linalg.matrix_norm(matrix.reshape(3 * 36, 2 * 36), ord=2)
        assert norm <= 3.0 * parametrizations.singular_values(conv).max()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    def test_gradients(self, dtype: torch.dtype) -> None:
        module = parametrizations.svd(Holder(3, 2, dtype=dtype), bounds=(0.1, 2.0))
        names = [name for name, _ in module.named_parameters()]
        x = torch.randn(2, 2, dtype=dtype)

        def run(*values: Tensor) -> Tensor:
            return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

        torch.autograd.gradcheck(run, tuple(module.parameters()))

    def test_copies_state_dicts_and_removal(self) -> None:
        module = parametrizations.svd(Holder(6, 4), rank=2, bounds=(0.0, 1.0))
        other = parametrizations.svd(Holder(6, 4), rank=2, bounds=(0.0, 1.0))
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.weight, module.weight)
        assert torch.equal(copy.deepcopy(module).weight, module.weight)
        weight = module.weight.detach().clone()
        parametrize.remove_parametrizations(module, "weight")
        assert torch.equal(module.weight, weight)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"rank": 4}, r"`rank` must be at most 3 for a weight \[3, 5\], got 4"),
            ({"rank": 0}, r"`rank` must be at least 1"),
            ({"bounds": (1.0, 1.0)}, r"`bounds` must be .* got \(1.0, 1.0\)"),
            ({"bounds": (-1.0, 1.0)}, r"`bounds` must be"),
            ({"bounds": (0.0, float("inf"))}, r"`bounds` must be"),
        ],
    )
    def test_wrong_options(self, options: dict, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            parametrizations.svd(Holder(3, 5), **options)

    def test_singular_values_of_something_else(self) -> None:
        for module in (Holder(3, 3), parametrizations.orthogonal(Holder(3, 3))):
            with pytest.raises(ValueError, match="must be parametrized by"):
                parametrizations.singular_values(module)
