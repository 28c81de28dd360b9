"""What vLLM is told: a model that runs inside the process that asks, as a recipe can hold it, and what follows from it.

    curate: {vlm: {vllm: {model: Qwen/Qwen3-VL-8B-Instruct, tensor_parallel_size: 2}}}

Plain values throughout, so that all of it can be checked without vLLM and without a GPU; `vllm_engine` puts them to
vLLM, and nothing else imports it. Keys are vLLM's own names. The sources of vLLM 0.20.0 and 0.33.0 were read: `LLM(…)`,
`LLM.chat`, `SamplingParams`, `StructuredOutputsParams` (`guided_decoding`, its older name, ended with 0.12).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from diptych.errors import UsageError
from diptych.llm import schema
from diptych.llm.endpoint import secret
from diptych.llm.question import Question

# What `extra` cannot say, because it is a key of its own here.
RESERVED = frozenset({"model", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len"})
# Its log goes to stdout, where `--json` speaks, and it reports its use to its authors, unless told otherwise. What
# somebody has set stays.
ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
# For a worker that may be killed and that does nothing after: the engine is then no process of its own, which would
# outlive its parent and hold the GPU's memory. In a run that trains afterwards it should be one, and is by default.
IN_WORKERS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class Vllm(BaseModel):
    """A model that vLLM runs on the GPUs of the process that asks: this one, or each of a stage's Ray workers."""

    # As `Endpoint`.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    model: str = Field(min_length=1)
    """A folder, or a hub name."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """GPUs that it is spread over, of one machine. A Ray worker asks for as many."""
    gpu_memory_utilization: float = Field(default=0.8, gt=0, le=1)
    """Share of each GPU's memory that it takes, weights included; the stage's other models need some beside it."""
    max_model_len: int | None = Field(default=8192, ge=1)
    """Longest question with its answer, in tokens; null is the model's own, which may not fit into the memory."""
    temperature: float = Field(default=0.0, ge=0)
    """Of sampling."""
    max_tokens: int = Field(default=2048, ge=1)
    """Longest answer."""
    batch_size: int = Field(default=256, ge=1)
    """Questions it is given at once; it runs as many of them together as the memory holds."""
    chat_template_kwargs: dict[str, Any] = {}
    """For the model's chat template, such as {enable_thinking: false}."""
    extra: dict[str, Any] = {}
    """More arguments of `vllm.LLM`, such as {quantization: fp8, limit_mm_per_prompt: {image: 2}}."""

    @field_validator("extra")
    @classmethod
    def _not_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED & value.keys()):
            raise ValueError(f"cannot hold {', '.join(taken)}: they are keys of their own")
        if "trust_remote_code" in value:
            raise ValueError("cannot hold trust_remote_code: models whose files bring code of their own are not run")
        if name := secret(value):
            raise ValueError(f"holds a key in '{name}'; leave it out, and set the environment variable that it is for")
        return value

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Of `vllm.LLM`, for the model that lies in `folder`."""
        told: dict[str, Any] = {
            "model": str(folder),
            "tensor_parallel_size": self.tensor_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "load_format": "safetensors",
        }
        if self.max_model_len is not None:
            told["max_model_len"] = self.max_model_len
        if self.tensor_parallel_size > 1:
            # Processes of its own beside it, and not Ray's, even where it runs in a Ray worker: its GPUs are there.
            told["distributed_executor_backend"] = "mp"
        return told | self.extra

    def parameters(self, question: Question) -> dict[str, Any]:
        """Of `SamplingParams`, for a question; `structured_outputs` holds the arguments of `StructuredOutputsParams`:
        the answer's JSON schema, which no token that is sampled may leave."""
        return {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": question.sample,
            "structured_outputs": {"json": schema.enforced(question.answer)},
        }

    def sampling(self) -> dict[str, Any]:
        """What bears on the answer besides model and messages. How it is spread and batched does not."""
        names = ("temperature", "max_tokens", "chat_template_kwargs", "extra")
        return {name: getattr(self, name) for name in names}


def problem(gpus: int = 1) -> str:
    """Why vLLM cannot run a model on so many GPUs here, and what to do; empty if it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; pip install 'diptych[vllm]'"
    import torch

    there = torch.cuda.device_count()
    if there < gpus:
        few = f"vLLM needs {gpus} GPU{'s' if gpus > 1 else ''}, and {there or 'none'} can be seen here"
        return f"{few}; lower tensor_parallel_size" if there else few
    return ""


def check(settings: Vllm) -> None:
    """UsageError where vLLM is not installed, or sees too few GPUs."""
    if said := problem(settings.tensor_parallel_size):
        raise UsageError(f"vllm: {settings.model}: {said}, or name an endpoint or a local model in its place")
