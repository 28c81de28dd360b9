"""`metrics.jsonl`, one line a step and each step once; progress; and the guard that stops a run that went wrong."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import statistics
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from diptych.errors import UsageError, UserError
from diptych.utils.io import write_atomic
from diptych.utils.paths import refuse_special

METRICS = "metrics.jsonl"
log = logging.getLogger(__name__)


class Watcher(Protocol):
    """A progress bar, a log, a test: anything with `update`."""

    def update(self, step: int, total: int, text: str) -> Any: ...


Progress = Watcher | Callable[[int, int, str], Any]  # or just a function (`console.Report`)


def report(progress: Progress | None, step: int, total: int, text: str) -> None:
    """Tells `progress`, if there is one."""
    if progress is not None:
        tell = progress if callable(progress) else progress.update
        tell(step, total, text)


class Metrics:
    """The log file of a run. Opening it at step s drops every line after s: a resumed run writes them again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.lines = [line for line in read(path) if line["step"] <= step]
        write_atomic(path, "".join(_dump(line) for line in self.lines).encode())
        self._stream = path.open("a", encoding="utf8")

    def of(self, step: int) -> dict[str, Any] | None:
        """The line of a step, if it was there when the file was opened."""
        return self.lines[-1] if self.lines and self.lines[-1]["step"] == step else None

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line, at once; `line` has a `step`."""
        try:
            self._stream.write(_dump(line))
            self._stream.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def sync(self) -> None:
        """Forces what was written to the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out. Empty if there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in refuse_special(path).read_text("utf8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


class Guard:
    """Stops training before a bad step reaches the weights: at once when not finite, else after `patience` spikes."""

    def __init__(
        self, recent: list[float], spikes: int = 0, window: int = 50, factor: float = 5.0, patience: int = 3
    ) -> None:
        """`recent` are the last losses, and `spikes` how many of them in a row were too large, at the end."""
        self.recent = deque(recent, maxlen=window)
        self.spikes = spikes
        self._factor, self._patience = factor, patience

    def check(self, step: int, loss: float, grad_norm: float, advice: str) -> None:
        """Raises UserError when this step must not be taken."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(f"step {step}: the loss is {loss} and the gradient's norm {grad_norm}; {advice}")
        usual = statistics.median(self.recent) if len(self.recent) >= 20 else math.inf
        self.spikes = self.spikes + 1 if loss > self._factor * usual else 0
        if self.spikes >= self._patience:
            raise UserError(
                f"step {step}: the loss is {loss:.3g}, for {self._patience} steps in a row more than "
                f"{self._factor:g} times its usual {usual:.3g}; {advice}"
            )
        self.recent.append(loss)


# Metrics for those who watch elsewhere: TensorBoard, Weights & Biases, trackio, through accelerate's trackers.
# `metrics.jsonl` is the record; these only mirror it.


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
