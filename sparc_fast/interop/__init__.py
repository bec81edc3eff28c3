"""Other people's models and formats: the research code's classes and files."""

from . import research_files

__all__ = ["research_files"]
