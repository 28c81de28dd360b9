"""How every model answers questions: ask, validate, give one repair turn, decide.

Each reply is cached by itself as soon as it arrives. So a run that is killed pays again for the calls in flight and for
nothing else, not even for the first of two turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from diptych.errors import UserError
from diptych.llm import schema
from diptych.llm.cache import Cache
from diptych.llm.question import GaveUp, Message, Outcome, Question, Reply, Usage, clean, defused, key_of, user

MAX_ECHO = 8000  # characters of a wrong answer that are sent back with what is wrong with it
SHOWN = 120  # characters of an invalid reply in an error message


@dataclass(frozen=True)
class ChatRequest:
    """What a model answers next: the messages of a question so far, `ready`, and the key of their reply."""

    messages: tuple[Message, ...]
    question: Question
    key: str


Ask = Callable[[tuple[Message, ...]], Reply]  # raises GaveUp for this question, UserError for the whole run
AskBatch = Callable[[Sequence[ChatRequest]], Sequence[Reply | GaveUp]]  # in order; GaveUp is returned, not raised
_Talk = Generator[ChatRequest, Reply, Outcome]


@dataclass(frozen=True)
class AnswerCache:
    """A cache and the model whose replies it stores.

    `identity` (model and sampling) is part of every key. Undecided replies are forgotten and requested again in the
    next run, unless `keep_undecided`.
    """

    identity: dict[str, Any]
    cache: Cache | None = None
    keep_undecided: bool = False


def answer_one(ask: Ask, question: Question, memory: AnswerCache) -> Outcome:
    """Answer one question. Raises UserError only where every question would fail."""

    def ask_batch(requests: Sequence[ChatRequest]) -> list[Reply | GaveUp]:
        try:
            return [ask(request.messages) for request in requests]
        except GaveUp as error:
            return [error]

    (outcome,) = answer_batch(ask_batch, [question], memory)
    return outcome


def answer_batch(ask: AskBatch, questions: Sequence[Question], memory: AnswerCache) -> list[Outcome]:
    """Answer many questions in step, in order.

    All first turns that are not cached are one call of `ask`, and all repairs are a second one. Equal requests are sent
    once.
    """
    outcomes: dict[int, Outcome] = {}
    waiting: dict[int, ChatRequest] = {}
    talks = [_talk(question, memory) for question in questions]

    def advance(number: int, step: Callable[[], ChatRequest]) -> None:
        try:
            waiting[number] = step()
        except StopIteration as end:
            outcomes[number] = end.value

    for number, talk in enumerate(talks):
        advance(number, partial(next, talk))
    while waiting:
        requests, waiting = waiting, {}
        different = {request.key: request for request in requests.values()}
        replies = dict(zip(different, ask(list(different.values())), strict=True))
        for number, request in requests.items():
            reply = replies[request.key]
            if isinstance(reply, GaveUp):
                advance(number, partial(talks[number].throw, reply))
            else:
                advance(number, partial(talks[number].send, reply))
                replies[request.key] = replace(reply, cached=True)  # the next equal request does not pay for it
    return [outcomes[number] for number in range(len(questions))]


def _talk(question: Question, memory: AnswerCache) -> _Talk:
    """Answer a question step by step: yield the requests that are not cached, and take their replies or GaveUp."""
    form = schema.full_schema(question.answer)
    keys: list[str] = []

    def remembered(messages: tuple[Message, ...]) -> Generator[ChatRequest, Reply, Reply]:
        keys.append(key_of(memory.identity, messages, form, question.sample))
        known = memory.cache.get(keys[-1]) if memory.cache is not None else None
        if known is not None:
            return replace(known, cached=True)
        reply = yield ChatRequest(messages, question, keys[-1])
        if memory.cache is not None and not reply.cached:
            memory.cache.put(keys[-1], reply)
        return reply

    try:
        messages = _first_messages(question)
    except UserError as error:
        return Outcome(question.tag, "failed", reason=str(error))
    outcome = yield from _converse(remembered, messages, question)
    if outcome.status == "undecided" and memory.cache is not None and not memory.keep_undecided:
        memory.cache.drop(keys)
    return replace(outcome, keys=tuple(keys))


def _first_messages(question: Question) -> tuple[Message, ...]:
    """Return a question's messages, `ready`, with the form of the answer at the end. UserError for a broken image."""
    *before, last = (message.ready() for message in question.messages)
    assert last.role == "user", "a question ends with the user's turn"
    return (*before, Message("user", (*last.parts, schema.in_words(question.answer))))


def _converse(
    ask: Callable[[tuple[Message, ...]], Generator[ChatRequest, Reply, Reply]],
    messages: tuple[Message, ...],
    question: Question,
) -> _Talk:
    usage, paid, reply, reason = Usage(), Usage(), Reply("", "", Usage()), ""

    def outcome(
        status: Literal["answered", "undecided", "failed"],
        reason: str,
        answer: dict[str, Any] | None = None,
        lost: bool = False,
    ) -> Outcome:
        reasoned = reply.reasoned and status != "failed"
        last = (reply.text, usage, paid, reply.model)
        return Outcome(question.tag, status, answer, reason, *last, lost=lost, reasoned=reasoned)

    for turn in ("first", "repair"):
        try:
            reply = yield from ask(messages)
        except GaveUp as error:
            return outcome("failed", str(error), lost=error.passing)
        usage += reply.usage
        paid += Usage() if reply.cached else reply.usage
        try:
            return outcome("answered", "", _parse(reply, question))
        except schema.Invalid as error:
            reason = f"the answer {error}"
        if reply.refused:
            reason = f"the model refuses: {reply.refused}"
            break
        if reply.cut:
            # The repair would be cut at the same length.
            reason = "the answer is cut off: it is longer than max_tokens"
            break
        if turn == "first":
            messages = (*messages, *_repair(reply.text, reason))
    if reply.empty:
        until = "all of max_tokens" if reply.cut else f"{reply.usage.output_tokens} tokens out"
        return outcome("failed", f"the reply is empty: neither content nor reasoning ({until})", lost=True)
    return outcome("undecided", reason)


def _parse(reply: Reply, question: Question) -> dict[str, Any]:
    if reply.refused:
        raise schema.Invalid("is a refusal")
    answer = schema.read(reply.text, question.answer)
    if repeated := schema.echoed(answer, question):
        raise schema.Invalid(f"repeats the question instead of answering it ({repeated})")
    return answer


def _repair(text: str, reason: str) -> tuple[Message, Message]:
    # These words are part of the keys of cached replies.
    answer = Message("assistant", (defused(clean(text)[:MAX_ECHO]) or "(nothing)",))
    wrong = f"This is no use: {defused(clean(reason))}."
    return answer, user(f"{wrong} Answer again, with the corrected JSON object and nothing else.")


@dataclass
class Streak:
    """Counts questions in a row without a valid answer, and stops the run at `limit` of them (0: never).

    Threads may share it. Answers from the cache say nothing about the model's present state and are not counted.
    """

    model: str
    limit: int
    cache: Cache | None
    remedy: str
    code: str
    """Error code if the last question got no reply at all; invalid replies are `reply_invalid`."""
    failed: str = "got no answer"
    _keys: list[str] = field(default_factory=list)
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, outcome: Outcome) -> None:
        """Add the outcome of a question. Raises UserError when the streak reaches the limit.

        The replies of the streak are then forgotten, and so are those of requests in flight that are no better: the
        next run asks for them again.
        """
        if outcome.cached or not outcome.keys:
            return
        with self._lock:
            if outcome.status == "answered":
                self._count, self._keys = 0, []
                return
            self._count += 1
            self._keys += outcome.keys
            if not 0 < self.limit <= self._count:
                return
            count, keys, self._keys = self._count, self._keys, []
        if self.cache is not None:
            self.cache.drop(keys)
        text = "".join(char for char in " ".join(outcome.text.split()) if char.isprintable())
        shown = f"; the reply was '{text[:SHOWN]}{'…' if len(text) > SHOWN else ''}'" if text else ""
        failed = outcome.status == "failed"
        raise UserError(
            self.code if failed else "reply_invalid",
            f"{self.model}: {count} questions in a row {self.failed if failed else 'got no valid answer'}, the last "
            f"because {outcome.reason}{shown}. {self.remedy}",
        )
