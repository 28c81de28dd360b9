"""A language model in this process, with or without vision, with the interface of an endpoint: no server, key or bill.

    model = LocalModel.load("Qwen/Qwen3-VL-4B-Instruct", cache=Cache("answers.sqlite"))
    outcome = model.ask(Question((user("What is it?", image),), Description))

`load` opens it with transformers: greedy decoding, one question at a time. The prompt describes the form of the answer,
which is validated and repaired as for an endpoint. `vllm.load` opens a model that answers in batches.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from diptych.errors import UserError, describe
from diptych.llm.answering import AnswerCache, AskBatch, ChatRequest, Streak, answer_batch
from diptych.llm.cache import Cache
from diptych.llm.question import EncodedImage, GaveUp, Message, Outcome, Question, Reply, Spent, Usage, body, clean
from diptych.utils import models
from diptych.utils.console import quiet_bars
from diptych.utils.machine import pick_device
from diptych.utils.opening import refuse_code

STOP_AFTER = 20  # questions in a row without an answer, after which the model is taken not to work here


class LocalModel:
    """A model, as the function that generates the next turns, with the cache of its answers."""

    def __init__(
        self,
        generate: AskBatch,
        identity: dict[str, Any],
        cache: Cache | None = None,
        *,
        keep_undecided: bool = False,
        batch_size: int = 1,
        sees: bool = True,
    ) -> None:
        """Wrap `generate`, which gets at most `batch_size` requests at once.

        `identity` is everything that an answer depends on besides the question. `sees` says whether the model reads
        images.
        """
        self._generate = generate
        self._memory = AnswerCache(identity, cache, keep_undecided)
        again = "Try another model or other settings. The next run sends these questions again."
        self._streak = Streak("The local model", STOP_AFTER, cache, again, "rows_failed", "failed")
        self.batch_size = batch_size
        self.sees = sees
        self.spent = Spent()

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_tokens: int = 2048,
        cache: Cache | None = None,
        keep_undecided: bool = False,
    ) -> LocalModel:
        """Open a folder or a hub name. `dtype` is torch's name for it; `auto` is the type of the files.

        Raises UserError if it is neither a vision-language model nor a language model with a chat template.
        """
        folder = models.resolve(name, "vlm")
        refuse_code(folder)
        with _opening(name):
            with quiet_bars():
                options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": dtype}
                config, loader, reader = _classes(folder)
                model, info = loader.from_pretrained(str(folder), output_loading_info=True, **options)
                processor = reader.from_pretrained(str(folder), local_files_only=True)
            model = model.eval().to(pick_device(device))
        if info["missing_keys"]:
            shown = ", ".join(sorted(info["missing_keys"])[:3])
            raise UserError("model_incomplete", f"The files of '{name}' lack {shown}. Download the model again.")
        _check_template(processor, name)
        identity = {"model": models.fingerprint(folder), "dtype": str(model.dtype), "max_tokens": max_tokens}
        sees = hasattr(config, "vision_config")
        generate = _Generate(model, processor, Path(name).name, max_tokens, sees)
        return cls(generate, identity, cache, keep_undecided=keep_undecided, sees=sees)

    @classmethod
    def check(cls, name: str, sees: bool = True) -> None:
        """Raise the UserError of `load`, without reading weights.

        Also raises one for a model without vision, if it has to read images (`sees`).
        """
        folder = models.resolve(name, "vlm")
        refuse_code(folder)
        with _opening(name):
            config, loader, reader = _classes(folder)
            if type(config) not in loader._model_mapping:
                raise ValueError(f"a {config.model_type} is neither")
            processor = reader.from_pretrained(str(folder), local_files_only=True)
        if sees and not hasattr(config, "vision_config"):
            raise blind(name)
        _check_template(processor, name)

    def ask(self, question: Question) -> Outcome:
        """Answer one question. Raises UserError after `STOP_AFTER` in a row without a valid answer."""
        (outcome,) = answer_batch(self._generate, [question], self._memory)
        return self._count(outcome)

    def ask_many(self, questions: Iterable[Question], on_answer: Callable[[Outcome], object]) -> Spent:
        """Answer all questions, in order. One batch of a generator, with its images, is in memory at a time."""
        source = iter(questions)
        problem: UserError | None = None
        while problem is None and (batch := list(islice(source, self.batch_size))):
            for outcome in answer_batch(self._generate, batch, self._memory):
                try:
                    self._count(outcome)
                except UserError as error:
                    problem = problem or error
                else:
                    on_answer(outcome)
        if problem is not None:
            raise problem
        return self.spent

    def _count(self, outcome: Outcome) -> Outcome:
        self.spent = self.spent.plus(outcome)
        self._streak.count(outcome)
        return outcome


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """Turn the exceptions of transformers for a model that it cannot open into UserError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        kinds = "a vision-language model or a language model of transformers"
        raise UserError("model_unsupported", f"Cannot open '{name}' as {kinds} ({describe(error)}).") from error


def _classes(folder: Path) -> tuple[Any, Any, Any]:
    """Return a model's config, and the classes of transformers that open its weights and its processor."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if hasattr(config, "vision_config"):
        return config, transformers.AutoModelForImageTextToText, transformers.AutoProcessor
    return config, transformers.AutoModelForCausalLM, transformers.AutoTokenizer


def blind(name: str) -> UserError:
    """Return the error of a model that has to read images and cannot."""
    return UserError("model_unsupported", f"'{name}' cannot read images. Use a vision-language model.")


def _check_template(processor: Any, name: str) -> None:
    if not getattr(processor, "chat_template", None):
        raise UserError("model_unsupported", f"'{name}' has no chat template. Use the instruct variant of the model.")


class _Generate:
    """Generates the model's next turns greedily, one after the other."""

    def __init__(self, model: Any, processor: Any, name: str, max_tokens: int, sees: bool) -> None:
        self.model = model
        self.processor = processor  # the tokenizer, if the model has no vision
        self.name = name
        self.max_tokens = max_tokens
        self.sees = sees

    def __call__(self, requests: Sequence[ChatRequest]) -> list[Reply | GaveUp]:
        return [self._next(request.messages) for request in requests]

    def _next(self, messages: tuple[Message, ...]) -> Reply | GaveUp:
        import torch
        from jinja2 import TemplateError

        try:
            inputs = self._inputs(messages)
            prompt = inputs["input_ids"].shape[1]
            # A model's generation settings may sample. Greedy decoding ignores these three and warns about them.
            unused: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
            with torch.inference_mode():
                tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_tokens, **unused)
        except (RuntimeError, ValueError, TypeError, IndexError, TemplateError) as error:
            # Out of memory, an image that the processor rejects, or a template without a system turn.
            return GaveUp(f"the model fails on it: {describe(error)}", passing=True)
        except GaveUp as error:
            return error
        new = tokens[0, prompt:]
        text = self.processor.decode(new, skip_special_tokens=True)
        eos = self.model.generation_config.eos_token_id
        cut = len(new) >= self.max_tokens and int(new[-1]) not in (eos if isinstance(eos, list) else [eos])
        return Reply(clean(text), self.name, Usage(1, prompt, len(new)), cut=cut)

    def _inputs(self, messages: tuple[Message, ...]) -> Any:
        turns = [_turn(message) for message in messages] if self.sees else _texts(messages)
        inputs = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        cast = {"dtype": self.model.dtype} if self.sees else {}
        return inputs.to(self.model.device, **cast)


def _texts(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Return turns as plain strings, for the templates of language models."""
    if any(isinstance(part, EncodedImage) for message in messages for part in message.parts):
        raise GaveUp("the model reads no images")
    return body(messages)


def _turn(message: Message) -> dict[str, Any]:
    from PIL import Image

    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, EncodedImage):
            try:
                content.append({"type": "image", "image": Image.open(io.BytesIO(part.data)).convert("RGB")})
            except (OSError, SyntaxError, ValueError) as error:
                raise GaveUp(f"a picture of the question is broken ({str(error)[:120]})") from error
        else:
            content.append({"type": "text", "text": part})
    return {"role": message.role, "content": content}
