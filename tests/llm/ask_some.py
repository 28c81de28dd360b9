"""Asks a server some questions through a cache, as a process of its own: `python ask_some.py URL CACHE COUNT`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pydantic import BaseModel

from diptych.llm.cache import Cache
from diptych.llm.client import Client
from diptych.llm.endpoint import Endpoint
from diptych.llm.question import Outcome, Question, user

CONCURRENCY = 8


class Number(BaseModel):
    """The number that was asked for."""

    number: int


def questions(count: int) -> Iterator[Question]:
    """Each asks for its own number."""
    return (Question((user(f"number {n}"),), Number, tag=str(n)) for n in range(count))


def ask(url: str, cache: str, count: int) -> list[Outcome]:
    """What became of them."""
    endpoint = Endpoint(base_url=url, model="tiny", concurrency=CONCURRENCY, backoff=0.01, timeout=60.0)
    outcomes: list[Outcome] = []
    with Cache(cache) as kept, Client(endpoint, kept) as client:
        client.ask_many(questions(count), outcomes.append)
    return outcomes


if __name__ == "__main__":
    ask(sys.argv[1], sys.argv[2], int(sys.argv[3]))
