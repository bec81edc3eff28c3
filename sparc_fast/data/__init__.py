"""Data sets in files and how they are read, and the built-in one."""

from .aligned import AlignedFiles, Scan, open
from .feature_folder import FeatureFolder
from .glyph_files import write_glyphs
from .glyphs import Glyphs, glyphs
from .join import Match, Matched
from .loader import Loader
from .readers import Reader

__all__ = [
    "AlignedFiles",
    "FeatureFolder",
    "Glyphs",
    "Loader",
    "Match",
    "Matched",
    "Reader",
    "Scan",
    "glyphs",
    "open",
    "write_glyphs",
]
