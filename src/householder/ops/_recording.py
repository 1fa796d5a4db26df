"""Calls that do again what a call before did. Imports triton: only kernel folders import this.

What a function that launches kernels finds out in Python (grids, tiles, strides, which form runs,
which program of a kernel) follows from the layout of its arguments. For many kernels that takes
milliseconds, as long as they run. So it is done once for each layout: allocations and launches are
noted as they come, and another call makes the same ones, with its own tensors.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from householder.ops._dispatch import remember
from householder.ops._triton import this_thread

Function = TypeVar("Function", bound=Callable[..., Any])
Steps = list[Callable[[list[Any]], None]]


# What every function that is recorded knows, by the layouts of its arguments.
_KNOWN: list[dict[Any, Replay | bool]] = []


class Recording:
    """What a call allocates and launches, in order, its tensors named by their places in a list.

    First in the list are the call's arguments, then what it allocates. A step of the recording is
    a function of that list. Tensors that come from anywhere else, copies of arguments for example,
    have no place: then the recording is no use.
    """

    def __init__(self, arguments: Iterable[Any]) -> None:
        self.steps: Steps = []
        self.is_complete = True
        self._places: dict[int, int] = {}
        self._watched: list[weakref.ref[Tensor]] = []
        self._number = 0
        for x in arguments:
            self._add(x)

    def _add(self, x: Any) -> None:
        if isinstance(x, Tensor):
            self._places[id(x)] = self._number
        self._number += 1

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a tensor; where the call lets go of it, another call will too."""

        def make(tensors: list[Any]) -> None:
            tensors.append(torch.empty(shape, dtype=dtype, device=device))

        x = torch.empty(shape, dtype=dtype, device=device)
        self._add(x)
        self.steps.append(make)
        place = self._number - 1

        def let_go(tensors: list[Any]) -> None:
            tensors[place] = None

        def has_gone(_: object, where: int = id(x)) -> None:
            if self._places.get(where) == place:
                del self._places[where]
            self.steps.append(let_go)

        self._watched.append(weakref.ref(x, has_gone))
        return x

    def add_launch(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: Any, kwargs: Any
    ) -> None:
        """Note a launch of a program that a kernel was compiled to."""
        # Neither the interpreter's kernels nor what a hook of Triton's held back are programs.
        if compiled is None:
            self.is_complete = False
            return
        values = [*args, *(kwargs[name] for name in kernel.arg_names[len(args) :])]
        tensors, copies = [], []
        for i, value in enumerate(values):
            described = getattr(value, "base", None) if not isinstance(value, Tensor) else None
            x = value if described is None else described
            if not isinstance(x, Tensor):
                continue
            place = self._places.get(id(x))
            if place is None:
                self.is_complete = False
                return
            values[i] = None
            if described is None:
                tensors.append((i, place))
            else:
                copies.append((i, place, _Description(value)))
        run = compiled[(*grid, 1, 1)[:3]]

        def launch(found: list[Any]) -> None:
            given = values.copy()
            for i, place in tensors:
                given[i] = found[place]
            for i, place, description in copies:
                given[i] = description.of(found[place])
            run(*given)

        self.steps.append(launch)

    def close(self, results: tuple[Tensor | None, ...]) -> Replay | None:
        """Return what another call is to do, or None if this one cannot be repeated so."""
        self._watched.clear()
        places = [-1 if x is None else self._places.get(id(x)) for x in results]
        if not self.is_complete or None in places:
            return None
        return Replay(self.steps, [place for place in places if place is not None])


class _Description:
    """A descriptor of copies from a tensor, to be made of other tensors of the same layout.

    Its own constructor examines everything anew.
    """

    def __init__(self, descriptor: Any) -> None:
        self._type = type(descriptor)
        self._fields = {**vars(descriptor), "base": None}

    def of(self, x: Tensor) -> Any:
        descriptor = object.__new__(self._type)
        descriptor.__dict__.update(self._fields)
        descriptor.base = x
        return descriptor


class Replay(NamedTuple):
    """The steps of a recorded call, and where its results then are; a place below 0 is None's."""

    steps: Steps
    results: list[int]

    def __call__(self, arguments: Iterable[Any]) -> tuple[Tensor | None, ...]:
        tensors = list(arguments)
        for step in self.steps:
            step(tensors)
        return tuple(None if place < 0 else tensors[place] for place in self.results)


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a tensor for kernels to write to, in a function that may be `recorded`."""
    recording = this_thread.recording
    if recording is None or this_thread.only_compiles:
        return torch.empty(shape, dtype=dtype, device=device)
    return recording.allocate(shape, dtype, device)


def room_like(x: Tensor) -> Tensor:
    """Allocate a contiguous tensor of x's shape and dtype, as `room` does."""
    return room(tuple(x.shape), x.dtype, x.device)


def recorded(function: Function) -> Function:
    """Let calls with arguments of one layout, but for the first of them, repeat what that one did.

    The function gets tensors, None and numbers, and returns a tuple of tensors and None. It must
    allocate by `room`, launch by `launch`, and do nothing else with tensors: what it computes in
    another way is computed every time, by calls that are not recorded. Nothing but shapes, strides,
    dtypes, devices and alignment of the tensors may matter to what it does.
    """
    known: dict[Any, Replay | bool] = {}
    _KNOWN.append(known)

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        key = tuple([
            (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)
            if isinstance(x, Tensor)
            else x
            for x in arguments
        ])  # fmt: skip
        replay = known.get(key)
        if isinstance(replay, Replay):
            return replay(arguments)
        if replay is not None or this_thread.recording is not None:
            return function(*arguments)
        # One tensor may be two arguments now, and not in another call.
        named = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        this_thread.recording = recording = Recording(named)
        try:
            results = function(*named)
        finally:
            this_thread.recording = None
        remember(known, key, recording.close(results) or False)
        return results

    return wrapped  # type: ignore[return-value]


def forget_recordings() -> None:
    """Let all calls be worked out anew, for whoever has changed what functions do, as tests do."""
    for known in _KNOWN:
        known.clear()
