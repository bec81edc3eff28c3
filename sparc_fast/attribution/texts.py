"""Which words of a text a latent is about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sparc_fast.evaluate.words import SPACELESS
from sparc_fast.extract.encoders import Encoder, ModelEncoder
from sparc_fast.model import SPARC

from .grids import hooks, rows_of
from .target import Latents, Target

__all__ = ["TextMethod", "WordScores", "word_scores"]

TextMethod = Literal["omission", "gradient", "integrated"]
STEPS = 32  # of the way from no words to the text
ONE = SPACELESS.pattern.removesuffix("+")  # a character of a script without spaces
WORD = re.compile(rf"{ONE}|(?:(?!{ONE})[^\W_])+")  # a run of letters and digits; of scripts without spaces, a character


@dataclass(frozen=True)
class WordScores:
    """A text's words, what each adds to the score, and the score of the whole, a weighted sum of pre-activations."""

    words: tuple[str, ...]
    scores: tuple[float, ...]
    whole: float

    def _repr_html_(self) -> str:
        """Words for it in green, against it in red, for a notebook."""
        top = max((abs(score) for score in self.scores), default=0) or 1.0
        spans = (
            f'<span title="{score:+.3g}" style="background: rgba({"31,140,90" if score > 0 else "200,60,60"},'
            f'{abs(score) / top * 0.7:.2f})">{escape(word)}</span>'
            for word, score in zip(self.words, self.scores, strict=True)
        )
        return f"<p>{' '.join(spans)}</p>"


def word_scores(
    model: SPARC,
    encoder: Encoder,
    texts: Sequence[str],
    *,
    stream: str,
    latents: Latents,
    method: TextMethod = "omission",
    batch_size: int = 64,
) -> list[WordScores]:
    """Which words of each text speak for a latent, or for many, in one stream; arguments as of `heatmaps`.

    The rows are those that `extract` makes, with the encoder's own pooling and norm, and the score that of the model of
    latents, so another latent has other words.

    Args:
        method: "omission", the score less that of the text without the word; any encoder, a function too. "gradient",
            each token's embedding times its gradient, summed over a word's tokens; of a torch model. It is the slope at
            the text alone: where a norm follows the embeddings, as in BERT, it may well have the wrong sign.
            "integrated", the mean of such gradients on the way from embeddings of 0 (Sundararajan et al., 2017): words
            then add up to the score less that of the text whose words are 0.

    Raises:
        ValueError: the encoder is not of texts, or is a function where gradients are asked for.
    """
    if method not in get_args(TextMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(TextMethod))}, got {method!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(encoder, ModelEncoder) and encoder.stream.modality != "text":
        raise ValueError(f"encoder must be a model of texts, got {encoder.stream.model}, of pictures")
    target = Target.of(model, stream, latents, len(texts))
    if method == "omission":
        return [_omission(encoder, text, target[n : n + 1], batch_size) for n, text in enumerate(texts)]
    if not isinstance(encoder, ModelEncoder):
        raise ValueError(f'method must be "omission" with a model that is no torch module, {type(encoder).__name__}')
    target = target.to(encoder.device)
    found: list[WordScores] = []
    for start in range(0, len(texts), batch_size):
        some = slice(start, start + batch_size)
        found += _gradient(encoder, texts[some], target[some], method)
    return found


def _gradient(encoder: ModelEncoder, texts: Sequence[str], target: Target, method: TextMethod) -> list[WordScores]:
    inputs, split = encoder.inputs(texts), encoder.words(texts)
    ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
    of_words = torch.tensor([of_tokens for _, of_tokens in split], dtype=torch.int64, device=ids.device)
    steps = [1.0] if method == "gradient" else [(step + 0.5) / STEPS for step in range(STEPS)]
    whole, given, slopes = _slopes(encoder, inputs, ids, of_words >= 0, target, steps)
    of_tokens = (slopes.double() * given.double()).sum(2).cpu()
    found = []
    for (words, numbers), tokens, score in zip(split, of_tokens, whole.tolist(), strict=True):
        sums = torch.zeros(len(words) + 1, dtype=torch.float64, device="cpu")  # the last is of marks
        sums.index_add_(0, torch.tensor(numbers, dtype=torch.int64, device="cpu") % (len(words) + 1), tokens)
        found.append(WordScores(tuple(words), tuple(sums[:-1].tolist()), score))
    return found


def _slopes(
    encoder: ModelEncoder, inputs: Any, ids: Tensor, is_word: Tensor, target: Target, steps: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores of the texts [n], their tokens' embeddings and mean gradients there, [n, T, D]) with words scaled so."""

    def at(scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """(scores, embeddings, their gradients where the words' are this many times as long)"""
        caught: list[Tensor] = []

        def swap(_: nn.Module, given: Any, out: Tensor) -> Tensor | None:
            if caught or not given or given[0].shape != ids.shape or not torch.equal(given[0], ids):
                return None
            caught[:] = out.detach(), torch.where(is_word[..., None], out.detach() * scale, out.detach())
            return caught[1].requires_grad_()

        with hooks() as add:
            for module in encoder.model.modules():
                if isinstance(module, nn.Embedding):
                    add(module.register_forward_hook(swap))
            scores = target.score(rows_of(encoder, inputs))
        if not caught:
            raise ValueError(
                f'method must be "omission" with {encoder.stream.model}: its tokens have no embedding of their own'
            )
        return scores.detach(), caught[0], torch.autograd.grad(scores.sum(), caught[1])[0]

    with torch.enable_grad():
        whole, given, first = at(1.0)
        slopes = [first if scale == 1.0 else at(scale)[2] for scale in steps]
    return whole, given, torch.stack(slopes).mean(0)


def _omission(encoder: Encoder, text: str, target: Target, batch_size: int) -> WordScores:
    places = list(WORD.finditer(text))
    without = [text, *(" ".join((text[: m.start()] + text[m.end() :]).split()) or " " for m in places)]
    rows = torch.cat([encoder.encode(without[i : i + batch_size]) for i in range(0, len(without), batch_size)])
    scores = Target(
        target.direction.expand(len(rows), -1), target.offset.expand(len(rows)), target.is_unit
    ).score(rows.to(target.direction.device)).tolist()  # fmt: skip
    return WordScores(tuple(m[0] for m in places), tuple(scores[0] - score for score in scores[1:]), scores[0])
