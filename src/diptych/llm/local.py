"""A language model in this process, with or without vision, asked like an endpoint: no server, no key, no bill.

    model = LocalModel.load("Qwen/Qwen3-VL-4B-Instruct", cache=Cache("answers.sqlite"))
    outcome = model.ask(Question((user("What is it?", image),), Description))

`load` opens it with transformers: greedy, one question at a time; the form of the answer is told in words, validated
and repaired as for an endpoint. `vllm_engine.load` opens one that is asked in batches.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from diptych.errors import UserError
from diptych.llm.cache import Cache
from diptych.llm.outcome import GaveUp, Outcome, Reply, Spent, Usage
from diptych.llm.question import Message, Picture, Question, body, clean
from diptych.llm.settle import AskTogether, Memory, Turn, settle_together
from diptych.llm.streak import Streak
from diptych.utils import models
from diptych.utils.console import quiet_bars
from diptych.utils.opening import refuse_code

BLIND = "'{name}' is a language model that reads no images; name a vision-language model"
STOP_AFTER = 20  # questions in a row without an answer: the model does not work here, whatever is asked


class LocalModel:
    """A model as the function that gives the next turns, and the cache of its answers."""

    def __init__(
        self,
        generate: AskTogether,
        identity: dict[str, Any],
        cache: Cache | None = None,
        *,
        keep_undecided: bool = False,
        batch_size: int = 1,
        sees: bool = True,
    ) -> None:
        """`identity` is what an answer depends on besides the question. `generate` gets at most `batch_size` turns.
        `sees` says whether the model reads images."""
        self._generate = generate
        self._memory = Memory(identity, cache, keep_undecided)
        again = "try another model, or other settings; they are asked again at the next run"
        self._streak = Streak("the model", STOP_AFTER, cache, again, "failed")
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
        """Opens a folder, or a hub name. `dtype` is torch's name for it; `auto` is what the files hold.

        Raises UserError if it is neither a vision-language model nor a language model with a chat template.
        """
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoProcessor,
            AutoTokenizer,
        )

        folder = models.resolve(name, "vlm")
        refuse_code(folder)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        with _opening(name):
            with quiet_bars():
                options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": dtype}
                sees = hasattr(AutoConfig.from_pretrained(str(folder), local_files_only=True), "vision_config")
                loader: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
                model, info = loader.from_pretrained(str(folder), output_loading_info=True, **options)
                reader: Any = AutoProcessor if sees else AutoTokenizer
                processor = reader.from_pretrained(str(folder), local_files_only=True)
            model = model.eval().to(device)
        if info["missing_keys"]:
            shown = ", ".join(sorted(info["missing_keys"])[:3])
            raise UserError(f"the files of '{name}' lack {shown}: the model would be partly random; fetch it again")
        _refuse_no_template(processor, name)
        identity = {"model": models.fingerprint(folder), "dtype": str(model.dtype), "max_tokens": max_tokens}
        generate = _Generate(model, processor, Path(name).name, max_tokens, sees)
        return cls(generate, identity, cache, keep_undecided=keep_undecided, sees=sees)

    @classmethod
    def check(cls, name: str, sees: bool = True) -> None:
        """UserError if `load` would not find a model with a chat template there, or one without vision though it has to
        see (`sees`). Reads no weights."""
        import transformers

        folder = models.resolve(name, "vlm")
        refuse_code(folder)
        with _opening(name):
            config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
            vision = hasattr(config, "vision_config")
            kind: Any = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
            if type(config) not in kind._model_mapping:
                raise ValueError(f"a {config.model_type} is neither")
            reader: Any = transformers.AutoProcessor if vision else transformers.AutoTokenizer
            processor = reader.from_pretrained(str(folder), local_files_only=True)
        if sees and not vision:
            raise UserError(BLIND.format(name=name))
        _refuse_no_template(processor, name)

    def ask(self, question: Question) -> Outcome:
        """Settles one question. UserError after `STOP_AFTER` in a row without a valid answer."""
        (outcome,) = settle_together(self._generate, [question], self._memory)
        return self._count(outcome)

    def ask_many(self, questions: Iterable[Question], on_answer: Callable[[Outcome], object]) -> Spent:
        """Settles them all, in order. Of a generator, one batch with its pictures is in memory at a time."""
        source = iter(questions)
        problem: UserError | None = None
        while problem is None and (batch := list(islice(source, self.batch_size))):
            for outcome in settle_together(self._generate, batch, self._memory):
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
    """UserError for what transformers raises when it opens a model that it cannot."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        kinds = "a vision-language model or a language model of transformers"
        raise UserError(f"'{name}' cannot be opened as {kinds} ({line})") from error


def _refuse_no_template(processor: Any, name: str) -> None:
    if not getattr(processor, "chat_template", None):
        raise UserError(f"'{name}' has no chat template; take the instruct variant of the model")


class _Generate:
    """The model's next turns, greedily, one after the other."""

    def __init__(self, model: Any, processor: Any, name: str, max_tokens: int, sees: bool) -> None:
        self.model = model
        self.processor = processor  # the tokenizer of a model that reads no images
        self.name = name
        self.max_tokens = max_tokens
        self.sees = sees

    def __call__(self, turns: Sequence[Turn]) -> list[Reply | GaveUp]:
        return [self._next(turn.messages) for turn in turns]

    def _next(self, messages: tuple[Message, ...]) -> Reply | GaveUp:
        import torch
        from jinja2 import TemplateError

        try:
            inputs = self._inputs(messages)
            told = inputs["input_ids"].shape[1]
            # A model's own generation settings may sample; greedy ignores these three, and says so each time.
            unused: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
            with torch.inference_mode():
                tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_tokens, **unused)
        except (RuntimeError, ValueError, TypeError, IndexError, TemplateError) as error:
            # Out of memory, a picture that the processor does not take, a template that knows no system turn.
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            return GaveUp(f"the model fails on it: {line}", passing=True)
        except GaveUp as error:
            return error
        new = tokens[0, told:]
        text = self.processor.decode(new, skip_special_tokens=True)
        cut = len(new) >= self.max_tokens and int(new[-1]) not in _ends(self.model.generation_config.eos_token_id)
        return Reply(clean(text), self.name, Usage(1, told, len(new)), cut=cut)

    def _inputs(self, messages: tuple[Message, ...]) -> Any:
        turns = [_turn(message) for message in messages] if self.sees else _texts(messages)
        inputs = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        cast = {"dtype": self.model.dtype} if self.sees else {}
        return inputs.to(self.model.device, **cast)


def _texts(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Turns as templates of language models have them: plain strings."""
    if any(isinstance(part, Picture) for message in messages for part in message.parts):
        raise GaveUp("the model reads no images")
    return body(messages)


def _turn(message: Message) -> dict[str, Any]:
    from PIL import Image

    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, Picture):
            try:
                content.append({"type": "image", "image": Image.open(io.BytesIO(part.data)).convert("RGB")})
            except (OSError, SyntaxError, ValueError) as error:
                raise GaveUp(f"a picture of the question is broken ({str(error)[:120]})") from error
        else:
            content.append({"type": "text", "text": part})
    return {"role": message.role, "content": content}


def _ends(eos: int | list[int] | None) -> list[int]:
    return eos if isinstance(eos, list) else [] if eos is None else [eos]
