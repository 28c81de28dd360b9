"""Questions that ask for a number, and what a server should answer to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from diptych.llm.endpoint import Endpoint
from diptych.llm.question import Question, user
from llm.ask_some import Number
from llm.chat_server import Act, Call, say

Make = Callable[..., Endpoint]
"""What the fixture `endpoint` gives."""


def number(n: int, *more: Any, sample: int = 0) -> Question:
    """Asks for `n`; `more` are further parts of the message."""
    return Question((user(f"number {n}", *more),), Number, tag=str(n), sample=sample)


def number_of(call: Call) -> int:
    """The number that a call asks for."""
    found = re.search(r"number (\d+)", call.text())
    assert found
    return int(found[1])


def right(call: Call, delay: float = 0.0) -> Act:
    """The answer it should get."""
    return say({"number": number_of(call)}, delay)
