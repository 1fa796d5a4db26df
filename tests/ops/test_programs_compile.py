"""The GPU kernels of the sequence ops and of their cache, compiled for Hopper without a GPU.

Triton's interpreter does not run the forms for Hopper, which are written in Gluon. That the Triton
installed here compiles them, and the others, into programs that a multiprocessor can hold is seen
here: in a process of its own, whose driver compiles for an H200 and launches nothing. A second one
must find them all on disk.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SPECIFICATION = importlib.util.spec_from_file_location(
    "addresses", Path(__file__).parents[1] / "addresses.py"
)
addresses = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(addresses)

# Arguments of `delta_product_inputs` or of `path_attention_inputs`, which has no N, and the kernels
# that a forward and a backward call have, or a decoded token of a cache.
CASES = {
    "gated": (
        {"B": 1, "T": 208, "N": 1, "H": 2, "K": 128, "V": 128, "dtype": "bfloat16"},
        ["prepare", "walk", "gate", "hopper_sweep"],
    ),
    "two reflections, packed, in segments": (
        {"B": 1, "T": 300, "N": 2, "H": 1, "HV": 2, "K": 64, "V": 128, "decay": None,
         "num_sequences": 3, "dtype": "bfloat16"},
        ["prepare", "carry", "chain", "walk", "carry_back", "chain", "hopper_sweep"],
    ),
    "float32, gated, in segments": (
        {"B": 1, "T": 300, "N": 1, "H": 1, "K": 64, "V": 48, "dtype": "float32"},
        ["table", "prepare", "carry", "chain", "walk",
         "carry_back", "chain", "walk_back", "gradient"],
    ),
    "attention": (
        {"B": 1, "T": 700, "H": 2, "K": 128, "V": 128, "decay": None, "dtype": "bfloat16"},
        ["prepare", "join", "climb", "attend",
         "prepare", "rows", "sum", "descend", "leaf", "chunk", "key", "query"],
    ),
    "a decoded token, narrow heads": (
        {"B": 1, "T": 1, "H": 1, "HQ": 2, "K": 20, "V": 16, "dtype": "bfloat16"},
        ["enter_one", "attend", "finish"],
    ),
}  # fmt: skip
SEGMENT_TOKENS = 256
# The shared memory that one program can have on an H200.
SHARED_BYTES = 232_448


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the programs are kept."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def processes(folder):
    """Return what is known of each case's programs in a first process, and in one after it."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    found = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", __file__], capture_output=True, text=True,
            env=environment, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout))
    return found


@pytest.fixture
def programs(processes):
    return processes[0]


@pytest.mark.parametrize("name", CASES)
def test_all_kernels_compile_side_by_side(name, programs):
    _, kernels = CASES[name]
    assert sorted(x["name"] for x in programs[name]) == sorted(f"{k}_kernel" for k in kernels)
    for program in programs[name]:
        assert program["arch"] == 90
        assert program["thread"].startswith("householder-compiler")
        assert Path(program["file"]).stat().st_size > 0
        assert program["shared"] <= SHARED_BYTES


@pytest.mark.parametrize("name", CASES)
def test_another_process_finds_all_programs_on_disk(name, processes):
    first, second = (process[name] for process in processes)
    assert sorted(x["name"] for x in second) == sorted(x["name"] for x in first)
    assert not any(x["from_disk"] for x in first)
    assert all(x["from_disk"] for x in second)


def test_no_address_has_mixed_halves(processes, folder):
    files = list(folder.rglob("*.cubin"))
    assert len(files) >= 20
    for file in files:
        assert not list(addresses.mixed_addresses(addresses.disassemble(file))), file


def test_mixed_halves_are_found():
    line = "        /*{}*/  {} ;"
    lower = line.format("a820", "LEA R26, P3, R26, R21, 0x5")
    again = line.format("a830", "IMAD.SHL.U32 R21, R26, 0x10, RZ")
    upper = line.format("a840", "@P6 LEA.HI.X R27, R21.reuse, R236, RZ, 0x1, P3")
    kept = line.format("a830", "IMAD.SHL.U32 R21, R28, 0x10, RZ")
    assert list(addresses.mixed_addresses("\n".join([lower, again, upper]))) == ["a840"]
    assert not list(addresses.mixed_addresses("\n".join([again, lower, upper])))
    assert not list(addresses.mixed_addresses("\n".join([lower, kept, upper])))
    # The carry of another instruction.
    added = line.format("a83c", "IADD3 R6, P3, R28, -R25, RZ")
    assert not list(addresses.mixed_addresses("\n".join([lower, again, added, upper])))
    # Moved on the way, or in another lower half.
    moved = line.format("a838", "MOV R30, R21")
    assert list(
        addresses.mixed_addresses("\n".join([lower, again, moved, upper.replace("R21", "R30")]))
    )
    assert not list(addresses.mixed_addresses("\n".join([lower, again, upper.replace("P3", "P2")])))


def sums_over_lanes(assembly):
    """Yield what adds to another lane's number a product that it has not rounded before."""
    shuffled = set()
    for line in assembly.splitlines():
        found = addresses.INSTRUCTION.match(line)
        if found is None:
            continue
        _, name, rest = found.groups()
        operands = [x.strip() for x in rest.replace(".reuse", "").split(",")]
        if name.startswith("FFMA") and shuffled & {operands[-1].lstrip("-")}:
            yield line
        if name == "SHFL.BFLY":
            shuffled.add(operands[1])
        elif not name.startswith(addresses.STORES):
            shuffled.discard(operands[0])


def test_lanes_of_narrow_heads_agree_on_a_sum(programs):
    """Of `a·b + c·d`, a and b here and c and d in another lane, each rounds both products."""
    for program in programs["a decoded token, narrow heads"]:
        found = list(sums_over_lanes(addresses.disassemble(program["file"])))
        assert not found, (program["name"], found)


def test_sums_over_lanes_are_found():
    product = "        /*1970*/  FMUL R10, R11, R23 ;"
    other = "        /*1980*/  SHFL.BFLY PT, R12, R10, 0x10, 0x1f ;"
    joined = "        /*1990*/  FFMA R11, R11, R23, R12 ;"
    moved = "        /*198c*/  MOV R12, R13 ;"
    assert list(sums_over_lanes("\n".join([product, other, joined]))) == [joined]
    assert not list(sums_over_lanes("\n".join([product, other, moved, joined])))
    assert not list(sums_over_lanes("\n".join([product, other, joined.replace("R12", "R14")])))


def without_gpu():
    """Make Triton compile for compute capability 9.0 and launch nothing, and torch not mind."""
    import contextlib

    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    class Nothing:
        """Stands for the driver, its utilities and the launcher of a program."""

        def __init__(self, *_):
            pass

        def __call__(self, *_):
            pass

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, _):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_device_properties(self, _):
            return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}

        def load_binary(self, *_):
            return 1, 2, 128, 0, 1024

        def unload_module(self, _):
            pass

        def map_python_to_cpp_type(self, _):
            return "int"

    driver = Nothing()
    driver.utils, driver.launcher_cls = Nothing(), Nothing
    triton.runtime.driver.set_active(driver)
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = lambda _: contextlib.nullcontext()


def run_delta_product(case):
    import importlib

    kernels = importlib.import_module("householder.ops.delta_product.triton")
    for name in ("backward", "chunks"):
        module = importlib.import_module(f"householder.ops.delta_product.triton.{name}")
        module.is_hopper = lambda _: True
    from householder.testing import delta_product_inputs

    kernels.config.SEGMENT_TOKENS = SEGMENT_TOKENS
    inputs = delta_product_inputs(**case)
    arguments = [inputs[n] for n in ("q", "k", "v", "beta", "g")]
    arguments += [0.3, inputs["initial_state"], inputs["cu_seqlens"]]
    o, state, *saved = kernels.forward(*arguments, True)
    kernels.backward(o, state, *arguments, *saved)


def run_path_attention(case):
    from householder.ops.path_attention import triton as kernels
    from householder.ops.path_attention.triton import problem
    from householder.testing import path_attention_inputs

    problem.is_hopper = lambda _: True
    inputs = path_attention_inputs(**case)
    arguments = [inputs[n] for n in ("q", "k", "v", "w", "beta", "g", "sinks")]
    arguments += [0.3, None, inputs["cu_seqlens"]]
    o, lse = kernels.forward(*arguments)
    kernels.backward(o, *arguments, o, lse)


def run_path_cache(case):
    from householder import PathCache
    from householder.ops.path_attention.cache import triton as kernels
    from householder.ops.path_attention.cache.store import Store
    from householder.testing import path_attention_inputs

    kernels.is_from_hopper_on = lambda _: True
    Store.has_kernels = lambda _: True
    inputs = path_attention_inputs(**case)
    PathCache(case["B"]).append(*(inputs[n] for n in ("q", "k", "v", "w", "beta", "g")))


def compile_all() -> dict[str, list[dict[str, object]]]:
    """Compile what every case's forward and backward call need."""
    import threading

    import torch
    import triton

    without_gpu()
    programs: list[dict[str, object]] = []

    def listen(*, src, metadata, metadata_group, cache_hit, **_):
        (binary,) = (path for name, path in metadata_group.items() if name.endswith(".cubin"))
        programs.append(
            {
                "name": src.name,
                "thread": threading.current_thread().name,
                "arch": metadata["target"].arch,
                "shared": metadata["shared"],
                "file": binary,
                "from_disk": cache_hit,
            }
        )

    triton.knobs.compilation.listener = listen
    found = {}
    for name, (case, _) in CASES.items():
        programs.clear()
        run = run_delta_product if "N" in case else run_path_attention
        if "token" in name:
            run = run_path_cache
        run(case | {"dtype": getattr(torch, case["dtype"])})
        found[name] = list(programs)
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all()))
