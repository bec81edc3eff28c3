"""The Triton operators as a kernel of the Hugging Face kernels hub: a folder that needs nothing of this package.

The layout is that of Python-only kernels (kernels 0.17): ``build/torch-<backend>`` is a package with a
``metadata.json``, which ``kernels.get_local_kernel`` and ``get_kernel`` load under its id, several versions in one
process if need be. So in the copies here imports are relative, and what torch registers bears the id.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path

from sparc_fast.files import as_path, write_text
from sparc_fast.version import __version__

__all__ = ["write_kernel"]

NAME = "sparc-fast"
VERSION = 1
"""Of the kernel: the next one when what it exports changes."""
BACKENDS = ("cuda", "cpu")
"""Of torch: on CPU tensors plain PyTorch computes, and the kernels in Triton's interpreter alone."""
OPS = ("autograd", "backends", "functional", "gpu_scratch", "layout", "pooled_topk", "reference", "row_step")
OURS = re.compile(r'(?P<quote>")sparc_fast(?=[._])|\bfrom sparc_fast\b(?P<module>[\w.]*) import')

PACKAGE = '''"""Operators of SPARC, sparse autoencoders over streams (arXiv 2507.06265), from sparc_fast {version}."""

import torch

from .ops import reference
from .ops.backends import available as available_backends
from .ops.backends import resolve
from .ops.functional import (
    batch_topk,
    global_topk,
    invert_indices,
    latents_above,
    local_topk,
    reconstruction_loss,
    sparse_decode,
    support_values,
)

__all__ = [
    "available_backends",
    "batch_topk",
    "global_topk",
    "invert_indices",
    "latents_above",
    "local_topk",
    "reconstruction_loss",
    "reference",
    "sparse_decode",
    "support_values",
]

_device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
for _name in available_backends(_device):
    resolve(_name, _device)  # loaded now, since torch.compile does not
'''

README = """---
library_name: kernels
license: apache-2.0
tags: [kernels, triton, sparse-autoencoder]
---

# sparc-fast

The operators of SPARC, sparse autoencoders over several streams of one latent space
(arXiv [2507.06265](https://arxiv.org/abs/2507.06265)), in Triton: the exact TopK of an encoder that keeps no
samples × latents matrix, decoding of any stream from any other's code, their fused loss, and the gradients of all of
it. Copied from sparc_fast {version}; one stream makes a plain TopK SAE.

| operator | gives |
|---|---|
| `global_topk(x, W_enc, pre_bias, latent_bias, k)` | int32 [N, k]: the k largest pre-activations, summed over streams |
| `local_topk(…, d_streams=)` | int32 [N, S, k]: the same of each stream by itself |
| `batch_topk(…, k)`, `latents_above(…, threshold)` | int32 [N, W]: BatchTopK, -1 where a sample has fewer than others |
| `support_values(…, indices, d_streams=)` | [N, S, k]: ReLU of the pre-activations there |
| `sparse_decode(values, indices, W_dec, pre_bias)` | [N, S, D]: all streams reconstructed from each stream's code |
| `reconstruction_loss(…)` | the weighted squared errors of all reconstructions, fused with their gradient |
| `invert_indices(indices, n_latents)` | where each latent occurs, sorted |

x [N, D] holds S streams side by side, W_enc and W_dec [L, D] a latent a row, pre_bias [D], latent_bias [S, L].
Gradients reach weights and inputs; torch.compile takes the operators as they are. `help(operator)` states its
contract, and `reference` is the specification in plain PyTorch.

```python
from pathlib import Path

import torch
from kernels import get_local_kernel

sparc = get_local_kernel(Path("."))  # this folder
device = "cuda" if torch.cuda.is_available() else "cpu"
N, D, L, k = 256, 768, 8192, 32
x, W_enc, W_dec = (torch.randn(n, D, device=device) for n in (N, L, L))
pre_bias, latent_bias = torch.zeros(D, device=device), torch.zeros(1, L, device=device)
support = sparc.global_topk(x, W_enc, pre_bias, latent_bias, k)
values = sparc.support_values(x, W_enc, pre_bias, latent_bias, support, d_streams=[D])
recons = sparc.sparse_decode(values, support, W_dec, pre_bias)
```

From the Hub: `get_kernel("NAME/sparc-fast", version={kernel_version}, trust_remote_code=True)`.

On CUDA tensors the kernels run. On CPU tensors plain PyTorch does, slowly and with a warning; `pip install sparc_fast`
has compiled operators for those, models and training. With `TRITON_INTERPRET=1`, `backend="triton"` runs the kernels on
CPU tensors in Triton's interpreter, which is what `pytest tests` does where there is no GPU.
"""

TESTS = '''"""The operators against plain PyTorch, on a GPU or, without one, in Triton's interpreter."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from kernels import get_local_kernel

sparc = get_local_kernel(Path(__file__).resolve().parents[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, STREAMS, L, K = 3, (5, 70), 40, 4
COLUMNS = (slice(0, 5), slice(5, 75))


@pytest.fixture
def operands():
    torch.manual_seed(0)
    shapes = {"x": (N, 75), "W_enc": (L, 75), "pre_bias": (75,), "latent_bias": (2, L)}
    return {name: torch.randn(shape).to(DEVICE) for name, shape in shapes.items()}


def scores(x, W_enc, pre_bias, latent_bias):
    """Pre-activations of each stream, float64 [N, S, L]."""
    centred, W, bias = (x - pre_bias).double(), W_enc.double(), latent_bias.double()
    return torch.stack([centred[:, c] @ W[:, c].T + bias[s] for s, c in enumerate(COLUMNS)], dim=1)


def test_the_kernels_run_on_this_device():
    assert "triton" in sparc.available_backends(DEVICE)


def test_supports_are_the_largest_pre_activations(operands):
    h = scores(**operands)
    shared = sparc.global_topk(**operands, k=K, backend="triton")
    own = sparc.local_topk(**operands, k=K, d_streams=STREAMS, backend="triton")
    assert torch.equal(shared.long(), h.sum(1).topk(K).indices.sort().values)
    assert torch.equal(own.long(), h.topk(K).indices.sort().values)


def test_codes_and_reconstructions_and_their_gradients_are_those_of_plain_pytorch(operands):
    h, W_dec = scores(**operands), torch.randn(L, 75).to(DEVICE)
    support = sparc.global_topk(**operands, k=K, backend="triton")
    there = support.long()[:, None].expand(-1, 2, -1)
    leaves = [operands["W_enc"].requires_grad_(), W_dec.requires_grad_()]
    values = sparc.support_values(**operands, indices=support, d_streams=STREAMS, backend="triton")
    recons = sparc.sparse_decode(values, support, W_dec, operands["pre_bias"], backend="triton")
    ours = torch.autograd.grad(recons.square().sum(), leaves)
    expected = scores(**operands).gather(2, there).relu()
    decoded = torch.einsum("nsj, njd -> nsd", expected, W_dec.double()[support.long()]) + operands["pre_bias"].double()
    theirs = torch.autograd.grad(decoded.square().sum(), leaves)
    assert torch.allclose(values.double(), h.gather(2, there).relu(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(recons.double(), decoded, rtol=1e-4, atol=1e-3)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_torch_compile_takes_them_as_one_graph(operands):
    def codes(x, W_enc, pre_bias, latent_bias):
        support = sparc.global_topk(x, W_enc, pre_bias, latent_bias, K, backend="triton")
        return sparc.support_values(
            x, W_enc, pre_bias, latent_bias, support, d_streams=STREAMS, backend="triton"
        )

    compiled = torch.compile(codes, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**operands), codes(**operands))
'''


def write_kernel(folder: str | Path) -> str:
    """Write the operators as a repository of the kernels hub: ``kernels.get_local_kernel(folder)`` loads it.

    Nothing of sparc_fast need be installed where it is loaded, and a GPU not be there.

    Args:
        folder: must be new or empty.

    Returns:
        the id under which it is loaded, for CUDA: another one whenever a line of it is another.
    """
    folder = as_path(folder, "folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or an empty one, got {folder}")
    sources = _sources()
    content = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]
    names = {backend: f"_{NAME.replace('-', '_')}_{backend}_{content}" for backend in BACKENDS}
    files = {
        "README.md": README.format(version=__version__, kernel_version=VERSION),
        "tests/test_operators.py": TESTS,
    }
    for backend, name in names.items():
        variant = f"build/torch-{backend}"
        metadata = {
            "id": name, "name": NAME, "version": VERSION, "license": "Apache-2.0", "python-depends": [],
            "backend": {"type": backend},
        }  # fmt: skip
        files[f"{variant}/metadata.json"] = json.dumps(metadata, indent=2) + "\n"
        files |= {f"{variant}/{path}": _moved(text, name) for path, text in sources.items()}
    for path, text in files.items():
        write_text(folder / path, text)
    return names["cuda"]


def _sources() -> dict[str, str]:
    """Path in the package -> what stands there in ours."""
    spec = find_spec("sparc_fast.kernels")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    kernels = Path(next(iter(spec.submodule_search_locations)))
    ops = Path(__file__).parents[1] / "ops"
    files = [("kernels", path) for path in sorted(kernels.glob("*.py"))]
    files += [("ops", ops / f"{name}.py") for name in ("__init__", *OPS)]
    return {
        "__init__.py": PACKAGE.format(version=__version__),
        **{f"{place}/{path.name}": path.read_text(encoding="utf-8") for place, path in files},
    }


def _moved(text: str, name: str) -> str:
    """The source of a module one folder below the package called `name`, which was one folder below ours."""
    return OURS.sub(lambda found: f'"{name}' if found["quote"] else f"from .{found['module'] or '.'} import", text)
