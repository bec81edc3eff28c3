"""Files appear whole or not at all; small ones are read, and what is open is closed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Closing", "as_path", "as_png", "atomic_path", "check_folder", "flush", "read_object", "sha256_of", "write_text",
]  # fmt: skip

T = TypeVar("T")


class Closing:
    """What the end of a `with` block closes."""

    def close(self) -> None: ...

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_path(path: str | os.PathLike[str], name: str) -> Path:
    """ValueError names the argument."""
    try:
        return Path(path)
    except TypeError:
        raise ValueError(f"{name} must be a path, got {path!r}") from None


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; it replaces `path` when the block ends well, and vanishes when it does not.

    Raises:
        OSError: the folder cannot be written; whatever `path` held is untouched.
    """
    path = as_path(path, "path").resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield temporary
        temporary.chmod(mode)  # the umask's: some writers put a private file in its place
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """In UTF-8, whole or not at all; OSError as `atomic_path` raises it."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_png(picture: Image.Image, **options: Any) -> bytes:
    """The content of a PNG file of it; `options` are pillow's."""
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def check_folder(folder: Path, name: str) -> None:
    """Make the folder now, or OSError naming the argument: minutes of work must not end in an error about it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / ".writable") as temporary:
            temporary.touch()
        (folder / ".writable").unlink()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{name} must be a folder that can be written, got {folder}: {reason}") from error


def flush(path: Path) -> None:
    """To the disk, so that a crash cannot leave the new name with old or no content."""
    if os.name == "posix" or path.is_file():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of(path: Path) -> str:
    """Of what the file holds, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_object(path: Path, argument: str) -> dict[str, Any]:
    """What a file of one JSON object holds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds something else. Both name the argument that `path` was given as.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be JSON, but there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{argument} must be JSON, but {path} is not: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{argument} must hold one JSON object, got {type(content).__name__} in {path}")
    return content
