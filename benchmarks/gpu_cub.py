"""CUB's batched TopK as a rival of ours, compiled where nvcc has it; elsewhere its row says why it is missing."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .gpu_cases import DeviceOperands

SOURCE = Path(__file__).with_name("cub_topk.cu")


@lru_cache(maxsize=16)
def compiled(L: int, k: int, capability: tuple[int, int]) -> Callable[..., int]:
    """cub_topk_rows of cub_topk.cu.

    Raises:
        RuntimeError: it cannot be compiled here, with the first error of nvcc.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("cub::DeviceBatchedTopK needs nvcc")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "cub_topk.so"
        arch = "".join(map(str, capability))
        flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "--shared", "-Xcompiler", "-fPIC"]
        command = [nvcc, *flags, f"-DTOPK_LENGTH={L}", f"-DTOPK_K={k}", "-o", str(library), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line]
            raise RuntimeError(f"not compiled: {errors[0].split('error', 1)[1] if errors else done.returncode}")
        function: Callable[..., int] = ctypes.CDLL(str(library)).cub_topk_rows
        return function


def batched_topk(o: DeviceOperands) -> Callable[[], Tensor]:
    scores, (N, L) = o.scores, o.scores.shape
    function = compiled(L, o.k, torch.cuda.get_device_capability(o.device))
    values = torch.empty(N, o.k, device=o.device)
    indices = torch.empty(N, o.k, dtype=torch.int32, device=o.device)
    wanted = ctypes.c_size_t()

    def call(workspace: int | None) -> None:
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (scores, values, indices)]
        stream = ctypes.c_void_p(torch.cuda.current_stream(o.device).cuda_stream)
        error = function(ctypes.c_void_p(workspace), ctypes.byref(wanted), *addresses, ctypes.c_int64(N), stream)
        if error:
            raise RuntimeError(f"CUDA error {error}")

    call(None)
    workspace = torch.empty(max(wanted.value, 1), dtype=torch.uint8, device=o.device)

    def run() -> Tensor:
        call(workspace.data_ptr())
        return indices

    return run
