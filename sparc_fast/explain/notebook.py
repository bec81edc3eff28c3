"""A latent as a notebook shows it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparc_fast.files import as_png
from sparc_fast.sizes import is_integer

from .contents import ModelReport, Report, Stream
from .latents import Tops, tops_of

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Latent"]


@dataclass(frozen=True, eq=False)
class Latent:
    """A latent of a report, with the samples that fire it most in each stream: the last line of a notebook's cell.

    Args:
        report: what `report_of` gives.
        number: the latent, from 0.
        samples: how many are shown of a stream, at most 12.
        before: of the model that was before, instead of the one after.

    Raises:
        ValueError: there is no such latent or model.
    """

    report: Report
    number: int
    samples: int = 8
    before: bool = False

    def __post_init__(self) -> None:
        latents = self.report.n_latents
        if not is_integer(self.number) or not 0 <= self.number < latents:
            raise ValueError(f"number must be in 0 ... {latents - 1}, got {self.number!r}")
        if self.before and self.report.before is None:
            raise ValueError("before must be False in a report of one model, got True")

    @property
    def model(self) -> ModelReport:
        return self.report.before if self.before and self.report.before is not None else self.report.after

    @property
    def rows(self) -> dict[str, list[int]]:
        """stream -> the samples that fire it, the strongest first."""
        return {name: self._tops.of(s, 0, self.samples) for s, name in enumerate(self.report.streams)}

    def __repr__(self) -> str:
        model, n = self.model, self.number
        names = ", ".join(model.names[n]) or "no name"
        agreement = "" if np.isnan(model.agreement[n]) else f"agreement {float(model.agreement[n]):.2f}, "
        return (
            f"Latent {n} of {model.name}: {names} ({agreement}fires for {float(model.frequency[n]):.2%} of the samples)"
        )

    def _repr_html_(self) -> str:
        streams = self.report.streams
        lines = "".join(
            f"<tr><th>{escape(name)}</th>{''.join(self._cell(streams[name], row) for row in rows) or '<td>–</td>'}</tr>"
            for name, rows in self.rows.items()
        )
        return f"<p>{escape(repr(self))}</p><table>{lines}</table>"

    @cached_property
    def _tops(self) -> Tops:
        return tops_of(self.report, self.model, torch.tensor([self.number], device="cpu"))

    def _cell(self, stream: Stream, row: int) -> str:
        items = self.report.items
        picture = None if stream.picture is None else items.pictures[stream.picture].draw(row)
        image = "" if picture is None else f'<img alt="{escape(items.ids[row])}" src="{_address(picture)}">'
        text = "" if stream.text is None else escape(items.texts[stream.text][row])
        return (
            f'<td style="text-align: center">{"<br>".join(filter(None, (image, text))) or escape(items.ids[row])}</td>'
        )


def _address(picture: Image.Image) -> str:
    """The picture itself, as an address of one: ink is black on white."""
    if picture.mode == "L":
        picture = picture.point(lambda ink: 255 - ink)
    return f"data:image/png;base64,{base64.b64encode(as_png(picture)).decode()}"
