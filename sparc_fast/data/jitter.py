"""Small random changes of pictures: position, rotation, scale, stroke weight and sharpness."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CHANGES", "jitter"]

CHANGES = 7  # numbers that say how one picture is changed
TURN = 5 * math.pi / 180  # radians either way
STRETCH = 0.05  # either way, of width and height by themselves
SHIFT = 1.0  # pixels either way, in x and y by themselves
WEIGHT = 0.5  # of one step of dilation or erosion by 3 x 3 pixels


def jitter(images: Tensor, changes: Tensor) -> Tensor:
    """Change pictures a little.

    Args:
        images: uint8 [N, H, W], 255 is full ink; outside is none.
        changes: float [N, 7], each from -1 to 1: turn, stretch of width and of height, shift right and down,
            weight (thinner below 0, heavier above), blur (as it was at -1, a standard deviation of one pixel at 1).

    Returns:
        uint8 [N, H, W]. A picture depends on its own row alone.
    """
    turn, wider, taller, right, down, weight, blur = changes.float().T[..., None, None]
    height, width = images.shape[1:]
    cos, sin = torch.cos(turn * TURN), torch.sin(turn * TURN)
    # where every pixel of the result comes from; grid_sample's coordinates go from -1 to 1
    x, y = (torch.arange(1 - n, n, 2, device=images.device) / n for n in (width, height))
    y = y[:, None]
    from_x = (cos * x + sin * y) / (1 + wider * STRETCH) - right * SHIFT * 2 / width
    from_y = (cos * y - sin * x) / (1 + taller * STRETCH) - down * SHIFT * 2 / height
    ink = F.grid_sample(images[:, None].float(), torch.stack([from_x, from_y], -1), align_corners=False)[:, 0]
    heavier, thinner = _spread(ink), -_spread(-ink)
    ink = torch.lerp(ink, torch.where(weight > 0, heavier, thinner), weight.abs() * WEIGHT)
    ink = torch.lerp(ink, _blurred(ink), (blur + 1) / 2)
    return ink.round().clamp(0, 255).to(torch.uint8)


def _spread(x: Tensor) -> Tensor:
    """The largest of every 3 x 3 pixels."""
    for dim in (1, 2):
        left, right = x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1)
        larger = torch.maximum(left, right)  # of every two neighbours
        edges = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.maximum(torch.cat([edges[0], larger], dim), torch.cat([larger, edges[1]], dim))
    return x


def _blurred(x: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation of one pixel."""
    bell = [math.exp(-(d**2) / 2) for d in range(-2, 3)]
    for dim, padding in ((1, (0, 0, 2, 2)), (2, (2, 2, 0, 0))):
        n, wide = x.shape[dim], F.pad(x, padding)
        x = torch.zeros_like(x)
        for d, b in enumerate(bell):
            x.add_(wide.narrow(dim, d, n), alpha=b / sum(bell))
    return x
