"""Several files that are one: a list of them, a folder, or a pattern."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["files_of", "in_natural_order", "is_list_of_files"]

PATTERN = re.compile(r"[*?\[]")
INSTEAD = {
    ".npz": "a .npy file for each array, or as safetensors",
    **dict.fromkeys((".csv", ".tsv", ".json", ".jsonl"), "a .npy file, or as Parquet with a column of lists"),
    **dict.fromkeys((".pkl", ".pickle", ".bin"), "a .npy file, or as safetensors"),
}
"""Suffix of files that people have rows in -> what to save them as."""
OPEN_AT_ONCE = 200  # files that any system lets a process have open


def is_list_of_files(value: Any, suffixes: Collection[str]) -> bool:
    """Whether all are paths that end as files do: ``["a.h5", "rows"]`` is a file and the name of a data set in it."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(path, str | Path) and Path(path).suffix.lower() in suffixes for path in value)
    )


def files_of(
    where: str | Path | Sequence[str | Path], what: str, suffixes: Collection[str], others: bool = False
) -> list[Path]:
    """The files meant, in natural order where they were not listed.

    Args:
        what: whose they are, for messages.
        suffixes: what files may end in.
        others: whether those that are named may also end in anything else.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a folder holds files of several kinds, or the splits of a data set.
    """
    if not isinstance(where, str | Path):
        return [path for one in where for path in files_of(one, what, suffixes, others)]
    if "://" in str(where):
        raise ValueError(f"{what} must be a file of this machine, got the address {where}: download it first")
    path = Path(where)
    if path.is_dir():
        found = _in_folder(path, what, suffixes)
    elif not path.exists() and PATTERN.search(str(path)):
        found = in_natural_order(Path(match) for match in glob.glob(str(path), recursive=True))
        if not found:
            raise FileNotFoundError(f"{what} must be a pattern of files, but none are like {path}")
    else:
        found = [path]
    for file in found:
        if not others and file.suffix.lower() not in suffixes:
            hint = f": save it as {INSTEAD[suffix]}" if (suffix := file.suffix.lower()) in INSTEAD else ""
            raise ValueError(f"{what} must end in one of {', '.join(suffixes)}, got {file}{hint}")
        if not file.is_file():
            raise FileNotFoundError(f"{what} must be a file, but there is none at {file}")
    if len(found) > OPEN_AT_ONCE:
        _allow_open_files(len(found))
    return found


def in_natural_order(paths: Any) -> list[Path]:
    """2 before 10."""
    return sorted(paths, key=lambda path: [(text, int(n or -1)) for text, n in re.findall(r"(\D*)(\d*)", str(path))])


def _in_folder(folder: Path, what: str, suffixes: Collection[str]) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise ValueError(f"{what} must be one split of the data set {folder}, a folder in it: {splits}")
    saved = (folder / "state.json").is_file()  # by datasets, which keeps caches there too
    names = "data-*.arrow" if saved else "[!._]*"
    found = in_natural_order(path for path in folder.glob(names) if path.suffix.lower() in suffixes)
    if not found:
        raise FileNotFoundError(f"{what} must be a folder of files, but none in {folder} ends in {', '.join(suffixes)}")
    if len({path.suffix.lower() for path in found}) > 1:
        other = next(path for path in found if path.suffix.lower() != found[0].suffix.lower())
        raise ValueError(
            f"{what} must be a folder of files of one kind, got {found[0].name} and {other.name} in {folder}"
        )
    return found


def _allow_open_files(n: int) -> None:
    """As many open files as the system lets this process ask for: shards stay open."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = soft + n if hard == resource.RLIM_INFINITY else min(soft + n, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
