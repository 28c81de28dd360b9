"""What comes back: a reply of a model, the outcome of a question, and what it all cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

MOST_TEXT = 2000  # characters kept as evidence of a reply that is no answer


@dataclass(frozen=True)
class Usage:
    """Calls that brought a reply, and their tokens as the server counted them (0 where it does not)."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )


@dataclass(frozen=True)
class Reply:
    """One turn of a model. `refused` is why it did not answer, if it says so; `cut` means it ran out of tokens;
    `reasoned` means that the text is its reasoning, because the answer's place was empty."""

    text: str
    model: str
    usage: Usage
    refused: str = ""
    cut: bool = False
    cached: bool = False
    reasoned: bool = False

    @property
    def empty(self) -> bool:
        """Whether the model neither said anything nor refused to."""
        return not self.text.strip() and not self.refused


@dataclass(frozen=True)
class Outcome:
    """What became of one question.

    answered: `answer` is the validated answer, as plain values.
    undecided: the model could not be brought to a valid answer; `reason` says why.
    failed: no model looked at it, or it said nothing; `reason` says why. `lost` if that may pass (a server that is
    down, an empty reply): the same question may be answered next time.

    `text` is the last reply, word for word; `reasoned` if it is the model's reasoning. `usage` is what the outcome cost
    whenever it was paid for, `paid` the part paid now: nothing for what was cached. `model` is what the server says it
    ran, `keys` the hashes of the turns that were asked.
    """

    tag: str
    status: Literal["answered", "undecided", "failed"]
    answer: dict[str, Any] | None = None
    reason: str = ""
    text: str = ""
    usage: Usage = Usage()
    paid: Usage = Usage()
    model: str = ""
    keys: tuple[str, ...] = ()
    lost: bool = False
    reasoned: bool = False

    @property
    def key(self) -> str:
        """The hash of what was asked; "" for a question that could not be put."""
        return self.keys[0] if self.keys else ""

    @property
    def cached(self) -> bool:
        """Settled without a call."""
        return self.status != "failed" and self.paid.calls == 0

    def evidence(self) -> dict[str, Any]:
        """As plain values to keep: the answer, or why there is none; who gave it; the hash of what was asked."""
        tokens = [self.usage.input_tokens, self.usage.output_tokens]
        found: dict[str, Any] = {"status": self.status, "model": self.model, "key": self.key, "tokens": tokens}
        if self.reasoned:
            found["source"] = "reasoning"
        if self.answer is not None:
            return found | {"answer": self.answer}
        return found | {"reason": self.reason, "text": self.text[:MOST_TEXT]}


class GaveUp(Exception):
    """One question cannot be put to the model; the message says why. The others go on. `passing` if trying again
    later may help."""

    def __init__(self, reason: str, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


@dataclass(frozen=True)
class Spent:
    """The sums of many outcomes. `requests` is what went over the wire, failed tries included; `money` is None without
    prices.

    A server may charge for a request that timed out or was lost; only replies that arrived can be counted.
    """

    questions: int = 0
    answered: int = 0
    undecided: int = 0
    failed: int = 0
    cached: int = 0
    requests: int = 0
    usage: Usage = Usage()
    money: float | None = None

    def plus(self, outcome: Outcome) -> Spent:
        """With one more outcome."""
        return replace(
            self,
            questions=self.questions + 1,
            answered=self.answered + (outcome.status == "answered"),
            undecided=self.undecided + (outcome.status == "undecided"),
            failed=self.failed + (outcome.status == "failed"),
            cached=self.cached + outcome.cached,
            usage=self.usage + outcome.paid,
        )

    def line(self) -> str:
        """For people."""
        parts = [f"{self.questions} questions: {self.answered} answered"]
        parts += [f"{n} {word}" for n, word in ((self.undecided, "undecided"), (self.failed, "failed")) if n]
        parts += [f"{self.cached} from the cache"] if self.cached else []
        parts += [f"{self.requests} requests"] if self.requests else []
        parts += [f"{self.usage.input_tokens} tokens in, {self.usage.output_tokens} out"]
        parts += [f"{self.money:.4f} spent"] if self.money is not None else []
        return ", ".join(parts)
