"""A recipe with everything that its cost depends on, and the book of what was assumed along the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from diptych.recipe.schema import Recipe
from diptych.recipe.tasks import Grid, Task
from diptych.run.plan import arithmetic
from diptych.run.plan.assumptions import Assumption
from diptych.run.plan.measured import Measured
from diptych.run.plan.teacher import Counts, Teacher


@dataclass
class Book:
    """The assumptions, and which of them a plan has used."""

    known: dict[str, Assumption]
    used: dict[str, Assumption] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        value = self.maybe(name)
        assert value is not None, name
        return value

    def maybe(self, name: str) -> float | None:
        """An assumption that may have no value."""
        self.used[name] = self.known[name]
        return self.known[name].value

    def derived(self, name: str, value: float) -> float:
        """An assumption, or, where nobody said or measured one, what follows from others."""
        one = self.known[name]
        self.used[name] = one = replace(one, value=value) if one.value is None else one
        assert one.value is not None
        return one.value

    def measure(self, found: Mapping[str, Measured]) -> None:
        """Measured values replace defaults."""
        for name, one in found.items():
            if self.known[name].of == "default":
                new = replace(self.known[name], value=one.value, source=one.source, low=None, high=None)
                self.known[name] = replace(new, of="measured")

    def was_set(self, *names: str) -> bool:
        """Whether somebody chose one of these."""
        return any(self.known[name].of == "set" for name in names)


@dataclass(frozen=True)
class Job:
    """A recipe with everything that its cost depends on."""

    recipe: Recipe
    task: Task
    teacher: Teacher
    counts: Counts
    book: Book
    on_cpu: bool

    @cached_property
    def layout(self) -> Grid:
        return self.task.layout(self.recipe.write.layout)

    @cached_property
    def size(self) -> int:
        """Pixels of a panel's side."""
        return self.teacher.panel(self.recipe.paint.panel_size)

    @property
    def grids(self) -> int:
        return self.recipe.write.count * self.recipe.paint.images

    @property
    def pairs(self) -> int:
        """Every two panels, in whichever order."""
        return self.grids * math.comb(self.layout.panels, 2)

    @property
    def candidates(self) -> int:
        return 2 * self.pairs

    @cached_property
    def kept(self) -> int:
        return round(self.candidates * self.book["keep_rate"])

    @property
    def text_flops(self) -> float:
        """Of one prompt through the text encoders."""
        return 2.0 * self.counts.text * self.teacher.text_tokens

    def number_bytes(self, asked: str) -> int:
        """Bytes of a number in a precision; `auto` is settled as the device decides."""
        return 4 if asked == "float32" or (asked == "auto" and self.on_cpu) else 2

    def canvas(self, rows: int, cols: int) -> arithmetic.Canvas:
        image = arithmetic.image_tokens(rows * self.size, cols * self.size, self.teacher.factor)
        return arithmetic.Canvas(image, self.teacher.text_tokens)

    def money(self, role: str, spent: dict[str, int]) -> float | None:
        """Of tokens in and out; None without both prices."""
        prices = [self.book.maybe(f"{role}_{way}_price") for way in ("input", "output")]
        if None in prices:
            return None
        return sum(n * (price or 0.0) for n, price in zip(spent.values(), prices, strict=True)) / 1e6

    def row_bytes(self, name: str, panels: int) -> float:
        """Bytes of a row with pictures of so many panels: as measured or set (`name`), else counted."""
        if self.book.known[name].value is not None:
            return self.book[name]
        return panels * self.size**2 * self.book["pixel_bytes"] + self.book["row_bytes"]

    def hours(self, seconds: str, times: int, flops: float, share: str) -> float:
        """Device hours of `times` pieces of work: by the seconds of one, measured or set, else by operations.

        Who chooses a device or its rate asks about that one, and not about where something was measured.
        """
        known = self.book.known[seconds]
        if known.of == "set" or (known.value is not None and not self.book.was_set("tflops", share)):
            return times * self.book[seconds] / 3600
        return arithmetic.hours(flops, self.book["tflops"], self.book[share])
