"""Panel texts from one idea: a language model writes what each panel of a story shows, and what stands below it.

write_panels("a cat who wants to see the sea", 6, endpoint)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, Field, create_model

from diptych.apps.story import Panel
from diptych.errors import UserError
from diptych.llm.client import Client
from diptych.llm.question import Question, clean, quoted, system, user
from diptych.stages.write import diversity

if TYPE_CHECKING:
    from diptych.llm.cache import Cache
    from diptych.llm.endpoint import Endpoint

BRIEF = (
    "You write a comic of {count} panels about one character, from somebody's idea. A text-to-image model draws each "
    "panel on its own, from what you say it shows and a reference picture of the character. So name the character in "
    "every panel in the same one to three words, with an article ('a cat'), and never say what it looks like. Give "
    "every panel what the character does, where it is, and the light, in at most 20 words; each panel another place or "
    "moment, so that together they tell the idea from beginning to end. No writing inside the pictures. Then give the "
    "words that stand below the panel: one short sentence of at most 12 words that carries the story on."
)

# What models like to write, and Pillow's own font does not have; and the bar, which parts a panel's two texts.
PLAIN = str.maketrans("–—|", "--/")
REPEATS = 0.7  # resemblance from which on a panel shows what an earlier one shows


class Told(BaseModel):
    """A panel, as the model writes it."""

    shows: str = Field(
        min_length=1, max_length=300, description="What the panel shows: character, action, place, light."
    )
    says: str = Field(min_length=1, max_length=160, description="The sentence below it.")


def _different(panels: list[Told]) -> list[Told]:
    """No two panels that show the same, or nearly, and no sentence twice."""
    guard = diversity.Guard(REPEATS)
    for number, panel in enumerate(panels, 1):
        if (near := guard.near(str(number), panel.shows)) is not None:
            raise ValueError(f"panel {number} shows what panel {near[0]} shows")
    if diversity.repeated([panel.shows for panel in panels]) or diversity.repeated([panel.says for panel in panels]):
        raise ValueError("two panels say the same")
    return panels


def write_panels(idea: str, count: int, endpoint: Endpoint, cache: Cache | None = None) -> list[Panel]:
    """So many panels that tell the idea. UserError if nobody answers there, or not as asked."""
    several = Field(min_length=count, max_length=count)
    shape = create_model("Story", panels=(Annotated[list[Told], several, AfterValidator(_different)], ...))
    question = Question((system(BRIEF.format(count=count)), user(quoted(idea, "idea"))), shape)
    with Client(endpoint, cache) as client:
        outcome = client.ask(question)
    if outcome.answer is None:
        raise UserError(f"the language model wrote no story: {outcome.reason}")
    lines = [
        {key: " ".join(clean(text).translate(PLAIN).split()) for key, text in panel.items()}
        for panel in outcome.answer["panels"]
    ]
    return [Panel(line["shows"], line["says"]) for line in lines]
