"""Tokenizers and text encoders of the pocket teacher: stock T5 and CLIP classes with the pocket vocabulary.

T5 has one piece per known word, marks, and letters for everything else; CLIP is a byte-level BPE trained on the
same words. Both are lower-case.
"""

import json
from pathlib import Path
from typing import Any

from .. import captions

MAX_LENGTH = 32
"""Tokens in a prompt, for both encoders: the longest grid prompt and its end mark."""
TEXT_WIDTH = 128
POOLED_WIDTH = 96


def make_tokenizers():
    """The `CLIPTokenizer` and the `T5Tokenizer`, in that order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + word, -1.0) for word in captions.WORDS] + [(mark, -1.0) for mark in ",.:;!?'\""]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789-"]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_LENGTH)

    start, end = "<|startoftext|>", "<|endoftext|>"
    template = CLIPTokenizer()._tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1200, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator([" ".join(captions.WORDS) + " . , :"], trainer)
    model = json.loads(learner.to_str())["model"]
    # Sorted, because the learner numbers some pieces differently in each process.
    vocabulary = {token: index for index, token in enumerate(sorted(model["vocab"]))}
    # The end mark must be the last id and never 2: CLIP looks for the largest id, or for `eos_token_id` when that is
    # not 2.
    vocabulary |= {start: len(vocabulary), end: len(vocabulary) + 1}
    merges: Any = [tuple(pair) for pair in model["merges"]]  # annotated as strings, which it does not take
    clip = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)
    return clip, t5


def load_or_make(folder: Path):
    """The tokenizers saved in `folder`, else new ones saved there: encoders are worth nothing under other ids."""
    from transformers import CLIPTokenizer, T5Tokenizer

    if (folder / "tokenizer").exists():
        return CLIPTokenizer.from_pretrained(folder / "tokenizer"), T5Tokenizer.from_pretrained(folder / "tokenizer_2")
    clip, t5 = make_tokenizers()
    save(folder, clip, t5)
    return clip, t5


def make_encoders(clip_tokenizer, t5_tokenizer):
    """Untrained `CLIPTextModel` and `T5EncoderModel`, sized for the tokenizers."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=POOLED_WIDTH,
            projection_dim=POOLED_WIDTH,
            intermediate_size=2 * POOLED_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=MAX_LENGTH,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=t5_tokenizer.pad_token_id,
            eos_token_id=t5_tokenizer.eos_token_id,
        )
    )
    return clip, t5


def save(folder: Path, clip_tokenizer, t5_tokenizer) -> None:
    """Write both tokenizers, and beside them `words.json`: what the models know, so that a prompt can be checked."""
    clip_tokenizer.save_pretrained(folder / "tokenizer")
    t5_tokenizer.save_pretrained(folder / "tokenizer_2")
    (folder / "words.json").write_text(json.dumps(captions.WORDS))
