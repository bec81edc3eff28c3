"""The HTML report: one latent, one concept, in every stream, before and after."""

from sparc_fast.evaluate import Row

from .contents import ModelReport, Report
from .latents import choose_latents
from .write import HEADLINE, PAGE, write_report

__all__ = ["HEADLINE", "PAGE", "ModelReport", "Report", "Row", "choose_latents", "write_report"]
