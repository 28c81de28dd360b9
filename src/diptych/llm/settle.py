"""How a question is settled, by whichever model: ask, validate, give one repair turn, decide.

Every reply is cached by itself, the moment it arrives. So a run that is killed pays again for the calls in flight and
for nothing else: not even for the first of two turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from diptych.errors import UserError
from diptych.llm import schema
from diptych.llm.cache import Cache
from diptych.llm.outcome import GaveUp, Outcome, Reply, Usage
from diptych.llm.question import Message, Question, clean, defused, key_of, user

Ask = Callable[[tuple[Message, ...]], Reply]  # raises GaveUp for this question, UserError for the whole run
MAX_ECHO = 8000  # characters of a wrong answer that are sent back with what is wrong with it


@dataclass(frozen=True)
class Memory:
    """A cache, and who answers: `identity` (model and sampling) is part of every key. Undecided questions are forgotten
    and asked anew next time, unless `keep_undecided`."""

    identity: dict[str, Any]
    cache: Cache | None = None
    keep_undecided: bool = False


def settle(ask: Ask, question: Question, memory: Memory) -> Outcome:
    """One question, settled. UserError only where every question would fail."""
    form = schema.told(question.answer)
    keys: list[str] = []

    def remembered(messages: tuple[Message, ...]) -> Reply:
        keys.append(key_of(memory.identity, messages, form, question.sample))
        known = memory.cache.get(keys[-1]) if memory.cache is not None else None
        if known is not None:
            return replace(known, cached=True)
        reply = ask(messages)
        if memory.cache is not None:
            memory.cache.put(keys[-1], reply)
        return reply

    try:
        messages = worded(question)
    except UserError as error:
        return Outcome(question.tag, "failed", reason=str(error))
    outcome = _converse(remembered, messages, question)
    if outcome.status == "undecided" and memory.cache is not None and not memory.keep_undecided:
        memory.cache.drop(keys)
    return replace(outcome, key=keys[0])


def worded(question: Question) -> tuple[Message, ...]:
    """A question's messages made ready, the form of the answer told at their end. UserError for a broken picture."""
    *before, last = (message.ready() for message in question.messages)
    assert last.role == "user", "a question ends with the user's turn"
    return (*before, Message("user", (*last.parts, schema.in_words(question.answer))))


def _converse(ask: Ask, messages: tuple[Message, ...], question: Question) -> Outcome:
    usage, paid, reply, reason = Usage(), Usage(), None, ""
    for turn in ("first", "repair"):
        try:
            reply = ask(messages)
        except GaveUp as error:
            text, model = (reply.text, reply.model) if reply else ("", "")
            return Outcome(question.tag, "failed", None, str(error), text, usage, paid, model)
        usage += reply.usage
        paid += Usage() if reply.cached else reply.usage
        try:
            answer = _read(reply, question)
            return Outcome(question.tag, "answered", answer, "", reply.text, usage, paid, reply.model)
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
    return Outcome(question.tag, "undecided", None, reason, reply.text, usage, paid, reply.model)


def _read(reply: Reply, question: Question) -> dict[str, Any]:
    if reply.refused:
        raise schema.Invalid("is a refusal")
    return schema.read(reply.text, question.answer)


def _repair(text: str, reason: str) -> tuple[Message, Message]:
    said = Message("assistant", (defused(clean(text)[:MAX_ECHO]) or "(nothing)",))
    wrong = f"This is no use: {defused(clean(reason))}."
    return said, user(f"{wrong} Answer again, with the corrected JSON object and nothing else.")
