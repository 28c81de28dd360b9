"""The writer that uses a language model: the task's brief and a seed caption in, a draft or a reason out.

A row's question depends only on its number and the run's seed, and so does its answer, once it is in the cache. Near
duplicates are removed within a batch (the engine's shard), in row order: of two drafts that repeat each other, the row
with the lower number stays, whichever answer came first. Between shards, seed captions keep drafts apart, because each
is used once before any is used again. `diversity.remove_repeats` removes the remaining repeats at the end.

The paper writes its prompts this way (section 3.1) and reports that the model collapses to cars and robots without seed
captions. Here, drafts that repeat others fail with that reason, and the run prints a warning.
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
from diptych.recipe.tasks import Grid, Task, fields_of
from diptych.stages.write import diversity, grammar, seeds
from diptych.stages.write.grammar import Draft

if TYPE_CHECKING:
    from diptych.llm.client import Model
    from diptych.llm.question import Outcome
    from diptych.recipe.schema import Recipe, Write

# Maximum words of the other parts of an answer; the wording of a task requests fewer.
LIMITS = {"subject": 5, "description": 32, "style": 16, "scene": 32}
MIN_PER_SUBJECT = 3  # grids of one subject that a shard may have at any `subject_share`
WARN_SHARE = 0.25  # share of drafts that repeat others at which the run prints a warning
# This text and the docstring and descriptions of `Clear` are sent to models; cached answers depend on them.
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
    """Writes drafts of a batch of rows: for each row a `Draft`, or a `Failure` with the reason."""

    def __init__(self, recipe: Recipe, task: Task, model: Model) -> None:
        """Raises UsageError if the task has no brief, UserError if the seed captions cannot be read or do not fit."""
        check_task(task)
        assert task.writer is not None
        self.settings: Write = recipe.write
        self.task = task
        self.model = model
        self.layout = task.layout(recipe.write.layout)
        self.answer = answer_type(task, self.layout.panels, recipe.write.panel_words)
        self.brief = brief(task, self.layout, recipe.write.panel_words)
        self.inspiration = Inspiration(recipe.write, recipe.seed)
        self._warned = False

    def __call__(self, rows: Sequence[Row]) -> list[Draft | Failure]:
        """Write the drafts. Raises `NobodyAnswers` where every question would fail."""
        results: dict[str, Draft | Failure] = self._unclear(rows) if self.settings.clear_subject else {}
        clear = [row for row in rows if row["id"] not in results]
        for name, outcome in self._outcomes(clear, self.question).items():
            results[name] = _failure(outcome) if outcome.answer is None else draft(self.task, outcome.answer)
        return self._without_repeats(rows, [results[row["id"]] for row in rows])

    def _outcomes(self, rows: Sequence[Row], question: Callable[[Row], Question]) -> dict[str, Outcome]:
        from diptych.llm.client import NobodyAnswers, answers

        outcomes = answers(self.model, (question(row) for row in rows))
        if rows and all(outcome.status == "failed" for outcome in outcomes.values()):
            # A shard may have fewer rows than the failures after which the client reports that a server is down.
            reason = outcomes[rows[0]["id"]].reason
            raise NobodyAnswers("rows_failed", f"None of {len(rows)} questions got an answer. The first: {reason}")
        return outcomes

    def _unclear(self, rows: Sequence[Row]) -> dict[str, Draft | Failure]:
        """Return the rows, by id, whose caption has no clear subject, or for which this is not known."""

        def question(row: Row) -> Question:
            caption, _, times = self.inspiration.of(row["index"])
            filtering = system(FILTER.format(task=self.task.description))
            return Question((filtering, user(quoted(caption, "caption"))), Clear, row["id"], sample=times)

        unclear: dict[str, Draft | Failure] = {}
        for name, outcome in self._outcomes(rows, question).items():
            if outcome.answer is None:
                unclear[name] = _failure(outcome)
            elif not outcome.answer["clear"]:
                unclear[name] = Failure("its caption names no clear subject")
        return unclear

    def question(self, row: Row) -> Question:
        """Return a row's question. Its caption is other people's text and is passed as data."""
        caption, category, times = self.inspiration.of(row["index"])
        parts = [quoted(caption, "caption"), "Let the caption inspire you."] if caption else ["There is no caption."]
        if category:
            parts.append(f"The subject must be of this category: {category}.")
        return Question((system(self.brief), user(*parts)), self.answer, row["id"], sample=times)

    def _without_repeats(self, rows: Sequence[Row], drafts: list[Draft | Failure]) -> list[Draft | Failure]:
        """Return the drafts in row order. Those that repeat an earlier draft, or a subject too often, are failures."""
        repeats = diversity.NearDuplicates(self.settings.near_duplicate)
        most = max(MIN_PER_SUBJECT, math.ceil(self.settings.subject_share * len(rows)))
        subjects: Counter[str] = Counter()
        kept: list[Draft | Failure] = []
        for row, one in zip(rows, drafts, strict=True):
            if isinstance(one, Failure):
                kept.append(one)
                continue
            subject = one.subject.casefold()
            if subjects[subject] >= most:
                kept.append(Failure(f"the subject '{one.subject}' is in {most} grids of this shard already"))
            elif (near := repeats.add(row["id"], content(one))) is not None:
                kept.append(Failure(diversity.reason(near, self.settings.near_duplicate)))
            else:
                subjects[subject] += 1
                kept.append(one)
        written = [one for one in drafts if isinstance(one, Draft)]
        removed = len(written) - sum(isinstance(one, Draft) for one in kept)
        if removed and removed >= WARN_SHARE * len(written) and not self._warned:
            self._warned = True  # once: `failed/` has every row
            self._warn(rows, written, removed)
        return kept

    def _warn(self, rows: Sequence[Row], written: list[Draft], removed: int) -> None:
        spread = diversity.measure([content(one) for one in written], len(written))
        if self.settings.captions is None:
            cure = "models repeat themselves without seed captions: set write.captions"
        else:
            cure = "use more varied captions, a higher endpoint.temperature, or another model"
        log.warning(
            "the writer repeats itself: %d of %d drafts from %s on are left out (%.0f %% of their word pairs are "
            "distinct, mean distance %.2f); %s",
            removed,
            len(written),
            rows[0]["id"],
            100 * spread.distinct,
            spread.distance,
            cure,
        )


def check_task(task: Task) -> None:
    """Raise UsageError if a task has no brief for a language model."""
    if task.writer is None:
        how = "Use write.writer: grammar, or add `writer` to the task's file."
        raise UsageError("task_unsuited", f"The task '{task.name}' has no `writer` for a language model. {how}")


def brief(task: Task, layout: Grid, words: int) -> str:
    """Return the instructions of a task that has a writer, for a layout and a limit of words a panel."""
    assert task.writer is not None
    return task.writer.brief.format(count=layout.panels, layout=layout.name, words=words)


def _failure(outcome: Outcome) -> Failure:
    return Failure(f"{outcome.status}: {outcome.reason}", lost=outcome.lost)


class Inspiration:
    """Assigns a seed caption and a category to each row: evenly, in an order that depends on the run's seed."""

    def __init__(self, settings: Write, run_seed: int) -> None:
        self.run_seed = run_seed
        self.quotas = settings.quotas
        self.slots = [name for name, count in settings.quotas.items() for _ in range(count)]
        self.captions = read_captions(settings)
        self.pools: dict[str, list[int]] = {"": list(range(len(self.captions.texts))) if self.captions else []}
        if self.captions and settings.category_column:
            known = Counter(self.captions.categories)
            for name in settings.quotas:
                if name not in known:
                    raise UsageError(
                        "recipe_invalid",
                        f"write.quotas: no caption of {settings.captions} has the category '{name}'. Categories: "
                        f"{', '.join(sorted(known)[:20])}{nearest(name, known)}",
                    )
                self.pools[name] = self.captions.of(name)
        if self.captions and (line := self.captions.line()):
            log.warning("%s: %s", settings.captions, line)

    def of(self, index: int) -> tuple[str, str, int]:
        """Return (caption, category, times the caption was used before) of a row; "" for what the recipe does not set.

        Without captions, the third value is the row's number, so that every row has a different question.
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
        """Return a row's category, and how many rows before it have the same category."""
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


def read_captions(settings: Write) -> seeds.SeedCaptions | None:
    """Return a recipe's seed captions; None if it has none."""
    if settings.captions is None:
        return None
    return seeds.read(settings.captions, settings.caption_column, settings.category_column)


def answer_type(task: Task, panels: int, words: int) -> type[BaseModel]:
    """Return the type that validates a model's answer for a grid: `Task.answer_schema` and the limit of words.

    A longer answer is sent back once with what is too long, like any other answer that does not match.
    """
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
    """Return a validated answer as a draft, whose captions follow the task's `panel_template`."""
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


def content(one: Draft) -> str:
    """Return the text of a draft that others must not repeat: its individual and its panels, without the template."""
    return " . ".join([one.description, *one.panels])
