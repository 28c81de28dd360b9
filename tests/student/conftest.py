"""A whole tiny student with text encoders, made here, and the fixture of the released layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "fixtures" / "release_golden"
WORDS = ["a", "cat", "dog", "on", "the", "beach", "moon", "red", "at", "night", "in", "snow"]
LENGTH = 12  # text tokens
PANEL = 16  # pixels; VAE factor 4, so 2×2 tokens a panel
TINY: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}


def tiny_transformer(**changes: Any):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(5)
    return FluxTransformer2DModel(**{**TINY, **changes}).eval()


def _tokenizers():
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *(("▁" + word, -1.0) for word in WORDS)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *marks]
    clip = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=LENGTH)
    return clip, t5


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete FluxPipeline folder with random weights, and its `words.json`."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_tokenizer, t5_tokenizer = _tokenizers()
    torch.manual_seed(1)
    blocks: Any = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    vae = AutoencoderKL(
        **blocks,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PANEL,
        scaling_factor=0.7,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    marks: Any = {key: getattr(clip_tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=20,
            projection_dim=20,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            **marks,
        )
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    folder = tmp_path_factory.mktemp("models") / "teacher"
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=tiny_transformer(),
    ).save_pretrained(folder)
    (folder / "words.json").write_text(json.dumps(WORDS))
    return folder


@pytest.fixture(scope="session")
def student_folder(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only a student's `transformer/`: the teacher widened, its condition columns random."""
    from diffusers import FluxTransformer2DModel

    from diptych.student.weights.fold import widen

    student = widen(FluxTransformer2DModel.from_pretrained(teacher / "transformer"))  # pyright: ignore
    torch.manual_seed(2)
    with torch.no_grad():
        student.x_embedder.weight[:, 16:].normal_()
    folder = tmp_path_factory.mktemp("models") / "student"
    student.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def pipe(student_folder: Path, teacher: Path):
    from diptych import student

    loaded = student.load(student_folder, teacher, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def pictures() -> list[Image.Image]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (PANEL, PANEL, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture
def golden() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(GOLDEN / "golden.safetensors")
