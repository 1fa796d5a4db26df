"""The laws of every map: one table, a row for each. A new map is a new row."""

import pytest
import torch

from householder import Composition, HouseholderProduct, LinearMap
from householder.testing import check_linear_map_laws


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal_then_general(k1, k2, beta):
    return HouseholderProduct(k2, beta).compose(HouseholderProduct.orthogonal(k1))


def composed(k1, k2, beta):
    return Composition(HouseholderProduct(k2, beta), HouseholderProduct.orthogonal(k1).mT)


COMPLEX = torch.complex128
MAPS = {
    "one reflector": (HouseholderProduct, draw(1, 5), draw(1)),
    "several": (HouseholderProduct, draw(3, 5), draw(3)),
    "more than dimensions": (HouseholderProduct, 0.5 * draw(9, 4), draw(9)),
    "complex": (HouseholderProduct, draw(3, 5, dtype=COMPLEX), draw(3, dtype=COMPLEX)),
    "batched": (HouseholderProduct, draw(2, 3, 4), draw(2, 3)),
    "beta broadcasts": (HouseholderProduct, draw(2, 1, 3, 4), draw(3, 3)),
    "orthogonal": (HouseholderProduct.orthogonal, draw(4, 5)),
    "unitary": (HouseholderProduct.orthogonal, draw(2, 3, 4, dtype=COMPLEX)),
    "product of products": (orthogonal_then_general, draw(2, 4), draw(3, 4), draw(3)),
    "composition": (composed, draw(2, 4), draw(3, 4), draw(3)),
    "composition, batched": (composed, draw(2, 2, 4), draw(3, 4), draw(3)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", MAPS)
def test_laws(name):
    make, *params = MAPS[name]
    check_linear_map_laws(make, *params, invertible=True)


def test_the_laws_notice_what_is_wrong():
    """A map with a flipped sign in one method breaks the law of that method."""

    class WrongTranspose(HouseholderProduct):
        @property
        def mH(self):
            return HouseholderProduct(self.reflectors, self.beta)  # the order not reversed

    class WrongInverse(HouseholderProduct):
        def inverse(self, *, check=True):
            return HouseholderProduct(self.reflectors.flip(-2), self.beta.flip(-1))

    class WrongDeterminant(HouseholderProduct):
        def logabsdet(self):
            return -super().logabsdet()

    class WrongProduct(HouseholderProduct):
        def __call__(self, x):
            return super().__call__(x) + 1e-6

    params = (draw(3, 5), draw(3))
    for wrong, law in [
        (WrongTranspose, "dot test"),
        (WrongInverse, "inverse"),
        (WrongDeterminant, "log-determinant"),
        (WrongProduct, "linearity"),
    ]:
        with pytest.raises(AssertionError, match=f"law of {law}"):
            check_linear_map_laws(wrong, *params, transforms=False)


class TestComposition:
    def test_flattens_and_reports_its_shape(self):
        a, b = (HouseholderProduct.orthogonal(draw(2, 4, seed=s)) for s in (0, 1))
        product = Composition(Composition(a, b), a)
        assert product.maps == (a, b, a)
        assert product.shape == (4, 4)
        assert "4 × 4" in repr(product)

    def test_sizes_must_fit(self):
        a, b = HouseholderProduct.orthogonal(draw(2, 4)), HouseholderProduct.orthogonal(draw(2, 5))
        with pytest.raises(ValueError, match="a map from 4 features cannot follow one to 5"):
            a @ b

    def test_takes_maps_and_at_least_one(self):
        with pytest.raises(ValueError, match="got none; give those to compose"):
            Composition()
        with pytest.raises(TypeError, match="must be a LinearMap, got Tensor"):
            Composition(HouseholderProduct.orthogonal(draw(2, 4)), draw(4))

    def test_a_tensor_is_called_and_not_multiplied(self):
        A = HouseholderProduct.orthogonal(draw(2, 4))
        with pytest.raises(TypeError, match="got a tensor; apply the map by calling"):
            A @ draw(4)
        with pytest.raises(TypeError):
            A @ 2


def test_a_map_without_an_inverse_says_so():
    class Ones(LinearMap):
        shape = torch.Size((2, 3))
        dtype = torch.float64
        device = torch.device("cpu")

        def __call__(self, x):
            return x.sum(-1, keepdim=True).expand(*x.shape[:-1], 2)

        @property
        def mH(self):
            return OnesBack()

    class OnesBack(Ones):
        shape = torch.Size((3, 2))

        def __call__(self, x):
            return x.sum(-1, keepdim=True).expand(*x.shape[:-1], 3)

        @property
        def mH(self):
            return Ones()

    assert torch.equal(Ones().to_dense(), torch.ones(2, 3, dtype=torch.float64))
    check_linear_map_laws(Ones, transforms=False)
    with pytest.raises(NotImplementedError, match=r"Ones.inverse: this kind of map has no"):
        Ones().inverse()
    with pytest.raises(NotImplementedError, match="no determinant; use"):
        Ones().logabsdet()
