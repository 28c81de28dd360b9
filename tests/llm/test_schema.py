"""The form of an answer, and reading it out of what models say."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from diptych.llm import schema
from diptych.llm.schema import Invalid, json_object, read


class Panel(BaseModel):
    """A panel, described."""

    title: str = Field(min_length=3, pattern="^[a-z]+$")
    default: int = Field(default=3, ge=0, le=4)


class Answer(BaseModel):
    """What a judge says."""

    kind: Literal["cat"]
    same: Literal["yes", "no"]
    panels: Annotated[list[Panel], Field(max_length=2)]
    note: str | None = None
    first: Panel = Field(description="the left one")


class Small(BaseModel):
    same: bool
    score: float


class Node(BaseModel):
    below: list[Node]


GOOD = {"same": True, "score": 0.5}


def test_what_servers_enforce_is_closed_complete_and_without_references() -> None:
    found = schema.enforced_schema(Answer)
    panel = found["properties"]["panels"]["items"]
    assert "$" not in json.dumps(found)
    assert found["required"] == ["kind", "same", "panels", "note", "first"]
    assert found["additionalProperties"] is False
    assert panel["required"] == ["title", "default"]  # a field's name is not a keyword
    assert panel["properties"]["title"] == {"type": "string"}
    assert panel["properties"]["default"] == {"type": "integer", "minimum": 0, "maximum": 4}
    assert found["properties"]["kind"] == {"type": "string", "enum": ["cat"]}
    assert found["properties"]["first"]["description"] == "the left one"


def test_what_the_model_is_told_keeps_every_constraint() -> None:
    title = schema.full_schema(Answer)["properties"]["first"]["properties"]["title"]
    assert (title["minLength"], title["pattern"]) == (3, "^[a-z]+$")
    assert json.dumps(schema.full_schema(Answer)) in schema.in_words(Answer)


def test_a_type_that_contains_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="Node contains itself"):
        schema.full_schema(Node)


def test_the_form_is_asked_for_as_the_server_can_take_it() -> None:
    whole = schema.response_format(Small, "json_schema")["response_format"]
    assert whole["json_schema"] == {"name": "Small", "strict": True, "schema": schema.enforced_schema(Small)}
    assert schema.response_format(Small, "json_object") == {"response_format": {"type": "json_object"}}
    assert schema.response_format(Small, "none") == {}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        f"```json\n{json.dumps(GOOD, indent=1)}\n```",
        f"Sure! Here it is: {json.dumps(GOOD)} Let me know.",
        f'<think>maybe {{\'same\': 0}} or {{"same": false, "score": 0}}</think>{json.dumps(GOOD)}',
        f'First I thought {{"same": false, "score": 0.1}}, but then: {json.dumps(GOOD)}',
        f"The {{panel}} of set {{1, 2}}: {json.dumps(GOOD)}",
        json.dumps(GOOD | {"thought": "extra"}),
    ],
)
def test_an_answer_is_found_among_what_models_say_around_it(text: str) -> None:
    assert read(text, Small) == GOOD


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("no idea", "holds no JSON object"),
        ("[1, 2]", "holds no JSON object"),
        ('{"same": true, "score": 0.', "is not valid JSON"),
        ('{"outer": {"same": true, "score": 1.0}, "x": tr', "is not valid JSON"),  # the inside is no answer
        ('{"same": true, "same": false, "score": 1}', "a key is there twice"),
        ('{"same": true, "score": NaN}', "NaN is not JSON"),
        ('{"same": "true", "score": 1}', "same"),
        ('{"same": 1, "score": 1}', "same"),
        ('{"score": 1}', "same: Field required"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_answer_says_why(text: str, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        read(text, Small)


@given(st.text())
def test_no_text_breaks_the_reader(text: str) -> None:
    with contextlib.suppress(Invalid):
        read(text, Small)


@given(
    st.dictionaries(st.text(min_size=1), st.none() | st.booleans() | st.integers() | st.text(), min_size=1),
    st.text(alphabet=st.characters(exclude_characters="{}<>")),
)
def test_any_object_survives_prose_around_it(value: dict[str, object], prose: str) -> None:
    assert json_object(f"{prose}{json.dumps(value)}{prose}") == value


def test_escapes_that_a_terminal_obeys_or_nobody_sees_do_not_get_through() -> None:
    class Words(BaseModel):
        line: str
        more: list[str]

    reply = r'{"line": "a \u001b[31mcat\u0000 \u202etac", "more": ["\ud83d\ude00", "\ud83d", "two\nlines"]}'
    assert schema.read(reply, Words) == {"line": "a [31mcat tac", "more": ["😀", "?", "two\nlines"]}
