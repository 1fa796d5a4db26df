"""Calls that do again what a call before did. Imports triton: only kernel folders import this.

What a function that launches kernels finds out in Python (grids, tiles, strides, which form runs,
which program of a kernel) follows from the layout of its arguments. For many kernels that takes
milliseconds, as long as they run. So it is done once for each layout: allocations and launches are
noted as they come, and another call makes the same ones, with its own tensors.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from householder.ops._dispatch import remember
from householder.ops._triton import this_thread

Function = TypeVar("Function", bound=Callable[..., Any])
# What a step of a call gets: all tensors, by their places, and where each begins in memory; numbers
# and None are in the second list as they are.
Step = Callable[[list[Any], list[Any]], None]

# Up to so many bytes, what a call works with is one allocation; its parts are numbers. Allocating
# and freeing twenty tensors takes the host 0.1 ms, as long as ten launches.
MOST_TOGETHER = 2**28
# What memory is allocated in multiples of, as PyTorch does.
ALIGNMENT = 512


class _Made(NamedTuple):
    """A tensor that a call allocates."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    born: int  # the step before which it is allocated
    place: int

    @property
    def size(self) -> int:
        """Bytes, with what is left unused behind them."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT

    def allocate(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class _Address(int):
    """Where memory begins; descriptors take it for a tensor."""

    def data_ptr(self) -> int:
        return self


class Recording:
    """What a call allocates and launches, in order, its tensors named by their places in a list.

    First in the list are the call's arguments, then what it allocates. A launch is noted as a
    function of their addresses: of a tensor Triton would ask for its own, and then the driver
    whether it is one of the device's. Tensors that come from anywhere else, copies of arguments for
    example, have no place: then the recording is no use.
    """

    def __init__(self, arguments: Iterable[Any]) -> None:
        self.launches: list[Step] = []
        self.made: list[_Made] = []
        self.gone: dict[int, int] = {}  # by places, the launch before which the call let go
        self.is_complete = True
        self._places: dict[int, int] = {}
        self._watched: list[weakref.ref[Tensor]] = []
        self._number = 0
        for x in arguments:
            self._add(x)

    def _add(self, x: Any) -> int:
        if isinstance(x, Tensor):
            self._places[id(x)] = self._number
        self._number += 1
        return self._number - 1

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a tensor; where the call lets go of it, another call will too."""
        x = torch.empty(shape, dtype=dtype, device=device)
        place = self._add(x)
        self.made.append(_Made(shape, dtype, device, len(self.launches), place))

        def has_gone(_: object, where: int = id(x)) -> None:
            if self._places.get(where) == place:
                del self._places[where]
            self.gone[place] = len(self.launches)

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

        def launch(_: list[Any], found: list[Any]) -> None:
            given = values.copy()
            for i, place in tensors:
                given[i] = found[place]
            for i, place, description in copies:
                given[i] = description.of(found[place])
            run(*given)

        self.launches.append(launch)

    def close(self, results: tuple[Tensor | None, ...]) -> Replay | None:
        """Return what another call is to do, or None if this one cannot be repeated so."""
        self._watched.clear()
        places = [-1 if x is None else self._places.get(id(x)) for x in results]
        if not self.is_complete or None in places:
            return None
        kept = [place for place in places if place is not None]
        parts = [x for x in self.made if x.place not in kept]
        offsets, size = self._arrange(parts)
        if 0 < size <= MOST_TOGETHER and len({x.device for x in parts}) == 1:
            allocate_all = _together(self.made, offsets, size, parts[0].device)
            return Replay([allocate_all, *self.launches], kept)
        return Replay(self._one_by_one(), kept)

    def _arrange(self, parts: list[_Made]) -> tuple[dict[int, int], int]:
        """Return where the parts of one allocation lie, and its size: each at the first free place.

        Nothing lies where something else does that the call had not let go of yet.
        """
        there: list[tuple[int, int, int]] = []  # start, stop, and the launch before which it goes
        offsets, size = {}, 0
        for part in parts:
            there = sorted(x for x in there if x[2] > part.born)
            start = 0
            for begin, stop, _ in there:
                if start + part.size <= begin:
                    break
                start = max(start, stop)
            offsets[part.place] = start
            gone = self.gone.get(part.place, len(self.launches) + 1)
            there.append((start, start + part.size, gone))
            size = max(size, start + part.size)
        return offsets, size

    def _one_by_one(self) -> list[Step]:
        """Return the launches with each allocation where it was, and each letting go."""
        steps = []
        born = {x.place: x.born for x in self.made}
        for i in range(len(self.launches) + 1):
            going = [place for place, when in self.gone.items() if when == i]
            steps += [_let_go(place) for place in going if born[place] < i]
            steps += [_make(x) for x in self.made if x.born == i]
            steps += [_let_go(place) for place in going if born[place] == i]
            steps += self.launches[i : i + 1]
        return steps


def _make(made: _Made) -> Step:
    def make(tensors: list[Any], found: list[Any]) -> None:
        tensors.append(made.allocate())
        found.append(tensors[-1].data_ptr())

    return make


def _let_go(place: int) -> Step:
    def let_go(tensors: list[Any], _: list[Any]) -> None:
        tensors[place] = None

    return let_go


def _together(made: list[_Made], offsets: dict[int, int], size: int, device: torch.device) -> Step:
    """Return a step that allocates everything: what is in `offsets` together, the rest apart."""
    rooms = [(offsets.get(x.place), x) for x in made]

    def make_all(tensors: list[Any], found: list[Any]) -> None:
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        start = memory.data_ptr()
        for offset, x in rooms:
            if offset is None:
                tensors.append(x.allocate())
                found.append(tensors[-1].data_ptr())
            else:
                tensors.append(None)
                found.append(start + offset)
        tensors.append(memory)  # until everything is launched

    return make_all


class _Description:
    """A descriptor of copies from a tensor, to be made of other tensors of the same layout.

    Its own constructor examines everything anew.
    """

    def __init__(self, descriptor: Any) -> None:
        self._type = type(descriptor)
        self._fields = {**vars(descriptor), "base": None}

    def of(self, address: int) -> Any:
        descriptor = object.__new__(self._type)
        descriptor.__dict__.update(self._fields)
        descriptor.base = _Address(address)
        return descriptor


class Replay(NamedTuple):
    """The steps of a recorded call, and where its results then are; a place below 0 is None's."""

    steps: list[Step]
    results: list[int]

    def __call__(self, arguments: Iterable[Any]) -> tuple[Tensor | None, ...]:
        tensors = list(arguments)
        found = [x.data_ptr() if isinstance(x, Tensor) else x for x in tensors]
        for step in self.steps:
            step(tensors, found)
        return tuple(None if place < 0 else tensors[place] for place in self.results)


# What every function that is recorded knows, by the layouts of its arguments.
_KNOWN: list[dict[Any, Replay | bool]] = []


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
