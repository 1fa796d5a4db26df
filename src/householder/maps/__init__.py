"""Structured linear maps as values: y = A x, with no parameters and no modules."""

from householder.maps.base import Composition, LinearMap
from householder.maps.householder import HouseholderProduct

__all__ = ["Composition", "HouseholderProduct", "LinearMap"]
