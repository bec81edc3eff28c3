"""The demo: characters of two typefaces and their names, built in, and the models that are compared on them."""

from sparc_fast.data import Glyphs, glyphs, write_glyphs

from .experiment import Settings, Trained, report, run

__all__ = ["Glyphs", "Settings", "Trained", "glyphs", "report", "run", "write_glyphs"]
