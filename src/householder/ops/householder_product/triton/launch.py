"""Launches that cost the host little where sizes, strides and device are those of a call before."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from householder.ops._triton import Launcher

_launchers: dict[tuple[Any, ...], Launcher] = {}
# Who brings this many different sizes does not come back to the first of them soon.
MOST_LAUNCHERS = 2048


def launch(kernel: Any, grid: tuple[int, ...], *tensors: Tensor | None, **others: Any) -> None:
    """Launch `kernel[grid](*tensors, **others)`; some tensors may be None, the first may not."""
    assert tensors[0] is not None
    key = (id(kernel), tensors[0].device, grid, *others.values())
    launcher = _launchers.get(key)
    if launcher is None:
        if len(_launchers) >= MOST_LAUNCHERS:
            _launchers.clear()
        launcher = _launchers[key] = Launcher(kernel, grid, **others)
    launcher(*tensors)
