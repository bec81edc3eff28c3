"""Features of your pictures and texts, from your models: a folder that `--data` takes as it takes files."""

from .config import Extraction, SourceConfig, StreamConfig, read_extraction
from .emoji import extract_emoji
from .items import Item
from .run import Extracted, extract

__all__ = [
    "Extracted",
    "Extraction",
    "Item",
    "SourceConfig",
    "StreamConfig",
    "extract",
    "extract_emoji",
    "read_extraction",
]
