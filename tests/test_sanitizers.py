"""The compiled operators under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++")
SOURCES = [path for path in sorted(ROOT.glob("csrc/cpu/*.cpp")) if path.name != "binding.cpp"]
# one instruction set, unoptimised, to compile in seconds; std::thread, since no sanitizer sees into libgomp
FLAGS = ["-std=c++17", "-O0", "-g1", "-Wno-psabi", "-DSPARC_FAST_BASELINE_ONLY", "-DSPARC_FAST_STD_THREADS", "-pthread"]
pytestmark = [pytest.mark.compilers, pytest.mark.skipif(COMPILER is None or not SOURCES, reason="no g++ or sources")]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_a_sanitizer_finds_nothing(sanitizer: str, tmp_path: Path) -> None:
    flags = [*FLAGS, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc/cpu'}"]
    sources = [*SOURCES, ROOT / "tests/native/operators.cpp"]
    objects = [str(tmp_path / f"{source.stem}-{i}.o") for i, source in enumerate(sources)]

    def compiler(*arguments: str) -> None:
        subprocess.run([str(COMPILER), *flags, *arguments], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: compiler("-c", str(pair[0]), "-o", pair[1]), zip(sources, objects, strict=True)))
    program = str(tmp_path / "operators")
    compiler(*objects, "-o", program)
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
