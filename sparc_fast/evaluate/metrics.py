"""All metrics, in the order of the table."""

from __future__ import annotations

from .agreement import AGREEMENT
from .jaccard import CONCEPTS, CONCEPTS_JOINT
from .latents import LATENTS
from .reconstruction import RECONSTRUCTION
from .reconstruction_retrieval import RETRIEVAL_BY_RECONSTRUCTION
from .registry import Metric
from .retrieval import RETRIEVAL

__all__ = ["METRICS"]

METRICS: tuple[Metric, ...] = (
    CONCEPTS,
    CONCEPTS_JOINT,
    AGREEMENT,
    RETRIEVAL,
    RETRIEVAL_BY_RECONSTRUCTION,
    RECONSTRUCTION,
    LATENTS,
)
