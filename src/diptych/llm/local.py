"""A language model in this process, with or without vision, asked like an endpoint: no server, no key, no bill.

    model = LocalModel.load("Qwen/Qwen3-VL-4B-Instruct", cache=Cache("answers.sqlite"))
    outcome = model.ask(Question((user("What is it?", image),), Description))

`load` opens it with transformers: greedy, one question at a time; the form of the answer is told in words, validated
and repaired as for an endpoint. `vllm_engine.load` opens one that is asked in batches.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from diptych.errors import UserError, describe
from diptych.llm.cache import Cache
from diptych.llm.question import GaveUp, Message, Outcome, Picture, Question, Reply, Spent, Usage, body, clean
from diptych.llm.replies import Streak
from diptych.llm.settle import AskTogether, Memory, Turn, settle_together
from diptych.llm.vllm import ENVIRONMENT, Vllm, check
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
        kinds = "a vision-language model or a language model of transformers"
        raise UserError(f"'{name}' cannot be opened as {kinds} ({describe(error)})") from error


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
            return GaveUp(f"the model fails on it: {describe(error)}", passing=True)
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


# The thin layer over vLLM's offline engine: `vllm.LLM(...)` once, and `LLM.chat` for each batch of turns. model =
# load(Vllm(model="Qwen/Qwen3-VL-8B-Instruct"), cache=Cache("answers.sqlite")) model.ask_many(questions, on_answer)
# Messages are those that an endpoint gets, pictures as data URLs; decoding is held to the answer's JSON schema. What
# comes back is validated, repaired and cached as any other model's answer (`settle`, `local`). Written by the sources
# of vLLM 0.20.0 and 0.33.0; `tests/llm/test_vllm_contract.py` runs it where vLLM and a GPU are.

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
            f"vLLM cannot run '{settings.model}' ({describe(error)}); see gpu_memory_utilization, max_model_len and "
            "extra in the section vllm, and vLLM's own log above"
        ) from error
    return LocalModel(
        _Engine(engine, settings),
        {"engine": "vllm", "model": models.fingerprint(folder), "sampling": settings.sampling()},
        cache,
        keep_undecided=keep_undecided,
        batch_size=settings.batch_size,
    )


class _Engine:
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
                return [GaveUp(f"vLLM refuses this question ({describe(error)})")]
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
