"""A model that vLLM runs inside this process: its settings, as a recipe has them, and the engine.

    curate: {vlm: {vllm: {model: Qwen/Qwen3-VL-8B-Instruct, tensor_parallel_size: 2}}}

    model = load(Vllm(model="Qwen/Qwen3-VL-8B-Instruct"), cache=Cache("answers.sqlite"))
    model.ask_many(questions, on_answer)

The engine is `vllm.LLM(...)` once, and `LLM.chat` for each batch of requests. Messages are those of an endpoint, with
images as data URLs, and decoding is constrained to the answer's JSON schema. Answers are validated, repaired and cached
as for any other model (`answering`, `local`).

The settings are plain values, so they can be checked without vLLM and without a GPU. Keys are vLLM's names. Written
after the sources of vLLM 0.20.0 and 0.33.0 (`guided_decoding`, the older name of `StructuredOutputsParams`, ended with
0.12). `tests/llm/test_vllm_contract.py` runs it on machines with vLLM and a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from diptych.errors import UsageError, UserError, describe
from diptych.llm import schema
from diptych.llm.answering import ChatRequest
from diptych.llm.cache import Cache
from diptych.llm.endpoint import secret
from diptych.llm.local import LocalModel
from diptych.llm.question import GaveUp, Question, Reply, Usage, body, clean
from diptych.utils import models

# Arguments that `extra` cannot have, because they have keys here.
RESERVED = frozenset({"model", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len"})
# By default vLLM logs to stdout, where `--json` prints, and reports its use to its authors. Variables that are set stay
# as they are.
ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
# For a worker that may be killed and does nothing afterwards: the engine then runs in the worker. As a separate process
# it would outlive the worker and keep the GPU's memory. A run that trains afterwards needs the separate process, which
# is the default.
IN_WORKERS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
UNFINISHED = ("abort", "error")  # finish reasons that leave no answer; the others are stop, length and repetition


class Vllm(BaseModel):
    """A model that vLLM runs on the GPUs of the calling process: this one, or each of a stage's Ray workers."""

    # See `Endpoint`.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    model: str = Field(min_length=1)
    """Folder or hub name of the model."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """Number of GPUs of one machine that share the model. Each Ray worker requests as many."""
    gpu_memory_utilization: float = Field(default=0.8, gt=0, le=1)
    """Share of each GPU's memory that vLLM takes, weights included. The stage's other models need the rest."""
    max_model_len: int | None = Field(default=8192, ge=1)
    """Maximum length of a question with its answer, in tokens. Null uses the model's limit, which may not fit in
    memory."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature. 0 is greedy decoding."""
    max_tokens: int = Field(default=2048, ge=1)
    """Maximum length of an answer, in tokens."""
    batch_size: int = Field(default=256, ge=1)
    """Questions passed to vLLM at once. vLLM runs as many of them together as fit in memory."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the model's chat template, such as `{enable_thinking: false}`."""
    extra: dict[str, Any] = {}
    """Further arguments of `vllm.LLM`, such as `{quantization: fp8, limit_mm_per_prompt: {image: 2}}`."""

    @field_validator("extra")
    @classmethod
    def _not_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED & value.keys()):
            raise ValueError(f"cannot have {', '.join(taken)}; set these keys of vllm instead")
        if "trust_remote_code" in value:
            raise ValueError("cannot have trust_remote_code; models that bring code are not run")
        if name := secret(value):
            raise ValueError(f"has an API key in '{name}'; leave it out and set its environment variable instead")
        return value

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Return the arguments of `vllm.LLM` for the model in `folder`."""
        arguments: dict[str, Any] = {
            "model": str(folder),
            "tensor_parallel_size": self.tensor_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "load_format": "safetensors",
        }
        if self.max_model_len is not None:
            arguments["max_model_len"] = self.max_model_len
        if self.tensor_parallel_size > 1:
            # Local processes instead of Ray's, also in a Ray worker, because its GPUs are on that machine.
            arguments["distributed_executor_backend"] = "mp"
        return arguments | self.extra

    def parameters(self, question: Question) -> dict[str, Any]:
        """Return the arguments of `SamplingParams` for a question.

        `structured_outputs` has the arguments of `StructuredOutputsParams`: the JSON schema that constrains decoding.
        """
        return {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": question.sample,
            "structured_outputs": {"json": schema.enforced_schema(question.answer)},
        }

    def sampling(self) -> dict[str, Any]:
        """Return the settings that change an answer, besides model and messages. GPUs and batch sizes do not."""
        names = ("temperature", "max_tokens", "chat_template_kwargs", "extra")
        return {name: getattr(self, name) for name in names}


def problem(gpus: int = 1) -> str:
    """Return why vLLM cannot run a model on `gpus` GPUs here, and what to do; "" if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; pip install 'diptych[vllm]'"
    import torch

    visible = torch.cuda.device_count()
    if visible < gpus:
        few = f"vLLM needs {gpus} GPU{'s' if gpus > 1 else ''}, and {visible or 'none'} can be seen here"
        return f"{few}; lower tensor_parallel_size" if visible else few
    return ""


def check(settings: Vllm) -> None:
    """Raise UsageError if vLLM is not installed or sees too few GPUs."""
    if why := problem(settings.tensor_parallel_size):
        code = "device_unavailable" if importlib.util.find_spec("vllm") else "dependency_missing"
        raise UsageError(code, f"vllm: {settings.model}: {why}, or use an endpoint or a local model instead")


def load(settings: Vllm, *, cache: Cache | None = None, keep_undecided: bool = False) -> LocalModel:
    """Open the model on this process's GPUs.

    Raises UsageError if vLLM or a GPU is missing, UserError if vLLM cannot run the model.
    """
    check(settings)
    folder = models.resolve(settings.model, "vlm")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm  # pyright: ignore[reportMissingImports]

    try:
        engine = vllm.LLM(**settings.arguments(folder))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            "model_unsupported",
            f"vLLM cannot run '{settings.model}' ({describe(error)}). Check gpu_memory_utilization, max_model_len and "
            "extra in the section vllm, and vLLM's log above.",
        ) from error
    return LocalModel(
        _Engine(engine, settings),
        {"engine": "vllm", "model": models.fingerprint(folder), "sampling": settings.sampling()},
        cache,
        keep_undecided=keep_undecided,
        batch_size=settings.batch_size,
    )


class _Engine:
    """Generates the model's next turns in batches."""

    def __init__(self, engine: Any, settings: Vllm) -> None:
        from vllm import exceptions  # pyright: ignore[reportMissingImports]

        self.engine = engine
        self.settings = settings
        self.name = Path(settings.model).name
        # The error for a rejected request: ValueError in older versions, a class of vLLM's in newer ones.
        self.refusals = (ValueError, getattr(exceptions, "VLLMClientError", ValueError))

    def __call__(self, requests: Sequence[ChatRequest]) -> list[Reply | GaveUp]:
        """Return the next turn of each request.

        Errors of the engine itself are raised. The engine is unusable then, and another worker, or another call of the
        command, takes the shard.
        """
        try:
            return self._batch(requests)
        except self.refusals as error:
            # One rejected request (too long, an unreadable image) ends the whole call before anything runs.
            if len(requests) == 1:
                return [GaveUp(f"vLLM refuses this question ({describe(error)})")]
            half = len(requests) // 2
            return [*self(requests[:half]), *self(requests[half:])]

    def _batch(self, requests: Sequence[ChatRequest]) -> list[Reply | GaveUp]:
        outputs = self.engine.chat(
            [body(request.messages) for request in requests],
            sampling_params=[self._parameters(request.question) for request in requests],
            use_tqdm=False,
            chat_template_kwargs=self.settings.chat_template_kwargs or None,
        )
        assert len(outputs) == len(requests), f"vLLM returned {len(outputs)} outputs for {len(requests)} questions"
        return [self._reply(output) for output in outputs]

    def _parameters(self, question: Question) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore[reportMissingImports]

        values = self.settings.parameters(question)
        form = StructuredOutputsParams(**values["structured_outputs"])
        return SamplingParams(**values | {"structured_outputs": form})

    def _reply(self, output: Any) -> Reply | GaveUp:
        first = output.outputs[0]
        if first.finish_reason in UNFINISHED:
            return GaveUp(f"vLLM did not finish this question ({first.finish_reason})", passing=True)
        usage = Usage(1, len(output.prompt_token_ids or ()), len(first.token_ids))
        return Reply(clean(first.text), self.name, usage, cut=first.finish_reason == "length")
