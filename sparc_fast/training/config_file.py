"""Settings from a file: TOML, JSON or YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from .config import Config
from .settings import sources

SUFFIXES = (".toml", ".json", ".yaml", ".yml")


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings a file holds, not yet checked; paths in it are relative to its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what its suffix says.
        ImportError: the library that reads it is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config must be a file of settings, but there is no file {path}")
    content = _parse(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"config must hold a table of settings, got {type(content).__name__} in {path}")
    settings = dict(content)
    for f in fields(Config):
        value = settings.get(f.name)
        if f.metadata["kind"] is sources and isinstance(value, Mapping):
            settings[f.name] = {stream: absolute(source, path.parent) for stream, source in value.items()}
        elif path.suffix in (".yaml", ".yml") and isinstance(value, str) and f.metadata["kind"].parse is float:
            settings[f.name] = _as_number(value)  # YAML takes 1e-3 for text
    return settings


def absolute(source: Any, folder: Path) -> Any:
    """A source whose path does not depend on the working folder."""
    if isinstance(source, str | Path):
        return str((folder / source).resolve())
    if isinstance(source, list | tuple) and source and isinstance(source[0], str | Path):
        return [absolute(source[0], folder), *source[1:]]
    return source


def _parse(path: Path) -> Any:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"config must end in one of {', '.join(SUFFIXES)}, got {path}")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml":
            return _toml().loads(text)
        if path.suffix == ".json":
            return json.loads(text)
        return _library("yaml", "PyYAML", path).safe_load(text)
    except ImportError:
        raise
    except Exception as error:  # every library has its own
        raise ValueError(f"config must be {path.suffix[1:].upper()}, but {path} is not: {error}") from error


def _toml() -> Any:
    try:
        return import_module("tomllib")
    except ImportError:  # before Python 3.11
        return _library("tomli", "tomli", Path("config.toml"))


def _library(module: str, package: str, path: Path) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs {package}: pip install 'sparc_fast[train]', or write it as JSON"
        ) from error


def _as_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
