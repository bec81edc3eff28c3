"""Features of your pictures and texts, from your models: a folder that `--data` takes as it takes files."""

from .config import Extraction, SourceConfig, StreamConfig, read_extraction
from .items import Item
from .run import Extracted, extract

__all__ = ["Extracted", "Extraction", "Item", "SourceConfig", "StreamConfig", "extract", "read_extraction"]
