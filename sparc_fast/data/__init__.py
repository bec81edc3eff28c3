"""Data sets and how they are read."""

from .glyphs import Glyphs, glyphs

__all__ = ["Glyphs", "glyphs"]
