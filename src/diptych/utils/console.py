"""Progress and messages for people: a bar with rate, time left and cost, or plain lines where there is no terminal.

Progress goes to stderr and results go to stdout.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

# Control characters that a terminal interprets (C0 and C1, except line ends and tabs), and those that reverse text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
EVERY = 10.0  # seconds between plain lines in the first minutes of a stage
LATER = 60.0  # and after ten times as long
RECOUNT = 5.0  # seconds for which a cost is shown before it is counted again
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
    """Progress of stages that run one after the other. `quiet` prints nothing.

    Attributes:
        step: place of the stage in its run, such as `2/5`; shown before the names of the stages.
        cost: function that returns the cost so far, or an empty text. It is called at most every `RECOUNT` seconds.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not quiet
        self.step = ""
        self.cost: Callable[[], str] = str

    def say(self, text: str) -> None:
        """Prints a message in one line."""
        if not self.quiet:
            show(text, news=True)

    def next(self, *steps: str) -> None:
        """Prints what the user can do next, one step in each line."""
        for step in steps:
            self.say(f"next: {step}")

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Report]:
        """Yields a function that shows progress: `report(done, total, note="")`."""
        name = f"{self.step} {name}".lstrip()
        if self.quiet:
            yield lambda *_, **__: None
        elif self.terminal:
            with self._bar(name, unit) as report:
                yield report
        else:
            yield self._lines(name, unit)

    def _news(self, unit: str) -> Callable[[int, int, str], str]:
        """A function that describes progress: rate, time left, cost so far, and the stage's note."""
        meter, costed, text = Meter(time.monotonic), float("-inf"), ""

        def describe(done: int, total: int, note: str) -> str:
            nonlocal costed, text
            rate, left = meter.update(done, total)
            if (now := time.monotonic()) - costed >= RECOUNT or done >= total:
                costed, text = now, self.cost()
            left_text = f"{duration(left)} left" if left and done < total else ""
            return " · ".join(part for part in (rate_text(rate, unit), left_text, text, note) if part)

        return describe

    @contextmanager
    def _bar(self, name: str, unit: str) -> Iterator[Report]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console, describe = Console(stderr=True), self._news(unit)
        length = 30 if console.width >= 110 else 10
        columns: tuple[Any, ...] = (
            SpinnerColumn(finished_text="✓"),
            TextColumn(f"{name:<9}", markup=False),
            BarColumn(bar_width=length),
            TextColumn("{task.fields[count]:<16}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[news]}", markup=False),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=None, count="", news="loading")

            def report(done: int, total: int, note: str = "") -> None:
                count = f"{done}/{total} {unit}"
                # Spinner, elapsed time and the spaces between columns take 14 cells. What does not fit is left out:
                # a line that wraps cannot be redrawn.
                room = console.width - 14 - max(9, len(name)) - length - max(16, len(count))
                news = one_line(describe(done, total, note))
                news = news if len(news) <= room else f"{news[: max(0, room - 1)]}…"
                progress.update(task, completed=done, total=total or 1, count=count, news=news)

            yield report

    def _lines(self, name: str, unit: str) -> Report:
        describe, began, last = self._news(unit), time.monotonic(), float("-inf")

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            wait = EVERY if now - began < 10 * LATER else LATER
            if now - last < wait and done < total:
                return
            last = now
            news = one_line(describe(done, total, note))
            self.say(f"{name:<9} {done}/{total} {unit}" + (f" · {news}" if news else ""))

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
