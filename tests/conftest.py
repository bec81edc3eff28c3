from __future__ import annotations

import importlib.util
import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

# cuBLAS is deterministic only with a workspace of its own, and must be told before it starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Triton warns where nobody has said whether products and sums may be fused; they may
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# without a GPU, Triton's interpreter runs the kernels; it must be chosen before they are imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import two_devices
from cuda_emulation import build
from native import build as native
from operands import fast_backends
from ranks import Ranks

from sparc_fast.ops import backends

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import triton_interpreter

    triton_interpreter.make_faster()
torch.set_num_threads(1)  # shapes are tiny; tests of threads set their own number
# SPARC_FAST_TEST_DEVICE=cuda runs the operators' tests on a GPU, =two on memory that keeps to the rules of one
TEST_DEVICE = os.environ.get("SPARC_FAST_TEST_DEVICE", "cpu")
if TEST_DEVICE == "two":
    FOR_GOOD = ExitStack()
    FOR_GOOD.enter_context(two_devices.two_devices())
    torch.compile = lambda *_, **__: pytest.skip("torch.compile compiles nothing while operators are watched")
if TEST_DEVICE != "cpu":  # a default that is set goes through Python in every operator
    torch.set_default_device(two_devices.DEVICE if TEST_DEVICE == "two" else TEST_DEVICE)

MOST_WORKERS = 4
MOST_EXAMPLES = 5  # of a test on a device
SETTINGS = "_hypothesis_internal_use_settings"  # where a decorated test keeps its own, which no profile overrules


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads as NaN, so that a value nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def is_worker(config: pytest.Config) -> bool:
    """Whether this is one of the processes that share a run; its environment would say so to runs inside it too."""
    return hasattr(config, "workerinput")


@pytest.fixture(scope="session")
def made_once(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder by its name, filled by the first process of the run that asks for it."""
    base, shares = tmp_path_factory.getbasetemp(), is_worker(pytestconfig)
    shared = base.parent if shares else base

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        folder, unfinished = shared / name, shared / f"unfinished {name}"
        with (shared / f"{name}.lock").open("w") as lock:
            if shares:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished.mkdir(exist_ok=True)
                fill(unfinished)
                unfinished.rename(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def native_objects(made_once: Callable[..., Path]) -> Callable[[str], list[Path]]:
    """The CPU's operators, by the sanitizer that watches them."""

    def objects(sanitizer: str) -> list[Path]:
        folder = made_once(f"operators under {sanitizer}", partial(native.compile_operators, sanitizer=sanitizer))
        return sorted(folder.glob("*.o"))

    return objects


@pytest.fixture(scope="session")
def native_results(
    made_once: Callable[..., Path], native_objects: Callable[[str], list[Path]]
) -> Callable[[str], tuple[int, str]]:
    """(exit status, what is printed) of native/operators.cpp, by the sanitizer that watches it."""

    def results(sanitizer: str) -> tuple[int, str]:
        objects = native_objects(sanitizer)
        fill = partial(native.run_program, objects=objects, sanitizer=sanitizer)
        folder = made_once(f"results under {sanitizer}", fill)
        return int((folder / "status").read_text()), (folder / "printed").read_text()

    return results


@pytest.fixture(scope="session")
def emulated_kernels(made_once: Callable[..., Path]) -> Callable[[str], list[Path]]:
    """The objects of the emulated CUDA kernels and of the emulation, by the sanitizer that watches the kernels."""

    def objects(sanitizer: str) -> list[Path]:
        folder = made_once(f"kernels {sanitizer}", partial(build.compile_kernels, sanitizer=sanitizer))
        return sorted([*folder.glob("*.o"), *made_once("emulation", build.compile_runtime).glob("*.o")])

    return objects


@pytest.fixture(scope="session")
def cuda(made_once: Callable[..., Path], emulated_kernels: Callable[[str], list[Path]]) -> ModuleType:
    """The CUDA backend with its kernels emulated on the host."""
    kernels = emulated_kernels("plain")
    return build.emulated_backend(made_once("cuda", partial(build.emulated_module, kernels=kernels)))


@pytest.fixture(scope="session")
def machine_code(made_once: Callable[..., Path]) -> Path:
    """A pickle of what nvcc makes of the CUDA kernels for every GPU they are meant for."""
    from sparc_fast.benchmarks.tools import cuda_resources

    def compile_all(folder: Path) -> None:
        (folder / "pickle").write_bytes(pickle.dumps(cuda_resources.machine_code()))

    return made_once("machine code", compile_all) / "pickle"


@pytest.fixture(scope="session")
def drawn_glyphs(made_once: Callable[..., Path]) -> Callable[..., Any]:
    """What `glyphs` gives for some faces, by default for all."""

    def drawn(*faces: str) -> Any:
        def draw(folder: Path) -> None:
            from sparc_fast.data.glyphs import FACES, glyphs

            (folder / "pickle").write_bytes(pickle.dumps(glyphs(faces=faces or tuple(FACES))))

        return pickle.loads((made_once(" ".join(("glyphs", *faces)), draw) / "pickle").read_bytes())

    return drawn


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


@pytest.fixture(params=["0", "1", "2", "3"], ids=["first to last", "last to first", "shuffled", "shuffled otherwise"])
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which the emulation runs threads."""
    monkeypatch.setenv("CUDA_EMULATION_SCHEDULE", request.param)


# the operators' own tests, small enough for Triton's interpreter
IN_INTERPRETER = {
    "test_decode_loss",
    "test_empty_slots",
    "test_every_operator",
    "test_global_topk",
    "test_local_topk",
    "test_offsets",
    "test_support_values",
    "test_update_rows",
}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in a process a core, and what is asked for by name in one."""
    whole = config.args == config.getini("testpaths") and TEST_DEVICE == "cpu" and not config.option.usepdb
    if whole and not is_worker(config) and getattr(config.option, "numprocesses", 0) is None:  # 0: no pytest-xdist here
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        config.option.numprocesses, config.option.maxprocesses = "logical", MOST_WORKERS
        config.option.dist = "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """NumPy, which Triton's interpreter computes with, warns of what floating point is meant to do."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


# the host's, whatever the default device: what files hold, runs on them, the CPU backend's own
ON_THE_HOST = {
    "test_benchmarks", "test_benchmarks_gpu", "test_cli", "test_convert", "test_data_files", "test_data_loader",
    "test_eval_command", "test_glyphs", "test_report", "test_screening", "test_simd_levels",
    "test_crosscoders", "test_docs", "test_export_command", "test_hub", "test_interop", "test_saelens",
}  # fmt: skip


@pytest.fixture(autouse=True)
def device_of_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    name = request.module.__name__
    of_the_host = TEST_DEVICE != "cpu" and (name in ON_THE_HOST or name.startswith("test_training_"))
    with torch.device("cpu") if of_the_host else nullcontext():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-of-each", action="store_true", help="of each test its first parameters, on every backend")
    parser.addoption("--every-combination", action="store_true", help="also those that `covering` leaves out")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "triton" in (parameters.get("backend"), parameters.get("library")):
            item.add_marker("interpreter")
        if "cuda" in getattr(item, "fixturenames", ()):
            item.add_marker("compilers")
    named = any("[" in argument for argument in config.args)  # with parameters, which then run
    if not named and not config.getoption("--every-combination") and not config.getoption("--one-of-each"):
        config.hook.pytest_deselected(items=_cover(items))
    # what takes longest begins first
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("long", "compilers")])
    if TEST_DEVICE != "cpu":
        for item in items:
            _cap_examples(item)
    if config.getoption("--one-of-each"):
        first: dict[object, pytest.Item] = {}
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            first.setdefault((item.path, item.originalname, parameters.get("backend")), item)
        items[:] = first.values()


def _cover(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of tests marked covering(n), so many that any n parameters still meet in every combination of their values.

    Returns what was taken out.
    """
    grids: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("covering") and isinstance(item, pytest.Function):
            grids.setdefault((item.path, item.originalname), []).append(item)
    left_out: set[pytest.Item] = set()
    for grid in grids.values():
        covered: set[object] = set()
        met = {item: _combinations(item) for item in random.Random(0).sample(grid, len(grid))}
        for new in range(max(map(len, met.values())), 0, -1):
            for item in [item for item, together in met.items() if len(together - covered) >= new]:
                if len(met[item] - covered) >= new:
                    covered |= met.pop(item)
        left_out.update(met)
    items[:] = [item for item in items if item not in left_out]
    return left_out


def _combinations(item: pytest.Item) -> set[object]:
    values = [(name, repr(value)) for name, value in item.callspec.params.items()]
    return set(combinations(values, min(len(values), item.get_closest_marker("covering").args[0])))


def _cap_examples(item: pytest.Item) -> None:
    """Kernels are compiled for many of hypothesis' examples: few, and the same in every run."""
    if is_hypothesis_test(test := getattr(item, "obj", None)):
        test = getattr(test, "__func__", test)
        own = getattr(test, SETTINGS, None) or settings.default
        most = min(own.max_examples, MOST_EXAMPLES)
        setattr(test, SETTINGS, settings(own, max_examples=most, deadline=None, derandomize=True, database=None))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every backend that runs here: an operator's tests hold for all of them."""
    if "backend" in metafunc.fixturenames:
        all_here = metafunc.module.__name__ in IN_INTERPRETER
        names = backends.available(torch.get_default_device()) if all_here else fast_backends()
        metafunc.parametrize("backend", sorted(getattr(metafunc.module, "BACKENDS", names)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What a test has to show in every run, recorded as its property `shown`."""
    for report in terminalreporter.getreports("passed"):
        for text in (text for name, text in report.user_properties if name == "shown"):
            terminalreporter.write_line(f"\n{text}")
