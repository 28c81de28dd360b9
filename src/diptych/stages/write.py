"""Stage 1, write: prompts that ask a teacher for grids (paper section 3.1).

`Write` gives each row a grammar's draft in one of its task's wordings. A language model as the writer will be another
entry of `WRITERS`: a function of the recipe that makes the same `Draft`s.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from diptych import tasks
from diptych.data.engine import Failure, Row, Work
from diptych.errors import UsageError, nearest
from diptych.stages import wording
from diptych.stages.grammar import GRAMMARS, Draft, Turn

if TYPE_CHECKING:
    import numpy as np

    from diptych.recipe import Recipe

MAX_WORDS = 52  # words and marks of a prompt: what the pocket teacher's text encoders were trained up to
TRIES = 200

Writer = Callable[[Row, "np.random.Generator"], Draft | None]


class Write:
    """Rows {id, index, seed} to prompt rows; each depends on its number and the recipe's seed alone."""

    name = "write"
    batch_size = 100

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.task = tasks.load(recipe.task)

    def load(self) -> Work:
        """Raises UsageError if the writer does not know the recipe's task."""
        draft = WRITERS[self.recipe.write.writer](self.recipe, self.task)
        return lambda rows: [self._prompt(row, draft) for row in rows]

    def _prompt(self, row: Row, draft: Writer) -> list[Row] | Failure:
        import numpy as np

        rng = np.random.default_rng(row["seed"])
        for _ in range(TRIES):
            drawn = draft(row, rng)
            if drawn is None:
                continue
            prompt = wording.grid_prompt(self.task, self.task.grids[0], drawn.subject, drawn.panels, rng)
            if count_words(prompt) <= MAX_WORDS:
                text = {"id": row["id"], "prompt": prompt, "panels": drawn.panels, "subject": drawn.subject}
                return [{**text, "task": self.task.name, "seed": row["seed"]}]
        return Failure(f"no prompt of at most {MAX_WORDS} words and marks in {TRIES} tries")


def grammar(recipe: Recipe, task: tasks.Task) -> Writer:
    """The writer that draws from a vocabulary."""
    rules = GRAMMARS.get(task.name)
    if rules is None:
        raise UsageError(
            f"the grammar writer has no grammar for the task '{task.name}'; it has: {', '.join(sorted(GRAMMARS))}"
            f"{nearest(task.name, GRAMMARS)}"
        )
    return lambda row, rng: rules(Turn(recipe.seed, row["index"]), rng)


WRITERS: dict[str, Callable[[Recipe, tasks.Task], Writer]] = {"grammar": grammar}


def count_words(text: str) -> int:
    """Words and punctuation marks, each about one token of the pocket tokenizers."""
    return len(re.findall(r"[\w-]+|[^\w\s]", text))
