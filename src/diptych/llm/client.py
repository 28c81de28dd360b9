"""The client for any OpenAI-compatible server: questions in, one outcome each, none lost.

    endpoint = Endpoint(base_url="http://localhost:8000/v1", model="Qwen/Qwen3-VL-8B-Instruct")
    with Client(endpoint, cache=Cache("answers.sqlite")) as client:
        spent = client.ask_many(questions, lambda outcome: print(outcome.tag, outcome.answer or outcome.reason))
        print(spent.line())

Many questions are under way at once, in threads; the answers arrive in the caller's thread, in any order. A question
that cannot be answered is an outcome; an exception means that none could be (a wrong key, a server that is down).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from diptych.errors import UserError
from diptych.llm import vllm as vllms
from diptych.llm.cache import Cache
from diptych.llm.endpoint import Endpoint
from diptych.llm.local import BLIND, LocalModel
from diptych.llm.question import Outcome, Question, Spent
from diptych.llm.replies import Streak
from diptych.llm.settle import Memory, settle
from diptych.llm.transport import Transport
from diptych.llm.vllm import Vllm

OnAnswer = Callable[[Outcome], object]


class Client:
    """One endpoint, with its pace, its cache and its bill. Threads may share it; it does not connect until asked."""

    def __init__(self, endpoint: Endpoint, cache: Cache | None = None, *, keep_undecided: bool = False) -> None:
        """`keep_undecided` also remembers what could not be answered, so that a later run does not ask it again."""
        self.endpoint = endpoint
        self._memory = Memory({"model": endpoint.model, "sampling": endpoint.sampling()}, cache, keep_undecided)
        self._transport = Transport(endpoint)
        again = "run again when that is mended (they are asked again), or raise stop_after"
        self._streak = Streak(endpoint.base_url, endpoint.stop_after, cache, again)
        self._lock = threading.Lock()
        self._spent = Spent()

    def ask(self, question: Question) -> Outcome:
        """Settles one question. UserError where every question would fail."""
        return self._settle(question, threading.Event())

    def ask_many(self, questions: Iterable[Question], on_answer: OnAnswer) -> Spent:
        """Settles them all, `endpoint.concurrency` at a time, and gives back what has been spent so far.

        Questions are taken as they can be put, so a generator of a million with pictures does not fill the memory. Both
        it and `on_answer` run in the caller's thread. After a UserError (every question would fail) nothing more is
        sent, what is under way is waited for and still given to `on_answer` if it was settled, and then it is raised.
        """
        stop = threading.Event()
        todo: SimpleQueue[Question | None] = SimpleQueue()
        done: SimpleQueue[Outcome | BaseException] = SimpleQueue()
        source = iter(questions)
        workers = under_way = 0
        problem: UserError | None = None
        try:
            while True:
                while problem is None and under_way < self.endpoint.concurrency:
                    question = next(source, None)
                    if question is None:
                        break
                    if workers <= under_way:
                        workers += 1
                        threading.Thread(target=self._work, args=(todo, done, stop), daemon=True).start()
                    todo.put(question)
                    under_way += 1
                if not under_way:
                    break
                result = done.get()
                under_way -= 1
                if isinstance(result, UserError):
                    problem = problem or result
                    stop.set()
                elif isinstance(result, BaseException):
                    raise result
                elif problem is None or result.status != "failed":
                    on_answer(result)
        finally:
            # Threads under way when we are interrupted end by themselves, and cannot keep the process alive.
            stop.set()
            for _ in range(workers):
                todo.put(None)
        if problem is not None:
            raise problem
        return self.spent

    @property
    def spent(self) -> Spent:
        """Everything this client has asked so far."""
        with self._lock:
            spent = self._spent
        money = self.endpoint.cost(spent.usage.input_tokens, spent.usage.output_tokens)
        return replace(spent, requests=self._transport.sent, money=money)

    def close(self) -> None:
        """Closes the connections, not the cache."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _settle(self, question: Question, stop: threading.Event) -> Outcome:
        outcome = settle(lambda messages: self._transport.complete(messages, question, stop), question, self._memory)
        if stop.is_set() and outcome.status == "failed" and not outcome.paid.calls:
            return outcome  # because of the stop
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
                done.put(self._settle(question, stop))
            except BaseException as error:
                # It is raised in the caller's thread, where somebody can see it.
                done.put(error)


# A model to ask, of whichever kind the settings name, and what became of many questions to it. model =
# open_model(endpoint, cache="answers.sqlite") answers(model, questions)["pair-7"].answer Where nobody answers at all,
# that is one error, which stops the stage: no row is blamed for it.

Model = Client | LocalModel


class NobodyAnswers(UserError):
    """The model can answer nothing at all now (server down, wrong key): whatever row comes next meets the same."""

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
    """The model at an endpoint, the `local` one of transformers on `device`, or the one that vLLM runs in this process;
    exactly one of them is named.

    Answers are kept in the SQLite file `cache`, if there is one; with `keep_undecided` useless ones too, so that a run
    that is continued ends with the rows it would have had. A local model that is asked without images (not `sees`) may
    be a language model without vision. UserError if the model or the file does not open.
    """
    kept = Cache(Path(cache).expanduser()) if cache is not None else None
    options: dict[str, Any] = {"cache": kept, "keep_undecided": keep_undecided}
    if vllm is not None:
        from diptych.llm import local as vllm_engine

        return vllm_engine.load(vllm, **options)
    if local is not None:
        return _opened(local, device, sees, options)
    assert endpoint is not None, "settings name one model"
    return Client(endpoint, **options)


def _opened(name: str, device: str, sees: bool, options: dict[str, Any]) -> LocalModel:
    model = LocalModel.load(name, device=device, **options)
    if sees and not model.sees:
        raise UserError(BLIND.format(name=name))
    return model


def answers(model: Model, questions: Iterable[Question]) -> dict[str, Outcome]:
    """What became of each question, by its tag. NobodyAnswers where every question would fail."""
    found: dict[str, Outcome] = {}
    try:
        model.ask_many(questions, lambda outcome: found.update({outcome.tag: outcome}))
    except UserError as error:
        raise NobodyAnswers(str(error)) from error
    return found


# Whether the language model that settings name can be asked at all: nothing is loaded, no server is called.


def check(endpoint: Endpoint | None, local: str | None, vllm: Vllm | None, sees: bool = True) -> None:
    """What `model.open_model` and the first question would raise: a key that is not set, a model or a package that is
    not there, a local model without vision where images are asked about (`sees`). UsageError or UserError."""
    from diptych.utils import models

    if endpoint is not None:
        Transport(endpoint).key()
    if local is not None:
        LocalModel.check(local, sees)
    if vllm is not None:
        vllms.check(vllm)
        models.resolve(vllm.model, "vlm")
