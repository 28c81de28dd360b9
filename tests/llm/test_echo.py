"""Answers that are the question's own words are no answers; those that share words with it are."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel, Field

from diptych.apps.story import WrittenPanel, write_panels
from diptych.judges.vlm import VlmJudge, answer_type
from diptych.llm import schema
from diptych.llm.client import Client
from diptych.llm.endpoint import Endpoint
from diptych.llm.question import Question, quoted, system, user
from diptych.recipe import tasks
from diptych.stages.curate.captioning import BRIEF, Words
from diptych.stages.write import llm_writer
from llm.chat_server import Call, Serve, say
from llm.counting import Make
from raising import raises

SUBJECT = tasks.load("subject")


def filled(form: dict[str, Any], text: Any) -> Any:
    """A valid answer to a schema whose every text is what `text` makes of its field's description."""
    kind = form.get("type")
    if kind == "object":
        return {name: filled(field, text) for name, field in form["properties"].items()}
    if kind == "array":
        return [filled(form["items"], text)] * form.get("minItems", 1)
    return {"boolean": True, "integer": form.get("minimum", 0)}.get(str(kind), text(form.get("description", "")))


def parrot(call: Call) -> Any:
    """A model that sends the schema's own words back."""
    return say(filled(call.body["response_format"]["json_schema"]["schema"], lambda about: about or "string"))


def test_a_judge_that_repeats_the_schema_has_no_vote(serve: Serve, endpoint: Make) -> None:
    red = Image.new("RGB", (8, 8), "red")
    with Client(endpoint(serve(parrot), temperature=0.7)) as client:
        found = VlmJudge(client, SUBJECT, votes=3).decide([("p", red, red)])["p"]
    assert (found.verdict, found.reason) == ("undecided", "no valid answer")
    assert ["repeats the question" in vote["reason"] for vote in found.votes] == [True] * 3


def test_a_story_of_the_schema_s_words_is_none(serve: Serve) -> None:
    with raises("reply_invalid"):
        write_panels("a cat at sea", 4, Endpoint(base_url=serve(parrot).url, model="t", backoff=0.01, retries=0))


def judged(text: str) -> tuple[Any, Question]:
    steps = "\n\n".join(f"Step {n}: {step}" for n, step in enumerate(SUBJECT.curation.questions, 1))
    answer = {"step_1": text, "step_2": "two cats", "step_3": "x", "same": True, "confidence": 3, "reason": "the ear"}
    return answer, Question((system("You compare images."), user("Image A:", steps)), answer_type(3))


@pytest.mark.parametrize(
    "text",
    [
        "Your answer to step 1.",
        "your answer to STEP 1",
        "step_1: Your answer to step 1.",
        "Name the main subject that both images share, in a few words.",
        "Step 1: Name the main subject that both images share",
        "Leave out pose, viewpoint, background and light.",
        "Answer with one JSON object and nothing else.",
        "step_1",
        "string",
    ],
)
def test_what_repeats_the_question_is_found(text: str) -> None:
    assert schema.echoed(*judged(text))


@pytest.mark.parametrize(
    "text",
    [
        "A cat.",
        "The main subject is a cat that both images share.",
        "They share none.",
        "the very same individual",
        "patterns and markings",
        "Image A: a red cat. Image B: a red cat, seen from the left.",
        "yes",
    ],
)
def test_what_only_shares_words_with_it_is_not(text: str) -> None:
    assert not schema.echoed(*judged(text))


@pytest.mark.parametrize(
    ("answer", "values"),
    [
        (Words, {"description": "The target, as the first brief asks", "instruction": "make it night"}),
        (Words, {"description": "a cat on the moon", "instruction": "As the second brief asks."}),
        (WrittenPanel, {"shows": "What the panel shows: character, action, place, light.", "says": "He ran."}),
        (WrittenPanel, {"shows": "a cat at sea", "says": "The sentence below it."}),
    ],
)
def test_the_words_of_every_schema_are_known(answer: type[BaseModel], values: dict[str, str]) -> None:
    assert schema.echoed(values, Question((system(BRIEF), user("Now.")), answer))


def test_a_phrase_of_a_description_is_found_and_an_allowed_value_is_not() -> None:
    class Kind(BaseModel):
        """What it is."""

        kind: str = Field(description="One or two words.")
        about: str = Field(description='The kind, in one or two words, such as "a tin robot".')

    question = Question((user("Which one?"),), Kind)
    assert schema.echoed({"kind": "One or two words", "about": "x"}, question)
    assert schema.echoed({"kind": "x", "about": "one or two words"}, question)
    assert not schema.echoed({"kind": "robot", "about": "a tin robot"}, question)


def test_other_people_s_text_may_be_repeated() -> None:
    caption = "a red fox asleep on a windowsill, soft light"
    question = Question((user(quoted(caption), "Describe it, please, as you like."),), Words)
    assert not schema.echoed({"description": caption, "instruction": "make it night"}, question)


@pytest.mark.parametrize("name", tasks.names())
def test_the_examples_of_a_task_are_answers(name: str) -> None:
    task = tasks.load(name)
    shape = llm_writer.answer_type(task, 2, 30)
    brief = task.writer.brief if task.writer else ""
    question = Question((system(brief), user(quoted("a fox"))), shape)
    good = {"subject": "tin robot", "description": "a tin robot with one green eye", "scene": "on a stone bridge"}
    good |= {"style": "a 35 mm film photograph", "panels": ["wearing a straw hat", "in heavy snow"]}
    fields = schema.full_schema(shape)["properties"]
    assert not schema.echoed(schema.read(json.dumps({key: good[key] for key in fields}), shape), question)
