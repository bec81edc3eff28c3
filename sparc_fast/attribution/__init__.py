"""Attribution: which positions of a picture, and which words of a text, a latent is about."""

from .encoders import encoders_of
from .heatmaps import Heatmaps, Method, heatmaps
from .look import Names, Sample, look_into, samples_of
from .page import Looked, Seen, write_heatmaps
from .region import Region, region_seen
from .target import Latents, Target, strongest
from .texts import TextMethod, WordScores, word_scores

__all__ = [
    "Heatmaps",
    "Latents",
    "Looked",
    "Method",
    "Names",
    "Region",
    "Sample",
    "Seen",
    "Target",
    "TextMethod",
    "WordScores",
    "encoders_of",
    "heatmaps",
    "look_into",
    "region_seen",
    "samples_of",
    "strongest",
    "word_scores",
    "write_heatmaps",
]
