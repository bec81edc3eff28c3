"""Data sets and how they are read."""

from .aligned import AlignedFiles, Scan, open
from .glyph_files import write_glyphs
from .glyphs import Glyphs, glyphs
from .loader import Loader
from .readers import Reader

__all__ = ["AlignedFiles", "Glyphs", "Loader", "Reader", "Scan", "glyphs", "open", "write_glyphs"]
