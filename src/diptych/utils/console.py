"""What a person sees while work goes on: a bar with rate and time left, or plain lines where there is no terminal.

Everything goes to stderr; stdout belongs to results.
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

# What a terminal obeys (control characters, C1 among them, but for line ends and tabs) or what turns text around.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
EVERY = 10.0  # seconds between plain lines
Report = Callable[..., None]  # (done, total, note="")


def printable(text: object) -> str:
    """Text of any origin with nothing in it that a terminal would obey: escape sequences would move its cursor, change
    its title or hide what follows. Line ends and tabs stay."""
    return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", str(text).replace("\r\n", "\n"))


def one_line(text: object) -> str:
    """The same in one line: a text with a line end in it could pass for a line of ours."""
    return printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}")


def printable_json(value: object, indent: int | None = None) -> str:
    """JSON with its letters as they are, and with everything a terminal would obey as an escape of JSON's."""
    text = json.dumps(value, default=str, ensure_ascii=False, indent=indent)
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def show(text: object, news: bool = False) -> None:
    """Prints a result to stdout, or `news` to stderr, as `printable` has it."""
    print(printable(text), file=sys.stderr if news else sys.stdout, flush=news)


@dataclass
class Meter:
    """Rate and time left from counts, leaving out what was there before this process began."""

    clock: Callable[[], float] = time.monotonic
    first: int | None = None
    started: float = field(default=0.0)

    def update(self, done: int, total: int) -> tuple[float, float | None]:
        """Units a second, and seconds left or None while nothing can be said."""
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
    """`3.1 grids/s`, or, below one a second, `2.5 s/grid`."""
    if rate <= 0:
        return ""
    one = unit[:-1] if unit.endswith("s") else unit
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{one}"


class Display:
    """Progress of several stages, one after the other. `quiet` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and not quiet

    def say(self, text: str) -> None:
        """One line of news."""
        if not self.quiet:
            show(text, news=True)

    @contextmanager
    def stage(self, name: str, unit: str) -> Iterator[Report]:
        """A function to call as `report(done, total, note="")`, as often as it pleases."""
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
    """Keeps the loading bars of diffusers and transformers off the terminal; downloads still show theirs."""
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
