"""Fast, exact SPARC: sparse autoencoders whose latents mean the same concept in every model and modality."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparc_fast.codes import SparseLatents
from sparc_fast.model import SPARC, SparcOutput
from sparc_fast.objective import SparcLoss, fvu, nmse
from sparc_fast.ops import functional
from sparc_fast.ops.backends import available as available_backends
from sparc_fast.optim import SparcAdam
from sparc_fast.version import __version__

if TYPE_CHECKING:
    from sparc_fast import (
        attribution,
        compat,
        data,
        demo,
        distributed,
        evaluate,
        explain,
        extract,
        interop,
        planning,
        training,
    )

__all__ = [
    "SPARC",
    "SparcAdam",
    "SparcLoss",
    "SparcOutput",
    "SparseLatents",
    "__version__",
    "attribution",
    "available_backends",
    "compat",
    "data",
    "demo",
    "distributed",
    "evaluate",
    "explain",
    "extract",
    "functional",
    "fvu",
    "interop",
    "nmse",
    "planning",
    "training",
]


def __getattr__(name: str) -> Any:
    """The modules among the public names, which are loaded on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return __all__


if "cpu" not in available_backends("cpu"):
    from sparc_fast.shadowing import warn_of_hidden_installation

    warn_of_hidden_installation()
