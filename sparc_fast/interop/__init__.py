"""Other people's models and formats: the research code's classes, `sparc_fast.compat`, and its files."""

from . import research_code, research_files

__all__ = ["research_code", "research_files"]
