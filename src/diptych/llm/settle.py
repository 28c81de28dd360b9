"""How questions are settled, by whichever model: ask, validate, give one repair turn, decide.

Every reply is cached by itself, the moment it arrives. So a run that is killed pays again for the calls in flight and
for nothing else: not even for the first of two turns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from diptych.errors import UserError
from diptych.llm import replies as echo
from diptych.llm import schema
from diptych.llm.cache import Cache
from diptych.llm.question import GaveUp, Message, Outcome, Question, Reply, Usage, clean, defused, key_of, user

MAX_ECHO = 8000  # characters of a wrong answer that are sent back with what is wrong with it


@dataclass(frozen=True)
class Turn:
    """What a model is to answer next: the messages of a question so far, `ready`, and the key of their reply."""

    messages: tuple[Message, ...]
    question: Question
    key: str


Ask = Callable[[tuple[Message, ...]], Reply]  # raises GaveUp for this question, UserError for the whole run
AskTogether = Callable[[Sequence[Turn]], Sequence[Reply | GaveUp]]  # in order; GaveUp is given back, not raised
_Talk = Generator[Turn, Reply, Outcome]


@dataclass(frozen=True)
class Memory:
    """A cache, and who answers: `identity` (model and sampling) is part of every key. Undecided questions are forgotten
    and asked anew next time, unless `keep_undecided`."""

    identity: dict[str, Any]
    cache: Cache | None = None
    keep_undecided: bool = False


def settle(ask: Ask, question: Question, memory: Memory) -> Outcome:
    """One question, settled. UserError only where every question would fail."""

    def alone(turns: Sequence[Turn]) -> list[Reply | GaveUp]:
        try:
            return [ask(turn.messages) for turn in turns]
        except GaveUp as error:
            return [error]

    (outcome,) = settle_together(alone, [question], memory)
    return outcome


def settle_together(ask: AskTogether, questions: Sequence[Question], memory: Memory) -> list[Outcome]:
    """Many questions, settled in step: all first turns that the cache does not know are one call of `ask`, all repairs
    are a second. What two of them have in common is asked once."""
    outcomes: dict[int, Outcome] = {}
    waiting: dict[int, Turn] = {}
    talks = [_talk(question, memory) for question in questions]

    def advance(number: int, step: Callable[[], Turn]) -> None:
        try:
            waiting[number] = step()
        except StopIteration as end:
            outcomes[number] = end.value

    for number, talk in enumerate(talks):
        advance(number, partial(next, talk))
    while waiting:
        turns, waiting = waiting, {}
        asked = {turn.key: turn for turn in turns.values()}
        replies = dict(zip(asked, ask(list(asked.values())), strict=True))
        for number, turn in turns.items():
            reply = replies[turn.key]
            if isinstance(reply, GaveUp):
                advance(number, partial(talks[number].throw, reply))
            else:
                advance(number, partial(talks[number].send, reply))
                replies[turn.key] = replace(reply, cached=True)  # the next to want it does not pay for it
    return [outcomes[number] for number in range(len(questions))]


def _talk(question: Question, memory: Memory) -> _Talk:
    """A question on its way: yields the turns that the cache cannot answer and takes their replies, or GaveUp."""
    form = schema.told(question.answer)
    keys: list[str] = []

    def remembered(messages: tuple[Message, ...]) -> Generator[Turn, Reply, Reply]:
        keys.append(key_of(memory.identity, messages, form, question.sample))
        known = memory.cache.get(keys[-1]) if memory.cache is not None else None
        if known is not None:
            return replace(known, cached=True)
        reply = yield Turn(messages, question, keys[-1])
        if memory.cache is not None and not reply.cached:
            memory.cache.put(keys[-1], reply)
        return reply

    try:
        messages = worded(question)
    except UserError as error:
        return Outcome(question.tag, "failed", reason=str(error))
    outcome = yield from _converse(remembered, messages, question)
    if outcome.status == "undecided" and memory.cache is not None and not memory.keep_undecided:
        memory.cache.drop(keys)
    return replace(outcome, keys=tuple(keys))


def worded(question: Question) -> tuple[Message, ...]:
    """A question's messages made ready, the form of the answer told at their end. UserError for a broken picture."""
    *before, last = (message.ready() for message in question.messages)
    assert last.role == "user", "a question ends with the user's turn"
    return (*before, Message("user", (*last.parts, schema.in_words(question.answer))))


def _converse(
    ask: Callable[[tuple[Message, ...]], Generator[Turn, Reply, Reply]],
    messages: tuple[Message, ...],
    question: Question,
) -> _Talk:
    usage, paid, reply, reason = Usage(), Usage(), None, ""
    for turn in ("first", "repair"):
        try:
            reply = yield from ask(messages)
        except GaveUp as error:
            text, model = (reply.text, reply.model) if reply else ("", "")
            said = str(error)
            return Outcome(question.tag, "failed", None, said, text, usage, paid, model, lost=error.passing)
        usage += reply.usage
        paid += Usage() if reply.cached else reply.usage
        try:
            answer = _read(reply, question)
            text, model, reasoned = reply.text, reply.model, reply.reasoned
            return Outcome(question.tag, "answered", answer, "", text, usage, paid, model, reasoned=reasoned)
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
    assert reply is not None
    text, model, reasoned = reply.text, reply.model, reply.reasoned
    if reply.empty:
        tokens = f"{reply.usage.output_tokens} tokens out"
        until = "all of max_tokens" if reply.cut else tokens
        said = f"the reply is empty: neither content nor reasoning ({until})"
        return Outcome(question.tag, "failed", None, said, text, usage, paid, model, lost=True)
    return Outcome(question.tag, "undecided", None, reason, text, usage, paid, model, reasoned=reasoned)


def _read(reply: Reply, question: Question) -> dict[str, Any]:
    if reply.refused:
        raise schema.Invalid("is a refusal")
    answer = schema.read(reply.text, question.answer)
    if repeated := echo.found(answer, question):
        raise schema.Invalid(f"repeats the question instead of answering it ({repeated})")
    return answer


def _repair(text: str, reason: str) -> tuple[Message, Message]:
    said = Message("assistant", (defused(clean(text)[:MAX_ECHO]) or "(nothing)",))
    wrong = f"This is no use: {defused(clean(reason))}."
    return said, user(f"{wrong} Answer again, with the corrected JSON object and nothing else.")
