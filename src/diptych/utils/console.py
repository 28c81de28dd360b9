"""Progress and messages for people: a bar with rate and time left, or plain lines where there is no terminal.

Progress goes to stderr and results go to stdout.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

# Control characters that a terminal interprets (C0 and C1, except line ends and tabs), and those that reverse text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
EVERY = 10.0  # seconds between plain lines
Report = Callable[..., None]  # (done, total, note="")


def printable(text: object) -> str:
    """Text of any origin without control characters, which could move the cursor of a terminal, change its title, or
    hide what follows. Line ends and tabs stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text).replace("\r\n", "\n"))


def one_line(text: object) -> str:
    """`printable` in one line: a text with a line end could imitate a line of diptych."""
    return printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}")


def printable_json(value: object, indent: int | None = None) -> str:
    """JSON that keeps letters as they are and writes control characters as JSON escapes."""
    text = json.dumps(value, default=str, ensure_ascii=False, indent=indent)
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def show(text: object, news: bool = False) -> None:
    """Prints a `printable` result to stdout, or with `news` a message to stderr."""
    print(printable(text), file=sys.stderr if news else sys.stdout, flush=news)


@dataclass
class Meter:
    """Rate and remaining time from counts, without what existed before this process started."""

    clock: Callable[[], float] = time.monotonic
    first: int | None = None
    started: float = field(default=0.0)

    def update(self, done: int, total: int) -> tuple[float, float | None]:
        """Units per second, and the seconds left or None while they are unknown."""
        if self.first is None:
            self.first, self.started = done, self.clock()
        elapsed = self.clock() - self.started
        rate = (done - self.first) / elapsed if elapsed > 0 else 0.0
        return rate, (total - done) / rate if rate > 0 else None


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:04:05`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def rate_text(rate: float, unit: str) -> str:
    """`3.1 grids/s`, or, below one per second, `2.5 s/grid`."""
    if rate <= 0:
        return ""
    one = unit[:-1] if unit.endswith("s") else unit
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{one}"


class Display:
    """Progress of stages that run one after the other. `quiet` prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and not quiet

    def say(self, text: str) -> None:
        """Prints a message in one line."""
        if not self.quiet:
            show(text, news=True)

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Report]:
        """Yields a function that shows progress: `report(done, total, note="")`."""
        if self.quiet:
            yield lambda *_, **__: None
        elif self.terminal:
            with self._bar(name, unit) as report:
                yield report
        else:
            yield self._lines(name, unit)

    @contextmanager
    def _bar(self, name: str, unit: str) -> Iterator[Report]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        meter = Meter()
        columns: tuple[Any, ...] = (
            SpinnerColumn(finished_text="✓"),
            TextColumn(f"{name:<9}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]:<16}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[news]}", markup=False),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(name, total=None, count="", news="loading")

            def report(done: int, total: int, note: str = "") -> None:
                rate, left = meter.update(done, total)
                news = [rate_text(rate, unit), f"{duration(left)} left" if left and done < total else "", note]
                count = f"{done}/{total} {unit}"
                progress.update(
                    task,
                    completed=done,
                    total=total or 1,
                    count=count,
                    news=printable(" · ".join(n for n in news if n)),
                )

            yield report

    def _lines(self, name: str, unit: str) -> Report:
        meter = Meter()
        last = [float("-inf")]

        def report(done: int, total: int, note: str = "") -> None:
            rate, left = meter.update(done, total)
            now = time.monotonic()
            if now - last[0] < EVERY and done < total:
                return
            last[0] = now
            parts = [f"{done}/{total} {unit}", rate_text(rate, unit)]
            parts += [f"{duration(left)} left" if left and done < total else "", note]
            self.say(f"{name:<9} " + " · ".join(part for part in parts if part))

        return report


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hides the loading bars of diffusers and transformers; downloads still show theirs."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as of_transformers

    with ExitStack() as stack:
        downloads_shown = not are_progress_bars_disabled()
        for library in (of_diffusers, of_transformers):
            if library.is_progress_bar_enabled():
                library.disable_progress_bar()
                stack.callback(library.enable_progress_bar)
        if downloads_shown:
            enable_progress_bars()  # transformers' switch turns these off as well
        yield
