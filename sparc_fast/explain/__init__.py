"""The page of latents: one latent, one concept, in every stream, before and after."""

from sparc_fast.evaluate import Row

from .contents import Items, ModelReport, Report, Stream
from .folder import items_of, report_of
from .latents import choose_latents
from .notebook import Latent
from .pictures import Ink, Pictures, Thumbnails
from .write import HEADLINE, PAGE, write_report

__all__ = [
    "HEADLINE",
    "PAGE",
    "Ink",
    "Items",
    "Latent",
    "ModelReport",
    "Pictures",
    "Report",
    "Row",
    "Stream",
    "Thumbnails",
    "choose_latents",
    "items_of",
    "report_of",
    "write_report",
]
