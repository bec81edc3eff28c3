"""Honest evaluation of sparse codes over several streams.

Every metric can be run on *single* codes (each stream encoded alone: the honest protocol) or on *joint* ones
(all encoded together: the SPARC paper's). `evaluate` runs those of `METRICS` that are asked for, and `table` compares
models.
"""

from .agreement import firing_agreement
from .alignment import alignment_by_depth, sparc_paper_alignment_by_depth
from .bridge import Bridge, BridgePair, bridge_pairs, bridge_score
from .codes import Codes, StreamCode
from .cofiring import cofiring_iou, energy_share, firing_entropy
from .concepts import Carried, LatentNames, TopSamples, latents_of_one_concept, name_latents, top_samples
from .dictionary import dictionary_of
from .evaluation import Evaluation, evaluate, evaluate_raw
from .formats import as_csv, as_latex, as_markdown, write_comparison
from .hierarchy import Hierarchy
from .interventions import Ablations, Intervention, intervene, probe_effects
from .jaccard import Concepts, above_chance, concept_alignment, concept_jaccard, concept_jaccard_by_chance
from .latents import LatentUse, latent_use
from .matching import match_latents, matched, rename_latents
from .metrics import METRICS
from .monosemanticity import Monosemanticity, mono_score
from .plots import write_plots
from .probe_1d import Probe1D, probe_1d, split_samples
from .probes import Probe, average_precision, linear_probe, mlp_probe
from .purity import Purity, class_purity
from .reconstruction import nmse_from_errors, r2_from_errors, squared_error
from .recovery import Recovery, SyntheticStreams, feature_recovery, synthetic_streams
from .registry import Batch, Given, Metric, Row, Score
from .retrieval import Found, Retrieval, retrieval_ranks, retrieval_scores, retrieval_seconds, retrieve
from .table import Comparison, as_text, comparison, difference, table
from .words import as_words, words_as_concepts

__all__ = [
    "METRICS",
    "Ablations",
    "Batch",
    "Bridge",
    "BridgePair",
    "Carried",
    "Codes",
    "Comparison",
    "Concepts",
    "Evaluation",
    "Found",
    "Given",
    "Hierarchy",
    "Intervention",
    "LatentNames",
    "LatentUse",
    "Metric",
    "Monosemanticity",
    "Probe",
    "Probe1D",
    "Purity",
    "Recovery",
    "Retrieval",
    "Row",
    "Score",
    "StreamCode",
    "SyntheticStreams",
    "TopSamples",
    "above_chance",
    "alignment_by_depth",
    "as_csv",
    "as_latex",
    "as_markdown",
    "as_text",
    "as_words",
    "average_precision",
    "bridge_pairs",
    "bridge_score",
    "class_purity",
    "cofiring_iou",
    "comparison",
    "concept_alignment",
    "concept_jaccard",
    "concept_jaccard_by_chance",
    "dictionary_of",
    "difference",
    "energy_share",
    "evaluate",
    "evaluate_raw",
    "feature_recovery",
    "firing_agreement",
    "firing_entropy",
    "intervene",
    "latent_use",
    "latents_of_one_concept",
    "linear_probe",
    "match_latents",
    "matched",
    "mlp_probe",
    "mono_score",
    "name_latents",
    "nmse_from_errors",
    "probe_1d",
    "probe_effects",
    "r2_from_errors",
    "rename_latents",
    "retrieval_ranks",
    "retrieval_scores",
    "retrieval_seconds",
    "retrieve",
    "sparc_paper_alignment_by_depth",
    "split_samples",
    "squared_error",
    "synthetic_streams",
    "table",
    "top_samples",
    "words_as_concepts",
    "write_comparison",
    "write_plots",
]
