"""The error of adapters."""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter that cannot be made, merged, undone, saved or loaded as asked; says why."""
