"""Any model that answers questions: an OpenAI-compatible server, or a model in this process.

    endpoint = Endpoint(base_url="http://localhost:8000/v1", model="Qwen/Qwen3-VL-8B-Instruct")
    with Client(endpoint, cache=Cache("answers.sqlite")) as client:
        spent = client.ask_many(questions, lambda outcome: print(outcome.tag, outcome.answer or outcome.reason))
        print(spent.line())

Many questions are in flight at once, in threads, and the answers arrive in the caller's thread in any order. A question
that cannot be answered is an outcome. An exception means that no question can be answered (a wrong key, a server that
is down).

`open_model` opens the kind of model that a recipe's settings name, and `answers` sends it many questions:

    answers(open_model(endpoint, cache="answers.sqlite"), questions)["pair-7"].answer
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from diptych.errors import UserError
from diptych.llm import vllm as vllm_engine
from diptych.llm.answering import AnswerCache, Streak, answer_one
from diptych.llm.cache import Cache
from diptych.llm.endpoint import Endpoint
from diptych.llm.local import LocalModel, blind
from diptych.llm.question import Message, Outcome, Question, Reply, Spent
from diptych.llm.transport import Transport
from diptych.llm.vllm import Vllm

OnAnswer = Callable[[Outcome], object]


class Client:
    """One endpoint with its rate limits, cache and costs. Threads may share it. It connects with the first question."""

    def __init__(self, endpoint: Endpoint, cache: Cache | None = None, *, keep_undecided: bool = False) -> None:
        """With `keep_undecided`, useless answers are cached too, so that a later run does not ask again."""
        self.endpoint = endpoint
        self._memory = AnswerCache({"model": endpoint.model, "sampling": endpoint.sampling()}, cache, keep_undecided)
        self._transport = Transport(endpoint)
        again = "Correct this and run again, which sends these questions again, or raise stop_after."
        self._streak = Streak(endpoint.base_url, endpoint.stop_after, cache, again, "endpoint_unreachable")
        self._lock = threading.Lock()
        self._spent = Spent()

    def ask(self, question: Question) -> Outcome:
        """Answer one question. Raises UserError where every question would fail."""
        return self._answer(question, threading.Event())

    def ask_many(self, questions: Iterable[Question], on_answer: OnAnswer) -> Spent:
        """Answer all questions, `endpoint.concurrency` at a time, and return the total costs so far.

        Questions are taken when they can be sent, so a generator of a million questions with images does not fill the
        memory. The generator and `on_answer` run in the caller's thread.

        After a UserError (every question would fail) nothing more is sent. Requests in flight are waited for and still
        passed to `on_answer` if they were answered; then the error is raised.
        """
        stop = threading.Event()
        todo: SimpleQueue[Question | None] = SimpleQueue()
        done: SimpleQueue[Outcome | BaseException] = SimpleQueue()
        source = iter(questions)
        workers = in_flight = 0
        problem: UserError | None = None
        try:
            while True:
                while problem is None and in_flight < self.endpoint.concurrency:
                    question = next(source, None)
                    if question is None:
                        break
                    if workers <= in_flight:
                        workers += 1
                        threading.Thread(target=self._work, args=(todo, done, stop), daemon=True).start()
                    todo.put(question)
                    in_flight += 1
                if not in_flight:
                    break
                result = done.get()
                in_flight -= 1
                if isinstance(result, UserError):
                    problem = problem or result
                    stop.set()
                elif isinstance(result, BaseException):
                    raise result
                elif problem is None or result.status != "failed":
                    on_answer(result)
        finally:
            # After an interrupt the threads end by themselves, and they cannot keep the process alive.
            stop.set()
            for _ in range(workers):
                todo.put(None)
        if problem is not None:
            raise problem
        return self.spent

    @property
    def spent(self) -> Spent:
        """The costs of everything that this client has sent so far."""
        with self._lock:
            spent = self._spent
        money = self.endpoint.cost(spent.usage.input_tokens, spent.usage.output_tokens)
        return replace(spent, requests=self._transport.sent, money=money)

    def close(self) -> None:
        """Close the connections, not the cache."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self, question: Question, stop: threading.Event) -> Outcome:
        def ask(messages: tuple[Message, ...]) -> Reply:
            return self._transport.complete(messages, question, stop)

        outcome = answer_one(ask, question, self._memory)
        if stop.is_set() and outcome.status == "failed" and not outcome.paid.calls:
            return outcome  # it failed because of the stop
        with self._lock:
            self._spent = self._spent.plus(outcome)
        self._streak.count(outcome)
        return outcome

    def _work(
        self,
        todo: SimpleQueue[Question | None],
        done: SimpleQueue[Outcome | BaseException],
        stop: threading.Event,
    ) -> None:
        while (question := todo.get()) is not None:
            try:
                done.put(self._answer(question, stop))
            except BaseException as error:
                # Raised in the caller's thread.
                done.put(error)


Model = Client | LocalModel


class NobodyAnswers(UserError):
    """The model cannot answer any question now (server down, wrong key), so every other row would fail in the same way.

    It stops the stage, and no row is marked as failed.
    """

    stops = True


def open_model(
    endpoint: Endpoint | None,
    local: str | None = None,
    vllm: Vllm | None = None,
    *,
    cache: str | Path | None,
    device: str = "auto",
    keep_undecided: bool = True,
    sees: bool = True,
) -> Model:
    """Open one model: an endpoint, a `local` model of transformers on `device`, or one that vLLM runs in this process.

    Answers are stored in the SQLite file `cache`, if one is given. With `keep_undecided` useless answers are stored
    too, so that a resumed run ends with the same rows. A local model for questions without images (not `sees`) may be a
    language model without vision. Raises UserError if the model or the file cannot be opened.
    """
    file = Cache(Path(cache).expanduser()) if cache is not None else None
    options: dict[str, Any] = {"cache": file, "keep_undecided": keep_undecided}
    if vllm is not None:
        return vllm_engine.load(vllm, **options)
    if local is not None:
        model = LocalModel.load(local, device=device, **options)
        if sees and not model.sees:
            raise blind(local)
        return model
    assert endpoint is not None, "settings name one model"
    return Client(endpoint, **options)


def answers(model: Model, questions: Iterable[Question]) -> dict[str, Outcome]:
    """Return the outcome of each question by its tag. Raises NobodyAnswers where every question would fail."""
    outcomes: dict[str, Outcome] = {}
    try:
        model.ask_many(questions, lambda outcome: outcomes.update({outcome.tag: outcome}))
    except UserError as error:
        raise NobodyAnswers(error.code, str(error)) from error
    return outcomes


def check(endpoint: Endpoint | None, local: str | None, vllm: Vllm | None, sees: bool = True) -> None:
    """Raise what `open_model` and the first question would raise, without loading a model or calling a server.

    That is UsageError or UserError for a key that is not set, an absent model or package, or a local model without
    vision where questions have images (`sees`).
    """
    from diptych.utils import models

    if endpoint is not None:
        Transport(endpoint).key()
    if local is not None:
        LocalModel.check(local, sees)
    if vllm is not None:
        vllm_engine.check(vllm)
        models.resolve(vllm.model, "vlm")
