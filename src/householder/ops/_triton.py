"""What the Triton kernels of all ops share. Imports triton: only kernel folders import this."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# The versions of Triton that the forms for Hopper have been compiled with, first and last: they are
# written in Gluon, whose names change from one version to the next.
HOPPER_TRITON = ((3, 6), (3, 9))

# Whether kernels run under Triton's interpreter.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Offsets inside one tile are 32-bit integers; a tile spans at most this many rows.
TILE_ROWS = 64


def on_its_device(function: Function) -> Function:
    """Make the device of a launcher's first tensor the current one while it runs."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(x):
            return function(x, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Return whether the forms for Hopper, compute capability 9.0, run on this device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    first, last = HOPPER_TRITON
    return first <= tuple(map(int, triton.__version__.split(".")[:2])) <= last


# How many kernels are compiled at the same time; no call here has more.
COMPILERS = 8


class _ThisThread(threading.local):
    """What becomes of this thread's launches besides."""

    only_compiles = False  # they only compile their kernels; see `compiled_together`
    recording: Any = None  # where they are noted; see `_recording.py`


this_thread = _ThisThread()


# Products and sums of these kernels are rounded together, whatever is Triton's default: 3.9 warns
# that nobody has said so, and later ones are to round them apart.
FUSED = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Launch a kernel once; see `Launcher`, and `_recording.py`, for what is launched often."""
    kwargs = FUSED | kwargs
    if this_thread.only_compiles:
        kernel.warmup(*args, grid=grid, **kwargs)
        return
    compiled = kernel[grid](*args, **kwargs)
    if this_thread.recording is not None:
        this_thread.recording.add_launch(kernel, compiled, grid, args, kwargs)


class Launcher:
    """Launches of one kernel that differ in their leading arguments, tensors or None, alone.

    For every launch Triton looks among all arguments' types, alignment and divisibility for the
    program compiled for them: 50 to 60 µs on an H200's host for the 30 to 40 that kernels here
    have. Who knows that they are what they were, as callers with the same shapes and strides do,
    asks for the program once.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **others: Any) -> None:
        self.kernel, self.grid, self.others = kernel, grid, FUSED | others
        self.dtypes: tuple[torch.dtype | None, ...] = ()
        self.behind: list[Any] = []
        self.run: Callable[..., object] | None = None

    def __call__(self, *leading: Tensor | None) -> None:
        """Launch the kernel on the current device, which must always be the same."""
        if this_thread.only_compiles:
            self.kernel.warmup(*leading, grid=self.grid, **self.others)
            return
        if self.run is not None and self._is_compiled_for(leading):
            self.run(*leading, *self.behind)
            return
        compiled = self.kernel[self.grid](*leading, **self.others)
        aligned = all(x is None or x.data_ptr() % 16 == 0 for x in leading)
        # Neither the interpreter's kernels nor what a hook of Triton's held back are programs.
        if compiled is not None and aligned:
            self.dtypes = tuple(None if x is None else x.dtype for x in leading)
            self.behind = [self.others[name] for name in self.kernel.arg_names[len(leading) :]]
            self.run = compiled[(*self.grid, 1, 1)[:3]]

    def _is_compiled_for(self, leading: tuple[Tensor | None, ...]) -> bool:
        for x, dtype in zip(leading, self.dtypes, strict=True):
            if x is None:
                if dtype is not None:
                    return False
            elif x.dtype is not dtype or x.data_ptr() % 16:
                return False
        return True


class _NoProgram:
    """Stands for a program that could not be made: whoever launches it is told why, every time.

    Triton keeps what its compilers return, and up to 3.6 has no error but the first to tell.
    """

    def __init__(self, reason: Exception) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        raise self._reason.with_traceback(None)


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels and load them onto the current device."""

    def __init__(self) -> None:
        super().__init__(COMPILERS, thread_name_prefix="householder-compiler")
        self.device = torch.cuda.current_device()

    def submit(self, compile_: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def compile_and_load() -> Any:
            try:
                compiled = compile_(*args, **kwargs)
                with torch.cuda.device(self.device):
                    # Asked for how to run it, Triton loads a program and makes its launcher, by a
                    # compiler of C up to Triton 3.6: half a second each.
                    _ = compiled.run
            except Exception as reason:
                return _NoProgram(reason)
            return compiled

        return super().submit(compile_and_load)


def compiled_together(kind: Callable[..., Hashable]) -> Callable[[Function], Function]:
    """Make the first call of each kind of a launcher compile all kernels it needs side by side.

    Kernels are compiled when they are first launched, one after the other, though each of them
    keeps one processor busy for a second or more. So the first call of a kind goes through its
    launches twice: once to ask for the programs, which threads compile at the same time, and again
    to run them. `kind` gets the call's arguments and returns what the programs depend on; what it
    leaves out costs time, as if there were no threads, and nothing else.

    For the first time nothing is launched, and what the kernels would have written is not there.
    So kernels must be launched by `launch` or a `Launcher` alone, nothing may wait for values, and
    nothing but kernels may write to the arguments.
    """

    def decorate(function: Function) -> Function:
        known: set[Hashable] = set()

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            this_kind = kind(*args, **kwargs)
            if this_kind not in known:
                known.add(this_kind)
                if _has_compiler() and not this_thread.only_compiles:
                    this_thread.only_compiles = True
                    try:
                        with _Compilers() as compilers, triton.AsyncCompileMode(compilers):
                            function(*args, **kwargs)
                    finally:
                        this_thread.only_compiles = False
            return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    return decorate


def _has_compiler() -> bool:
    """Return whether kernels are compiled here, and this is a moment to load programs."""
    return (
        torch.cuda.is_available()
        and not triton.knobs.runtime.interpret
        and not torch.cuda.is_current_stream_capturing()
    )


def aligned(x: Tensor) -> Tensor:
    """Return `x`, copied if it does not begin at a multiple of 16 bytes.

    For each such argument kernels would be compiled to another program, and there are too many of
    these to compare them all with float64 (one gave wrong gradients, with Triton 3.6).
    """
    return x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % 16 else x


def addressable(x: Tensor) -> Tensor:
    """Return `x`, copied only if the kernels cannot read it through its strides.

    They need it `aligned`, the last dimension contiguous, so that loads are wide, and every offset
    inside a tile below 2³¹; offsets of tiles are 64-bit.
    """
    x = aligned(x)
    steps = [
        stride for stride, size in zip(x.stride()[1:-1], x.shape[1:-1], strict=True) if size > 1
    ]
    if x.stride(-1) == 1 and sum(steps) * TILE_ROWS < 2**31:
        return x
    return x.contiguous()


def has_wide_rows(x: Tensor) -> bool:
    """Return whether all rows of `x` start at multiples of 16 bytes, the widest copy there is."""
    if x.data_ptr() % 16:
        return False
    entries = 16 // x.element_size()
    for stride, length in zip(x.stride()[:-1], x.shape[:-1], strict=True):
        if stride % entries and length > 1:
            return False
    return True


def dot_precision(*tensors: Tensor) -> str:
    """Return the `input_precision` of products of these tensors, at most as coarse as their dtype.

    float32 is split in three so that nothing of it is lost; float16 is exact in TF32, which has
    its ten bits and the range that states and gradients need; bfloat16 goes to the tensor cores as
    it is.
    """
    dtypes = {x.dtype for x in tensors}
    if torch.float64 in dtypes:
        raise NotImplementedError(
            'the Triton kernels compute in float32, got float64; use impl="chunk" or "reference"'
        )
    names = {torch.bfloat16: "bf16", torch.float16: "tf32"}
    return names.get(dtypes.pop(), "tf32x3") if len(dtypes) == 1 else "tf32x3"


def operand_dtype(precision: str) -> torch.dtype:
    """Return the dtype of what the kernels keep in memory between them."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def power_of_two(size: int, least: int = 16, most: int | None = None) -> int:
    """Return the smallest power of two not below `size`, inside `least … most`."""
    block = max(least, 1 << (size - 1).bit_length())
    return block if most is None else min(block, most)


@triton.jit
def round_to_tf32(x):
    """Round a float32 tile to the ten bits of TF32; the tensor cores would cut off the others."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def load_tile(pointer, offsets, valid, start, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load columns `start …` of rows at `offsets`: `[rows, BLOCK]`, zero where not `valid`."""
    o_d = start + tl.arange(0, BLOCK)
    mask = valid[:, None]
    if D % BLOCK != 0:
        mask = mask & (o_d[None, :] < D)
    return tl.load(pointer + offsets[:, None] + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, offsets, valid, start, x, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store what `load_tile` loads."""
    o_d = start + tl.arange(0, BLOCK)
    mask = valid[:, None]
    if D % BLOCK != 0:
        mask = mask & (o_d[None, :] < D)
    tl.store(pointer + offsets[:, None] + o_d[None, :], x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_tile_t(pointer, offsets, valid, start, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load the same tile transposed, `[BLOCK, rows]`."""
    o_d = start + tl.arange(0, BLOCK)
    mask = valid[None, :]
    if D % BLOCK != 0:
        mask = mask & (o_d[:, None] < D)
    return tl.load(pointer + offsets[None, :] + o_d[:, None], mask=mask, other=0.0)


@triton.jit
def store_tile_t(pointer, offsets, valid, start, x, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile `[BLOCK, rows]` where `load_tile_t` loads it."""
    o_d = start + tl.arange(0, BLOCK)
    mask = valid[None, :]
    if D % BLOCK != 0:
        mask = mask & (o_d[:, None] < D)
    tl.store(pointer + offsets[None, :] + o_d[:, None], x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def cast_operand(x, PRECISION: tl.constexpr):
    """Bring a tile to what `dot` multiplies; PRECISION is what `dot_precision` returns, or more.

    "fp16" is for what has norms of about 1, as products of reflections: it keeps three bits more
    than bfloat16 at the same cost. "fp32" is for products of hundreds of float32 factors, and so is
    "bf16x6", in half the time, where no digits are asked of what is small in its row or column.
    """
    if PRECISION == "bf16":
        return x.to(tl.bfloat16)
    elif PRECISION == "fp16":
        return x.to(tl.float16)
    elif PRECISION == "tf32":
        return round_to_tf32(x.to(tl.float32))
    else:
        return x.to(tl.float32)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Multiply two tiles that went through `cast_operand`, into float32."""
    if PRECISION == "bf16" or PRECISION == "fp16":
        return tl.dot(a, b)
    elif PRECISION == "tf32x3":
        return dot_in_parts(a, b)
    elif PRECISION == "fp32":
        return dot_to_nearest(a, b)
    elif PRECISION == "bf16x6":
        return multiply_parts(in_three_parts(a, 1), in_three_parts(b, 0))
    else:
        return tl.dot(a, b, input_precision="tf32")


@triton.jit
def dot_add(a, b, acc, PRECISION: tl.constexpr):
    """Return `acc + a b`."""
    if PRECISION == "bf16" or PRECISION == "fp16":
        return tl.dot(a, b, acc)
    elif PRECISION == "tf32x3":
        return acc + dot_in_parts(a, b)
    elif PRECISION == "fp32" or PRECISION == "bf16x6":
        return acc + dot(a, b, PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision="tf32")


@triton.jit
def dot_apart(a, b):
    """Multiply tiles of eight or TF32's bits from zero, for a sum outside the tensor cores.

    Triton makes `tl.dot(a, b) + c` a product onto c, which the tensor cores then cut off.
    """
    # Grids here have at most two dimensions, of which the compiler does not know: it sees no zero.
    zero = tl.zeros((a.shape[0], b.shape[1]), tl.float32) + tl.program_id(2).to(tl.float32)
    return tl.dot(a, b, zero, input_precision="tf32")


@triton.jit
def dot_in_parts(a, b):
    """Multiply float32 tiles in two TF32 parts each: all products but that of the small parts.

    What `input_precision="tf32x3"` does, the small parts first, in a loop: the compiler's time is
    what its code takes, and with gates a first backward call took 14 s on an H200's host. The
    tensor cores cut off what does not fit, so that nothing is added to a sum larger than it.
    """
    product = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    # Grids here have at most two dimensions, of which the assembler does not know: a loop of 3 it
    # would unroll.
    for part in range(3 + tl.program_id(2)):
        large_a = round_to_tf32(a)
        large_b = round_to_tf32(b)
        part_a = tl.where(part == 0, a - large_a, large_a)
        part_b = tl.where(part == 1, b - large_b, large_b)
        product = tl.dot(part_a, part_b, product, input_precision="tf32")
    return product


@triton.jit
def leading_bits(x, AXIS: tl.constexpr):
    """Round a float32 tile to multiples of 2⁻⁷ times the power of two of its maximum along AXIS."""
    most = tl.max(tl.abs(x), AXIS, keep_dims=True).to(tl.int32, bitcast=True)
    # 1.5 · 2¹⁶ times that power of two: a float32 of this size has no bits below.
    large = ((most & 0x7F800000) + (16 << 23)).to(tl.float32, bitcast=True) * 1.5
    return (x + large) - large


@triton.jit
def dot_to_nearest(a, b):
    """Multiply float32 tiles as `dot_in_parts`, with sums that are rounded to nearest.

    The tensor cores cut off what does not fit into a sum: so sums shrink, and a product of
    hundreds of reflections by 5e-7 a factor. Here the leading bits of both sides are integers
    below 2⁸ times one power of two for each row or column, whose sums of up to 256 products lose
    nothing. What is cut off belongs to the rest, 2⁻⁸ of it, and both are added at the end.
    """
    first_a, first_b = leading_bits(a, 1), leading_bits(b, 0)
    second_a, second_b = round_to_tf32(a - first_a), round_to_tf32(b - first_b)
    product = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    rest = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
    for part in range(6 + tl.program_id(2)):
        part_a = tl.where((part == 2) | (part == 3), second_a, first_a)
        part_a = tl.where(part == 0, a - first_a - second_a, part_a)
        part_b = tl.where((part == 2) | (part == 4), second_b, first_b)
        part_b = tl.where(part == 1, b - first_b - second_b, part_b)
        product = tl.where(part < 5, product, 0.0)
        product = tl.dot(part_a, part_b, product, input_precision="tf32")
        rest = tl.where(part < 5, product, rest)
    return product + rest


@triton.jit
def round_to_bf16(x):
    """Round a float32 tile to the eight bits of bfloat16, of which the interpreter knows little."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def in_three_parts(x, AXIS: tl.constexpr):
    """Cut a float32 tile into its leading bits along AXIS and eight bits each of two rests.

    Of an entry below 2⁻⁸ of the maximum along AXIS, only the rests' 16 bits are left.
    """
    first = leading_bits(x, AXIS)
    second = round_to_bf16(x - first)
    third = round_to_bf16(x - first - second.to(tl.float32))
    return round_to_bf16(first), second, third


@triton.jit
def multiply_parts(a, b):
    """Multiply float32 tiles in three parts, with sums that are rounded to nearest.

    As in `dot_to_nearest`, sums of the first parts lose nothing, and what is cut off the others
    is 2⁻⁸ of that. Six products of bfloat16 take as long as three of TF32.
    """
    rest = tl.dot(a[2], b[0])
    rest = tl.dot(a[0], b[2], rest)
    rest = tl.dot(a[1], b[1], rest)
    rest = tl.dot(a[1], b[0], rest)
    rest = tl.dot(a[0], b[1], rest)
    return dot_apart(a[0], b[0]) + rest


@triton.jit
def square(x, PRECISION: tl.constexpr):
    """Multiply a tile that went through `cast_operand` with its transpose."""
    if PRECISION == "bf16x6":
        a, b, c = in_three_parts(x, 1)
        return multiply_parts((a, b, c), (tl.trans(a), tl.trans(b), tl.trans(c)))
    else:
        return dot(x, tl.trans(x), PRECISION)


@triton.jit
def beside_diagonal(o, SIZE: tl.constexpr):
    """Mask, in a square of rows and columns `o`, what joins each two diagonal blocks of SIZE."""
    same_pair = (o[:, None] // (2 * SIZE)) == (o[None, :] // (2 * SIZE))
    return same_pair & ((o[:, None] // SIZE) != (o[None, :] // SIZE))


@triton.jit
def substitute(blocks):
    """Invert I + b for strictly lower triangular `blocks [·, 16, 16]` by substitution."""
    o_16 = tl.arange(0, 16)
    x = tl.where(o_16[:, None] == o_16[None, :], 1.0, 0.0)[None, :, :] + tl.zeros_like(blocks)
    for j in range(15):
        # Eliminate column j: rows below it lose their multiple of row j, which is final by now.
        column = tl.sum(tl.where(o_16[None, None, :] == j, blocks, 0.0), axis=2)
        row = tl.sum(tl.where(o_16[None, :, None] == j, x, 0.0), axis=1)
        x -= column[:, :, None] * row[:, None, :]
    return x


@triton.jit
def join_all(blocks):
    """Invert I + b for strictly lower triangular `blocks [·, 16, 16]` by joins, to float16."""
    o_16 = tl.arange(0, 16)
    x = tl.where(o_16[:, None] == o_16[None, :], 1.0, 0.0)[None, :, :] + tl.zeros_like(blocks)
    x -= tl.where(beside_diagonal(o_16, 1)[None, :, :], blocks, 0.0)
    for level in tl.static_range(1, 4):
        beside = tl.where(beside_diagonal(o_16, 1 << level)[None, :, :], -blocks, 0.0)
        right = x.to(tl.float16)
        x = tl.dot(tl.dot(right, beside.to(tl.float16)).to(tl.float16), right, x)
    return x


@triton.jit
def inverse_unit_lower(m, R: tl.constexpr, PRECISION: tl.constexpr):
    """Return `(I + m)⁻¹` for a strictly lower triangular float32 tile `m [R, R]`, R = 16, 32 or 64.

    The diagonal blocks of 16 are inverted all at once, then joined pairwise by
    `[[A, 0], [C, D]]⁻¹ = [[A⁻¹, 0], [−D⁻¹ C A⁻¹, D⁻¹]]`. With X the inverse of the block diagonal
    and C the blocks beside it, a join is X − X C X. No power of m is formed: where I + m comes from
    reflections, all of X, X C and the inverse stays below 2, however close the reflectors are. In
    the layout of a tensor-core product each warp has one diagonal block to itself, and so these
    first steps stay inside warps.

    For half inputs everything is made of float16 products, whose operands have as many bits as
    TF32 has and need no exchange between threads, and one step of Newton's iteration with both
    halves of m's bits, `X ← X + X (I − X − m X)`, takes the error from 1e-2, where reflectors are
    nearly parallel and β is 2, to 1e-4. Such a step, from a rest made to the nearest float32, also
    takes what the tensor cores cut off the joins' sums out of the inverse for "fp32".
    """
    o_r = tl.arange(0, R)
    o_b = tl.arange(0, R // 16)
    on_diagonal = o_b[:, None, None, None] == o_b[None, None, :, None]
    blocks = tl.sum(tl.where(on_diagonal, tl.reshape(m, (R // 16, 16, R // 16, 16)), 0.0), axis=2)
    IN_FLOAT32: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "fp32"
    x = substitute(blocks) if IN_FLOAT32 else join_all(blocks)
    x = tl.where(on_diagonal, tl.reshape(x, (R // 16, 16, 1, 16)), 0.0)
    x = tl.reshape(x, (R, R))
    if IN_FLOAT32:
        # One loop, which nobody unrolls (see `dot_in_parts`): a product in parts takes the compiler
        # 0.2 s (a core of an AMD EPYC).
        for level in range(R // 32 + tl.program_id(2)):
            beside = tl.where(beside_diagonal(o_r, 16 << level), -m, 0.0)
            product = dot(x, beside, "tf32x3")
            x = dot_add(product, x, x, "tf32x3")
    else:
        for level in tl.static_range(R // 32):
            beside = tl.where(beside_diagonal(o_r, 16 << level), -m, 0.0)
            right = x.to(tl.float16)
            x = tl.dot(tl.dot(right, beside.to(tl.float16)).to(tl.float16), right, x)
    if PRECISION == "fp32":
        rest = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0) - x
        rest -= dot(m, x, PRECISION)
        x += dot_apart(cast_operand(x, "tf32"), cast_operand(rest, "tf32"))
    if not IN_FLOAT32:
        right = x.to(tl.float16)
        x = right.to(tl.float32)
        high = (-m).to(tl.float16)
        low = (-m - high.to(tl.float32)).to(tl.float16)
        rest = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0) - x
        rest = tl.dot(low, right, tl.dot(high, right, rest))
        x = tl.dot(right, rest.to(tl.float16), x)
    return x
