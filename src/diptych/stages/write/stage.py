"""Stage 1, write: prompts that ask a teacher for grids (paper section 3.1).

`Write` puts a writer's drafts into one of its task's wordings, a row each. The grammar writer speaks in the words its
teacher knows (`write.grammar`): the pocket world's, or a vocabulary's; the language model's is `llm_writer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.data.engine import Failure, Row, Work
from diptych.errors import UsageError, nearest
from diptych.recipe import tasks
from diptych.stages.write.grammar import GRAMMARS, Draft, Turn, grid_prompt, styled
from diptych.utils.documents import parse_json

if TYPE_CHECKING:
    import numpy as np

    from diptych.recipe.schema import Recipe

MAX_WORDS_PHOTO = 240  # about 200 words and their marks: with room to spare in T5's 512 tokens
SHORT_TEXT = 77  # tokens: CLIP's text length, which every released text-to-image model reads
POCKET, PHOTO = "pocket", "photo"
TRIES = 200
Drawn = Callable[["np.random.Generator"], Draft | Failure | None]


@dataclass(frozen=True)
class Writer:
    """What drafts grids, and how long their prompts may be, in words and marks.

    `begin` sees a batch of rows and gives for each the function that draws its drafts. One of None is drawn again, a
    Failure is the row's end.
    """

    begin: Callable[[list[Row]], Sequence[Drawn]]
    max_words: int


class Write:
    """Rows {id, index, seed} to prompt rows; each depends on its number and the recipe's seed alone, and, where a
    language model writes, on the answers to its shard's questions.

    `answers` is the file where those are kept: nothing is asked twice, in this run or after a kill.
    """

    name = "write"

    def __init__(self, recipe: Recipe, answers: Path | None = None) -> None:
        self.recipe = recipe
        self.answers = answers
        # A language model is asked for a shard at once, and its drafts are compared with each other.
        self.batch_size = 100 if recipe.write.writer == "grammar" else recipe.write.shard_size
        self.task = tasks.load(recipe.task)
        self.layout = self.task.layout(recipe.write.layout)

    def load(self) -> Work:
        """Raises UsageError if the writer does not know the recipe's task or layout."""
        writer = WRITERS[self.recipe.write.writer](self)
        return lambda rows: [
            self._prompt(row, draw, writer.max_words) for row, draw in zip(rows, writer.begin(rows), strict=True)
        ]

    def _prompt(self, row: Row, draw: Drawn, max_words: int) -> list[Row] | Failure:
        import numpy as np

        from diptych.pocket import captions

        rng = np.random.default_rng(row["seed"])
        drawn: Draft | None = None
        for _ in range(TRIES):
            found = draw(rng)
            if isinstance(found, Failure):
                return found
            if found is None:
                continue
            drawn = found
            prompt = grid_prompt(self.task, self.layout, drawn, rng)
            if captions.count_words(prompt) <= max_words:
                panels = [styled(panel, drawn.style) for panel in drawn.panels]
                text = {"id": row["id"], "prompt": prompt, "panels": panels, "subject": drawn.subject}
                return [{**text, "task": self.task.name, "seed": row["seed"]}]
        if drawn is None:
            return Failure(f"{TRIES} drafts in turn did not say their place, or gave away their subject's looks")
        return Failure(f"no prompt of at most {max_words} words and marks in {TRIES} tries")


def grammar(stage: Write) -> Writer:
    """The writer that draws from words."""
    from diptych.pocket import captions

    recipe, task = stage.recipe, stage.task
    name = grammar_of(recipe)
    rules = pocket_rules(recipe, task) if name == POCKET else _composed(name, recipe, task)
    limit = captions.LONGEST if name == POCKET else MAX_WORDS_PHOTO
    return Writer(lambda rows: [partial(rules, Turn(recipe.seed, row["index"])) for row in rows], limit)


def llm(stage: Write) -> Writer:
    """The writer that asks a language model."""
    from diptych.llm.client import open_model
    from diptych.stages.write import llm_writer

    settings = stage.recipe.write
    # A useless answer is a row that fails: nothing is made of it, so another try should get another answer.
    cache = settings.cache or stage.answers
    model = open_model(
        settings.endpoint,
        settings.local,
        settings.vllm,
        cache=cache,
        device=stage.recipe.device,
        keep_undecided=False,
        sees=False,
    )
    drafts = llm_writer.LanguageModel(stage.recipe, stage.task, model)

    def begin(rows: list[Row]) -> list[Drawn]:
        return [partial(_as_given, one) for one in drafts(rows)]

    return Writer(begin, MAX_WORDS_PHOTO)


def _as_given(draft: Draft | Failure, rng: np.random.Generator) -> Draft | Failure:
    return draft


def pocket_rules(recipe: Recipe, task: tasks.Task) -> Callable[[Turn, np.random.Generator], Draft | None]:
    """The pocket world's grammar for a task. UsageError if it has none, or not for the recipe's layout."""
    layout = task.layout(recipe.write.layout)
    if layout.name != "1x2":
        raise UsageError(f"write.layout: the pocket teacher draws 1x2 grids only, not {layout.name}")
    name = task.grammar.pocket if task.grammar else None
    if name is None or name not in GRAMMARS:
        wants = f"the pocket grammar '{name}', which there is not" if name else "no pocket grammar"
        raise UsageError(
            f"the task '{task.name}' names {wants}; set grammar.pocket in its file to one of {', '.join(GRAMMARS)}"
            f"{nearest(name or task.name, GRAMMARS)}, or write.grammar to {PHOTO} for a teacher that knows English"
        )
    return GRAMMARS[name]


def _composed(name: str, recipe: Recipe, task: tasks.Task) -> Callable[[Turn, np.random.Generator], Draft | None]:
    from diptych.stages.write import vocabulary

    return vocabulary.grids(vocabulary.load(name), task, task.layout(recipe.write.layout).panels)


WRITERS: dict[str, Callable[[Write], Writer]] = {"grammar": grammar, "llm": llm}


def grammar_of(recipe: Recipe) -> str:
    """Whose words the recipe's grammar uses, `auto` settled: `pocket` for a teacher that reads less than CLIP does.

    Looks at a local teacher's tokenizers and downloads nothing: a hub name is a teacher that knows English.
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
    """sha256 of the vocabulary or the seed captions a recipe writes from; "" for the pocket world's words, which are
    code."""
    if recipe.write.writer == "llm":
        from diptych.stages.write.llm_writer import read_captions

        captions = read_captions(recipe.write)
        return captions.digest if captions else ""
    from diptych.stages.write import vocabulary

    name = grammar_of(recipe)
    return "" if name == POCKET else vocabulary.digest(name)
