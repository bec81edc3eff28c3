"""Calibration of a model on more rows than fit in memory."""

from __future__ import annotations

import torch

from sparc_fast.data import Loader
from sparc_fast.model import SPARC
from sparc_fast.reference import stream_slices


def calibrate(model: SPARC, loader: Loader, n_rows: int) -> None:
    """`SPARC.calibrate` on the first `n_rows` rows that the loader gives, at most one epoch; the loader stands still.

    Means and squares are combined batch by batch in float64 (Chan et al., 1979), so it equals the measurement in one
    piece to rounding.
    """
    state = loader.state_dict()
    D = sum(model.d_streams.values())
    mean, squares, n = torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64), 0
    for batch in loader:
        x = batch[: n_rows - n].double()
        of_batch = x.mean(0)
        squares += (x - of_batch).square_().sum(0)
        delta, total = of_batch - mean, n + len(x)
        squares += delta.square() * (n * len(x) / total)
        mean += delta * (len(x) / total)
        n = total
        if n == n_rows:
            break
    loader.load_state_dict(state)
    columns = stream_slices(tuple(model.d_streams.values()))
    rms = torch.stack([(squares[cols].sum() / n).sqrt() for cols in columns])
    size = torch.stack([mean[cols].norm() for cols in columns])
    rms = torch.where(rms > 1e-6 * size, rms, 1.0)  # a constant stream has no scale of its own
    model.load_state_dict({"input_mean": mean, "input_rms": rms}, strict=False)
