"""The GPU kernels of `delta_product`, compiled for compute capability 9.0 without a GPU.

Triton's interpreter does not run the forms for Hopper, which are written in Gluon. That the Triton
installed here compiles them, and the others, into programs that a multiprocessor can hold is seen
here: in a process of its own, whose driver compiles for an H200 and launches nothing.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# Arguments of `delta_product_inputs`, and the kernels that a forward and a backward call have.
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
}  # fmt: skip
SEGMENT_TOKENS = 256
# The shared memory that one program can have on an H200.
SHARED_BYTES = 232_448


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Return what is known of each case's programs."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", CASES)
def test_all_kernels_compile_side_by_side(name, programs):
    _, kernels = CASES[name]
    assert sorted(x["name"] for x in programs[name]) == sorted(f"{k}_kernel" for k in kernels)
    for program in programs[name]:
        assert program["arch"] == 90
        assert program["thread"].startswith("householder-compiler")
        assert program["bytes"] > 0
        assert program["shared"] <= SHARED_BYTES


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


def compile_all() -> dict[str, list[dict[str, object]]]:
    """Compile what every case's forward and backward call need."""
    import importlib
    import threading

    import torch
    import triton

    without_gpu()
    kernels = importlib.import_module("householder.ops.delta_product.triton")
    for name in ("backward", "chunks"):
        module = importlib.import_module(f"householder.ops.delta_product.triton.{name}")
        module.is_hopper = lambda _: True
    from householder.testing import delta_product_inputs

    programs: list[dict[str, object]] = []

    def listen(*, src, metadata, metadata_group, **_):
        (binary,) = (path for name, path in metadata_group.items() if name.endswith(".cubin"))
        programs.append(
            {
                "name": src.name,
                "thread": threading.current_thread().name,
                "arch": metadata["target"].arch,
                "shared": metadata["shared"],
                "bytes": os.path.getsize(binary),
            }
        )

    triton.knobs.compilation.listener = listen
    kernels.config.SEGMENT_TOKENS = SEGMENT_TOKENS
    found = {}
    for name, (case, _) in CASES.items():
        dtype = getattr(torch, case["dtype"])
        inputs = delta_product_inputs(**(case | {"dtype": dtype}))
        arguments = [inputs[n] for n in ("q", "k", "v", "beta", "g")]
        arguments += [0.3, inputs["initial_state"], inputs["cu_seqlens"]]
        programs.clear()
        o, state, *saved = kernels.forward(*arguments, True)
        kernels.backward(torch.ones_like(o), torch.ones_like(state), *arguments, *saved)
        found[name] = list(programs)
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all()))
