"""The Triton operators as a kernel of the Hub: a folder that runs where nothing of this package is installed.

The ordinary suite loads it as the package `kernels` does, with a stand-in of it; test_interop.py with the real one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accuracy import assert_equal
from operands import OPERATORS, fitting, kernel_device, operands, operators_of

from sparc_fast.interop.kernel_hub import write_kernel

pytest.importorskip("triton")

STAND_IN = """
import importlib.util, json, sys
import torch

def get_local_kernel(folder, backend=None):
    variant = folder / "build" / f"torch-{backend or ('cuda' if torch.cuda.is_available() else 'cpu')}"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


@pytest.fixture(scope="session")
def folder(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return made_once("kernel", write_kernel)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> ModuleType:
    """The operators of the folder beside our own."""
    kernels: dict[str, Any] = {}
    exec(STAND_IN, kernels)
    return kernels["get_local_kernel"](folder, "cuda")


def python(code: str, tmp_path: Path, *arguments: str, **environment: str) -> str:
    """What a new process prints in which `kernels` is the stand-in."""
    (tmp_path / "kernels.py").write_text(f'{STAND_IN}\nsys.modules["sparc_fast"] = None  # to import it is an error\n')
    command = [sys.executable, *arguments, *(["-c", code] if code else [])]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.interpreter
def test_the_folders_own_tests_pass_where_this_package_cannot_be_imported(folder: Path, tmp_path: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(folder))
    printed = python("", tmp_path, "-m", "pytest", *options, str(folder / "tests"))
    assert re.search(r"^4 passed", printed, re.MULTILINE), printed


@pytest.mark.interpreter
@pytest.mark.parametrize("name", list(OPERATORS))
def test_every_operator_of_the_folder_has_the_bits_of_ours(name: str, loaded: ModuleType) -> None:
    with kernel_device():
        o = fitting(operands("ragged", torch.float32), "triton")
        theirs = sys.modules[f"{loaded.__name__}.ops.backends"].resolve("triton", o.x.device)
        assert_equal(OPERATORS[name](o, theirs), OPERATORS[name](o, operators_of("triton")))


def test_several_versions_live_in_one_process_and_register_operators_of_their_own(folder: Path, tmp_path: Path) -> None:
    code = f"""if True:
        import os
        os.environ["TRITON_INTERPRET"] = "1"
        from pathlib import Path
        import torch
        from kernels import get_local_kernel
        for backend in ("cuda", "cpu"):
            kernel = get_local_kernel(Path({str(folder)!r}), backend)
            x = torch.randn(3, 4)
            print(kernel.global_topk(x, x, x[0], torch.zeros(1, 3), 2, backend="triton").shape)
            print(hasattr(getattr(torch.ops, kernel.__name__ + "_triton"), "global_topk"))"""
    assert python(code, tmp_path).splitlines() == ["torch.Size([3, 2])", "True"] * 2


def test_without_a_gpu_and_without_triton_it_is_imported_and_plain_pytorch_computes(
    folder: Path, tmp_path: Path
) -> None:
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    before = 'import sys; sys.modules["triton"] = None; import torch; torch.cuda.is_available = lambda: False\n'
    here = code[1].replace('Path(".")', f"Path({str(folder)!r})").replace("256, 768, 8192, 32", "6, 7, 9, 2")
    after = "\nprint(recons.shape, sparc.available_backends('cpu')[0])"
    printed = python(before + here + after, tmp_path, TRITON_INTERPRET="0")
    assert printed == "torch.Size([6, 1, 7]) reference\n"


def test_nothing_in_it_names_this_package_in_code(folder: Path) -> None:
    sources = list((folder / "build").rglob("*.py"))
    assert len(sources) > 40
    for path in sources:
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) sparc_fast|\"sparc_fast[._]", text, re.MULTILINE), path
    variants = {path.name: json.loads((path / "metadata.json").read_text()) for path in (folder / "build").iterdir()}
    assert {name: about["backend"]["type"] for name, about in variants.items()} == {
        "torch-cuda": "cuda", "torch-cpu": "cpu",
    }  # fmt: skip
    assert len({about["id"] for about in variants.values()}) == 2


def test_the_same_sources_are_the_same_kernel_and_a_folder_in_use_is_refused(folder: Path, tmp_path: Path) -> None:
    name = write_kernel(tmp_path / "again")
    assert (folder / "build" / "torch-cuda" / "metadata.json").read_text().count(f'"{name}"') == 1
    for used in (tmp_path / "again", tmp_path / "again" / "README.md"):
        with pytest.raises(ValueError, match="folder must be new or an empty one, got"):
            write_kernel(used)
