"""A model to ask, of whichever kind the settings name, and what became of many questions to it.

    model = open_model(endpoint, cache="answers.sqlite")
    answers(model, questions)["pair-7"].answer

Where nobody answers at all, that is one error, which stops the stage: no row is blamed for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.llm.cache import Cache
from diptych.llm.client import Client
from diptych.llm.endpoint import Endpoint
from diptych.llm.local import BLIND, LocalModel
from diptych.llm.outcome import Outcome
from diptych.llm.question import Question
from diptych.llm.vllm import Vllm

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
        from diptych.llm import vllm_engine

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
