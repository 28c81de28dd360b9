"""Every tiny random model of the tests: stock classes with real tokenizers, small enough to build in a moment.

`flux_teacher` is a complete FluxPipeline folder; `FAMILIES` and `teacher_folder` have teachers of other families.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
}
SHIFTED = {"use_dynamic_shifting": True}


# FLUX.1 ---------------------------------------------------------------------------------------------------------------


def vae(panel: int, channels: int = 8, **changes: Any) -> Any:
    """An `AutoencoderKL` of a fourth of the side."""
    from diffusers import AutoencoderKL

    plain = {"latent_channels": channels, "norm_num_groups": 4, "scaling_factor": 0.7, "shift_factor": 0.1}
    no_quant = {"use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(**BLOCKS, **{**plain, **no_quant, "sample_size": panel, **changes})


def flux(channels: int = 32, singles: int = 1, seed: int | None = None, **changes: Any) -> Any:
    """A `FluxTransformer2DModel` of width 32 that reads the pocket world's text encoders."""
    import torch
    from diffusers import FluxTransformer2DModel

    from diptych.pocket.pretrain import tokenizers

    if seed is not None:
        torch.manual_seed(seed)
    widths = {"joint_attention_dim": tokenizers.TEXT_WIDTH, "pooled_projection_dim": tokenizers.POOLED_WIDTH}
    heads: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    sizes: dict[str, Any] = {"in_channels": channels, "num_layers": 1, "num_single_layers": singles}
    return FluxTransformer2DModel(**{**sizes, **heads, **widths, **changes})


def word_tokenizers(words: Sequence[str], length: int, clip_length: int | None = None) -> tuple[Any, Any]:
    """A CLIP tokenizer of letters and a T5 tokenizer of `words` and letters, for texts of at most `length` tokens."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *(("▁" + word, -1.0) for word in words)]
    pieces += [] if clip_length else [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbers, merges=[], model_max_length=clip_length or length), t5


def word_encoders(clip_tokenizer: Any, t5_tokenizer: Any, width: int) -> tuple[Any, Any]:
    """A CLIP of `width` and a T5 of width 24, of one layer each."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    marks: Any = {f"{mark}_token_id": getattr(clip_tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    sizes: dict[str, Any] = {"hidden_size": width, "projection_dim": width, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(clip_tokenizer)}
    clip = CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=clip_tokenizer.model_max_length, **marks))
    t5 = T5Config(
        vocab_size=len(t5_tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return clip, T5EncoderModel(t5)


def flux_teacher(folder: Path, parts: Callable[[], dict[str, Any]], seed: int = 0, **scheduler: Any) -> Path:
    """A FluxPipeline folder of what `parts` makes: `vae`, `transformer`, `encoders` and `tokenizers` (CLIP's, T5's)."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(seed)
    made = parts()
    (clip, t5), (clip_tokenizer, t5_tokenizer) = made["encoders"], made["tokenizers"]
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=made["vae"].eval(),
        text_encoder=clip.eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=t5_tokenizer,
        transformer=made["transformer"].eval(),
    ).save_pretrained(folder)
    return folder


def pocket_teacher(folder: Path, panel: int) -> Path:
    """A FluxPipeline folder that reads the pocket vocabulary."""
    from diptych.pocket.pretrain import tokenizers

    def parts() -> dict[str, Any]:
        made = tokenizers.make_tokenizers()
        encoders = tokenizers.make_encoders(*made)
        images = vae(panel, mid_block_add_attention=False)
        return {"tokenizers": made, "encoders": encoders, "vae": images, "transformer": flux()}

    return flux_teacher(folder, parts, shift=1.0)


def widened(teacher: Path, folder: Path, seed: int = 2) -> Path:
    """A folder with only a student's `transformer/`: the teacher widened, its condition columns random."""
    import torch
    from diffusers import FluxTransformer2DModel

    from diptych.student.weights.fold import widen

    student = widen(FluxTransformer2DModel.from_pretrained(teacher / "transformer"))  # pyright: ignore
    torch.manual_seed(seed)
    with torch.no_grad():
        weight = student.x_embedder.weight
        weight[:, weight.shape[1] // 2 :].normal_()
    student.save_pretrained(folder / "transformer")
    return folder


# Judges ---------------------------------------------------------------------------------------------------------------

RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def resnet(folder: Path, labels: Sequence[str] = (), seed: int = 3) -> Path:
    """A ResNet with its image processor, which resizes to 32 px: an embedding model, or a classifier of `labels`."""
    import torch
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification, ResNetModel

    torch.manual_seed(seed)
    names = dict(enumerate(labels))
    config = ResNetConfig(**RESNET, id2label=names, label2id={v: k for k, v in names.items()}) if labels else None
    model = ResNetForImageClassification(config) if config else ResNetModel(ResNetConfig(**RESNET))
    model.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    return folder


# Other families -------------------------------------------------------------------------------------------------------


def scheduler(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def letters(*special: str) -> Any:
    """A tokenizer of letters that begins every text with a mark; its chat template gives the messages' texts."""
    from tokenizers import pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import Qwen2Tokenizer

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", *special]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=64)
    mark = "<|endoftext|>"
    first = TemplateProcessing(single=f"{mark} $A", special_tokens=[(mark, words.index(mark))])
    tokenizer.backend_tokenizer.post_processor = first
    tokenizer.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    return tokenizer


def language_model(tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **sizes))


def t5() -> tuple[Any, Any]:
    """A T5 and its tokenizer."""
    from diptych.pocket.pretrain import tokenizers

    clip_tokenizer, tokenizer = tokenizers.make_tokenizers()
    return tokenizers.make_encoders(clip_tokenizer, tokenizer)[1], tokenizer


def clips() -> tuple[Any, Any]:
    from diptych.pocket.pretrain import tokenizers

    tokenizer, t5_tokenizer = tokenizers.make_tokenizers()
    return tokenizers.make_encoders(tokenizer, t5_tokenizer)[0], tokenizer


def image_vae(channels: int = 8, levels: int = 3) -> Any:
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * levels, "norm_num_groups": 4}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * levels, "block_out_channels": (8,) * levels}
    return AutoencoderKL(**blocks, latent_channels=channels, shift_factor=0.1, mid_block_add_attention=False)


def qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    sizes: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1}
    means: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return AutoencoderKLQwenImage(**sizes, **means, temperal_downsample=[False, True])


def sees() -> Any:
    """A Qwen 2.5 VL of two layers."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 260}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    sight: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    marks: dict[str, Any] = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight | {"out_hidden_size": 16}, **marks)
    return Qwen2_5_VLForConditionalGeneration(config)


def zimage() -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    tokenizer = letters()
    heads: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    ropes: dict[str, Any] = {"axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64]}
    transformer = ZImageTransformer2DModel(in_channels=8, cap_feat_dim=16, **heads, **ropes)
    return ZImagePipeline(scheduler(shift=6.0), image_vae(), language_model(tokenizer), tokenizer, transformer)


def zimage_teacher(folder: Path) -> Path:
    """A ZImagePipeline, as a folder."""
    import torch

    torch.manual_seed(0)
    zimage().save_pretrained(folder)
    return folder


def krea2() -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    tokenizer = letters()
    sizes: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    texts: dict[str, Any] = {"text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2}
    texts |= {"text_num_key_value_heads": 2, "text_intermediate_size": 16, "num_layerwise_text_blocks": 1}
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=1, intermediate_size=16, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
        **sizes, **texts,
    )  # fmt: skip
    text: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    sight: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    sight |= {"out_hidden_size": 16, "deepstack_visual_indexes": [0]}
    model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=sight))
    return Krea2Pipeline(scheduler(**SHIFTED), qwen_vae(), model, tokenizer, transformer, (0, 2))


def ernie() -> Any:
    from diffusers import AutoencoderKLFlux2, ErnieImagePipeline, ErnieImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = letters()
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (8, 8)}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": 4}
    vae = AutoencoderKLFlux2(**blocks, latent_channels=4, sample_size=32, mid_block_add_attention=False)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=16, out_channels=16,
        text_in_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    model = language_model(tokenizer)
    rewriter: Any = Qwen3ForCausalLM(Qwen3Config(**model.config.to_dict()))
    return ErnieImagePipeline(transformer, vae, model, tokenizer, scheduler(), rewriter, letters())


def longcat() -> Any:
    from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

    tokenizer = letters()
    transformer = LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    nobody: Any = None  # its processor is read where a prompt is rewritten alone: that would fail here
    return LongCatImagePipeline(scheduler(**SHIFTED), image_vae(16), sees(), tokenizer, nobody, transformer)


def lumina2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = letters()
    transformer = Lumina2Transformer2DModel(
        in_channels=8, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=2,
        multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(300, 64, 64), cap_feat_dim=16,
    )  # fmt: skip
    vae = image_vae(levels=4)  # the pipeline takes that for granted
    return Lumina2Pipeline(transformer, scheduler(), vae, language_model(tokenizer), tokenizer)


def sana() -> Any:
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel

    tokenizer = letters()
    blocks: Any = ("ResBlock",) * 2
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=blocks,
        decoder_block_types=blocks, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), upsample_block_type="interpolate", downsample_block_type="stride_conv",
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=32,
    )  # fmt: skip
    return SanaPipeline(tokenizer, language_model(tokenizer), vae, transformer, scheduler())


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    encoder, tokenizer = t5()
    transformer = ChromaTransformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=encoder.config.d_model, axes_dims_rope=(4, 6, 6), approximator_num_channels=16,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(scheduler(), image_vae(), encoder, tokenizer, transformer)


def ovis() -> Any:
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    tokenizer = letters()
    transformer = OvisImageTransformer2DModel(
        in_channels=32, out_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return OvisImagePipeline(scheduler(**SHIFTED), image_vae(), language_model(tokenizer), tokenizer, transformer)


def auraflow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    encoder, tokenizer = t5()
    transformer = AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=8, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=encoder.config.d_model,
        caption_projection_dim=32, out_channels=8, pos_embed_max_size=1024,
    )  # fmt: skip
    return AuraFlowPipeline(tokenizer, encoder, image_vae(), transformer, scheduler())


def cogview4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    tokenizer = letters()
    transformer = CogView4Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=1, attention_head_dim=16, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=16, condition_dim=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    flow = scheduler(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, **SHIFTED, time_shift_type="linear")
    return CogView4Pipeline(tokenizer, language_model(tokenizer), image_vae(), transformer, flow)


def unet(latent: bool = False) -> Any:
    """Stable Diffusion 1's pipeline, or, with `latent`, a latent consistency model's."""
    from diffusers import (
        DDIMScheduler,
        LatentConsistencyModelPipeline,
        LCMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    clip, tokenizer = clips()
    model = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, cross_attention_dim=clip.config.hidden_size, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        time_cond_proj_dim=8 if latent else None,
    )  # fmt: skip
    made: Any = LatentConsistencyModelPipeline if latent else StableDiffusionPipeline
    times = LCMScheduler() if latent else DDIMScheduler()
    return made(image_vae(), clip, tokenizer, model, times, None, None, requires_safety_checker=False)


FAMILIES: dict[str, Callable[[], Any]] = {
    "auraflow": auraflow,
    "chroma": chroma,
    "cogview4": cogview4,
    "consistency": lambda: unet(latent=True),
    "ernie": ernie,
    "krea2": krea2,
    "longcat": longcat,
    "lumina2": lumina2,
    "ovis": ovis,
    "sana": sana,
    "unet": unet,
    "zimage": zimage,
}


def sd3_teacher(folder: Path) -> Path:
    """A StableDiffusion3Pipeline with SD 3.5's norms and second attention, two CLIPs and a T5."""
    import torch
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    from diptych.pocket.pretrain import tokenizers

    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = tokenizers.make_tokenizers()
    clip, t5 = tokenizers.make_encoders(clip_tokenizer, t5_tokenizer)
    config = clip.config
    config.hidden_size, config.intermediate_size, config.projection_dim = 32, 64, 32
    images = vae(64, mid_block_add_attention=False)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=t5.config.d_model,
        pooled_projection_dim=64,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
        pos_embed_max_size=64,
    )
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=images,
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=clip_tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def qwen_teacher(folder: Path) -> Path:
    """A QwenImagePipeline: its own VAE, a Qwen 2.5 VL of two layers, a tokenizer of letters."""
    import torch
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from tokenizers import pre_tokenizers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={t: i for i, t in enumerate([*letters, "<|endoftext|>"])}, merges=[])
    text: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    sight: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    marks: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "image_token_id": 1, "video_token_id": 2}
    marks |= {"vision_start_token_id": 3, "vision_end_token_id": 4}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight, **marks)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def flux2_teacher(folder: Path) -> Path:
    """A Flux2KleinPipeline: FLUX.2's transformer and VAE, and a Qwen 3 of as many layers as prompts are read at."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*letters, "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=64)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    vae = AutoencoderKLFlux2(
        **BLOCKS,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(text),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder
