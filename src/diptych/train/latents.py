"""The latent cache: every pair goes through the VAE once, before training, and lies on disk from then on.

One safetensors file for each shard of the pairs, in a folder named after the VAE, the panel size and the pairs it came
from, so that a cache is never read for other data. A file is published by renaming, so a killed build continues where
it was. The VAE sees whole canvases, [reference | target] and [reference | black], because its convolutions and its
attention cross the seam (facts.md 2). The posterior's mode is taken: nothing is sampled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diptych.data.images import open_image
from diptych.data.sources import Pairs
from diptych.errors import UserError
from diptych.student.geometry import Canvas, condition_canvas, fit_image, join_panels, to_pixels
from diptych.train.metrics import Progress, report
from diptych.train.processes import ALONE, Processes

Encode = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
IN_MEMORY = 4 * 2**30  # bytes of latents that are read once and kept; more is read row by row from the mapped files
BATCH = 16  # pairs through the VAE at once; fixed, so that the cache's bytes do not depend on anything else
FORMAT = 2  # raised when the files say something else
MOST_SKIPPED = 0.05  # share of unreadable pairs above which training on the rest would hide a fault
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """What training knows of a pair besides its latents."""

    id: str
    grid_id: str
    caption: str
    instruction: str = ""

    def told(self, instruct: bool) -> str:
        """The instruction if it is wanted and there is one, else the caption."""
        return self.instruction if instruct and self.instruction else self.caption


class Latents:
    """Packed latents of all pairs, by row number: `samples[i]` and the rows of `gather([i])` belong together."""

    def __init__(self, *sources: Sequence[Path]) -> None:
        """Of the files of one data set, or of several, whose samples' ids then begin with its number."""
        from safetensors import safe_open

        files = [file for source in sources for file in source]
        owners = [number for number, source in enumerate(sources) for _ in source]
        self.counts = [0] * len(sources)
        self.samples: list[Sample] = []
        self.skipped: list[dict[str, str]] = []
        self._places: list[tuple[int, int]] = []
        self._files = [safe_open(path, "pt") for path in files]
        size = 0
        for number, (path, file) in enumerate(zip(files, self._files, strict=True)):
            header = _header(file)
            owner = owners[number]
            prefix = f"{owner}/" if len(sources) > 1 else ""
            found = [Sample(**sample) for sample in header["samples"]]
            self.samples += [replace(s, id=prefix + s.id, grid_id=prefix + s.grid_id) for s in found]
            self.counts[owner] += len(found)
            self.skipped += header["skipped"]
            self._places += [(number, row) for row in range(len(header["samples"]))]
            size += path.stat().st_size
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None
        if size <= IN_MEMORY and self.samples:
            self._whole = (self._read("clean"), self._read("condition"))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C): tokens of a canvas and channels of a token."""
        if self._whole is not None:
            return tuple(self._whole[0].shape[1:])  # pyright: ignore[reportReturnType]
        return tuple(self._files[0].get_slice("clean").get_shape()[1:])  # pyright: ignore[reportReturnType]

    def gather(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean and condition latents of these rows, (B, N, C) float32 each, newly allocated."""
        if self._whole is not None:
            index = torch.tensor(rows)
            clean, condition = (tensor.index_select(0, index) for tensor in self._whole)
        else:
            clean, condition = (torch.cat([self._row(name, row) for row in rows]) for name in ("clean", "condition"))
        return clean.float(), condition.float()

    def _row(self, name: str, row: int) -> torch.Tensor:
        number, place = self._places[row]
        return self._files[number].get_slice(name)[place : place + 1]

    def _read(self, name: str) -> torch.Tensor:
        return torch.cat([file.get_tensor(name) for file in self._files if name in file.keys()])  # noqa: SIM118


def build(
    pairs: Pairs,
    folder: Path,
    encode: Encode,
    canvas: Canvas,
    key: str,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> list[Path]:
    """Encodes what is not encoded yet, each process its share of the shards; the files of the cache (`Latents`).

    `key` names the VAE and the pairs; `encode` is what `canvas_encoder` gives. Pairs whose pictures cannot be read are
    left out, counted and listed (`Latents.skipped`); UserError when they are more than a few, or a shard is missing.
    """
    name = hashlib.sha256(f"{FORMAT} {key} {canvas.panel_height}x{canvas.panel_width}".encode()).hexdigest()[:16]
    folder = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the latent cache {folder}: {error.strerror or error}") from error
    shards = pairs.shards()
    total = sum(pairs.rows_in(shard) for shard in shards)
    done, files = 0, []
    with processes.together():
        for number, shard in enumerate(shards):
            path = folder / f"part-{shard:05d}.safetensors"
            files.append(path)
            if number % processes.count == processes.rank and not path.exists():
                encode_shard(pairs.read_shard(shard), path, encode, canvas)
            done += pairs.rows_in(shard)
            report(progress, done, total, "encoding pairs")
    if skipped := _skipped(files):
        first = skipped[0]
        message = f"{len(skipped)} of {total} pairs cannot be read (first: {first['id']}: {first['reason']})"
        if len(skipped) > MOST_SKIPPED * total:
            raise UserError(f"{message}; make {pairs.url} again, or check the disk that holds it")
        log.warning("%s; they are left out and listed in the summary", message)
    return files


def _header(file: Any) -> dict[str, Any]:
    """What an open cache file says of its pairs: `samples` and `skipped`."""
    return json.loads(file.metadata()["diptych"])


def _skipped(files: Sequence[Path]) -> list[dict[str, str]]:
    """The pairs that were left out of these files, from their headers alone."""
    from safetensors import safe_open

    found: list[dict[str, str]] = []
    for path in files:
        with safe_open(path, "pt") as file:
            found += _header(file)["skipped"]
    return found


def encode_shard(rows: Sequence[dict[str, Any]], path: Path, encode: Encode, canvas: Canvas) -> None:
    """Encodes one shard's rows (those that curation kept) into one file."""
    samples: list[dict[str, str]] = []
    skipped: list[dict[str, str]] = []
    panels: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row in rows:
        if not row.get("kept", True):
            continue
        try:
            panels.append((_panel(row["conditioning"], canvas), _panel(row["image"], canvas)))
        except UserError as error:
            skipped.append({"id": row["id"], "reason": str(error)})
            continue
        samples.append({key: row[key] for key in ("id", "grid_id", "caption", "instruction")})
    tensors: dict[str, torch.Tensor] = {}
    for first in range(0, len(panels), BATCH):
        reference, target = (torch.stack(side) for side in zip(*panels[first : first + BATCH], strict=True))
        for name, latents in zip(("clean", "condition"), encode(reference, target), strict=True):
            tensors[name] = torch.cat([tensors[name], latents]) if name in tensors else latents
    publish(tensors, path, {"diptych": json.dumps({"samples": samples, "skipped": skipped})})


def publish(tensors: dict[str, torch.Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Writes a safetensors file whole or not at all. UserError if it cannot."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _panel(cell: dict[str, Any], canvas: Canvas) -> torch.Tensor:
    return to_pixels(fit_image(open_image(cell), canvas.panel_height, canvas.panel_width))


def canvas_encoder(encode_canvas: Callable[[torch.Tensor], torch.Tensor]) -> Encode:
    """References and targets, (B, 3, h, w) pixels each, to packed latents on the CPU: clean and condition canvases.

    `encode_canvas` is the pipeline's own, so that what training sees is what sampling will see.
    """

    def encode(reference: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            clean, condition = encode_canvas(join_panels(reference, target)), encode_canvas(condition_canvas(reference))
        return clean.cpu(), condition.cpu()

    return encode


def split(samples: Sequence[Sample], held_out: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to validate on.

    Whole grids are held out, those with the lowest hash of their id, until they make `held_out` pairs, but never more
    than a fifth of all pairs; so no validation subject was trained on and the choice does not move with the order.
    """
    wanted = min(held_out, len(samples) // 5)
    by_grid: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        by_grid.setdefault(sample.grid_id, []).append(row)
    validation: list[int] = []
    for grid in sorted(by_grid, key=lambda g: hashlib.sha256(f"validation {g}".encode()).digest()):
        if len(validation) + len(by_grid[grid]) > wanted:
            break
        validation += by_grid[grid]
    held = set(validation)
    return [row for row in range(len(samples)) if row not in held], validation
