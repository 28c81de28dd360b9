"""The latents of the pairs, which training computes only once.

The VAE encodes every pair once, before training, into one safetensors file for each shard of the pairs. The folder's
name depends on the VAE, the panel size and the pairs, so that a cache is never used for other data. Files are published
by renaming, so a killed build resumes. Each has a hash of its contents, so that a damaged or swapped file is detected
when training starts, and made again. The VAE encodes complete canvases, [reference | target] and [reference | black],
because its convolutions and its attention cross the seam. It takes the posterior's mode; nothing is sampled. With
several sizes (`schedule.Bucket`), each pair is encoded at the size nearest to its target's shape.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from diptych.data.images import open_image
from diptych.data.pairs import SIDES, pair
from diptych.data.sources import Pairs
from diptych.errors import UserError
from diptych.student.canvas import Canvas, condition_canvas, fit_image, join_panels, split_panels, to_pixels
from diptych.train import canvases_at_once
from diptych.train.metrics import Progress, report
from diptych.train.processes import ALONE, Processes
from diptych.utils.io import publish, sha256

HASH = "sha256"  # key of the hash in a file's header
log = logging.getLogger(__name__)


def write(tensors: dict[str, torch.Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Writes a file of a cache, with the hash of its header, tensors and name in its header. UserError if it cannot be
    written."""
    header = header or {}
    write_tensors(tensors, path, header | {HASH: _digest(path, header, tensors)})


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Writes a safetensors file completely or not at all. UserError if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with publish(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=header)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            "path_unwritable", f"Cannot write {path}: {reason}. Free some space, then run the same command again."
        ) from error


def is_whole(path: Path) -> bool:
    """Whether `write` made this file at this path. Warns if it is damaged or swapped.

    A process reads each version of a file only once.
    """
    from safetensors import SafetensorError

    if not path.exists():
        return False
    stat = path.stat()
    try:
        _check(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
    except (OSError, SafetensorError, ValueError) as error:
        log.warning("%s is damaged (%s). It is made again.", path, error)
        return False
    return True


@lru_cache(maxsize=100_000)
def _check(path: Path, state: tuple[int, ...]) -> None:
    """ValueError if a file's hash differs from that of its contents. `state` distinguishes its versions."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:  # compares the lengths in the header with the file's
        header = dict(file.metadata() or {})
        stored = header.pop(HASH, "")
        names = file.keys()
        if stored != _digest(path, header, {name: file.get_tensor(name) for name in names}):
            raise ValueError("its sha256 differs")


def _digest(path: Path, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of a file's header, tensors and name, so that swapped files are detected too."""
    digest = hashlib.sha256(json.dumps([path.parent.name, path.name, sorted(header.items())]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


Encode = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
LATENTS_IN_MEMORY = 4 * 2**30  # bytes; more latents are read row by row from the mapped files
FORMAT = 4  # increase it when the contents of the files change
MOST_SKIPPED = 0.05  # share of unreadable pairs above which training on the others would hide a fault
SAME_SHAPE = 0.02  # allowed relative difference of an aligned pair's aspect ratios: one or two pixels of rounding


@dataclass(frozen=True)
class CachedPair:
    """The texts and the bucket of a pair, beside its latents."""

    id: str
    grid_id: str
    caption: str
    instruction: str = ""
    bucket: int = 0  # index of the canvas that it is trained on

    def text(self, instruct: bool) -> str:
        """The instruction if it is requested and there is one, otherwise the caption."""
        return self.instruction if instruct and self.instruction else self.caption


class Latents:
    """Packed latents of all pairs by row number. `samples[i]` belongs to `gather([i])`."""

    def __init__(self, *sources: Sequence[Path]) -> None:
        """`sources` are the files of each data set. With several, the ids of samples begin with the set's number."""
        from safetensors import safe_open

        files = [file for source in sources for file in source]
        owners = [number for number, source in enumerate(sources) for _ in source]
        self.counts = [0] * len(sources)
        self.samples: list[CachedPair] = []
        self.skipped: list[dict[str, str]] = []
        self._places: list[tuple[int, int]] = []  # (file of a row, its index among that file's rows of its bucket)
        self._files = [safe_open(path, "pt") for path in files]
        size = 0
        for number, (path, file) in enumerate(zip(files, self._files, strict=True)):
            header = _header(file)
            owner = owners[number]
            prefix = f"{owner}/" if len(sources) > 1 else ""
            samples = [CachedPair(**sample) for sample in header["samples"]]
            self.samples += [replace(s, id=prefix + s.id, grid_id=prefix + s.grid_id) for s in samples]
            self.counts[owner] += len(samples)
            self.skipped += header["skipped"]
            seen: Counter[int] = Counter()
            for sample in samples:
                self._places.append((number, seen[sample.bucket]))
                seen[sample.bucket] += 1
            size += path.stat().st_size
        self._whole: dict[str, torch.Tensor] = {}  # tensors with all rows of a bucket
        self._index: list[int] = []  # index of a row in them
        if size <= LATENTS_IN_MEMORY:
            names = sorted({name for file in self._files for name in file.keys()})  # noqa: SIM118
            self._whole = {name: self._read(name) for name in names}
            seen = Counter()
            for sample in self.samples:
                self._index.append(seen[sample.bucket])
                seen[sample.bucket] += 1

    def __len__(self) -> int:
        return len(self.samples)

    def shape(self, row: int) -> tuple[int, int]:
        """(N, C): number of tokens and of channels of a row's canvas."""
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
    """The name of a bucket's `clean` or `condition` latents in a cache file."""
    return f"{kind}.{bucket}"


def panels_of(pipe: Any, latents: Latents, rows: Sequence[int], canvas: Canvas) -> list[torch.Tensor]:
    """References and targets of rows on this canvas, pixels (B, 3, h, w) each, decoded from their latents."""
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
    """Encodes the missing pairs, each process its share of the shards. Returns the files of the cache, for `Latents`.

    Pairs whose images cannot be read are left out, counted and listed (`Latents.skipped`). UserError if they are more
    than a few, or if a shard is missing.

    Args:
        encode: a function of `canvas_encoder`.
        key: identifies the VAE and the pairs.
        aligned: whether equal pixels of reference and target show the same point (the task's geometry). Both are then
            cropped the same way, and a pair of images with different shapes is left out. Otherwise each is fitted
            separately.
    """
    sizes = [(canvas.panel_height, canvas.panel_width, canvas.panels) for canvas in canvases]
    name = sha256(f"{FORMAT} {key} {sizes} {aligned}")[:16]
    folder = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "path_unwritable", f"Cannot create the latent cache {folder}: {error.strerror or error}."
        ) from error
    shards = pairs.shards()
    total = sum(pairs.rows_in(shard) for shard in shards)
    done, files = 0, []
    with processes.together():
        for number, shard in enumerate(shards):
            path = folder / f"part-{shard:05d}.safetensors"
            files.append(path)
            if number % processes.count == processes.rank and not is_whole(path):
                encode_shard(pairs.read_shard(shard), path, encode, canvases, aligned)
            done += pairs.rows_in(shard)
            report(progress, done, total, "encoding pairs")
    if skipped := _skipped(files):
        reasons = Counter(each["reason"] for each in skipped).most_common(3)
        listed = "; ".join(f"{times} times {reason}" for reason, times in reasons)
        message = f"{len(skipped)} of {total} pairs cannot be used ({listed}; the first is {skipped[0]['id']})"
        if len(skipped) > MOST_SKIPPED * total:
            raise UserError("rows_failed", f"{message}. Correct these rows, make {pairs.url} again, or check its disk.")
        log.warning("%s. They are left out and listed in the summary.", message)
    return files


def _header(file: Any) -> dict[str, Any]:
    """The pairs of an open cache file: `samples` and `skipped`."""
    return json.loads(file.metadata()["diptych"])


def _skipped(files: Sequence[Path]) -> list[dict[str, str]]:
    """The pairs that were left out of these files, from their headers alone."""
    from safetensors import safe_open

    skipped: list[dict[str, str]] = []
    for path in files:
        with safe_open(path, "pt") as file:
            skipped += _header(file)["skipped"]
    return skipped


def encode_shard(
    rows: Sequence[dict[str, Any]], path: Path, encode: Encode, canvases: Sequence[Canvas], aligned: bool = False
) -> None:
    """Encodes one shard's rows into one file, except rejected and invalid pairs."""
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
    write(tensors, path, {"diptych": json.dumps({"samples": samples, "skipped": skipped})})


def _panels(
    row: dict[str, Any], canvases: Sequence[Canvas], aligned: bool
) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
    """A pair's bucket, and its reference and target as pixels of that size. UserError if an image cannot be read."""
    from diffusers.training_utils import find_nearest_bucket

    reference, target = (open_image(row[side], name=side) for side in SIDES)
    shapes = reference.width * target.height, target.width * reference.height
    if aligned and abs(shapes[0] - shapes[1]) > SAME_SHAPE * max(shapes):
        sizes = " and ".join(f"{image.width}x{image.height}" for image in (reference, target))
        raise UserError("row_invalid", f"the task is aligned, and reference and target have different shapes ({sizes})")
    bucket: Any = find_nearest_bucket(target.height, target.width, [(c.panel_height, c.panel_width) for c in canvases])
    size = canvases[bucket].panel_height, canvases[bucket].panel_width
    return bucket, (to_pixels(fit_image(reference, *size)), to_pixels(fit_image(target, *size)))


def vae_fingerprint(pipe: Any) -> str:
    """sha256 of the VAE's weights in memory and its scaling, which define the latents."""
    config = pipe.vae.config
    scales = [config.get(name) for name in ("scaling_factor", "shift_factor")]
    scales += [config[name] for name in ("latents_mean", "latents_std", "batch_norm_eps") if config.get(name)]
    digest = hashlib.sha256(repr(tuple(scales)).encode())
    for name, tensor in pipe.vae.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def canvas_encoder(encode_canvas: Callable[[torch.Tensor], torch.Tensor], panels: int = 2) -> Encode:
    """A function from references and targets, pixels (B, 3, h, w) each, to packed latents on the CPU: clean and
    condition canvases with this number of panels.

    `encode_canvas` is the pipeline's, so that training and sampling have the same latents.
    """

    def encode(reference: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            clean = encode_canvas(join_panels(reference, target, panels))
            condition = encode_canvas(condition_canvas(reference, panels))
        return clean.cpu(), condition.cpu()

    return encode
