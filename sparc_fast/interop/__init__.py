"""Other people's models and formats: the research code (`sparc_fast.compat` and its files), SAELens, the Hubs."""

from . import hub, kernel_hub, research_code, research_files, saelens

__all__ = ["hub", "kernel_hub", "research_code", "research_files", "saelens"]
