"""The report's files, each whole or untouched."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from .contents import Report
from .headline import render_headline
from .page import render_page

PAGE, HEADLINE = "index.html", "alignment.png"


def write_report(report: Report, folder: str | os.PathLike[str]) -> Path:
    """Write `index.html` and `alignment.png` into `folder` (made if missing); returns the page's path."""
    missing = [name for name in ("jinja2", "matplotlib", "PIL") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the report needs {', '.join(missing)}: pip install 'sparc_fast[demo]'")
    folder = Path(folder)
    files = {HEADLINE: render_headline(report), PAGE: render_page(report).encode("utf-8", "replace")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _write(folder / name, content)
    except OSError as error:
        raise OSError(f"cannot write the report into {folder}: {error.strerror or error}") from error
    return folder / PAGE


def _write(path: Path, content: bytes) -> None:
    """Beside the old file, then in its place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
