"""Other people's models and formats: the research code's classes, `sparc_fast.compat`, and its files; SAELens' SAEs."""

from . import research_code, research_files, saelens

__all__ = ["research_code", "research_files", "saelens"]
