"""Launches: what Triton is asked, and when. Nothing runs on a GPU here."""

import contextlib
import threading

import pytest
import torch

pytest.importorskip("triton")
import triton

from householder.ops import _triton
from householder.ops._triton import FUSED, Launcher, compiled_together, launch


class Kernel:
    """Stands for a kernel of two leading arguments; notes how its programs are launched."""

    arg_names = ("x", "y", "size", "BLOCK")

    def __init__(self, compiles=True):
        self.asked, self.launched, self.compiles = [], [], compiles
        self.warmed = []

    def warmup(self, *leading, grid, **others):
        self.warmed.append((grid, leading, others))

    def __getitem__(self, grid):
        def run(*leading, **others):
            self.asked.append((grid, leading, others))
            return Program(self) if self.compiles else None

        return run


class Program:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


def launcher(kernel):
    return Launcher(kernel, (7,), BLOCK=16, num_warps=4, size=3)


def test_asks_once_and_then_gives_all_arguments_in_order():
    kernel, x, y = Kernel(), torch.zeros(4), torch.zeros(4)
    start = launcher(kernel)
    start(x, None)
    others = FUSED | {"BLOCK": 16, "num_warps": 4, "size": 3}
    assert kernel.asked == [((7,), (x, None), others)]
    assert not kernel.launched
    start(y, None)
    assert len(kernel.asked) == 1
    ((grid, arguments),) = kernel.launched
    assert grid == (7, 1, 1)
    assert arguments[0] is y
    assert arguments[1:] == (None, 3, 16)


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(4, dtype=torch.float64), None),  # another dtype
        (torch.zeros(5)[1:], None),  # not at a multiple of 16 bytes
        (torch.zeros(4), torch.zeros(4)),  # a tensor where there was none
        (None, None),  # none where there was a tensor
    ],
)
def test_asks_again_for_what_the_program_is_not_compiled_for(other):
    kernel = Kernel()
    start = launcher(kernel)
    start(torch.zeros(4), None)
    start(*other)
    assert len(kernel.asked) == 2
    assert not kernel.launched


def test_a_program_for_any_address_is_not_kept():
    kernel = Kernel()
    start = launcher(kernel)
    for _ in range(2):
        start(torch.zeros(5)[1:], None)
    assert len(kernel.asked) == 2


def test_what_gives_no_program_is_asked_every_time():
    kernel = Kernel(compiles=False)
    start = launcher(kernel)
    for _ in range(3):
        start(torch.zeros(4), None)
    assert len(kernel.asked) == 3


@pytest.fixture
def may_compile(monkeypatch):
    """Stand in for a GPU and for Triton's way to have kernels compiled by others."""
    monkeypatch.setattr(_triton, "_has_compiler", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton, "AsyncCompileMode", lambda compilers: contextlib.nullcontext())


def test_the_first_call_of_a_kind_asks_for_all_programs_before_it_launches(may_compile):
    first, second, x = Kernel(), Kernel(), torch.zeros(4)
    launched = []

    @compiled_together(lambda size: size)
    def function(size):
        launch(first, (size,), x, BLOCK=16)
        Launcher(second, (size,), size=size, BLOCK=16)(x, None)
        launched.append((len(first.asked), len(second.asked)))
        return size

    assert function(3) == 3
    assert first.warmed == [((3,), (x,), FUSED | {"BLOCK": 16})]
    assert second.warmed == [((3,), (x, None), FUSED | {"size": 3, "BLOCK": 16})]
    assert launched == [(0, 0), (1, 1)]
    function(3)
    assert len(first.warmed) == 1
    function(4)
    assert [grid for grid, *_ in first.warmed] == [(3,), (4,)]
    assert len(first.asked) == len(second.asked) == 3


def test_a_call_inside_another_one_is_compiled_with_it(may_compile):
    kernel = Kernel()

    @compiled_together(lambda: "inner")
    def inner():
        launch(kernel, (1,))

    @compiled_together(lambda: "outer")
    def outer():
        inner()
        return len(kernel.asked)

    assert outer() == 1
    assert len(kernel.warmed) == 1


def test_launches_go_on_after_a_call_that_could_not_be_compiled(may_compile):
    kernel = Kernel()

    @compiled_together(lambda: None)
    def function():
        raise ValueError("no such size")

    with pytest.raises(ValueError, match="no such size"):
        function()
    launch(kernel, (1,))
    assert len(kernel.asked) == 1
    assert not kernel.warmed


def test_nothing_is_compiled_ahead_without_a_gpu():
    kernel = Kernel()

    @compiled_together(lambda: None)
    def function():
        launch(kernel, (1,))

    if torch.cuda.is_available():
        pytest.skip("there is one")
    function()
    assert len(kernel.asked) == 1
    assert not kernel.warmed


def test_programs_are_compiled_and_loaded_at_the_same_time_on_the_callers_device(
    may_compile, monkeypatch
):
    loaded, meeting = [], threading.Barrier(2, timeout=20)
    devices = threading.local()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    @contextlib.contextmanager
    def device(index):
        devices.current = index
        yield
        devices.current = None

    monkeypatch.setattr(torch.cuda, "device", device)

    class Compiled:
        @property
        def run(self):
            loaded.append((threading.current_thread().name, devices.current))

    def compile_one():
        # Nobody gets past this alone.
        meeting.wait()
        return Compiled()

    with _triton._Compilers() as compilers:
        results = [compilers.submit(compile_one) for _ in range(2)]
    assert all(isinstance(x.result(), Compiled) for x in results)
    assert len(set(loaded)) == 2
    for name, index in loaded:
        assert name.startswith("householder-compiler")
        assert index == 1


def test_whoever_launches_what_could_not_be_compiled_is_told_why(may_compile):
    def compile_one():
        raise ValueError("too much shared memory")

    with _triton._Compilers() as compilers:
        result = compilers.submit(compile_one)
    for _ in range(2):
        with pytest.raises(ValueError, match="too much shared memory"):
            result.result().run()
