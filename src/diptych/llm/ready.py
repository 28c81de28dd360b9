"""Whether the language model that settings name can be asked at all: nothing is loaded, no server is called."""

from __future__ import annotations

from diptych.llm import vllm as vllms
from diptych.llm.endpoint import Endpoint
from diptych.llm.local import LocalModel
from diptych.llm.transport import Transport
from diptych.llm.vllm import Vllm


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
