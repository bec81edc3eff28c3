"""Attribution: which positions of a picture, and which words of a text, a latent is about."""

from .encoders import encoders_of
from .heatmaps import Heatmaps, Method, heatmaps
from .page import write_heatmaps
from .region import Region, region_seen
from .target import Latents, Target, strongest
from .texts import TextMethod, WordScores, word_scores

__all__ = [
    "Heatmaps",
    "Latents",
    "Method",
    "Region",
    "Target",
    "TextMethod",
    "WordScores",
    "encoders_of",
    "heatmaps",
    "region_seen",
    "strongest",
    "word_scores",
    "write_heatmaps",
]
