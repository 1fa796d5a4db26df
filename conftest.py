"""What holds for every test and every example in docstrings and documents: fixed random numbers."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Start from the same random state, whatever ran before."""
    torch.manual_seed(0)
