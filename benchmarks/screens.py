"""Precision and recall of the screens that come from PyPI: writing by RapidOCR, nudity by NudeNet.

    python benchmarks/screens.py [--count 120] [--seed 2026] [--out FILE]      # five minutes on one thread

It needs `pip install 'diptych[screens]'` and fonts in /usr/share/fonts/truetype (Debian: fonts-dejavu-core,
fonts-liberation). Panels are renders of the pocket world and drawn panels (`canvases.py`), half of each kind, at 256,
512 and 1024 pixels. Each is scored as it is, and again with one or two words in a random font, color, place and angle.
The height of a letter is 3 % to 15 % of the panel. Words have a contrast of at least 60 levels to what they cover.

Writing: a panel with words should score above the limit, a clean one below. Nudity: no panel shows any, so every score
above the limit is a false alarm; recall cannot be measured without images of nudity, which are not part of this
repository.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import time
from pathlib import Path
from typing import Any

import canvases
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diptych.judges.detectors import DETECTORS, score
from diptych.pocket import world
from diptych.pocket.render import render
from diptych.utils.machine import machine, versions

RESULTS = Path(__file__).with_name("results")
FONTS = Path("/usr/share/fonts/truetype")
SIZES = (256, 512, 1024)
LIMITS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
LETTERS = (0.03, 0.05, 0.08, 0.15)  # bounds of the classes of letter heights, as shares of a panel
CONTRAST = 60  # levels of 255
WORDS = (
    *("OPEN", "SALE", "BAKERY", "HOTEL", "Coffee", "Tea", "STOP", "EXIT", "Milk", "Fresh", "Bread", "Taxi", "POLICE"),
    *("School", "Garden", "Books", "Music", "Winter", "Summer", "Paris", "Tokyo", "2024", "No.7", "Route", "66"),
    *("Copyright", "Studio", "Happy", "Birthday", "WELCOME", "Danger", "Fire", "North", "Harbor", "Station"),
)


def panel(rng: np.random.Generator, kind: str, size: int) -> Image.Image:
    """A panel without writing."""
    if kind == "pocket":
        identity = world.sample_identity(rng)
        return Image.fromarray(render(identity, world.sample_scene(rng), size))
    canvas = canvases.make(int(rng.integers(2**31)), int(rng.integers(3)), "plain", size, (1, 2))
    return canvas.image.convert("RGB").crop(canvas.boxes[0])


def write(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
    """The panel with one or two words, and what was written: text, font, letter height as a share, angle."""
    fonts = sorted(path for path in FONTS.rglob("*.ttf") if "Math" not in path.name)
    side = min(image.size)
    while True:
        height = float(rng.uniform(LETTERS[0], LETTERS[-1]))
        text = " ".join(str(rng.choice(WORDS)) for _ in range(int(rng.integers(1, 3))))
        path = fonts[int(rng.integers(len(fonts)))]
        font = ImageFont.truetype(str(path), max(6, round(height * side / 0.72)))  # a capital is 0.72 of the size
        left, top, right, bottom = font.getbbox(text)
        mask = Image.new("L", (round(right - left) + 4, round(bottom - top) + 4))
        ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=font)
        angle = float(rng.choice([0.0, 0.0, float(rng.uniform(-20, 20))]))
        mask = mask.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)
        if mask.width > image.width or mask.height > image.height:
            continue
        x = int(rng.integers(image.width - mask.width + 1))
        y = int(rng.integers(image.height - mask.height + 1))
        under = np.asarray(image.crop((x, y, x + mask.width, y + mask.height)).convert("L"))
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        gray = float(np.dot(color, (0.299, 0.587, 0.114)))
        if abs(gray - float(np.median(under))) < CONTRAST:
            continue
        written = image.copy()
        written.paste(color, (x, y), mask)
        return written, {"text": text, "font": path.stem, "letters": round(height, 3), "angle": round(angle, 1)}


def run(count: int, seed: int, out: Path | None) -> dict[str, Any]:
    """Scores `count` panels of each size without and with words; writes and returns the result."""
    reads = DETECTORS["rapidocr"].open("writing", 1)
    looks = DETECTORS["nudenet"].open("nudity", 1)
    rows: list[dict[str, Any]] = []
    seconds: dict[str, dict[int, float]] = {name: dict.fromkeys(SIZES, 0.0) for name in ("rapidocr", "nudenet")}
    for size in SIZES:
        for number in range(count):
            rng = np.random.default_rng([seed, size, number])
            kind = "pocket" if number % 2 else "drawn"
            clean = panel(rng, kind, size)
            written, about = write(rng, clean)
            started = time.perf_counter()
            row = {"size": size, "number": number, "kind": kind, "clean": score(reads, clean)}
            seconds["rapidocr"][size] += time.perf_counter() - started
            started = time.perf_counter()
            row["nudity"] = score(looks, clean)
            seconds["nudenet"][size] += time.perf_counter() - started
            rows.append(row | {"written": score(reads, written), **about})
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "packages": packages(),
        "count": count,
        "seed": seed,
        "writing": {str(limit): rates(rows, limit) for limit in LIMITS},
        "writing_at_0.5_by_size": {str(size): rates([r for r in rows if r["size"] == size], 0.5) for size in SIZES},
        "writing_at_0.5_by_kind": {k: rates([r for r in rows if r["kind"] == k], 0.5) for k in ("drawn", "pocket")},
        "recall_at_0.5_by_letters": by_letters(rows, 0.5),
        "nudity": {str(limit): sum(row["nudity"] > limit for row in rows) for limit in (0.0, 0.3, 0.5)},
        "panels": len(rows),
        "seconds_per_panel": {
            name: {str(size): round(value / count, 3) for size, value in each.items()} for name, each in seconds.items()
        },
        "false_alarms": [row for row in rows if row["clean"] > 0.5],
        "missed": [row for row in rows if row["written"] <= 0.5],
    }
    path = out or RESULTS / f"screens-cpu-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf8")
    return result


def rates(rows: list[dict[str, Any]], limit: float) -> dict[str, float | int]:
    """Precision and recall of `score > limit`, over as many written panels as clean ones."""
    found = sum(row["written"] > limit for row in rows)
    false = sum(row["clean"] > limit for row in rows)
    precision = round(found / (found + false), 4) if found + false else 1.0
    return {"recall": round(found / len(rows), 4), "precision": precision, "false_alarms": false, "of": len(rows)}


def by_letters(rows: list[dict[str, Any]], limit: float) -> dict[str, str]:
    """Recall by the height of the letters."""
    result = {}
    for low, high in itertools.pairwise(LETTERS):
        some = [row for row in rows if low <= row["letters"] < high or row["letters"] == high == LETTERS[-1]]
        result[f"{low:.0%} to {high:.0%}"] = f"{sum(row['written'] > limit for row in some)} of {len(some)}"
    return result


def packages() -> dict[str, str]:
    """Versions of the packages with the weights."""
    from importlib.metadata import version

    return {name: version(name) for name in ("rapidocr", "nudenet", "onnxruntime", "opencv-python-headless")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = run(given.count, given.seed, given.out)
    shown = {
        key: value for key, value in result.items() if key not in ("false_alarms", "missed", "versions", "machine")
    }
    print(json.dumps(shown, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
