"""Opens stock transformers vision models and their image processors for every judge.

Processors always use Pillow: torchvision resizes slightly differently, and scores must not depend on whether it is
installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import UserError, describe
from diptych.utils import models
from diptych.utils.console import quiet_bars
from diptych.utils.documents import parse_json
from diptych.utils.machine import pick_device
from diptych.utils.opening import refuse_code

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

BATCH = 32


@dataclass(frozen=True)
class Vision:
    """A model on its device, and its processor. `missing` are weights that the files lack."""

    model: Any
    processor: Any
    device: torch.device
    fingerprint: str
    missing: frozenset[str]

    def batches(self, images: Sequence[Image]) -> Iterator[torch.Tensor]:
        """Pixels (≤ BATCH, 3, H, W) of the images, in order, on the device."""
        for first in range(0, len(images), BATCH):
            batch = [image.convert("RGB") for image in images[first : first + BATCH]]
            yield self.processor(images=batch, return_tensors="pt")["pixel_values"].to(self.device)


def open_vision(name: str, role: str, auto: str, device: str) -> Vision:
    """Opens the model `name` of `role` with the transformers class `auto` in float32. UserError if that fails."""
    import torch
    import transformers

    folder = models.resolve(name, role)
    target = pick_device(device)
    with _opening(folder, role), quiet_bars():
        loader = getattr(transformers, auto)
        options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
        model, info = loader.from_pretrained(str(folder), output_loading_info=True, **options)
        processor = _processor(folder)
    model = model.eval().requires_grad_(False).to(target)
    return Vision(model, processor, target, models.fingerprint(folder), frozenset(info["missing_keys"]))


def check(name: str, role: str, auto: str) -> Any:
    """The config of the model that `open_vision` would open. UserError if it would fail or if there are no
    weights; none are read."""
    import torch
    import transformers

    folder = models.resolve(name, role)
    with _opening(folder, role), quiet_bars():
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            getattr(transformers, auto).from_config(config)
        _processor(folder)
        if not any(folder.glob("*.safetensors")):
            raise OSError("it has no *.safetensors")
    return config


@contextmanager
def _opening(folder: Path, role: str) -> Iterator[None]:
    """UserError for a folder with code, and for errors of transformers."""
    refuse_code(folder)
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        message = f"The {role} in {folder} cannot be opened as a transformers vision model ({describe(error)})."
        raise UserError("judge_invalid", message) from error


def pinned(name: str, role: str) -> dict[str, Any]:
    """What identifies a vision model and its preprocessing: name, hub revision, sha256 of its files, processor.

    The model is not opened. UserError if it does not exist.
    """
    folder = models.resolve(name, role)
    revision = folder.name if folder.parent.name == "snapshots" else None
    config = folder / "preprocessor_config.json"
    try:
        processor = parse_json(config.read_text("utf8")) if config.is_file() else None
    except ValueError as error:
        raise UserError("json_invalid", f"{config} is not valid JSON. Fetch the model again.") from error
    return {
        "name": name,
        "revision": revision,
        "fingerprint": models.fingerprint(folder),
        "preprocessing": processor,
        "backend": "pil",
    }


def refuse_missing(missing: Sequence[str], name: str) -> None:
    """UserError if weights are missing, because they would be random."""
    if missing:
        shown = ", ".join(sorted(missing)[:3]) + (", …" if len(missing) > 3 else "")
        message = f"The files of '{name}' lack {shown}, so the model would be partly random. Fetch it again."
        raise UserError("model_incomplete", message)


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, backend="pil")
