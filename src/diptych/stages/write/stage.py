"""Stage 1, write: prompts for grids (paper section 3.1).

`WriteStage` turns a writer's drafts into prompts by the task's templates, one a row. The grammar writer uses a
vocabulary that the teacher understands (`write.grammar`): the pocket world's or a vocabulary file. The other writer is
a language model (`llm_writer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data.engine import Failure, Row, Work
from diptych.errors import UsageError, nearest
from diptych.recipe import tasks
from diptych.stages.write.grammar import GRAMMARS, Draft, Turn, grid_prompt, styled
from diptych.utils.documents import parse_json

if TYPE_CHECKING:
    import numpy as np

    from diptych.recipe.schema import Recipe

MAX_WORDS_PHOTO = 240  # about 200 words and their punctuation, well within T5's 512 tokens
SHORT_TEXT = 77  # tokens: CLIP's text length, which every released text-to-image model reads
POCKET, PHOTO = "pocket", "photo"
TRIES = 200
Sample = Callable[["np.random.Generator"], Draft | Failure | None]


@dataclass(frozen=True)
class Drafter:
    """A function that drafts grids, and the maximum length of their prompts in words and punctuation marks.

    `begin` gets a batch of rows and returns for each row the function that samples its drafts. None is sampled again,
    and a Failure ends the row.
    """

    begin: Callable[[list[Row]], Sequence[Sample]]
    max_words: int


class WriteStage:
    """Turns rows {id, index, seed} into prompt rows.

    A prompt depends only on the row's number and the recipe's seed and, if a language model writes, on the answers to
    its shard's questions. `answers` is the file that stores these, so that no question is sent twice, even after a
    kill.
    """

    name = "write"

    def __init__(self, recipe: Recipe, answers: Path | None = None) -> None:
        self.recipe = recipe
        self.answers = answers
        # A language model writes a shard at once, and its drafts are compared with each other.
        self.batch_size = 100 if recipe.write.writer == "grammar" else recipe.write.shard_size
        self.task = tasks.load(recipe.task)
        self.layout = self.task.layout(recipe.write.layout)

    def load(self) -> Work:
        """Open the writer. Raises UsageError if it cannot write the recipe's task or layout."""
        writer = WRITERS[self.recipe.write.writer](self)
        return lambda rows: [
            self._prompt(row, sample, writer.max_words) for row, sample in zip(rows, writer.begin(rows), strict=True)
        ]

    def _prompt(self, row: Row, sample: Sample, max_words: int) -> list[Row] | Failure:
        import numpy as np

        from diptych.pocket import captions

        rng = np.random.default_rng(row["seed"])
        sampled = False
        for _ in range(TRIES):
            draft = sample(rng)
            if isinstance(draft, Failure):
                return draft
            if draft is None:
                continue
            sampled = True
            prompt = grid_prompt(self.task, self.layout, draft, rng)
            if captions.count_words(prompt) <= max_words:
                panels = [styled(panel, draft.style) for panel in draft.panels]
                text = {"id": row["id"], "prompt": prompt, "panels": panels, "subject": draft.subject}
                return [{**text, "task": self.task.name, "seed": row["seed"]}]
        if not sampled:
            return Failure(f"{TRIES} drafts in turn did not say their place, or gave away their subject's looks")
        return Failure(f"no prompt of at most {max_words} words and marks in {TRIES} tries")


def grammar(stage: WriteStage) -> Drafter:
    """Return the writer that samples from a grammar."""
    from diptych.pocket import captions
    from diptych.stages.write import vocabulary

    recipe, task = stage.recipe, stage.task
    name = grammar_of(recipe)
    if name == POCKET:
        rules, limit = pocket_rules(recipe, task), captions.LONGEST
    else:
        panels = task.layout(recipe.write.layout).panels
        rules, limit = vocabulary.grids(vocabulary.load(name), task, panels), MAX_WORDS_PHOTO
    return Drafter(lambda rows: [partial(rules, Turn(recipe.seed, row["index"])) for row in rows], limit)


def llm(stage: WriteStage) -> Drafter:
    """Return the writer that uses a language model."""
    from diptych.llm.client import open_model
    from diptych.stages.write import llm_writer

    settings = stage.recipe.write
    options: dict[str, Any] = {"cache": settings.cache or stage.answers, "device": stage.recipe.device, "sees": False}
    # A row with a useless answer fails, so another try should get another answer.
    model = open_model(settings.endpoint, settings.local, settings.vllm, keep_undecided=False, **options)
    drafts = llm_writer.LanguageModel(stage.recipe, stage.task, model)

    def begin(rows: list[Row]) -> list[Sample]:
        return [lambda rng, draft=draft: draft for draft in drafts(rows)]

    return Drafter(begin, MAX_WORDS_PHOTO)


def pocket_rules(recipe: Recipe, task: tasks.Task) -> Callable[[Turn, np.random.Generator], Draft | None]:
    """Return the pocket world's grammar for a task. Raises UsageError if the task or the layout has none."""
    layout = task.layout(recipe.write.layout)
    if layout.name != "1x2":
        how = "Set write.layout to 1x2, or use another teacher."
        raise UsageError("task_unsuited", f"The pocket teacher generates 1x2 grids only, not {layout.name}. {how}")
    name = task.grammar.pocket if task.grammar else None
    if name is None or name not in GRAMMARS:
        named = f"names the unknown pocket grammar '{name}'" if name else "names no pocket grammar"
        raise UsageError(
            "vocabulary_invalid",
            f"The task '{task.name}' {named}. Set grammar.pocket in its file to one of {', '.join(GRAMMARS)}"
            f"{nearest(name or task.name, GRAMMARS)}. For a teacher that understands English, set write.grammar to "
            f"{PHOTO} or to a vocabulary file instead.",
        )
    return GRAMMARS[name]


WRITERS: dict[str, Callable[[WriteStage], Drafter]] = {"grammar": grammar, "llm": llm}


def grammar_of(recipe: Recipe) -> str:
    """Return the recipe's grammar, with `auto` resolved: `pocket` for a teacher that reads less text than CLIP.

    Reads the tokenizers of a local teacher and downloads nothing. A teacher on the hub is taken to understand English.
    """
    if recipe.write.grammar != "auto":
        return recipe.write.grammar
    if recipe.teacher == POCKET:
        return POCKET
    lengths = [
        _text_length(path) for path in Path(recipe.teacher).expanduser().glob("tokenizer*/tokenizer_config.json")
    ]
    return POCKET if lengths and max(lengths) < SHORT_TEXT else PHOTO


def _text_length(config: Path) -> float:
    try:
        return float(parse_json(config.read_text("utf8")).get("model_max_length") or SHORT_TEXT)
    except (OSError, ValueError, TypeError):
        return SHORT_TEXT


def words_digest(recipe: Recipe) -> str:
    """Return the SHA-256 of a recipe's vocabulary or seed captions; "" for the pocket world's vocabulary, which is
    code."""
    if recipe.write.writer == "llm":
        from diptych.stages.write.llm_writer import read_captions

        captions = read_captions(recipe.write)
        return captions.digest if captions else ""
    from diptych.stages.write import vocabulary

    name = grammar_of(recipe)
    return "" if name == POCKET else vocabulary.digest(name)
