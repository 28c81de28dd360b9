"""The thin layer over vLLM's offline engine: `vllm.LLM(...)` once, and `LLM.chat` for each batch of turns.

    model = load(Vllm(model="Qwen/Qwen3-VL-8B-Instruct"), cache=Cache("answers.sqlite"))
    model.ask_many(questions, on_answer)

Messages are those that an endpoint gets, pictures as data URLs; decoding is held to the answer's JSON schema. What
comes back is validated, repaired and cached as any other model's answer (`settle`, `local`). Written by the sources of
vLLM 0.20.0 and 0.33.0; `tests/llm/test_vllm_contract.py` runs it where vLLM and a GPU are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.llm.cache import Cache
from diptych.llm.local import LocalModel
from diptych.llm.outcome import GaveUp, Reply, Usage
from diptych.llm.question import body, clean
from diptych.llm.settle import Turn
from diptych.llm.vllm import ENVIRONMENT, Vllm, check
from diptych.utils import models

UNFINISHED = ("abort", "error")  # reasons to finish that leave no answer; the others are stop, length, repetition


def load(settings: Vllm, *, cache: Cache | None = None, keep_undecided: bool = False) -> LocalModel:
    """Opens the model on this process's GPUs. UsageError where vLLM or a GPU is missing, UserError if it fails."""
    check(settings)
    folder = models.resolve(settings.model, "vlm")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm  # pyright: ignore[reportMissingImports]

    try:
        engine = vllm.LLM(**settings.arguments(folder))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"vLLM cannot run '{settings.model}' ({_line(error, 300)}); see gpu_memory_utilization, max_model_len and "
            "extra in the section vllm, and vLLM's own log above"
        ) from error
    return LocalModel(
        _Generate(engine, settings),
        {"engine": "vllm", "model": models.fingerprint(folder), "sampling": settings.sampling()},
        cache,
        keep_undecided=keep_undecided,
        batch_size=settings.batch_size,
    )


class _Generate:
    """The model's next turns, together."""

    def __init__(self, engine: Any, settings: Vllm) -> None:
        from vllm import exceptions  # pyright: ignore[reportMissingImports]

        self.engine = engine
        self.settings = settings
        self.name = Path(settings.model).name
        # What vLLM says of a request that it does not take: a ValueError at first, a class of its own later.
        self.refusals = (ValueError, getattr(exceptions, "VLLMClientError", ValueError))

    def __call__(self, turns: Sequence[Turn]) -> list[Reply | GaveUp]:
        """What goes wrong with the engine itself is raised: it is good for nothing then, and another worker, or
        another call of the command, takes the shard."""
        try:
            return self._together(turns)
        except self.refusals as error:
            # One that it refuses (too long, a picture it cannot read) ends the whole call, before anything ran.
            if len(turns) == 1:
                return [GaveUp(f"vLLM refuses this question ({_line(error, 200)})")]
            half = len(turns) // 2
            return [*self(turns[:half]), *self(turns[half:])]

    def _together(self, turns: Sequence[Turn]) -> list[Reply | GaveUp]:
        outputs = self.engine.chat(
            [body(turn.messages) for turn in turns],
            sampling_params=[self._parameters(turn) for turn in turns],
            use_tqdm=False,
            chat_template_kwargs=self.settings.chat_template_kwargs or None,
        )
        assert len(outputs) == len(turns), f"vLLM gave {len(outputs)} outputs for {len(turns)} questions"
        return [self._reply(output) for output in outputs]

    def _parameters(self, turn: Turn) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

        told = self.settings.parameters(turn.question)
        return SamplingParams(**told | {"structured_outputs": StructuredOutputsParams(**told["structured_outputs"])})

    def _reply(self, output: Any) -> Reply | GaveUp:
        said = output.outputs[0]
        if said.finish_reason in UNFINISHED:
            return GaveUp(f"vLLM did not finish this question ({said.finish_reason})", passing=True)
        usage = Usage(1, len(output.prompt_token_ids or ()), len(said.token_ids))
        return Reply(clean(said.text), self.name, usage, cut=said.finish_reason == "length")


def _line(error: Exception, most: int) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:most]
