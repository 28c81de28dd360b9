"""A local vision-language model, tiny and random: what it says is noise, but it is asked and read as a real one is.

The only tests here that need torch. How such a model answers is counted in test_answering.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel

from diptych.llm import schema
from diptych.llm.cache import Cache
from diptych.llm.client import open_model
from diptych.llm.local import LocalModel
from diptych.llm.question import Outcome, Question, system, user
from diptych.recipe.schema import Recipe
from raising import raises

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SIDE, PATCH = 16, 8


def save_tiny_llava(
    folder: Path, template: str | None = TEMPLATE, mute: bool = False, head: int = 8, longest: int = 2048
) -> None:
    """A LLaVA of two thin layers, with two heads of a width, its tokenizer one token for each byte. If `mute` it ends
    before it says a word."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    marks = ["<pad>", "<s>", "</s>", "<image>"]
    vocabulary = {token: i for i, token in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, additional_special_tokens=["<image>"])
    pictures = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=False
    )
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    thin: dict[str, Any] = {
        "hidden_size": 2 * head,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**thin, image_size=SIDE, patch_size=PATCH),
        text_config=LlamaConfig(
            **thin,
            vocab_size=len(vocabulary),
            num_key_value_heads=2,
            max_position_embeddings=longest,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=3,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    if mute:
        torch.nn.init.zeros_(model.lm_head.weight)  # of equal chances greedy takes token 0
        model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llava")
    save_tiny_llava(made)
    return made


def ask(folder: Path, verdict: type[BaseModel], cache: Cache | None, colour: str = "red") -> Outcome:
    model = LocalModel.load(str(folder), device="cpu", max_tokens=4, cache=cache, keep_undecided=True)
    shown = user("The same?", Image.new("RGB", (20, 12), colour), Image.new("RGB", (12, 20), "blue"))
    return model.ask(Question((system("You judge."), shown), verdict))


def test_a_local_model_is_asked_with_pictures_and_gives_the_same_answer_again(
    folder: Path, verdict: type[BaseModel], tmp_path: Path
) -> None:
    first = ask(folder, verdict, None)
    assert first.status == "undecided"
    assert "longer than max_tokens" in first.reason
    assert first.usage.output_tokens == 4
    assert first.usage.input_tokens > 2 * (SIDE // PATCH) ** 2
    with Cache(tmp_path / "a.sqlite") as cache:
        asked, kept = ask(folder, verdict, cache), ask(folder, verdict, cache)
        other = ask(folder, verdict, cache, "green")
    assert (asked.text, asked.cached) == (first.text, False)
    assert (kept.text, kept.cached) == (first.text, True)
    assert not other.cached


def test_a_folder_that_is_no_such_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with raises("model_unsupported", tmp_path):
        LocalModel.load(str(tmp_path))


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    save_tiny_llava(tmp_path, template=None)
    with raises("model_unsupported", tmp_path, "chat template"):
        LocalModel.load(str(tmp_path), device="cpu")


def save_tiny_llama(folder: Path, mute: bool = False) -> None:
    """A language model without vision, its tokenizer one token for each byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    # Content is joined as text, which parts are not.
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)
    thin: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    thin |= {"num_attention_heads": 2}
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**thin, vocab_size=len(vocabulary), max_position_embeddings=8192, **ends))
    if mute:
        torch.nn.init.zeros_(model.lm_head.weight)  # of equal chances greedy takes token 0
        model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)


def test_a_language_model_without_vision_is_asked_in_text_and_gives_up_on_pictures(
    verdict: type[BaseModel], tmp_path: Path
) -> None:
    save_tiny_llama(tmp_path)
    model = LocalModel.load(str(tmp_path), device="cpu", max_tokens=4)
    outcome = model.ask(Question((system("You judge."), user("One.", "Two.")), verdict))
    assert (outcome.status, outcome.usage.output_tokens, model.sees) == ("undecided", 4, False)
    assert outcome.usage.input_tokens == len("system: You judge.\nuser: One.\n\nTwo.\n\n\nassistant: ") + len(
        schema.in_words(verdict)
    )
    shown = model.ask(Question((user("This?", Image.new("RGB", (8, 8))),), verdict))
    assert shown.status == "failed" and "no images" in shown.reason
    with raises("model_unsupported", tmp_path, "images"):
        open_model(None, str(tmp_path), cache=None, device="cpu")
    with raises("model_unsupported", tmp_path, "images"):
        LocalModel.check(str(tmp_path))
    LocalModel.check(str(tmp_path), sees=False)


def test_a_recipe_s_writer_may_be_a_language_model_on_this_machine(tmp_path: Path) -> None:
    from diptych.run.runner import PromptShards
    from diptych.stages.write import stage

    save_tiny_llama(tmp_path / "llama", mute=True)
    (tmp_path / "c.txt").write_text("a fox\nan owl\n")
    section = {"writer": "llm", "local": str(tmp_path / "llama"), "captions": f"{tmp_path}/c.txt", "shard_size": 2}
    recipe = Recipe.model_validate({"name": "x", "device": "cpu", "write": section})
    work = stage.WriteStage(recipe, tmp_path / "answers.sqlite").load()
    with raises("rows_failed", "2 questions", "the reply is empty"):
        work(PromptShards(0, 2, 2)[0])
    with pytest.raises(ValueError, match="captions"):
        Recipe.model_validate({"name": "x", "write": {"writer": "llm", "local": "x"}})
