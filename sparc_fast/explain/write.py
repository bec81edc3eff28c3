"""The report's files, each whole or untouched."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from sparc_fast.files import atomic_path

from .contents import Report
from .headline import render_headline
from .page import render_page

__all__ = ["HEADLINE", "PAGE", "write_report"]

PAGE, HEADLINE = "index.html", "alignment.png"


def write_report(report: Report, folder: str | os.PathLike[str]) -> Path:
    """Write `index.html` and `alignment.png` into `folder` (made if missing); returns the page's path."""
    missing = [name for name in ("jinja2", "matplotlib", "PIL") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the report needs {', '.join(missing)}: pip install 'sparc_fast[demo]'")
    folder = Path(folder)
    files = {HEADLINE: render_headline(report), PAGE: render_page(report).encode("utf-8", "replace")}
    for name, content in files.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    return folder / PAGE
