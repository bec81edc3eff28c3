"""Other people's models and formats: the research code and its files, SAELens, crosscoders, the Hubs."""

from . import crosscoders, hub, kernel_hub, research_code, research_files, saelens

__all__ = ["crosscoders", "hub", "kernel_hub", "research_code", "research_files", "saelens"]
