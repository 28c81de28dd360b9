"""Detectors that come with their weights from PyPI, for screens that need no download: RapidOCR and NudeNet.

    pip install 'diptych[screens]'

A recipe names them like a classifier: `{name: text, model: rapidocr, label: writing}` and
`{name: nudity, model: nudenet, label: nudity}`. They run on the CPU, with as many threads as torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.errors import UsageError
from diptych.utils.io import sha256_file, sha256_json

if TYPE_CHECKING:
    from PIL.Image import Image

EXTRA = "pip install 'diptych[screens]'"
WRITING = "writing"
SIDE = 512  # pixels: larger images are reduced to it, because letters that fill an image of 1024 are missed
LETTERS = 2  # letters and digits that a line must have besides round ones, because an eye is read as O, two as 00
ROUND = "oO08"
NUDITY = "nudity"
EXPOSED = (
    "ANUS_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)  # what `nudity` stands for
OTHERS = (
    "ANUS_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "BELLY_COVERED",
    "BELLY_EXPOSED",
    "BUTTOCKS_COVERED",
    "FACE_FEMALE",
    "FACE_MALE",
    "FEET_COVERED",
    "FEET_EXPOSED",
    "FEMALE_BREAST_COVERED",
    "FEMALE_GENITALIA_COVERED",
    "MALE_BREAST_EXPOSED",
)
Measure = Callable[[np.ndarray], float]  # pixels (H, W, 3), uint8, BGR → a score, 0 to 1


@dataclass(frozen=True)
class Detector:
    """A package with weights, and the labels that it can look for."""

    package: str
    labels: tuple[str, ...]
    open: Callable[[str, int], Measure]
    """(label, threads) → the measure of one image."""

    def folder(self) -> Path:
        """The package's folder. UsageError if it is not installed."""
        found, *needed = (find_spec(name) for name in (self.package, "onnxruntime", "cv2"))
        if found is None or found.origin is None or None in needed:
            raise UsageError("dependency_missing", f"The screen {self.package} is not installed. Run: {EXTRA}")
        return Path(found.origin).parent

    def fingerprint(self) -> str:
        """sha256 of the names and contents of the package's weights. UsageError if it is not installed."""
        folder = self.folder()
        weights = sorted(folder.rglob("*.onnx"))
        return sha256_json([[path.relative_to(folder).as_posix(), sha256_file(path)] for path in weights])


def score(measure: Measure, image: Image) -> float:
    """The score of an image."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return measure(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))


def _writing(label: str, threads: int) -> Measure:
    """The confidence of the most certain line that was read, among those with at least `LETTERS` letters and digits
    that are not round."""
    from rapidocr import RapidOCR  # pyright: ignore[reportMissingImports]

    settings = {
        "Global.log_level": "critical",
        "Global.text_score": 0.0,
        "Global.use_cls": False,  # lines that stand on their head count as writing too
        "Det.limit_side_len": SIDE,
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
    }
    reader = RapidOCR(params=settings)

    def measure(pixels: np.ndarray) -> float:
        result: Any = reader(pixels)
        lines = zip(result.txts or (), result.scores or (), strict=True)
        return max((float(sure) for text, sure in lines if _letters(text) >= LETTERS), default=0.0)

    return measure


def _letters(text: str) -> int:
    return sum(letter.isalnum() and letter not in ROUND for letter in text)


def _nudity(label: str, threads: int) -> Measure:
    """The confidence of the most certain detection with the label; 0 below 0.25, NudeNet's own limit."""
    import onnxruntime  # pyright: ignore[reportMissingImports]
    from nudenet import NudeDetector  # pyright: ignore[reportMissingImports]

    wanted = EXPOSED if label == NUDITY else (label,)
    detector = NudeDetector()
    # Its own session uses every core of the machine, also in each of many workers.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    weights = NUDENET.folder() / "320n.onnx"
    detector.onnx_session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])

    def measure(pixels: np.ndarray) -> float:
        found: Sequence[Mapping[str, Any]] = detector.detect(pixels)
        return max((float(each["score"]) for each in found if each["class"] in wanted), default=0.0)

    return measure


RAPIDOCR = Detector("rapidocr", (WRITING,), _writing)
NUDENET = Detector("nudenet", (NUDITY, *EXPOSED, *OTHERS), _nudity)
DETECTORS = {each.package: each for each in (RAPIDOCR, NUDENET)}
