"""The report's files: the page appears when all that it needs is there, and until then is what it was."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from importlib.util import find_spec
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc_fast.files import as_path, atomic_path
from sparc_fast.sizes import counted

from .contents import Report

if TYPE_CHECKING:
    from .shards import Shards

__all__ = ["HEADLINE", "PAGE", "write_report"]

PAGE, HEADLINE = "index.html", "alignment.png"
PIECES = "report-"  # and a hash of the content: what a page that is there needs is never overwritten
SCRIPTS = ("load.js", "draw.js", "page.js")
HERE = Path(__file__).parent


def write_report(report: Report, folder: str | os.PathLike[str]) -> Path:
    """Write `index.html`, the folder of what it loads and `alignment.png` into `folder`; returns the page's path.

    The folder is made if missing. The page can be moved or shared with the folder, and opens without a server.

    Raises:
        ImportError: jinja2, matplotlib or pillow is missing.
        OSError: the folder cannot be written; whatever it held is untouched.
    """
    missing = [name for name in ("jinja2", "matplotlib", "PIL") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the report needs {', '.join(missing)}: pip install 'sparc_fast[demo]'")
    from .headline import render_headline
    from .shards import Shards

    folder, shards = as_path(folder, "folder").resolve(), Shards(report)
    temporary = folder / f".{PIECES}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise type(error)(f"cannot write {folder}: {error.strerror or os.strerror(errno.EIO)}") from error
    try:
        pieces = folder / f"{PIECES}{_fill(temporary, shards)}"
        if not pieces.exists():
            os.replace(temporary, pieces)
        for name, content in (
            (HEADLINE, render_headline(report, shards)),
            (PAGE, render_page(report, pieces.name)),
        ):
            with atomic_path(folder / name) as file:
                file.write_bytes(content)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for other in folder.glob(f"{PIECES}*/page.js"):
        if other.parent != pieces:
            shutil.rmtree(other.parent, ignore_errors=True)
    return folder / PAGE


def render(template: Path, **values: Any) -> bytes:
    """A page of a template, in which values are text and no markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template.name).render(values).encode("utf-8", "replace")


def render_page(report: Report, pieces: str) -> bytes:
    """What the page says whatever is looked at; its scripts draw the rest from `pieces`, the folder that they load."""
    return render(
        HERE / "page.html.jinja", report=report, counted=counted, pieces=pieces,
        sections=[(name, list(rows)) for name, rows in groupby(report.table, key=lambda row: row.section)],
        table_notes=getattr(report.table, "notes", ()),
        table_columns=list(dict.fromkeys(column for row in report.table for column in row.cells)),
    )  # fmt: skip


def _fill(folder: Path, shards: Shards) -> str:
    """Write all pieces; a hash of their content."""
    digest = hashlib.blake2b(digest_size=6)
    own = ((name, (HERE / name).read_bytes()) for name in ("page.css", *SCRIPTS))
    for name, content in chain(own, shards.pictures(), shards.pieces()):
        digest.update(f"{name} {len(content)} ".encode() + content)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return digest.hexdigest()
