"""A tiny teacher and a tiny judge of random weights, and, as a script (RECIPE OUT), a run as far as its pairs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

PANEL = 64


def make_vae() -> Any:
    """An AutoencoderKL of eight channels, four times smaller a side, as these teachers have it."""
    from diffusers import AutoencoderKL

    three: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
    }
    return AutoencoderKL(
        **three,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=PANEL,
        scaling_factor=0.7,
        shift_factor=0.1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_teacher(folder: Path) -> Path:
    """A complete FluxPipeline folder that reads the pocket vocabulary."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from diptych.pocket.pretrain import tokenizers

    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = tokenizers.make_tokenizers()
    clip, t5 = tokenizers.make_encoders(clip_tokenizer, t5_tokenizer)
    vae = make_vae()
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=tokenizers.TEXT_WIDTH,
        pooled_projection_dim=tokenizers.POOLED_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def make_half(teacher: Path, folder: Path) -> Path:
    """The same teacher with float16 files."""
    import torch
    from diffusers import FluxPipeline

    FluxPipeline.from_pretrained(teacher, torch_dtype=torch.float16).save_pretrained(folder)
    return folder


def make_judge(folder: Path) -> Path:
    """A random stock ResNet with its image processor, which resizes to 32 px."""
    import torch
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetModel

    torch.manual_seed(3)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    return folder


def make_classifier(folder: Path) -> Path:
    """A random stock ResNet that tells three labels apart."""
    import torch
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(3)
    labels = {0: "normal", 1: "nsfw", 2: "text"}
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(**sizes, id2label=labels, label2id={name: number for number, name in labels.items()})
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    return folder


def recipe_text(teacher: Path, judge: Path) -> str:
    """Twelve grids in three shards, batches that do not divide a shard; thresholds that random panels pass."""
    return f"""
name: tiny
seed: 3
teacher: {teacher}
device: cpu
threads: 1
write: {{count: 12, shard_size: 4}}
paint: {{steps: 2, batch_size: 3}}
curate: {{judge: {judge}, batch_size: 3, thresholds: {{same: -1, near_copy: 0, seam: -1}}}}
"""


if __name__ == "__main__":
    from diptych.recipe import load
    from diptych.run.runner import run
    from diptych.utils.console import Display

    run(load(sys.argv[1]), sys.argv[2], ("write", "paint", "curate"), Display(quiet=True))
