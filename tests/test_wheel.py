"""One wheel serves every version of torch: it is built where there is none, and links to nothing of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("sparc_fast", "kernels", "csrc", "benchmarks", "setup.py", "pyproject.toml", "README.md", "LICENSE")
pytestmark = [pytest.mark.compilers, pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")]


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def build(folder: Path) -> None:
    """The wheel, from the sources alone, in an environment of its own that holds what pyproject.toml asks for."""
    compiled = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=compiled)
        else:
            shutil.copy(source, folder / "source" / name)
    # nvcc is left out: the CUDA module's compilation has tests of its own
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    done = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, folder / "source", cwd=folder, PATH=path
    )
    if done.returncode and "No matching distribution found for setuptools" in done.stderr + done.stdout:
        pytest.skip("no package index to build from")
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.fixture(scope="module")
def wheel(made_once: Callable[..., Path]) -> Path:
    (built,) = made_once("wheel", build).glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, made_once: Callable[..., Path]) -> Path:
    def install(folder: Path) -> None:
        done = run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel, cwd=folder)
        assert done.returncode == 0, done.stderr + done.stdout

    return made_once("installed", install)


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
    done = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not triton",
        *(ROOT / "tests" / name for name in tests), cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
