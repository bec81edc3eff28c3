"""Other people's models and formats: the research code (`sparc_fast.compat` and its files), SAELens, the Hub."""

from . import hub, research_code, research_files, saelens

__all__ = ["hub", "research_code", "research_files", "saelens"]
