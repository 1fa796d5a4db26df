"""`householder adapt`: fine-tune a model of timm or transformers on images or a text."""

from householder.train.adapt.config import AdaptConfig
from householder.train.adapt.methods import METHODS, Method, make_method
from householder.train.adapt.run import AdaptObserver, AdaptResult, run_adapt

__all__ = [
    "METHODS",
    "AdaptConfig",
    "AdaptObserver",
    "AdaptResult",
    "Method",
    "make_method",
    "run_adapt",
]
