"""The compiled operators; sparc_fast/native.py is their only caller."""

from typing import Any

def __getattr__(name: str) -> Any: ...
