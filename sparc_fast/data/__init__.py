"""Data sets in files and how they are read. The built-in ones, of `sparc_fast.demo`, are loaded on first use."""

from typing import TYPE_CHECKING, Any

from .aligned import AlignedFiles, Scan, open
from .feature_folder import FeatureFolder
from .join import Match, Matched
from .loader import Loader
from .readers import Reader

if TYPE_CHECKING:
    from sparc_fast.demo.glyph_files import write_glyphs
    from sparc_fast.demo.glyphs import Glyphs, glyphs

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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparc_fast import demo

    return getattr(demo, name)


def __dir__() -> list[str]:
    return __all__
