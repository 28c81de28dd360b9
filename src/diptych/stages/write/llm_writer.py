"""The writer that asks a language model: its task's brief and a row's seed caption in, a draft or a reason out.

A row's question depends on its number and the run's seed alone, and so does its answer, once it is in the cache. Near
duplicates are looked for within a batch (the engine's shard), in row order: of two drafts that repeat each other the
row with the lower number stays, whichever answer came first. Between shards, seed captions keep drafts apart (each is
used once before any is used again), and what still repeats is taken out at the end (`repeats`).

The paper writes its prompts this way (section 3.1), and found that without seed captions the model collapses to cars
and robots. Here the drafts that repeat others fail with that reason, and the run says so.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, create_model

from diptych.data.engine import Failure, Row
from diptych.data.records import seed_of
from diptych.errors import UsageError, nearest
from diptych.llm.question import Question, quoted, system, user
from diptych.recipe.tasks import Task, fields_of
from diptych.stages.write import diversity, grammar, seeds
from diptych.stages.write.grammar import Draft

if TYPE_CHECKING:
    from diptych.llm.client import Model
    from diptych.llm.question import Outcome
    from diptych.recipe.schema import Recipe, Write

# Most words of an answer's other parts; a task's own wording asks for fewer.
LIMITS = {"subject": 5, "description": 32, "style": 16, "scene": 32}
ALWAYS = 3  # grids of one subject that a shard may have whatever `subject_share` says
TELL = 0.25  # share of drafts that repeat others from which on the run is told
FILTER = (
    "You sort captions of pictures, for a data set in which a pair is: {task} Say what the caption is about, and "
    "whether that is one clear subject for such a pair, one that a picture can show: no list, no crowd, no chart, no "
    "lettering, no mere idea."
)
log = logging.getLogger(__name__)


class Clear(BaseModel):
    """What a model says of a caption."""

    subject: str = Field(description="What the caption is about, in a few words; empty if it is about nothing.")
    clear: bool = Field(description="Whether that is one clear subject.")


class LanguageModel:
    """Drafts of a batch of rows: for each a `Draft`, or a `Failure` that says why there is none."""

    def __init__(self, recipe: Recipe, task: Task, model: Model) -> None:
        """UsageError if the task has no brief, UserError if the seed captions cannot be read or do not fit."""
        if task.writer is None:
            raise UsageError(f"the task '{task.name}' has no `writer`, so no language model can write it")
        self.settings: Write = recipe.write
        self.task = task
        self.model = model
        self.layout = task.layout(recipe.write.layout)
        self.answer = answer_type(task, self.layout.panels, recipe.write.panel_words)
        self.brief = task.writer.brief.format(
            count=self.layout.panels, layout=self.layout.name, words=recipe.write.panel_words
        )
        self.inspiration = Inspiration(recipe.write, recipe.seed)
        self._said = False

    def __call__(self, rows: Sequence[Row]) -> list[Draft | Failure]:
        """Raises `NobodyAnswers` where every question would fail."""
        results: dict[str, Draft | Failure] = self._unclear(rows) if self.settings.clear_subject else {}
        asked = [row for row in rows if row["id"] not in results]
        for name, outcome in self._outcomes(asked, self.question).items():
            results[name] = _unanswered(outcome) if outcome.answer is None else draft(self.task, outcome.answer)
        return self._apart(rows, [results[row["id"]] for row in rows])

    def _outcomes(self, rows: Sequence[Row], question: Callable[[Row], Question]) -> dict[str, Outcome]:
        from diptych.llm.client import NobodyAnswers, answers

        found = answers(self.model, (question(row) for row in rows))
        if rows and all(outcome.status == "failed" for outcome in found.values()):
            # A shard may hold fewer rows than the client takes to see that a server is down.
            raise NobodyAnswers(f"none of {len(rows)} questions got an answer: {found[rows[0]['id']].reason}")
        return found

    def _unclear(self, rows: Sequence[Row]) -> dict[str, Draft | Failure]:
        """The rows, by id, whose caption names no clear subject, or of which that is not known."""

        def question(row: Row) -> Question:
            caption, _, times = self.inspiration.of(row["index"])
            brief = system(FILTER.format(task=self.task.description))
            return Question((brief, user(quoted(caption, "caption"))), Clear, row["id"], sample=times)

        refused: dict[str, Draft | Failure] = {}
        for name, outcome in self._outcomes(rows, question).items():
            if outcome.answer is None:
                refused[name] = _unanswered(outcome)
            elif not outcome.answer["clear"]:
                refused[name] = Failure("its caption names no clear subject")
        return refused

    def question(self, row: Row) -> Question:
        """What is asked for a row. Its caption is somebody else's text, and goes in as data."""
        caption, category, times = self.inspiration.of(row["index"])
        parts = [quoted(caption, "caption"), "Let the caption inspire you."] if caption else ["There is no caption."]
        if category:
            parts.append(f"The subject must be of this category: {category}.")
        return Question((system(self.brief), user(*parts)), self.answer, row["id"], sample=times)

    def _apart(self, rows: Sequence[Row], drafts: list[Draft | Failure]) -> list[Draft | Failure]:
        """The drafts, in row order; those that repeat an earlier one, or its subject too often, are failures."""
        guard = diversity.Guard(self.settings.near_duplicate)
        most = max(ALWAYS, math.ceil(self.settings.subject_share * len(rows)))
        subjects: Counter[str] = Counter()
        kept: list[Draft | Failure] = []
        for row, one in zip(rows, drafts, strict=True):
            if isinstance(one, Failure):
                kept.append(one)
                continue
            subject = one.subject.casefold()
            if subjects[subject] >= most:
                kept.append(Failure(f"the subject '{one.subject}' is in {most} grids of this shard already"))
            elif (near := guard.near(row["id"], told(one))) is not None:
                kept.append(Failure(diversity.reason(near, self.settings.near_duplicate)))
            else:
                subjects[subject] += 1
                kept.append(one)
        written = [one for one in drafts if isinstance(one, Draft)]
        repeats = len(written) - sum(isinstance(one, Draft) for one in kept)
        if repeats and repeats >= TELL * len(written) and not self._said:
            self._said = True  # once: `failed/` has every row
            self._warn(rows, written, repeats)
        return kept

    def _warn(self, rows: Sequence[Row], written: list[Draft], repeats: int) -> None:
        spread = diversity.spread([told(one) for one in written], len(written))
        if self.settings.captions is None:
            cure = "without seed captions models do that: give write.captions"
        else:
            cure = "take more varied captions, a higher endpoint.temperature, or another model"
        log.warning(
            "the writer repeats itself: %d of %d drafts from %s on are left out (%.0f %% of their word pairs are "
            "distinct, mean distance %.2f); %s",
            repeats,
            len(written),
            rows[0]["id"],
            100 * spread.distinct,
            spread.distance,
            cure,
        )


def _unanswered(outcome: Outcome) -> Failure:
    return Failure(f"{outcome.status}: {outcome.reason}", lost=outcome.lost)


class Inspiration:
    """Which seed caption and which category a row gets: even by construction, in an order that is the run's own."""

    def __init__(self, settings: Write, run_seed: int) -> None:
        self.run_seed = run_seed
        self.quotas = settings.quotas
        self.slots = [name for name, count in settings.quotas.items() for _ in range(count)]
        self.captions = read_captions(settings)
        everywhere = list(range(len(self.captions.texts))) if self.captions else []
        self.pools: dict[str, list[int]] = {"": everywhere}
        if self.captions and settings.category_column:
            known = Counter(self.captions.categories)
            for name in settings.quotas:
                if name not in known:
                    there = ", ".join(sorted(known)[:20])
                    raise UsageError(
                        f"write.quotas: no caption of {settings.captions} has the category '{name}'; there are: "
                        f"{there}{nearest(name, known)}"
                    )
                self.pools[name] = self.captions.of(name)
        if self.captions and (line := self.captions.line()):
            log.warning("%s: %s", settings.captions, line)

    def of(self, index: int) -> tuple[str, str, int]:
        """(caption, category, times it was used before) of a row; "" for what the recipe does not ask for.

        Without captions the third is the row's number, so that every row asks a question of its own.
        """
        category, before = self._category(index)
        if self.captions is None:
            return "", category, index
        owner = category if category in self.pools else ""
        pool = self.pools[owner]
        times, place = divmod(before if owner else index, len(pool))
        order = _shuffled(self.run_seed, f"captions-{owner}-{times}", len(pool))
        return self.captions.texts[pool[order[place]]], category, times

    def _category(self, index: int) -> tuple[str, int]:
        """A row's category, and how many rows before it have the same."""
        if not self.slots:
            return "", index
        block, place = divmod(index, len(self.slots))
        turns = [self.slots[slot] for slot in _shuffled(self.run_seed, f"quota-{block}", len(self.slots))]
        name = turns[place]
        return name, block * self.quotas[name] + turns[:place].count(name)


@lru_cache(maxsize=64)
def _shuffled(run_seed: int, purpose: str, count: int) -> list[int]:
    import numpy as np

    return np.random.default_rng(seed_of(run_seed, purpose, "write")).permutation(count).tolist()


def read_captions(settings: Write) -> seeds.Captions | None:
    """A recipe's seed captions; None if it has none."""
    if settings.captions is None:
        return None
    return seeds.read(settings.captions, settings.caption_column, settings.category_column)


def answer_type(task: Task, panels: int, words: int) -> type[BaseModel]:
    """What a language model returns for a grid of a task, as the type that validates it: `Task.answer_schema`, and the
    budget of words. An answer over it goes back once, with what is too long, like any other that does not match."""
    assert task.writer is not None
    # A change is read back from a caption by the comma before it.
    plain = "change" in fields_of(task.panel_template)
    fields: dict[str, Any] = {}
    for name, about in task.writer.answer.items():
        if name == "panels":
            one = Annotated[str, Field(min_length=1), AfterValidator(partial(_short, words, plain))]
            many = Field(min_length=panels, max_length=panels, description=about)
            fields[name] = (Annotated[list[one], many, AfterValidator(_different)], ...)
        else:
            short = AfterValidator(partial(_short, LIMITS[name], False))
            fields[name] = (Annotated[str, Field(min_length=1, description=about), short], ...)
    return create_model("Grid", **fields)


def _short(words: int, plain: bool, text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    count = len(text.split())
    if not count:
        raise ValueError("is empty")
    if count > words:
        raise ValueError(f"has {count} words; at most {words}")
    if plain and "," in text:
        raise ValueError("has a comma; say it without")
    return text


def _different(panels: list[str]) -> list[str]:
    if diversity.repeated(panels):
        raise ValueError("two panels show the same")
    return panels


def draft(task: Task, answer: dict[str, Any]) -> Draft:
    """A validated answer as a draft: its panels' captions follow the task's `panel_template`."""
    changes = "change" in fields_of(task.panel_template)
    subject = re.sub(r"^(an?|the) ", "", answer["subject"], flags=re.IGNORECASE)
    captions = [
        grammar.fill(
            task.panel_template,
            subject=subject,
            scene=answer.get("scene", "") if changes else panel,
            change=panel if changes else "",
        )
        for panel in answer["panels"]
    ]
    return Draft(subject, captions, description=answer["description"], style=answer.get("style", ""))


def told(one: Draft) -> str:
    """What a draft says that others should not say again: its individual and its panels, without the template."""
    return " . ".join([one.description, *one.panels])
