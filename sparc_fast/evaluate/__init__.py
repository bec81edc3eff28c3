"""Honest evaluation of sparse codes over several streams.

Every metric can be run on *single* codes (each stream encoded alone: the honest protocol) or on *joint* ones
(all encoded together: the SPARC paper's). `evaluate` runs those of `METRICS` that are asked for, and `table` compares
models.
"""

from .agreement import firing_agreement
from .codes import Codes, StreamCode
from .concepts import Carried, LatentNames, TopSamples, latents_of_one_concept, name_latents, top_samples
from .evaluation import Evaluation, evaluate
from .formats import as_csv, as_latex, as_markdown, write_comparison
from .jaccard import above_chance, concept_jaccard, concept_jaccard_by_chance
from .latents import LatentUse, latent_use
from .matching import match_latents, matched, rename_latents
from .metrics import METRICS
from .plots import write_plots
from .raw import evaluate_raw
from .reconstruction import nmse_from_errors, r2_from_errors, squared_error
from .registry import Batch, Given, Metric, Row, Score
from .retrieval import Found, Retrieval, retrieval_ranks, retrieval_scores, retrieval_seconds, retrieve
from .table import Comparison, as_text, comparison, difference, table
from .words import as_words, words_as_concepts

__all__ = [
    "METRICS",
    "Batch",
    "Carried",
    "Codes",
    "Comparison",
    "Evaluation",
    "Found",
    "Given",
    "LatentNames",
    "LatentUse",
    "Metric",
    "Retrieval",
    "Row",
    "Score",
    "StreamCode",
    "TopSamples",
    "above_chance",
    "as_csv",
    "as_latex",
    "as_markdown",
    "as_text",
    "as_words",
    "comparison",
    "concept_jaccard",
    "concept_jaccard_by_chance",
    "difference",
    "evaluate",
    "evaluate_raw",
    "firing_agreement",
    "latent_use",
    "latents_of_one_concept",
    "match_latents",
    "matched",
    "name_latents",
    "nmse_from_errors",
    "r2_from_errors",
    "rename_latents",
    "retrieval_ranks",
    "retrieval_scores",
    "retrieval_seconds",
    "retrieve",
    "squared_error",
    "table",
    "top_samples",
    "words_as_concepts",
    "write_comparison",
    "write_plots",
]
