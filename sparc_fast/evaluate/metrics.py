"""All metrics, in the order of the table."""

from __future__ import annotations

from .agreement import AGREEMENT
from .alignment import CONCEPTS_BY_DEPTH, CONCEPTS_BY_DEPTH_SPARC_PAPER
from .bridge import BRIDGE
from .cofiring import COFIRING
from .interventions import ABLATIONS, PROBE_ABLATIONS
from .jaccard import CONCEPTS, CONCEPTS_JOINT
from .latents import LATENTS
from .monosemanticity import MONOSEMANTICITY
from .probe_1d import PROBE_1D, PROBE_1D_SPARC_PAPER
from .probes import LINEAR_PROBES, MLP_PROBES
from .purity import PURITY
from .reconstruction import RECONSTRUCTION
from .reconstruction_retrieval import RETRIEVAL_BY_RECONSTRUCTION
from .registry import Metric
from .retrieval import RETRIEVAL

__all__ = ["METRICS"]

METRICS: tuple[Metric, ...] = (
    CONCEPTS,
    CONCEPTS_JOINT,
    CONCEPTS_BY_DEPTH,
    CONCEPTS_BY_DEPTH_SPARC_PAPER,
    AGREEMENT,
    COFIRING,
    PURITY,
    MONOSEMANTICITY,
    PROBE_1D,
    PROBE_1D_SPARC_PAPER,
    LINEAR_PROBES,
    MLP_PROBES,
    RETRIEVAL,
    RETRIEVAL_BY_RECONSTRUCTION,
    RECONSTRUCTION,
    ABLATIONS,
    PROBE_ABLATIONS,
    BRIDGE,
    LATENTS,
)
