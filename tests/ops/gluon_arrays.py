"""Gluon kernels on a CPU, with float64 arrays in place of tiles.

Triton's interpreter does not run Gluon. Here the Python functions of a kernel run as they are, with
stand-ins for the language: layouts mean nothing, products are exact, warps with roles are threads,
and copies arrive late. So it shows whether a kernel computes the right thing and whether its roles
wait for one another, and nothing about layouts, rounding, or the threads of one role.
"""

from __future__ import annotations

import random
import threading
import time
import types

import torch
from triton.runtime.jit import JITFunction

WAIT_SECONDS = 10
LATEST_COPY = 0.03


class Pointer:
    """Memory, and offsets into it."""

    dtype = types.SimpleNamespace(element_ty=torch.float64)

    def __init__(self, memory, offsets=0):
        self.memory, self.offsets = memory.view(-1), offsets

    def __add__(self, offsets):
        return Pointer(self.memory, self.offsets + offsets)


class Shared:
    """Shared memory."""

    dtype = torch.float64

    def __init__(self, array):
        self.array = array

    @property
    def shape(self):
        return list(self.array.shape)

    def index(self, i):
        return Shared(self.array[int(i)])

    def slice(self, start, length, dim=0):
        return Shared(self.array.narrow(dim, int(start), int(length)))

    def permute(self, order):
        return Shared(self.array.permute(order))

    def load(self, layout=None):
        return self.array.clone()

    def store(self, value):
        assert self.array.shape == value.shape
        self.array.copy_(value)

    def reinterpret(self, dtype, shape, layout):
        return Shared(self.array.view(shape))

    _reinterpret = reinterpret


class Barrier:
    """A barrier in shared memory, of which one can ask for the parity of the phase it is in."""

    def __init__(self):
        self.changed = threading.Condition()
        self.phase = self.arrivals = self.pending = self.expected = 0

    def _advance(self):
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.expected == 0:
            self.phase += 1
            self.pending = self.arrivals
            self.changed.notify_all()

    def change(self, arrivals=0, expected=0):
        with self.changed:
            self.pending -= arrivals
            self.expected += expected
            self._advance()

    def wait(self, parity):
        with self.changed:
            over = self.changed.wait_for(lambda: self.phase % 2 != int(parity), WAIT_SECONDS)
        assert over, "a role waits for ever"


class Barriers(list):
    def index(self, i):
        return self[int(i)]


class Description:
    """What a tensor descriptor describes."""

    dtype = torch.float64

    def __init__(self, array):
        self.array = array


class Machine:
    """One program's shared memory, its roles and its copies under way."""

    def __init__(self, program):
        self.program, self.copies = program, 0

    def copy_block(self, description, start, bar, tile):
        """Copy a block, with zeros beyond the array, some time later: most soon, some late."""
        here = tile.array.shape
        start = [int(i) for i in start]
        cut = zip(start, here, description.array.shape, strict=True)
        source = description.array[tuple(slice(i, min(i + n, size)) for i, n, size in cut)]
        block = torch.zeros(here)
        block[tuple(slice(0, n) for n in source.shape)] = source
        self.copies += 1

        def arrive():
            time.sleep(random.random() ** 4 * LATEST_COPY)
            tile.array.copy_(block)
            self.copies -= 1
            bar.change(expected=-2 * block.numel())

        threading.Thread(target=arrive).start()

    def warp_specialize(self, roles, warps, registers):
        failures = []

        def run(function, arguments):
            try:
                function(*arguments)
            except BaseException as reason:
                failures.append(reason)

        threads = [threading.Thread(target=run, args=role) for role in roles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert self.copies == 0, "a program ends with copies under way"

    def allocate(self, dtype, shape, layout=None, value=None):
        if dtype == torch.int64:
            return Barriers(Barrier() for _ in range(shape[0]))
        return Shared(torch.full(shape, torch.nan) if value is None else value.clone())

    def stand_ins(self):
        """Return what the names of a kernel's module stand for."""
        as_tensor = torch.as_tensor
        gl = types.SimpleNamespace(
            float32=torch.float64, float16=torch.float64, bfloat16=torch.float64,
            int64=torch.int64, int32=torch.int32, constexpr=None, static_range=range,
            program_id=lambda axis: torch.tensor(self.program), to_tensor=as_tensor,
            num_warps=lambda: 4, arange=lambda start, stop, layout=None: torch.arange(start, stop),
            where=lambda c, a, b: torch.where(as_tensor(c), as_tensor(a), as_tensor(b)),
            minimum=lambda a, b: torch.minimum(as_tensor(a), as_tensor(b)),
            maximum=lambda a, b: torch.maximum(as_tensor(a), as_tensor(b)),
            sum=lambda x, axis: x.sum(axis), max=lambda x, axis: x.amax(axis),
            exp2=torch.exp2, log2=torch.log2, load=load, store=store,
            full=lambda shape, value, dtype=None, layout=None: torch.full(shape, value),
            zeros=lambda shape, dtype=None, layout=None: torch.zeros(shape),
            convert_layout=lambda x, layout: x, allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize, SliceLayout=nothing, DotOperandLayout=nothing,
            NVMMADistributedLayout=nothing, BlockedLayout=nothing, SwizzledSharedLayout=nothing,
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=nothing),
        )  # fmt: skip
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=nothing, init=set_arrivals, arrive=arrive,
            expect=lambda bar, size: bar.change(arrivals=1, expected=size),
            wait=lambda bar, parity, pred=True: bar.wait(parity) if pred else None,
        )  # fmt: skip
        async_copy = types.SimpleNamespace(commit_group=nothing, wait_group=nothing)
        return {
            "gl": gl, "mbarrier": mbarrier, "async_copy": async_copy, "async_load": async_load,
            "copy_block": self.copy_block, "warpgroup_mma": multiply, "barrier": nothing,
            "warpgroup_mma_wait": lambda left, x: x[0] if len(x) == 1 else tuple(x),
            "fence_async_shared": nothing, "row_layout": nothing, "exp2": torch.exp2,
            "soften": soften, "highest_bit": highest_bit,
            "lowest_bit": lambda x: highest_bit(x & -x),
            "pass_product": lambda d, product, layout: d @ product.array,
        }  # fmt: skip


def run(kernel, programs, *arguments):
    """Run a kernel's programs, one after the other."""
    for program in range(programs):
        known = Machine(program).stand_ins()
        translate(kernel, known)(*arguments)


def translate(function, known):
    """Return a Gluon function's Python function, with stand-ins for the names that it uses."""
    source = function.fn
    names = {"__builtins__": __builtins__}
    for name in source.__code__.co_names:
        if name not in known and name not in source.__globals__:
            continue  # an attribute, or a builtin
        value = known.get(name, source.__globals__.get(name))
        if isinstance(value, JITFunction):
            value = translate(value, known)
        names[name] = getattr(value, "value", value)
    return types.FunctionType(source.__code__, names, source.__name__, source.__defaults__)


def nothing(*arguments, **options):
    return None


def highest_bit(x):
    return torch.as_tensor(int(x).bit_length() - 1 if x > 0 else -127)


def set_arrivals(bar, count):
    bar.arrivals = bar.pending = count


def arrive(bar, count=1, pred=True):
    if pred:
        bar.change(arrivals=count)


def load(pointer, mask=None, other=0.0):
    offsets = torch.as_tensor(pointer.offsets)
    if mask is None:
        return pointer.memory[offsets]
    found = pointer.memory[torch.where(mask, offsets, 0)]
    return torch.where(mask, found, torch.tensor(float(other)))


def store(pointer, value, mask=None):
    offsets = torch.as_tensor(pointer.offsets)
    mask = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask.expand_as(offsets)
    pointer.memory[offsets[mask]] = value.expand_as(offsets)[mask]


def async_load(to, pointer, mask=None):
    to.store(load(pointer, mask))


def multiply(a, b, acc, use_acc=True, is_async=False):
    a, b = (x.array if isinstance(x, Shared) else x for x in (a, b))
    return acc + a @ b if use_acc else a @ b


def soften(logits, top, total, weights, half):
    """Do what the function of this name does, which asks its operands for their layouts."""
    logits = logits * 1.4426950408889634
    new = torch.maximum(top, logits.amax(1))
    p = torch.exp2(logits - new[:, None])
    rescale = torch.exp2(top - new)
    return p, rescale, new, total * rescale + p.sum(1)
