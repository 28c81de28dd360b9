"""`metrics.jsonl` with one line for each step, progress, trackers, and the guard that stops a diverged training."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import statistics
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from diptych.errors import UsageError, UserError
from diptych.utils.io import write_atomic
from diptych.utils.paths import refuse_special

METRICS = "metrics.jsonl"
log = logging.getLogger(__name__)


class Watcher(Protocol):
    """An object with `update`, such as a progress bar."""

    def update(self, step: int, total: int, text: str) -> Any: ...


Progress = Watcher | Callable[[int, int, str], Any]  # an object, or a function (`console.Report`)


def report(progress: Progress | None, step: int, total: int, text: str) -> None:
    """Calls `progress`, if it is not None."""
    if progress is not None:
        update = progress if callable(progress) else progress.update
        update(step, total, text)


class Metrics:
    """The metrics file of a run. Opening it at step s drops every line after s, which a resumed run writes again."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.lines = [line for line in read(path) if line["step"] <= step]
        write_atomic(path, "".join(_dump(line) for line in self.lines).encode())
        self._stream = path.open("a", encoding="utf8")

    def of(self, step: int) -> dict[str, Any] | None:
        """The line of a step, if it is the last one of the file when it was opened."""
        return self.lines[-1] if self.lines and self.lines[-1]["step"] == step else None

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line, which has a `step`, and flushes it."""
        try:
            self._stream.write(_dump(line))
            self._stream.flush()
        except OSError as error:
            raise UserError("path_unwritable", f"Cannot write {self.path}: {error.strerror or error}.") from error

    def sync(self) -> None:
        """Forces the lines to the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last line that a kill truncated. Empty if there is no file."""
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


MIN_INFLUENCE = 0.01  # a student with less uses its reference hardly, or not at all


def reference_warning(validation: Mapping[str, Any] | None) -> str | None:
    """The warning for a student that ignores its reference (`reference_influence` of its validation is below
    `MIN_INFLUENCE`). None for other students, and without the figure."""
    influence = (validation or {}).get("reference_influence")
    if influence is None or influence >= MIN_INFLUENCE:
        return None
    return (
        f"The student ignores its reference: with references swapped among the held-out pairs, its loss changes by "
        f"{influence:+.2%} (expected: at least {MIN_INFLUENCE:+.0%}). Check that reference and target of a pair show "
        "the same subject (diptych data audit), that the captions do not describe the subject completely, and that "
        "distill.reference_dropout is low; then train for more steps or with a higher distill.learning_rate."
    )


class LossGuard:
    """Stops training before a bad step changes the weights: immediately for a loss that is not finite, otherwise after
    `patience` spikes."""

    def __init__(
        self, recent: list[float], spikes: int = 0, window: int = 50, factor: float = 5.0, patience: int = 3
    ) -> None:
        """`recent` are the last losses, and `spikes` is the number of spikes at their end."""
        self.recent = deque(recent, maxlen=window)
        self.spikes = spikes
        self._factor, self._patience = factor, patience

    def check(self, step: int, loss: float, grad_norm: float, advice: str) -> None:
        """UserError, with `advice`, if this step must not be taken."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                "training_diverged",
                f"Step {step}: the loss is {loss} and the norm of the gradient is {grad_norm}. {advice}",
            )
        usual = statistics.median(self.recent) if len(self.recent) >= 20 else math.inf
        self.spikes = self.spikes + 1 if loss > self._factor * usual else 0
        if self.spikes >= self._patience:
            raise UserError(
                "training_diverged",
                f"Step {step}: the loss is {loss:.3g}. For {self._patience} steps in a row it is more than "
                f"{self._factor:g} times its median of {usual:.3g}. {advice}",
            )
        self.recent.append(loss)


# Metrics in other programs: TensorBoard, Weights & Biases, trackio, through accelerate's trackers. They mirror
# `metrics.jsonl`, which is the record.


class Trackers:
    """The trackers that a recipe names. Each gets every line of the metrics once."""

    def __init__(self, names: Sequence[str], folder: Path, run: str, settings: dict[str, Any]) -> None:
        """Opens the trackers, whose files go to `folder`. UsageError for one whose package is not installed."""
        self._open = [_start(name, folder, run) for name in names]
        for tracker in self._open:
            tracker.store_init_configuration(
                {key: v if isinstance(v, (bool, int, float, str)) else str(v) for key, v in settings.items()}
            )

    def log(self, line: dict[str, Any]) -> None:
        """Logs a line of the metrics at its `step`."""
        values = flat({key: value for key, value in line.items() if key != "step"})
        for tracker in self._open:
            tracker.log(values, step=line["step"])

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            for tracker in self._open:
                if tracker.name == "trackio":
                    import trackio  # pyright: ignore[reportMissingImports]

                    trackio.finish()  # accelerate ends only the run, and trackio would end it again at exit
                else:
                    tracker.finish()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under names with slashes: `validation/right/0.5`."""
    named: dict[str, float] = {}
    for key, value in values.items():
        named |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return named


# Each tracker needs one of these packages.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def check(names: Sequence[str]) -> None:
    """UsageError for a tracker whose package is not installed. Imports nothing heavy."""
    for name in names:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise _missing(name)


def _missing(name: str) -> UsageError:
    return UsageError(
        "dependency_missing", f"distill.trackers: {name} is not installed. Run pip install {name}, or leave it out."
    )


def _start(name: str, folder: Path, run: str) -> Any:
    from accelerate import tracking
    from accelerate.state import PartialState

    try:
        if name == "tensorboard":
            tracker = tracking.TensorBoardTracker(run, logging_dir=folder)
        elif name == "trackio":
            # A resumed training continues the run, and only its metrics are logged.
            quiet = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
            tracker = tracking.TrackioTracker(run, name=run, resume="allow", **quiet)
        else:
            tracker = tracking.WandBTracker(run)
        PartialState()  # the trackers read the process's rank from it
        with redirect_stdout(sys.stderr):  # some print a greeting, and stdout is for results
            tracker.start()
    except ImportError as error:
        raise _missing(name) from error
    return tracker
