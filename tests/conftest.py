"""What holds for every test: no window, GPU tests that skip without a GPU, files interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

# Before anything imports matplotlib: pictures are drawn to files.
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

# The time of one example says nothing on a busy machine. Derandomized, so that a run can be
# repeated: a failure is the code's, and shows again.
settings.register_profile("householder", deadline=None, derandomize=True, database=None)
settings.load_profile("householder")

# Runs a file under Triton's interpreter.
INTERPRETER = Path(__file__).parent / "interpret.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


class InterpretedFiles:
    """Test files run as scripts under Triton's interpreter, while other tests go on.

    Whether kernels are interpreted is settled when they are imported: it takes another process. A
    file takes up to a minute of one core, and so the first begins before the first test.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1))
        self._running: set[subprocess.Popen[str]] = set()
        self._answers = {file: self._pool.submit(self._run, file) for file in files}

    def answer(self, file: str) -> Any:
        """Wait until a file has run, and return the JSON that it printed last."""
        return self._answers[file].result()

    def stop(self) -> None:
        """End what is still running, and begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.kill()

    def _run(self, file: str) -> Any:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [sys.executable, str(INTERPRETER), file],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            self._running.add(process)
            printed, errors = process.communicate()
            self._running.discard(process)
        assert process.returncode == 0, errors[-4000:]
        return json.loads(printed.splitlines()[-1])


INTERPRETED = pytest.StashKey[InterpretedFiles]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with the files whose answers the chosen tests want."""
    if not session.config.option.collectonly:
        wanting = (i for i in session.items if "interpreted" in getattr(i, "fixturenames", ()))
        files = dict.fromkeys(str(item.path) for item in wanting)
        session.config.stash[INTERPRETED] = InterpretedFiles(files)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave no process behind where tests ended early."""
    if INTERPRETED in session.config.stash:
        session.config.stash[INTERPRETED].stop()


@pytest.fixture(autouse=True)
def _no_recordings() -> None:
    """Let no test repeat the launches of another one, which may have changed what is launched."""
    recording = sys.modules.get("householder.ops._recording")
    if recording is not None:
        recording.forget_recordings()


@pytest.fixture(scope="session")
def interpreted(pytestconfig: pytest.Config) -> Callable[[str], Any]:
    """Return what a test file printed, as JSON, when it ran under Triton's interpreter."""
    return pytestconfig.stash[INTERPRETED].answer


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Make numbers float64 where nothing else is said, and random ones the same every time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def nothing_waits() -> Callable[[], AbstractContextManager[None]]:
    """Return what makes a context in which it is an error if the host waits for the GPU."""

    @contextmanager
    def context() -> Iterator[None]:
        try:
            # It may warn when it is set already, and warnings are errors.
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Collect the names of the threads that compile kernels, with nothing compiled before."""
    import triton

    threads = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        threads.append(threading.current_thread().name)
        assert not cache_hit, src.name

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    return threads


@pytest.fixture
def specialized(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Collect by kernel what it would be compiled for, in place of launching it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    found: dict[str, set[str]] = defaultdict(set)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, options = bind(*args, debug=False, **kwargs)
        found[self.fn.__name__].add(f"{specialization} {options}")

    monkeypatch.setattr(JITFunction, "run", run)
    return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Collect what kernels are launched with, by module and name, in place of launching them."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(self: Any, *_: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        module = self.fn.__module__.rpartition(".")[-1]
        launches.append((f"{module}.{self.fn.__name__}", constants))

    monkeypatch.setattr(JITFunction, "run", run)
    return launches


@pytest.fixture
def logits_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """Collect how many logits each rectangle of a module of path_attention's chunked form has."""
    from householder.ops.path_attention.chunk import tree

    def collect(module: Any) -> list[int]:
        computed: list[int] = []
        rectangle = module.rectangle

        def spy(*args: Any) -> torch.Tensor:
            logits: torch.Tensor = rectangle(*args)
            computed.append(logits.numel())
            return logits

        monkeypatch.setattr(tree, "TILE_ELEMENTS", {"cpu": 1})
        monkeypatch.setattr(module, "rectangle", spy)
        return computed

    return collect
