"""One wheel serves every version of torch: it is built where there is none, and links to nothing of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("sparc_fast", "kernels", "csrc", "benchmarks", "setup.py", "pyproject.toml", "README.md", "LICENSE")
pytestmark = [pytest.mark.compilers, pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def build(folder: Path, **environment: str) -> None:
    """The wheel, from the sources alone, in an environment of its own that holds what pyproject.toml asks for.

    Unoptimised and for one instruction set, which compiles many times faster: what `pip install -e` compiled is what all
    other tests run on, each instruction set those of test_simd_levels.py.
    """
    compiled = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=compiled)
        else:
            shutil.copy(source, folder / "source" / name)
    # nvcc is left out: the CUDA module's compilation has tests of its own
    folders = [str(folder), *os.environ["PATH"].split(os.pathsep)]
    path = os.pathsep.join(p for p in folders if not Path(p, "nvcc").exists())
    unoptimised = folder / "unoptimised"
    flags = "-O0 -DSPARC_FAST_BASELINE_ONLY"  # of flags that differ the last counts
    unoptimised.write_text(f'#!/bin/sh\nexec {sysconfig.get_config_var("CXX") or "c++"} "$@" {flags}\n')
    unoptimised.chmod(0o755)
    done = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, folder / "source", cwd=folder,
        **({"PATH": path, "CC": unoptimised.name, "CXX": unoptimised.name} | environment),
    )  # fmt: skip
    if done.returncode and "No matching distribution found for setuptools" in done.stderr + done.stdout:
        pytest.skip("no package index to build from")
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.fixture(scope="module")
def wheel(made_once: Callable[..., Path]) -> Path:
    (built,) = made_once("wheel", build).glob("*.whl")
    return built


def install(wheel: Path, folder: Path) -> None:
    done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, made_once: Callable[..., Path]) -> Path:
    return made_once("installed", partial(install, wheel))


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"sparc_fast", f"{'-'.join(wheel.stem.split('-')[:2])}.dist-info"}
    assert {"sparc_fast/kernels/decode_loss.py", "sparc_fast/explain/page.css", "sparc_fast/py.typed"} <= set(names)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_compiled_module_links_to_nothing_of_torch(installed: Path) -> None:
    (module,) = (installed / "sparc_fast").glob("_cpu*.so")
    needed = run("readelf", "-dW", module, cwd=installed).stdout
    libraries = {line.split("[")[1].split("]")[0].split(".")[0] for line in needed.splitlines() if "NEEDED" in line}
    assert "libstdc++" in libraries
    assert libraries <= {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "ld-linux-x86-64"}
    symbols = run("readelf", "--dyn-syms", "-W", module, cwd=installed).stdout
    undefined = [line.split()[-1] for line in symbols.splitlines() if " UND " in line]
    assert any(name.startswith("Py") for name in undefined)
    assert not [name for name in undefined if "c10" in name or "torch" in name or "2at" in name]


def test_the_installed_wheel_passes_tests(installed: Path, tmp_path: Path) -> None:
    where = run(
        sys.executable, "-c", "import sparc_fast; print(sparc_fast.__file__)", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert Path(where.stdout.strip()).parents[1] == installed, where.stderr
    tests = ("test_custom_ops.py", "test_simd_levels.py", "test_support_values.py")
    # of types one: the other tests run what was compiled of the same sources with all of them
    done = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not triton and not float16 and not float64",
        *(ROOT / "tests" / name for name in tests), cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


WITHOUT = """
import sys, torch, warnings
# an editable installation would lend its compiled module
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sparc_fast
    model = sparc_fast.SPARC({"a": 8, "b": 6}, n_latents=32, k=4)
    before = model.W_enc.detach().clone()
    optimizer = sparc_fast.SparcAdam(model)
    for _ in range(2):
        optimizer.step({"a": torch.randn(16, 8), "b": torch.randn(16, 6)})
assert sparc_fast.available_backends("cpu")[0] == "reference", sparc_fast.available_backends("cpu")
assert not torch.equal(model.W_enc, before)
(said,) = [str(warning.message) for warning in caught if "sparc_fast" in str(warning.message)]
assert "without its compiled CPU module" in said and "C++ compiler" in said, said
print(sparc_fast.__file__)
"""


def test_without_a_compiler_all_but_the_compiled_module_is_installed_and_says_so_once(tmp_path: Path) -> None:
    folder, target = tmp_path / "built", tmp_path / "target"
    folder.mkdir(), target.mkdir()
    build(folder, CC="no-such-compiler", CXX="no-such-compiler")
    (wheel,) = folder.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    install(wheel, target)
    done = run(sys.executable, "-c", WITHOUT, cwd=tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parents[1] == target
