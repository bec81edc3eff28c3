"""The compiled operators; sparc_fast/ops/cpu.py is their only caller."""

from typing import Any

def __getattr__(name: str) -> Any: ...
