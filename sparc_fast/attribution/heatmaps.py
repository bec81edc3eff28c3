"""Heatmaps: which positions of a picture a latent is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sparc_fast.extract.encoders import Encoder, ModelEncoder
from sparc_fast.extract.items import load_picture, on_white
from sparc_fast.model import SPARC

from .attention import WatchedAttention, relevancy
from .grids import Grid, grid_of
from .region import Region, region_seen
from .target import Latents, Target

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Heatmaps", "Method", "heatmaps", "opened_picture"]

Method = Literal["position", "attention", "gradient"]
LINEAR = 1e-4  # how far, for its size, a row may be from the mean of its positions' rows
HOT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis
OPACITY = 0.65


@dataclass(frozen=True, eq=False)
class Heatmaps:
    """Maps of n pictures over the positions of one model.

    Of "position" a map is in units of the score: where the model's row is the mean of its positions, the map's mean is
    the score. Of "attention" it is at least 0 and has no unit; of "gradient" it has the score's unit, and its sum is
    the score less a constant where all behind the positions is linear.
    """

    maps: Tensor
    """float32 [n, h, w]."""
    scores: Tensor
    """float64 [n]: what the model of latents says of the whole picture, a weighted sum of pre-activations."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each picture."""
    regions: tuple[Region, ...]
    """The part of each picture that the model saw."""
    windows: tuple[Region, ...]
    """Where each map lies on its picture, positions being centred where strides and padding put them."""
    method: Method

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def gap(self) -> Tensor:
        """float64 [n], the score less the map's mean: 0 to rounding where a map of "position" is exact."""
        return self.scores - self.maps.double().mean((1, 2))

    def on_picture(self, n: int, size: tuple[int, int] | None = None) -> npt.NDArray[np.float32]:
        """The n-th map in the pixels of its picture, [height, width], or of a picture of another size.

        Bilinear between the positions' centres; NaN where the model did not see the picture.
        """
        width, height = size or self.sizes[n]
        x, y = ((np.arange(m) + 0.5) / (m / own) for m, own in zip((width, height), self.sizes[n], strict=True))
        left, top, right, bottom = self.windows[n]
        places = np.stack(np.meshgrid((x - left) / (right - left) * 2 - 1, (y - top) / (bottom - top) * 2 - 1), axis=-1)
        at = torch.from_numpy(places[None].astype(np.float32))
        sampled = F.grid_sample(self.maps[n][None, None], at, padding_mode="border", align_corners=False)
        found: npt.NDArray[np.float32] = sampled[0, 0].numpy()
        left, top, right, bottom = self.regions[n]
        found[(y < top) | (y > bottom)] = np.nan
        found[:, (x < left) | (x > right)] = np.nan
        return found

    def overlay(self, n: int, picture: Image, highest: float | None = None) -> Image:
        """The picture, grey, with the n-th map over it; what is at most 0, and what was not seen, is left grey.

        `highest`: the value of full colour, by default the map's largest; the same for maps to be compared.
        """
        from PIL import Image

        grey = np.asarray(on_white(picture).convert("L"), np.float32)[..., None] * 0.6 + 255 * 0.4
        heat = np.nan_to_num(self.on_picture(n, picture.size), nan=0.0)
        top = float(heat.max()) if highest is None else highest
        share = np.clip(heat / top, 0, 1) if top > 0 else np.zeros_like(heat)
        ends = np.linspace(0, 1, len(HOT))
        colour = np.stack([np.interp(share, ends, [rgb[c] for rgb in HOT]) for c in range(3)], axis=-1)
        weight = (OPACITY * np.clip(share * 4, 0, 1))[..., None]
        return Image.fromarray((grey * (1 - weight) + colour * weight).round().astype(np.uint8))


def heatmaps(
    model: SPARC,
    encoder: Encoder,
    pictures: Sequence[Image | str | Path],
    *,
    stream: str,
    latents: Latents,
    method: Method = "position",
    enlarge: float = 1.0,
    batch_size: int = 16,
) -> Heatmaps:
    """Which positions of each picture speak for a latent, or for many, in one stream.

    Each picture goes through the encoder's own preprocessing, whose geometry is read off, and through the model in
    float32. Nothing of either model is changed, and no counter moves.

    Args:
        encoder: the model whose rows the stream holds, as `encoder_of` or `encoders_of` makes it.
        pictures: of any sizes, or their files.
        latents: a latent; or (values, indices), both [n, m]: what ``codes.stream(name)`` gives of another stream, or of
            this one. Pre-activations are summed with these weights.
        method: "position", the trained encoder on every position, exact where the row is their mean; "attention",
            gradient-weighted relevancy through all blocks; "gradient", features times their gradient.
        enlarge: how many times larger a convolutional model is shown the pictures, for things that are small in them;
            the scores are then of the larger ones.
        batch_size: pictures at a time.

    Raises:
        ValueError: the encoder is a function, or its pictures have no positions, or no attention over the whole.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not enlarge > 0:
        raise ValueError(f"enlarge must be above 0, got {enlarge}")
    if not isinstance(encoder, ModelEncoder) or encoder.stream.modality != "image":
        raise ValueError(f"encoder must be a model of pictures with modules to look into, got {type(encoder).__name__}")
    opened = [opened_picture(picture) for picture in pictures]
    if not opened:
        raise ValueError("pictures must be at least one, got none")
    target = Target.of(model, stream, latents, len(opened)).to(encoder.device)
    seen = {size: region_seen(encoder, size) for size in {picture.size for picture in opened}}
    grid: Grid | None = None
    maps, scores = [], []
    for start in range(0, len(opened), batch_size):
        some = slice(start, start + batch_size)
        inputs = encoder.inputs([encoder.prepare(picture) for picture in opened[some]])
        grid = grid or grid_of(encoder, inputs)
        if enlarge != 1 and grid.is_map:
            inputs = F.interpolate(inputs, scale_factor=enlarge, mode="bicubic", antialias=True)
            grid = grid_of(encoder, inputs)
        elif enlarge != 1:
            raise ValueError(
                f"enlarge must be 1 with {encoder.stream.model}, which is no convolutional model, got {enlarge}"
            )
        with torch.enable_grad():
            found, score = _METHODS[method](grid, inputs, target[some])
        maps.append(found.detach().float().cpu().view(-1, grid.height, grid.width))
        scores.append(score.detach().cpu())
    assert grid is not None
    regions = tuple(seen[picture.size] for picture in opened)
    windows = tuple(_window(region, grid) for region in regions)
    sizes = tuple(picture.size for picture in opened)
    return Heatmaps(torch.cat(maps), torch.cat(scores), sizes, regions, windows, method)


def _position(grid: Grid, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        caught: list[Tensor] = []

        def catch(features: Tensor) -> Tensor:
            caught.append(features)
            return features

        rows = grid.run(inputs, catch)
        if rows.ndim == 3:  # a row for each patch
            parts = target.score(rows)
            return parts, parts.mean(1)
        parts = grid.run(inputs[:1], lambda _: grid.alone(caught[0])).view(len(rows), -1, rows.shape[1])
        away = (parts.mean(1) - rows).norm(dim=1) > LINEAR * rows.norm(dim=1)
        maps = torch.where(away[:, None], target.score(parts), target.share(parts, rows))
        return maps, target.score(rows)


def _attention(grid: Grid, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    name, caught = grid.encoder.stream.model, []
    with WatchedAttention() as watched:

        def note(features: Tensor) -> Tensor:
            caught.append((features, len(watched.found)))
            return features

        scores = _score(target, grid.run(inputs.detach().clone().requires_grad_(), note))
    features, blocks = caught[0]
    attention = watched.found[:blocks]
    *gradients, pooled = torch.autograd.grad(scores.sum(), [*attention, features], allow_unused=True)
    kept = [(A, gradient) for A, gradient in zip(attention, gradients, strict=True) if gradient is not None]
    if grid.is_map or not kept or any(A.shape[2:] != (features.shape[1],) * 2 for A, _ in kept):
        shapes = ", ".join(dict.fromkeys(str(list(A.shape[1:])) for A in attention)) or "none"
        raise ValueError(
            f'method must be "position" or "gradient" with {name}: its blocks do not attend to the whole picture at '
            f"once, in {grid.height} x {grid.width} positions and {grid.prefix} tokens; attention: {shapes}"
        )
    found = relevancy(*zip(*kept, strict=True))
    found = found - torch.eye(found.shape[1], dtype=found.dtype, device=found.device)  # what a token is to itself
    weight = pooled.float().norm(dim=2)  # which tokens became the row, and how far
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-30)
    return (weight[:, :, None] * found).sum(1)[:, grid.prefix :], scores


def _gradient(grid: Grid, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    rows, features = grid.run_keeping(inputs.detach().clone().requires_grad_())
    scores = _score(target, rows)
    gradients = torch.autograd.grad(scores.sum(), features, allow_unused=True)
    for given, gradient in zip(reversed(features), reversed(gradients), strict=True):
        # a class token is alone in having all of the last features: then those before it looked at the others
        if gradient is not None and grid.positions(gradient).any():
            return grid.positions(gradient.double() * given.detach().double()).sum(2), scores
    raise ValueError(
        f'method must be "position" or "attention" with {grid.encoder.stream.model}: no gradient comes back'
    )


_METHODS: dict[Method, Callable[[Grid, Tensor, Target], tuple[Tensor, Tensor]]] = {
    "position": _position,
    "attention": _attention,
    "gradient": _gradient,
}


def _score(target: Target, rows: Tensor) -> Tensor:
    scores = target.score(rows)
    return scores if scores.ndim == 1 else scores.mean(1)


def opened_picture(picture: Image | str | Path) -> Image:
    """In RGB, of a file turned as its EXIF says, transparent parts on white."""
    return load_picture(Path(picture).read_bytes(), None) if isinstance(picture, str | Path) else on_white(picture)


def _window(region: Region, grid: Grid) -> Region:
    left, top, right, bottom = grid.window
    across, down = region.right - region.left, region.bottom - region.top
    return Region(
        region.left + left * across, region.top + top * down, region.left + right * across, region.top + bottom * down
    )
