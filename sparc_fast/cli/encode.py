"""Encode a data set of any size: the sparse codes of every sample, in one file that `SparseLatents.load` reads.

All streams of a sample are encoded together, or each alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc_fast import checkpoint
from sparc_fast.batch import PIECE
from sparc_fast.codes import FORMAT, SparseLatents
from sparc_fast.data import AlignedFiles
from sparc_fast.data.absence import present_of
from sparc_fast.data.readers import Source
from sparc_fast.files import sha256_of
from sparc_fast.model import SPARC, evaluating
from sparc_fast.selection import BY_THRESHOLD, LOCAL
from sparc_fast.sizes import as_bytes, counted
from sparc_fast.training.trainer import device_of

from .eval import add_reading, load, model_file, open_joined, sources_of

__all__ = ["add_arguments", "encode_files", "run"]

DECODED = "sparc_fast.Decoded/1"
CODES = "codes.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the samples, and what to write."""
    source = "STREAM=FILE[#NAME]"
    parser.add_argument("model", type=Path, help="a finished run's folder, a model file or a checkpoint")
    parser.add_argument(
        "--data", nargs="+", action="extend", required=True, metavar=f"FOLDER or {source}",
        help="a folder of features, a folder with a file named after each of the model's streams, or the files, of all "
        "streams or some",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.safetensors or FOLDER",
        help=f"the file to write, or the folder of {CODES}",
    )  # fmt: skip
    parser.add_argument("--alone", action="store_true", help="encode each stream by itself, with a support of its own")
    parser.add_argument(
        "--decode", metavar="STREAM=FILE.safetensors",
        help="also write this stream as each stream's code reconstructs it, a tensor [N, D] for each",
    )  # fmt: skip
    add_reading(parser, split="all", memory="2GiB", what="a stream's rows of zeros are absent, or encoded")


def run(arguments: argparse.Namespace) -> int:
    """Write the codes, and say how many."""
    out, decode = arguments.out, _target(arguments.decode)
    if out.suffix != ".safetensors":
        out /= CODES
    if decode is not None and decode[1].resolve() == out.resolve():
        raise ValueError(f"--decode must name another file than --out, got {out} for both")
    memory, device = as_bytes(arguments.memory, "--memory"), device_of(arguments.device)
    path = model_file(arguments.model)
    model = load(path).to(device)
    sources = sources_of(arguments.data, model, some=True)
    read = {path.resolve(), *(file.resolve() for source in sources.values() for file in _files(source))}
    for flag, written in (("--out", out), ("--decode", out if decode is None else decode[1])):
        if written.resolve() in read:
            raise ValueError(f"{flag} must not be a file that is read, got {written}")
    with open_joined(sources, arguments) as files:
        if files.matched is not None:
            print(files.matched, flush=True)
        absent = encode_files(
            model, files, out, alone=arguments.alone, decode=decode,
            zero_rows=arguments.zero_rows, memory=memory, about={"model_sha256": sha256_of(path)},
        )  # fmt: skip
        lacking = "".join(f", {n:,} without {stream!r}" for stream, n in absent.items() if n)
        print(f"{out}: {counted(files.n_rows, 'sample')} of {', '.join(files.d_streams)}{lacking}")
    return 0


def _files(source: Source) -> list[Path]:
    where: Any = source[0] if isinstance(source, tuple) else source
    return [Path(where)] if isinstance(where, str | Path) else [Path(one) for one in where]


@torch.no_grad()
def encode_files(
    model: SPARC,
    files: AlignedFiles,
    out: Path,
    *,
    alone: bool = False,
    decode: tuple[str, Path] | None = None,
    zero_rows: str = "absent",
    memory: int = 2**31,
    about: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Write the codes of all samples to one safetensors file, atomically; gives how many samples lack each stream.

    `SparseLatents.load` reads it: values [N, S, k] and int32 indices [N, k], or [N, S, k] where each stream has a
    support of its own. What a sample lacks has values 0, and a support of -1 where no stream chose one.

    Args:
        alone: encode each stream by itself instead of all together.
        decode: (target, file): also write this stream as decoded from each stream's code, [N, D_target], 0 if absent.
        zero_rows: rows of zeros are "absent", or "keep".
        memory: bytes to take beside the model, of the host and of the device.
        about: entries of the file's JSON beside streams and n_latents.

    Raises:
        ValueError: streams or widths are not the model's, memory is too small, or a row is not finite.
    """
    if unknown := [stream for stream in files.d_streams if stream not in model.streams]:
        raise ValueError(f"files must hold streams of the model, {list(model.streams)}, got {unknown}")
    streams = tuple(stream for stream in model.streams if stream in files.d_streams)
    widths = {stream: model.d_streams[stream] for stream in streams}
    if (got := {stream: files.d_streams[stream] for stream in streams}) != widths:
        raise ValueError(f"files must have the widths {widths}, got {got}")
    N, S = files.n_rows, len(streams)
    k = max(model._slots([stream]) for stream in streams) if alone else model._slots(streams)
    encode = _encode_alone if alone else _encode
    own_support = alone or model.selection in LOCAL
    config = {"streams": list(streams), "n_latents": model.n_latents, **(about or {})}
    read_together, encoded_together = _rows_at_once(model, files, memory)
    absent = torch.zeros(S, dtype=torch.int64, device="cpu")
    with evaluating(model):
        if model.selection in BY_THRESHOLD:  # how many latents the sample of most has is not known beforehand
            blocks = _blocks(files, streams, zero_rows, read_together, encoded_together)
            k = max((encode(model, x, present).values.shape[-1] for x, present in blocks), default=k)
        tensors = {
            "values": (model.W_enc.dtype, (N, S, k)),
            "indices": (torch.int32, (N, S, k) if own_support else (N, k)),
        }
        with ExitStack() as opened:
            write = opened.enter_context(checkpoint.save_in_parts(out, tensors, config, FORMAT))
            if decode is not None:
                target, path = decode
                if target not in model.streams:
                    raise ValueError(f"decode must be one of the streams {list(model.streams)}, got {target!r}")
                of_target = (model.W_dec.dtype, (N, model.d_streams[target]))
                decoded = {"target": target, **(about or {})}
                write_decoded = opened.enter_context(
                    checkpoint.save_in_parts(path, dict.fromkeys(streams, of_target), decoded, DECODED)
                )
            for x, present in _blocks(files, streams, zero_rows, read_together, encoded_together):
                if present is not None:
                    absent += (~present).sum(0)
                codes = encode(model, x, present).with_slots(k)
                write("values", codes.values)
                write("indices", codes.indices)
                for s, source in enumerate(streams if decode is not None else ()):
                    recons = model.decode(codes, source, target).cpu()
                    if present is not None:
                        recons[~present[:, s]] = 0
                    write_decoded(source, recons)
    return dict(zip(streams, absent.tolist(), strict=True))


def _rows_at_once(model: SPARC, files: AlignedFiles, memory: int) -> tuple[int, int]:
    """(rows read together, in whole granules where they go in; rows encoded together), within half of memory each."""
    readers = files.readers.values()
    stored = sum(reader.row_bytes for reader in readers)
    itemsize = max(4, model.W_enc.dtype.itemsize)
    # as read and side by side, calibrated, converted, decoded; scores and what selecting among them takes; the code
    encoded = itemsize * (5 * sum(model.d_streams.values()) + 2 * model.n_latents) + 24 * len(readers) * model._slots()
    L, D = model.W_enc.shape
    copies = 4 * min(L * D, 2**23) + 48 * L  # what the selection makes of a chunk of weights, and for each latent
    left = memory - copies - 2 * max(reader.pick_scratch for reader in readers)
    read, together = left // 2 // stored, min(PIECE, left // 2 // encoded)
    if read < 1 or together < 1:
        least = memory - left + 2 * max(stored, encoded)
        raise ValueError(f"memory must be at least {least} bytes here, got {memory}")
    read = min(read, max(PIECE, 2**26 // stored))  # more is no faster
    granule = max(reader.granule for reader in readers)
    return (read // granule * granule or read), together


def _blocks(
    files: AlignedFiles, streams: tuple[str, ...], zero_rows: str, read_together: int, encoded_together: int
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Samples in order, and which streams each has; ValueError names the file and row of what is not finite."""
    columns = [list(files.d_streams).index(stream) for stream in streams]
    widths = {stream: files.d_streams[stream] for stream in streams}
    room = files.room(min(read_together, files.n_rows), streams)
    for start in range(0, files.n_rows, read_together):
        n = min(read_together, files.n_rows - start)
        rows = files.read(start, start + n, room)
        for first in range(0, n, encoded_together):
            x = {stream: part[first : first + encoded_together] for stream, part in rows.items()}
            at = slice(start + first, min(start + first + encoded_together, start + n))
            present = None if files.present is None else files.present[at, columns]
            present, _ = present_of(torch.cat(list(x.values()), dim=1), present, widths, zero_rows)
            yield x, present


def _encode(model: SPARC, x: Mapping[str, Tensor], present: Tensor | None) -> SparseLatents:
    """As `SPARC.encode`, for samples of which some may have no stream at all."""
    device, dtype = model.W_enc.device, torch.promote_types(model.W_enc.dtype, torch.float32)
    if present is None:
        return model.encode({stream: rows.to(device, dtype) for stream, rows in x.items()})
    some = present.any(1)
    codes = model.encode({stream: rows[some].to(device, dtype) for stream, rows in x.items()}, present[some])
    if some.all():
        return codes
    values = codes.values.new_zeros(len(some), *codes.values.shape[1:])
    indices = codes.indices.new_full((len(some), *codes.indices.shape[1:]), -1)
    some = some.to(device)
    values[some], indices[some] = codes.values, codes.indices
    return SparseLatents(values, indices, codes.streams, codes.n_latents)


def _encode_alone(model: SPARC, x: Mapping[str, Tensor], present: Tensor | None) -> SparseLatents:
    """Each stream by itself."""
    parts = []
    for s, (stream, rows) in enumerate(x.items()):
        parts.append(_encode(model, {stream: rows}, None if present is None else present[:, s : s + 1]))
    k = max(part.values.shape[-1] for part in parts)
    parts = [part.with_slots(k) for part in parts]
    values = torch.cat([part.values for part in parts], dim=1)
    indices = torch.stack([part.stream(*part.streams)[1] for part in parts], dim=1)
    return SparseLatents(values, indices, tuple(x), model.n_latents)


def _target(text: str | None) -> tuple[str, Path] | None:
    if text is None:
        return None
    stream, _, path = text.partition("=")
    if not stream or not path:
        raise ValueError(f"--decode must be STREAM=FILE, got {text!r}")
    return stream, Path(path)
