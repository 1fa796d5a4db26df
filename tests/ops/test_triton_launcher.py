"""`Launcher`: what Triton is asked, and when. Nothing runs on a GPU here."""

import pytest
import torch

pytest.importorskip("triton")

from householder.ops._triton import Launcher


class Kernel:
    """Stands for a kernel of two leading arguments; notes how its programs are launched."""

    arg_names = ("x", "y", "size", "BLOCK")

    def __init__(self, compiles=True):
        self.asked, self.launched, self.compiles = [], [], compiles

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
    launch = launcher(kernel)
    launch(x, None)
    assert kernel.asked == [((7,), (x, None), {"BLOCK": 16, "num_warps": 4, "size": 3})]
    assert not kernel.launched
    launch(y, None)
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
    launch = launcher(kernel)
    launch(torch.zeros(4), None)
    launch(*other)
    assert len(kernel.asked) == 2
    assert not kernel.launched


def test_a_program_for_any_address_is_not_kept():
    kernel = Kernel()
    launch = launcher(kernel)
    for _ in range(2):
        launch(torch.zeros(5)[1:], None)
    assert len(kernel.asked) == 2


def test_what_gives_no_program_is_asked_every_time():
    kernel = Kernel(compiles=False)
    launch = launcher(kernel)
    for _ in range(3):
        launch(torch.zeros(4), None)
    assert len(kernel.asked) == 3
