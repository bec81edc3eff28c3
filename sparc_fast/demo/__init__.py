"""The demo: characters of two typefaces and their names, built in, and the models that are compared on them."""

from .experiment import Settings, Trained, report, run
from .glyph_files import write_glyphs
from .glyphs import Glyphs, glyphs

__all__ = ["Glyphs", "Settings", "Trained", "glyphs", "report", "run", "write_glyphs"]
