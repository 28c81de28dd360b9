"""`metrics.jsonl`, one line a step and each step once; progress; and the guard that stops a run that went wrong."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from diptych.data.store import write_atomic
from diptych.errors import UserError
from diptych.utils.paths import refuse_special

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
