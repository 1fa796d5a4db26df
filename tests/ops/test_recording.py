"""Calls that repeat what one before did. Nothing runs on a GPU here."""

import ctypes
import types
import weakref

import pytest
import torch

pytest.importorskip("triton")

from householder.ops import _recording
from householder.ops._recording import recorded, room, room_like
from householder.ops._triton import Launcher, compiled_together, launch, this_thread


class Kernel:
    """Stands for `kernel(x, out, factor)`: it writes factor · x, and notes who launched it."""

    arg_names = ("x", "out", "factor")

    def __init__(self, compiles=True):
        self.compiles = compiles
        self.searched, self.launched, self.warmed = 0, 0, 0
        self.options = {}

    def warmup(self, *arguments, grid, **others):
        self.warmed += 1

    def __getitem__(self, grid):
        def run(x, out, factor, **options):
            self.searched += 1
            self.options = options
            self.write(x, out, factor)
            return Program(self, grid, out) if self.compiles else None

        return run

    def write(self, x, out, factor):
        x = getattr(x, "base", x)
        out.copy_(factor * x)
        self.launched += 1


class Program:
    """A kernel that knows how many numbers there are, wherever they are."""

    def __init__(self, kernel, grid, out):
        self.kernel, self.grid, self.shape, self.dtype = kernel, grid, out.shape, out.dtype

    def __getitem__(self, grid):
        assert grid == (*self.grid, 1, 1)[:3]
        return lambda x, out, factor: self.kernel.write(self.find(x), self.find(out), factor)

    def find(self, x):
        x = getattr(x, "base", x)
        if isinstance(x, torch.Tensor):
            return x
        room = ctypes.c_byte * (self.shape.numel() * self.dtype.itemsize)
        return torch.frombuffer(room.from_address(x), dtype=self.dtype).view(self.shape)


class Descriptor:
    """Stands for a description of copies from a tensor, which takes time to make."""

    made = 0

    def __init__(self, base, block):
        Descriptor.made += 1
        self.base, self.block = base, block


def scaled_twice(kernel):
    @recorded
    def function(x, factor, y):
        between, out = room_like(x), room(tuple(x.shape), x.dtype, x.device)
        launch(kernel, (3,), x, between, factor=factor, num_warps=4)
        launch(kernel, (3,), between, out, factor)
        return out, None

    return function


def test_products_and_sums_are_rounded_together_unless_a_launch_says_otherwise():
    x, out, kernel = torch.ones(2), torch.empty(2), Kernel()
    for others, fused in (({}, True), ({"enable_fp_fusion": False}, False)):
        launch(kernel, (1,), x, out, 1.0, **others)
        assert kernel.options["enable_fp_fusion"] is fused
        Launcher(kernel, (1,), factor=1.0, **others)(x, out)
        assert kernel.options["enable_fp_fusion"] is fused


def test_other_tensors_of_the_layout_get_the_same_launches():
    kernel = Kernel()
    function = scaled_twice(kernel)
    for number in range(4):
        x = torch.full((5,), float(number + 1))
        out, nothing = function(x, 3.0, None)
        assert out.tolist() == [9.0 * (number + 1)] * 5
        assert nothing is None
    assert kernel.launched == 8
    assert kernel.searched == 2


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(6), 3.0, None),  # another shape
        (torch.ones(10)[::2], 3.0, None),  # other strides
        (torch.ones(5, dtype=torch.float64), 3.0, None),
        (torch.ones(6)[1:], 3.0, None),  # not at a multiple of 16 bytes
        (torch.ones(5), 2.0, None),
        (torch.ones(5), 3.0, torch.ones(1)),  # a tensor where there was none
    ],
)
def test_another_layout_is_worked_out_anew(other):
    kernel = Kernel()
    function = scaled_twice(kernel)
    function(torch.ones(5), 3.0, None)
    out, _ = function(*other)
    assert kernel.searched == 4
    assert out.tolist() == [other[1] ** 2] * out.numel()


def test_one_tensor_as_two_arguments_stands_for_neither_of_them():
    kernel = Kernel()

    @recorded
    def function(x, y):
        out, other = room_like(x), room_like(y)
        launch(kernel, (1,), x, out, 1.0)
        launch(kernel, (1,), y, other, 1.0)
        return out, other

    x = torch.ones(4)
    function(x, x)
    out, other = function(x, 2 * x)
    assert (out.tolist(), other.tolist()) == ([1.0] * 4, [2.0] * 4)
    assert kernel.searched == 2


def test_what_cannot_be_repeated_runs_every_time():
    kernel = Kernel()

    @recorded
    def copies(x):
        out = room_like(x)
        launch(kernel, (1,), x.clone(), out, 1.0)
        return (out,)

    @recorded
    def computes(x):
        out = room_like(x)
        launch(kernel, (1,), x, out, 1.0)
        return (2 * out,)

    interpreted = scaled_twice(Kernel(compiles=False))
    for number in range(3):
        x = torch.full((4,), float(number))
        assert copies(x)[0].tolist() == [number] * 4
        assert computes(x)[0].tolist() == [2 * number] * 4
        assert interpreted(x, 2.0, None)[0].tolist() == [4 * number] * 4
    assert kernel.searched == 6


def test_descriptors_are_made_of_the_tensors_of_each_call():
    kernel = Kernel()

    @recorded
    def function(x):
        out = room_like(x)
        launch(kernel, (1,), Descriptor(x, [2]), out, 1.0)
        return (out,)

    Descriptor.made = 0
    for number in range(3):
        assert function(torch.full((4,), float(number)))[0].tolist() == [number] * 4
    assert Descriptor.made == 1
    assert kernel.searched == 1


def test_much_memory_is_let_go_where_the_first_call_let_it_go(monkeypatch):
    kernel = Kernel()
    alive = []

    def empty(*size, **options):
        x = make(*size, **options)
        alive.append(weakref.ref(x))
        return x

    def inner(x):
        between = room_like(x)
        launch(kernel, (1,), x, between, 1.0)

    @recorded
    def function(x):
        inner(x)
        out = room_like(x)
        launch(kernel, (1,), x, out, 1.0)
        return (out,)

    make, write = torch.empty, kernel.write
    standing = []

    def count(*arguments):
        standing.append(sum(x() is not None for x in alive))
        write(*arguments)

    kernel.write = count
    monkeypatch.setattr(_recording, "torch", types.SimpleNamespace(empty=empty))
    monkeypatch.setattr(_recording, "MOST_TOGETHER", 0)
    for _ in range(3):
        alive.clear()
        function(torch.ones(4))
    assert standing == [1, 1] * 3


@pytest.mark.parametrize("most_together", [0, 2**20])
def test_what_is_there_at_the_same_time_lies_apart(most_together, monkeypatch):
    """Tensors of several sizes and lives, each read when later ones have been written."""
    monkeypatch.setattr(_recording, "MOST_TOGETHER", most_together)
    kernel = Kernel()

    def double(x):
        out = room_like(x)
        launch(kernel, (1,), x, out, 2.0)
        return out

    @recorded
    def function(*inputs):
        waiting, results = [], []
        for x in inputs:
            waiting.append(double(double(x)))
            if len(waiting) > 2:
                results.append(double(waiting.pop(0)))
        results += [double(x) for x in waiting]
        return tuple(results)

    sizes = (400, 100, 1300, 300, 700, 1300, 50)
    for number in range(3):
        inputs = [torch.full((size,), float(size + number)) for size in sizes]
        for x, result in zip(inputs, function(*inputs), strict=True):
            assert torch.equal(result, 8 * x)
    assert kernel.searched == 3 * len(sizes)
    assert kernel.launched == 3 * kernel.searched


def test_asking_for_programs_is_not_recorded(monkeypatch):
    kernel = Kernel()

    @recorded
    @compiled_together(lambda x: "kind")
    def function(x):
        out = room_like(x)
        launch(kernel, (1,), x, out, 2.0)
        return (out,)

    class Compilers:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    import triton

    from householder.ops import _triton

    monkeypatch.setattr(_triton, "_has_compiler", lambda: True)
    monkeypatch.setattr(_triton, "_Compilers", Compilers)
    monkeypatch.setattr(triton, "AsyncCompileMode", lambda compilers: Compilers())
    for _ in range(2):
        assert function(torch.ones(4))[0].tolist() == [2.0] * 4
    assert (kernel.warmed, kernel.searched, kernel.launched) == (1, 1, 2)


def test_an_error_leaves_nothing_behind():
    kernel = Kernel()

    @recorded
    def function(x, fails):
        out = room_like(x)
        launch(kernel, (1,), x, out, 1.0)
        if failing:
            raise RuntimeError("no")
        return (out,)

    failing = True
    with pytest.raises(RuntimeError, match="no"):
        function(torch.ones(4), 0)
    assert this_thread.recording is None
    failing = False
    assert function(torch.ones(4), 0)[0].tolist() == [1.0] * 4
    function(torch.ones(4), 0)
    assert kernel.searched == 2
