"""Fast, exact SPARC: sparse autoencoders whose latents mean the same concept in every model and modality."""

from sparc_fast import functional
from sparc_fast.backends import available as available_backends
from sparc_fast.codes import SparseLatents
from sparc_fast.model import SPARC, SparcOutput
from sparc_fast.objective import SparcLoss, fvu, nmse
from sparc_fast.optim import SparcAdam
from sparc_fast.version import __version__

__all__ = [
    "SPARC",
    "SparcAdam",
    "SparcLoss",
    "SparcOutput",
    "SparseLatents",
    "__version__",
    "available_backends",
    "functional",
    "fvu",
    "nmse",
]
