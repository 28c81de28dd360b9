"""Stands in for vLLM where it cannot be installed: its names, as `vllm_api.json` records them, over a real model of
transformers. Messages, pictures, chat template and tokens are real, and the model decides what the schema leaves open.

What is not: speed, scheduling, GPUs, and vLLM's own code. `test_vllm_contract.py` is for that.
"""

from __future__ import annotations

import base64
import importlib.machinery
import io
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

API: dict[str, list[str]] = json.loads((Path(__file__).parent / "vllm_api.json").read_text("utf8"))
LETTERS = 3  # of each string


class Refused(Exception):
    """vLLM's `VLLMClientError`: no ValueError, as since 0.3x."""


def named(kind: str, values: dict[str, Any]) -> SimpleNamespace:
    """The arguments of a call; TypeError for one that not every vLLM has."""
    if unknown := values.keys() - set(API[kind]):
        raise TypeError(f"{kind} got unexpected arguments {sorted(unknown)}")
    return SimpleNamespace(**values)


class LLM:
    """The engine. `calls` are the sizes of the batches that ran; `broken` is raised by the next."""

    made: ClassVar[list[LLM]] = []

    def __init__(self, **values: Any) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.told = named("LLM", values)
        if self.told.gpu_memory_utilization > 0.95:
            raise ValueError("Free memory on device cuda:0 is less than desired\nGPU memory utilization")
        self.model: Any = AutoModelForImageTextToText.from_pretrained(self.told.model).eval()
        self.processor: Any = AutoProcessor.from_pretrained(self.told.model)
        self.calls: list[int] = []
        self.broken: Exception | None = None
        self.made.append(self)

    def chat(self, messages: list[Any], **values: Any) -> list[SimpleNamespace]:
        told = named("LLM.chat", {"messages": messages, **values})
        assert told.use_tqdm is False and len(told.sampling_params) == len(messages)
        prompts = [self._rendered(conversation) for conversation in messages]  # all before any runs
        if self.broken is not None:
            raise self.broken
        self.calls.append(len(messages))
        return [self._one(prompt, told_) for prompt, told_ in zip(prompts, told.sampling_params, strict=True)]

    def _rendered(self, conversation: list[dict[str, Any]]) -> Any:
        told = [{"role": turn["role"], "content": parts(turn["content"])} for turn in conversation]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        prompt = self.processor.apply_chat_template(told, **how)
        if (length := prompt["input_ids"].shape[1]) > self.told.max_model_len:
            raise Refused(f"The decoder prompt (length {length}) is longer than the maximum model length")
        return prompt

    def _one(self, prompt: Any, told: SimpleNamespace) -> SimpleNamespace:
        pen = Pen(self.model, self.processor.tokenizer, prompt, told)
        try:
            pen.write(told.structured_outputs.json)
            reason = "stop"
        except Cut:
            reason = "length"
        said = named("CompletionOutput", {"text": pen.text, "token_ids": pen.tokens, "finish_reason": reason})
        ids = prompt["input_ids"][0].tolist()
        return named("RequestOutput", {"prompt_token_ids": ids, "outputs": [said]})


class Cut(Exception):
    """Out of tokens."""


class Pen:
    """Writes JSON of a schema, a token a byte. What the schema leaves open is the model's likeliest next token, or is
    drawn from its probabilities where the temperature is above 0."""

    def __init__(self, model: Any, tokenizer: Any, prompt: Any, told: SimpleNamespace) -> None:
        import torch

        self.model, self.tokenizer, self.told = model, tokenizer, told
        self.generator = torch.Generator().manual_seed(told.seed)
        self.text, self.tokens = "", []
        self._see(**prompt)

    def _see(self, **inputs: Any) -> None:
        import torch

        with torch.inference_mode():
            found = self.model(**inputs, use_cache=True)
        self.past, self.logits = found.past_key_values, found.logits[0, -1]

    def put(self, text: str) -> None:
        """These very tokens, whatever the model thinks."""
        import torch

        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        room = self.told.max_tokens - len(self.tokens)
        self.tokens += ids[:room]
        self.text = self.tokenizer.decode(self.tokens)
        if len(ids) > room:
            raise Cut
        self._see(input_ids=torch.tensor([ids]), past_key_values=self.past)

    def choose(self, options: list[str]) -> None:
        """One of several texts that begin differently."""
        import torch

        first = [self.tokenizer(option, add_special_tokens=False)["input_ids"][0] for option in options]
        logits = self.logits[first]
        if self.told.temperature:
            chances = torch.softmax(logits / self.told.temperature, -1)
            self.put(options[int(torch.multinomial(chances, 1, generator=self.generator))])
        else:
            self.put(options[int(logits.argmax())])

    def write(self, schema: dict[str, Any]) -> None:
        kind = schema.get("type")
        if kind == "object":
            for n, (name, below) in enumerate(schema["properties"].items()):
                self.put(f'{", " if n else "{"}"{name}": ')
                self.write(below)
            self.put("}")
        elif kind == "array":
            for n in range(schema["minItems"]):
                self.put(", " if n else "[")
                self.write(schema["items"])
            self.put("]")
        elif kind == "boolean":
            self.choose(["true", "false"])
        elif kind == "integer":
            self.choose([str(n) for n in range(schema.get("minimum", 0), schema.get("maximum", 9) + 1)])
        elif kind == "number":
            self.choose([f"{n}.5" for n in range(10)])
        else:
            assert kind == "string", schema
            self.put('"')
            for _ in range(LETTERS):
                self.choose([chr(letter) for letter in range(ord("a"), ord("z") + 1)])
            self.put('"')


def parts(content: Any) -> list[dict[str, Any]]:
    """A turn's content as processors take it: pictures opened from their data URLs."""
    from PIL import Image

    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    told: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text":
            told.append(part)
            continue
        head, _, data = part["image_url"]["url"].partition(",")
        assert head.startswith("data:image/") and head.endswith(";base64"), head
        picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        told.append({"type": "image", "image": picture})
    return told


def modules() -> dict[str, ModuleType]:
    """For `sys.modules`: `vllm`, `vllm.sampling_params`, `vllm.exceptions`."""
    names = ("vllm", "vllm.sampling_params", "vllm.exceptions")
    made: dict[str, Any] = {name: ModuleType(name) for name in names}
    made["vllm"].__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    made["vllm"].LLM = LLM
    made["vllm"].SamplingParams = lambda **values: named("SamplingParams", values)
    made["vllm"].exceptions = made["vllm.exceptions"]
    made["vllm.exceptions"].VLLMClientError = Refused
    made["vllm.sampling_params"].StructuredOutputsParams = lambda **values: named("StructuredOutputsParams", values)
    return made
