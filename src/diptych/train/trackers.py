"""Metrics for those who watch elsewhere: TensorBoard, Weights & Biases, trackio, through accelerate's trackers.

`metrics.jsonl` is the record; these only mirror it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from diptych.errors import UsageError


class Trackers:
    """The trackers a recipe names, each told every line of the metrics once."""

    def __init__(self, names: Sequence[str], folder: Path, run: str, settings: dict[str, Any]) -> None:
        """Opens them; files go to `folder`. Raises UsageError for one whose package is not installed."""
        self._open = [_start(name, folder, run) for name in names]
        for tracker in self._open:
            tracker.store_init_configuration({key: _plain(value) for key, value in settings.items()})

    def log(self, line: dict[str, Any]) -> None:
        """A line of the metrics; `line["step"]` says when."""
        values = flat({key: value for key, value in line.items() if key != "step"})
        for tracker in self._open:
            tracker.log(values, step=line["step"])

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            for tracker in self._open:
                if tracker.name == "trackio":
                    import trackio  # pyright: ignore[reportMissingImports]

                    trackio.finish()  # accelerate ends the run alone, and trackio would end it again as Python exits
                else:
                    tracker.finish()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under names with slashes: `validation/right/0.5`."""
    found: dict[str, float] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


# Any of these packages does; the first is the one to install.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def check(names: Sequence[str]) -> None:
    """UsageError for a tracker whose package is not installed. Imports nothing heavy."""
    for name in names:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise _missing(name)


def _missing(name: str) -> UsageError:
    return UsageError(f"distill.trackers: {name} is not installed; pip install {name}, or leave it out")


def _start(name: str, folder: Path, run: str) -> Any:
    from accelerate import tracking
    from accelerate.state import PartialState

    try:
        if name == "tensorboard":
            tracker = tracking.TensorBoardTracker(run, logging_dir=folder)
        elif name == "trackio":
            # One run, in which a training that is continued goes on; nothing but what the training says.
            quiet = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
            tracker = tracking.TrackioTracker(run, name=run, resume="allow", **quiet)
        else:
            tracker = tracking.WandBTracker(run)
        PartialState()  # what the trackers ask which process they are in
        with redirect_stdout(sys.stderr):  # some greet, and stdout is for results
            tracker.start()
    except ImportError as error:
        raise _missing(name) from error
    return tracker


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
