"""The latent cache: every pair goes through the VAE once, before training, and lies on disk from then on.

One safetensors file for each shard of the pairs, in a folder named after the VAE, the panel size and the pairs it came
from, so that a cache is never read for other data. A file is published by renaming, so a killed build continues where
it was. The VAE sees whole canvases, [reference | target] and [reference | black], because its convolutions and its
attention cross the seam. The posterior's mode is taken: nothing is sampled.

Where pairs are trained at several sizes (`buckets`), each goes through at the one nearest to its target's shape.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diptych.data.images import open_image
from diptych.data.pairs import SIDES, pair
from diptych.data.records import prompt_of
from diptych.data.sources import Pairs
from diptych.errors import UserError
from diptych.student.canvas import Canvas, condition_canvas, fit_image, join_panels, split_panels, to_pixels
from diptych.train import cached, canvases_at_once
from diptych.train.metrics import Progress, report
from diptych.train.processes import ALONE, Processes

Encode = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
IN_MEMORY = 4 * 2**30  # bytes of latents that are read once and kept; more is read row by row from the mapped files
FORMAT = 4  # raised when the files say something else
MOST_SKIPPED = 0.05  # share of unreadable pairs above which training on the rest would hide a fault
SAME_SHAPE = 0.02  # aspect ratios of an aligned pair may differ by this share: a pixel or two of rounding
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """What training knows of a pair besides its latents."""

    id: str
    grid_id: str
    caption: str
    instruction: str = ""
    bucket: int = 0  # which of the canvases it is trained on

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
        self._places: list[tuple[int, int]] = []  # file of a row, and its place among those of its bucket there
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
            seen: Counter[int] = Counter()
            for sample in found:
                self._places.append((number, seen[sample.bucket]))
                seen[sample.bucket] += 1
            size += path.stat().st_size
        self._whole: dict[str, torch.Tensor] = {}  # a tensor of every row of a bucket
        self._index: list[int] = []  # of a row in it
        if size <= IN_MEMORY:
            names = sorted({name for file in self._files for name in file.keys()})  # noqa: SIM118
            self._whole = {name: self._read(name) for name in names}
            seen = Counter()
            for sample in self.samples:
                self._index.append(seen[sample.bucket])
                seen[sample.bucket] += 1

    def __len__(self) -> int:
        return len(self.samples)

    def shape(self, row: int) -> tuple[int, int]:
        """(N, C): tokens of a row's canvas and channels of a token."""
        name = tensor_name("clean", self.samples[row].bucket)
        if self._whole:
            return tuple(self._whole[name].shape[1:])  # pyright: ignore[reportReturnType]
        return tuple(self._files[self._places[row][0]].get_slice(name).get_shape()[1:])  # pyright: ignore

    def gather(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean and condition latents of these rows of one bucket, (B, N, C) float32 each, newly allocated."""
        (bucket,) = {self.samples[row].bucket for row in rows}
        clean, condition = (self._rows(tensor_name(kind, bucket), rows) for kind in ("clean", "condition"))
        return clean.float(), condition.float()

    def _rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        if self._whole:
            return self._whole[name].index_select(0, torch.tensor([self._index[row] for row in rows]))
        places = [self._places[row] for row in rows]
        return torch.cat([self._files[number].get_slice(name)[at : at + 1] for number, at in places])

    def _read(self, name: str) -> torch.Tensor:
        return torch.cat([file.get_tensor(name) for file in self._files if name in file.keys()])  # noqa: SIM118


def tensor_name(kind: str, bucket: int) -> str:
    """What a cache file calls the `clean` or `condition` latents of a bucket."""
    return f"{kind}.{bucket}"


def panels_of(pipe: Any, latents: Latents, rows: Sequence[int], canvas: Canvas) -> list[torch.Tensor]:
    """Reference and target of rows on this canvas, (B, 3, h, w) pixels each, decoded from their latents."""
    clean, condition = (tokens.to(pipe.vae.device, pipe.vae.dtype) for tokens in latents.gather(rows))
    reference, target = split_panels(pipe.decode_canvas(clean, canvas), canvas.panels)
    return [reference if canvas.panels == 2 else pipe.decode_canvas(condition, canvas), target]


def build(
    pairs: Pairs,
    folder: Path,
    encode: Encode,
    canvases: Sequence[Canvas],
    key: str,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    aligned: bool = False,
) -> list[Path]:
    """Encodes what is not encoded yet, each process its share of the shards; the files of the cache (`Latents`).

    `key` names the VAE and the pairs; `encode` is what `canvas_encoder` gives. `aligned` is the task's geometry: a
    pixel of the reference and the same one of the target show one spot, so both are cut the same way, and a pair whose
    pictures have different shapes is left out. Else either is fitted by itself. Pairs whose pictures cannot be read are
    left out, counted and listed (`Latents.skipped`); UserError when they are more than a few, or a shard is missing.
    """
    sizes = [(canvas.panel_height, canvas.panel_width, canvas.panels) for canvas in canvases]
    name = hashlib.sha256(f"{FORMAT} {key} {sizes} {aligned}".encode()).hexdigest()[:16]
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
            if number % processes.count == processes.rank and not cached.is_whole(path):
                encode_shard(pairs.read_shard(shard), path, encode, canvases, aligned)
            done += pairs.rows_in(shard)
            report(progress, done, total, "encoding pairs")
    if skipped := _skipped(files):
        reasons = Counter(each["reason"] for each in skipped).most_common(3)
        named = "; ".join(f"{times} times {reason}" for reason, times in reasons)
        message = f"{len(skipped)} of {total} pairs cannot be used ({named}; the first is {skipped[0]['id']})"
        if len(skipped) > MOST_SKIPPED * total:
            raise UserError(f"{message}; mend those rows or make {pairs.url} again, or check the disk that holds it")
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


def encode_shard(
    rows: Sequence[dict[str, Any]], path: Path, encode: Encode, canvases: Sequence[Canvas], aligned: bool = False
) -> None:
    """Encodes one shard's rows (those that curation kept, and that are pairs) into one file."""
    samples: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    panels: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for number, given in enumerate(rows):
        if not given.get("kept", True):
            continue
        try:
            row = pair(given, number, decode=False)
            bucket, sides = _panels(row, canvases, aligned)
        except UserError as error:
            skipped.append({"id": given["id"], "reason": str(error)})
            continue
        panels.setdefault(bucket, []).append(sides)
        samples.append({key: row[key] for key in ("id", "grid_id", "caption", "instruction")} | {"bucket": bucket})
    tensors: dict[str, torch.Tensor] = {}
    for bucket, pairs in sorted(panels.items()):
        made = []
        size = canvases_at_once(canvases[bucket].height, canvases[bucket].width)
        for first in range(0, len(pairs), size):
            reference, target = (torch.stack(side) for side in zip(*pairs[first : first + size], strict=True))
            made.append(encode(reference, target))
        for kind, parts in zip(("clean", "condition"), zip(*made, strict=True), strict=True):
            tensors[tensor_name(kind, bucket)] = torch.cat(parts)
    cached.write(tensors, path, {"diptych": json.dumps({"samples": samples, "skipped": skipped})})


def _panels(
    row: dict[str, Any], canvases: Sequence[Canvas], aligned: bool
) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
    """A pair's bucket, and its reference and target as pixels of that size. UserError if it cannot be read."""
    from diffusers.training_utils import find_nearest_bucket

    reference, target = (open_image(row[side], name=side) for side in SIDES)
    shapes = reference.width * target.height, target.width * reference.height
    if aligned and abs(shapes[0] - shapes[1]) > SAME_SHAPE * max(shapes):
        sizes = " and ".join(f"{image.width}x{image.height}" for image in (reference, target))
        raise UserError(f"the task is aligned, and reference and target have different shapes ({sizes})")
    bucket: Any = find_nearest_bucket(target.height, target.width, [(c.panel_height, c.panel_width) for c in canvases])
    size = canvases[bucket].panel_height, canvases[bucket].panel_width
    return bucket, (to_pixels(fit_image(reference, *size)), to_pixels(fit_image(target, *size)))


def vae_fingerprint(pipe: Any) -> str:
    """sha256 over the VAE's weights in memory and its scaling: names what a latent means."""
    digest = hashlib.sha256(repr((pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor)).encode())
    for name, tensor in pipe.vae.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def canvas_encoder(encode_canvas: Callable[[torch.Tensor], torch.Tensor], panels: int = 2) -> Encode:
    """References and targets, (B, 3, h, w) pixels each, to packed latents on the CPU: clean and condition canvases of
    so many panels.

    `encode_canvas` is the pipeline's own, so that what training sees is what sampling will see.
    """

    def encode(reference: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            clean = encode_canvas(join_panels(reference, target, panels))
            condition = encode_canvas(condition_canvas(reference, panels))
        return clean.cpu(), condition.cpu()

    return encode


def split(samples: Sequence[Sample], held_out: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to validate on.

    All grids of a prompt are held out together, those with the lowest hash of their id, until they make `held_out`
    pairs, but never more than a fifth of all pairs; so no validation subject was trained on and the choice does not
    move with the order. Where every prompt (or reference, in other people's data) has more pairs than `held_out`, one
    whole prompt is held out; where it would be more than a fifth, single pairs are held out, and a warning says that
    their references are trained on.
    """
    most = len(samples) // 5
    wanted = min(held_out, most)
    prompts = [prompt_of(sample.grid_id) for sample in samples]
    validation = _lowest(prompts, wanted)
    if not validation and wanted:
        smallest = min(Counter(prompts).values())
        validation = _lowest(prompts, smallest) if smallest <= most else []
    if not validation and wanted:
        validation = _lowest([sample.id for sample in samples], wanted)
        log.warning(
            "%d of %d pairs are held out for validation, and training sees their references with other targets: "
            "every reference has more than %d pairs",
            len(validation),
            len(samples),
            wanted,
        )
    elif held_out and not wanted:
        log.warning("no pair is held out for validation: that takes at least 5 pairs, and there are %d", len(samples))
    held = set(validation)
    return [row for row in range(len(samples)) if row not in held], validation


def _lowest(groups: Sequence[str], wanted: int) -> list[int]:
    """The rows of whole groups, lowest hash first, up to the first that would make more than `wanted` rows; if that is
    the very first group, of those that do fit."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    found: list[int] = []
    for group in sorted(rows, key=lambda g: hashlib.sha256(f"validation {g}".encode()).digest()):
        if len(found) + len(rows[group]) <= wanted:
            found += rows[group]
        elif found:
            break
    return found
