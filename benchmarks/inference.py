"""Inference: the released sampler compared with ours, alternating in one run. The source of docs/speed.md's numbers.

    python benchmarks/inference.py golden                 both ways against the release's fixture
    python benchmarks/inference.py pocket                 the pocket model, with prompt and reference caching apart
    python benchmarks/inference.py midsize                a random FLUX of 4 + 8 blocks, d = 768, 512 + 128 tokens (CPU)
    python benchmarks/inference.py full                   a random FLUX.1, 12 B, 2048 + 512 tokens (a GPU of 80 GB)
    python benchmarks/inference.py tokens                 that FLUX as a diptych and with reference tokens, 512² (CPU)
    python benchmarks/inference.py quality                CP·PF of the lossy switches on the pocket model
    python benchmarks/inference.py publish RESULT.json    a quality result into docs/speed.md and `switches`

Results go to benchmarks/results/, with the machine named. Seconds are medians. Peak bytes are above the memory of both
models at rest. `share` is the blocks' arithmetic divided by time × the matrix rate measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from PIL import Image
from released_way import ReleasedWay, from_folder, split_input

from diptych import student
from diptych.run.plan.sizes import known
from diptych.student.canvas import Canvas
from diptych.student.runtime import speed
from diptych.student.runtime.applied import apply_speed, remove_speed
from diptych.student.runtime.speed import PLAIN, PRESETS, Speed

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "fixtures" / "release_golden"
REFERENCES = ROOT / "examples" / "references"
# Absolute and relative together. Guidance adds up to three times the rounding of a forward, which differs by processor.
TOLERANCE = {"plain": 1e-5, "guided": 2e-5}
GUIDED = {"image_guidance": 1.5, "text_guidance": 2.0}
UNGUIDED = {"image_guidance": 1.0, "text_guidance": 1.0}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
RANK = 128
H200_RATE = 790e12  # measured bf16 product rate; the floor of 1.33 s for 28 forwards rests on it
DEV = known()["black-forest-labs/FLUX.1-dev"]["transformer"]
FLUX: dict[str, Any] = {key: value for key, value in DEV.items() if not key.startswith("_")}
MIDSIZE: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 64,
    "num_attention_heads": 12,
    "joint_attention_dim": 512,
    "pooled_projection_dim": 256,
    "axes_dims_rope": (8, 28, 28),
    "guidance_embeds": True,
}


# golden ------------------------------------------------------------------------------------------------------------


def golden(arguments: argparse.Namespace) -> dict[str, Any]:
    """Largest difference of final latents from the release's, for the rewritten release and for `exact`."""
    found = golden_on(torch.device("cpu"), torch.float32)
    del found["apart"]
    passed = all(case["within"] for way in found.values() for case in way.values())
    largest = {way: {name: case["max"] for name, case in cases.items()} for way, cases in found.items()}
    return {"benchmark": "golden", "largest_difference": largest, "tolerance": TOLERANCE, "passed": passed}


def golden_on(
    device: torch.device, dtype: torch.dtype, cases: Sequence[str] = ("plain", "guided")
) -> dict[str, dict[str, Any]]:
    """By sampler and case: largest and mean difference of the final latents from the release's (float32, CPU), and
    whether it is within `TOLERANCE`. `apart` is the difference between the two samplers.

    With bfloat16's coarse timesteps the fixture's small random model gives other images in both samplers."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from safetensors.torch import load_file

    tensors = load_file(GOLDEN / "golden.safetensors")
    image, canvas = Image.open(GOLDEN / "reference.png"), Canvas(512, 512, 8)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(GOLDEN / "base" / "scheduler")
    vae: Any = AutoencoderKL.from_pretrained(GOLDEN / "base" / "vae")
    released = ReleasedWay(from_folder(GOLDEN / "dsd_model").to(device, dtype), vae.to(device, dtype), scheduler)
    ours: Any = student.load(GOLDEN / "dsd_model", GOLDEN / "base", device=device, dtype=dtype)
    ours.set_progress_bar_config(disable=True)
    apply_speed(ours, PRESETS["exact"])
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    given = {name: tensors[name].to(device, dtype) for name in names}
    texts, empty = (given[names[0]], given[names[1]]), (given[names[2]], given[names[3]])
    found: dict[str, dict[str, Any]] = {"released": {}, "exact": {}, "apart": {}}
    for name in cases:
        scales = UNGUIDED if name == "plain" else GUIDED
        theirs = released(
            image, None, tensors["noise"], canvas, steps=4, texts=texts, empty=empty, latents_only=True, **scales
        )
        mine = ours(
            reference=image,
            latents=tensors["noise"],
            num_inference_steps=4,
            image_guidance_scale=scales["image_guidance"],
            text_guidance_scale=scales["text_guidance"],
            output_type="latent",
            **given,
        ).images
        expected = tensors[f"latents_{name}"]
        theirs, mine = theirs.float().cpu(), mine.float().cpu()
        ways = {"released": (theirs, expected), "exact": (mine, expected), "apart": (mine, theirs)}
        for way, (got, wanted) in ways.items():
            difference = (got - wanted).abs()
            found[way][name] = {
                "max": float(difference.max()),
                "mean": float(difference.mean()),
                "within": torch.allclose(got, wanted, rtol=TOLERANCE[name], atol=TOLERANCE[name]),
            }
    return found


# timing ------------------------------------------------------------------------------------------------------------


def compare(
    released: Callable[[int], torch.Tensor],
    ours: Any,
    draw: Callable[[int], torch.Tensor],
    settings: dict[str, Speed],
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Compares the released sampler with `ours` in each setting, in turn.

    A setting is applied before its call, outside the measured time. torch keeps compiled code between the turns.
    """
    left_out: dict[str, list[str]] = {}
    remembered: dict[str, Any] = {}  # by setting: putting one on starts with nothing remembered

    def way(name: str, setting: Speed) -> Callable[[int], torch.Tensor]:
        def call(number: int) -> torch.Tensor:
            return draw(number)

        def prepare() -> None:
            left_out[name] = apply_speed(ours, setting)
            if not name.endswith("_forgetful"):
                ours.runtime.recall = remembered.setdefault(name, ours.runtime.recall)

        call.prepare = prepare  # pyright: ignore[reportFunctionMemberAccess]
        return call

    methods: dict[str, Any] = {"released": released} | {name: way(name, setting) for name, setting in settings.items()}
    seconds, outputs, peaks = measuring.alternate(methods, arguments.rounds, device)
    remove_speed(ours)
    base = measuring.summary(seconds["released"])
    found: dict[str, Any] = {}
    for name, times in seconds.items():
        entry = measuring.summary(times)
        entry["speedup"] = round(base["median_s"] / entry["median_s"], 3)
        entry["peak_mib"] = round(peaks[name] / 2**20, 1)
        difference = (outputs[name].float() - outputs["released"].float()).abs()
        entry["difference"] = {"max": float(difference.max()), "mean": float(difference.mean())}
        if name in settings:
            entry["switches"] = settings[name].changed()
            entry["left_out"] = left_out[name]
        found[name] = entry
    return found


def alone(names: list[str]) -> dict[str, Speed]:
    """Each exact switch alone, for a table of their effects."""
    return {f"only_{name}": replace(PLAIN, **{name: getattr(PRESETS["exact"], name)}) for name in names}


EXACT_SWITCHES = ["fused_lora", "packed", "fused_qkv", "compile", "modulation", "batched_guidance"]


def pocket(arguments: argparse.Namespace) -> dict[str, Any]:
    """The packaged student, with an unfused LoRA in the released sampler and its text encoders."""
    from diffusers import FluxTransformer2DModel

    ours: Any = student.load("pocket", device="cpu", fuse=True)
    slow: Any = student.load("pocket", device="cpu", fuse=False)
    for pipe in (ours, slow):
        pipe.set_progress_bar_config(disable=True)
    sampling = ours.settings.sampling
    assert isinstance(slow.transformer, FluxTransformer2DModel)
    parts = {name: getattr(slow, name) for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    # The control-LoRA also adapts the input layer, so that layer stays one: it cannot be told apart into two.
    way = ReleasedWay(slow.transformer, slow.vae, slow.scheduler, **parts)
    side = ours.default_panel_size
    canvas = Canvas(side, side, ours.vae_scale_factor)
    picture, prompt = Image.open(REFERENCES / "cat.png").convert("RGB"), "a cat on a beach at sunset"
    steps = arguments.steps or int(sampling["steps"])
    scales = {key: sampling[key] for key in ("image_guidance", "text_guidance")}

    def noise(number: int) -> torch.Tensor:
        return ours.noise([number + 1], canvas)

    def released(number: int) -> torch.Tensor:
        return way(picture, prompt, noise(number), canvas, steps=steps, **scales).clamp(-1, 1)

    def draw(number: int) -> torch.Tensor:
        return ours_pixels(ours, picture, noise(number), canvas, steps, scales, prompt=prompt)

    settings = {
        "exact": PRESETS["exact"],
        "exact_forgetful": PRESETS["exact"],  # prompt and reference encoded anew for each picture
        "fast": PRESETS["fast"],
        "fastest": PRESETS["fastest"],
    }
    found = compare(released, ours, draw, settings, arguments, torch.device("cpu"))
    return {"benchmark": "pocket", "steps": steps, **scales, "methods": found}


def ours_pixels(
    pipe: Any,
    image: Image.Image,
    noise: torch.Tensor,
    canvas: Canvas,
    steps: int,
    scales: dict[str, float],
    **given: Any,
) -> torch.Tensor:
    """Right-panel pixels (1, 3, h, w) in [-1, 1], the VAE's range."""
    images = pipe(
        reference=image,
        latents=noise,
        height=canvas.panel_height,
        width=canvas.panel_width,
        num_inference_steps=steps,
        image_guidance_scale=scales["image_guidance"],
        text_guidance_scale=scales["text_guidance"],
        output_type="pt",
        **given,
    ).images
    return 2 * images - 1


def random_pair(config: dict[str, Any], device: torch.device, dtype: torch.dtype, side: int) -> tuple[ReleasedWay, Any]:
    """The released sampler and our pipeline with equal random weights: transformer, LoRA (rank 128), VAE, scheduler."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from safetensors.torch import load_file, save_file

    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.weights.lora import apply_lora, fuse_loras

    torch.manual_seed(0)
    channels = config["in_channels"]
    torch.set_default_dtype(dtype)  # 12 B parameters are not made in float32 first
    with torch.device(device):
        plain: Any = FluxTransformer2DModel(**config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    folded = copy.deepcopy(plain)
    condition = torch.randn(plain.inner_dim, channels, device=device, dtype=dtype) * 0.02
    weight = torch.cat([plain.x_embedder.weight, condition], dim=1)
    folded.x_embedder = torch.nn.Linear(2 * channels, plain.inner_dim, device=device, dtype=dtype).requires_grad_(False)
    folded.x_embedder.weight.copy_(weight)
    folded.x_embedder.bias.copy_(plain.x_embedder.bias)
    folded.register_to_config(in_channels=2 * channels, out_channels=channels)
    split_input(plain, weight, plain.x_embedder.bias)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64) if side <= 256 else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels // 4,
        layers_per_block=2,
        norm_num_groups=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        sample_size=side,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae = vae.to(device, dtype).eval().requires_grad_(False)
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pytorch_lora_weights.safetensors"
        save_file(random_lora(folded), path)
        released = ReleasedWay(plain, vae, FlowMatchEulerDiscreteScheduler(**shift))
        plain.load_lora_adapter(load_file(path), prefix="transformer")
        ours = DiptychPipeline(FlowMatchEulerDiscreteScheduler(**shift), vae, folded)
        ours.set_progress_bar_config(disable=True)
        apply_lora(ours, path)
        fuse_loras(ours)
    return released, ours


def random_lora(transformer: Any) -> dict[str, torch.Tensor]:
    """A LoRA of rank 128 on every attention projection, large enough to matter and too small to dominate the model."""
    state = {}
    for name, module in transformer.named_modules():
        if ".attn." in name and any(name.endswith(f".{target}") for target in ATTENTION):
            like = {"dtype": module.weight.dtype, "device": module.weight.device}
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, module.in_features, **like) * 0.02
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, RANK, **like) * 0.02
    return {key: tensor.cpu().contiguous() for key, tensor in state.items()}


def random_flux(
    name: str, config: dict[str, Any], side: int, text: int, device: torch.device, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One size of random FLUX, unguided and guided."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    released_way, ours = random_pair(config, device, dtype, side)
    canvas = Canvas(side, side, ours.vae_scale_factor)
    generator = torch.Generator().manual_seed(1)

    def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
        shapes = (1, text, config["joint_attention_dim"]), (1, config["pooled_projection_dim"])
        first, second = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        return first, second

    texts, empty = embeddings(), embeddings()
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    given = {
        "prompt_embeds": texts[0],
        "pooled_prompt_embeds": texts[1],
        "negative_prompt_embeds": empty[0],
        "negative_pooled_prompt_embeds": empty[1],
    }
    steps = arguments.steps or 28
    rate = measuring.matrix_rate(device, dtype, 2048 if device.type == "cpu" else 8192)
    work = measuring.forward_flop(ours.transformer.config, canvas.tokens, text)
    result: dict[str, Any] = {
        "benchmark": name,
        "parameters": sum(p.numel() for p in ours.transformer.parameters()),
        "image_tokens": canvas.tokens,
        "text_tokens": text,
        "steps": steps,
        "dtype": str(dtype).removeprefix("torch."),
        "forward_tflop": round(work / 1e12, 4),
        "matrix_tflops": round(rate / 1e12, 3),
        "cases": {},
    }
    settings = {key: preset for key, preset in PRESETS.items() if not arguments.only_exact or key == "exact"}
    settings |= alone(EXACT_SWITCHES) if arguments.switches else {}
    for case, scales in (("unguided", UNGUIDED), ("guided", GUIDED)):
        if case not in arguments.cases:
            continue
        forwards = steps if case == "unguided" else min(2, steps) + 3 * max(0, steps - 2)

        def released(number: int, scales: dict[str, float] = scales) -> torch.Tensor:
            noise = ours.noise([number + 1], canvas)
            drawn = released_way(image, None, noise, canvas, steps=steps, texts=texts, empty=empty, **scales)
            return drawn.float().clamp(-1, 1)

        def draw(number: int, scales: dict[str, float] = scales) -> torch.Tensor:
            noise = ours.noise([number + 1], canvas)
            return ours_pixels(ours, image, noise, canvas, steps, scales, **given).float()

        found = compare(released, ours, draw, settings, arguments, device)
        for entry in found.values():
            floor = forwards * work / rate
            entry["share"] = round(floor / entry["median_s"], 3)
            if device.type == "cuda":
                entry["share_of_790_tflops"] = round(forwards * work / H200_RATE / entry["median_s"], 3)
        result["cases"][case] = {"forwards_of_the_released_way": forwards, "floor_s": round(floor, 4), "methods": found}
    return result


def midsize(arguments: argparse.Namespace) -> dict[str, Any]:
    """4 + 8 blocks, d = 768; two panels of 256 pixels: 512 image tokens, 128 of text; on the CPU in float32."""
    return random_flux("midsize", MIDSIZE, 256, 128, torch.device("cpu"), arguments)


def full(arguments: argparse.Namespace) -> dict[str, Any]:
    """FLUX.1-dev's sizes, random weights in bfloat16: two panels of 512 pixels, 512 tokens of text."""
    if not torch.cuda.is_available():
        sys.exit("full needs a CUDA GPU with about 80 GB; here: midsize, pocket")
    return random_flux("full", FLUX, 512, 512, torch.device("cuda"), arguments)


# tokens ------------------------------------------------------------------------------------------------------------


def tokens(arguments: argparse.Namespace) -> dict[str, Any]:
    """A random FLUX of 4 + 8 blocks, d = 768, as a diptych and with reference tokens: images and training steps."""
    from diffusers import FluxTransformer2DModel

    from diptych.student.pipeline import DiptychPipeline
    from diptych.student.settings import Settings, register

    side, text, device = arguments.side, arguments.text, torch.device("cpu")
    _, diptych = random_pair(MIDSIZE, device, torch.float32, side)
    pipes: dict[str, Any] = {"diptych": diptych}
    torch.manual_seed(0)
    plain: Any = FluxTransformer2DModel(**MIDSIZE).eval().requires_grad_(False)
    for attention in ("joint", "self"):
        model = copy.deepcopy(plain)
        register(model, Settings(conditioning="tokens", reference_attention=attention))  # pyright: ignore[reportArgumentType]
        pipes[f"tokens, {attention}"] = DiptychPipeline(diptych.scheduler, diptych.vae, model)
    generator, names = torch.Generator().manual_seed(1), ("prompt_embeds", "negative_prompt_embeds")
    given = {name: torch.randn(1, text, MIDSIZE["joint_attention_dim"], generator=generator) for name in names}
    for name in names:
        pooled = name.replace("prompt", "pooled_prompt") if name == names[0] else "negative_pooled_prompt_embeds"
        given[pooled] = torch.randn(1, MIDSIZE["pooled_projection_dim"], generator=generator)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
        apply_speed(pipe, PRESETS["exact"])
    cases: dict[str, Any] = {}
    for case, scales in (("unguided", UNGUIDED), ("guided", GUIDED)):

        def way(pipe: Any, scales: dict[str, float] = scales) -> Callable[[int], torch.Tensor]:
            def draw(number: int) -> torch.Tensor:
                canvas = pipe.canvas(side, side)
                steps, noise = arguments.steps or 28, pipe.noise([number + 1], canvas)
                return ours_pixels(pipe, image, noise, canvas, steps, scales, **given)

            return draw

        cases[case] = _beside_diptych({name: way(pipe) for name, pipe in pipes.items()}, arguments, device)
    for pipe in pipes.values():
        remove_speed(pipe)
    cases["training step"] = _beside_diptych(
        {name: _training(pipe, side, text) for name, pipe in pipes.items()}, arguments, device
    )
    count = sum(p.numel() for p in plain.parameters())
    result = {"benchmark": "tokens", "parameters": count, "side": side, "text_tokens": text}
    return {**result, "steps": arguments.steps or 28, "cases": cases}


def _training(pipe: Any, side: int, text: int) -> Callable[[int], torch.Tensor]:
    """Forward and backward of one sample, all weights trained."""
    from diptych.student.attention import install
    from diptych.student.references import TokenStyle
    from diptych.train.objective import Batch, panel_losses

    model, canvas, settings = pipe.transformer, pipe.canvas(side, side), pipe.settings
    style = TokenStyle(settings.positions, settings.reference_attention) if canvas.panels == 1 else None
    install(model)
    shape = (1, canvas.tokens, pipe.channels)

    def step(number: int) -> torch.Tensor:
        model.train().requires_grad_(True)
        generator = torch.Generator().manual_seed(number + 1)
        clean, condition, noise = (torch.randn(shape, generator=generator) for _ in range(3))
        embeds = torch.randn(1, text, MIDSIZE["joint_attention_dim"], generator=generator)
        pooled = torch.randn(1, MIDSIZE["pooled_projection_dim"], generator=generator)
        batch = Batch(clean, condition, noise, torch.tensor([0.6]), embeds, pooled, canvas=canvas)
        left, right = panel_losses(model, batch, 1.0, style)
        loss = (left + right).mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _beside_diptych(methods: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    seconds, _, peaks = measuring.alternate(methods, arguments.rounds, device)
    found = {name: measuring.summary(times) for name, times in seconds.items()}
    for name, entry in found.items():
        entry["speedup"] = round(found["diptych"]["median_s"] / entry["median_s"], 3)
        entry["peak_mib"] = round(peaks[name] / 2**20, 1)
    return found


# quality -----------------------------------------------------------------------------------------------------------


LOSSY_ALONE = {
    "cache=first_block": {"cache": "first_block"},
    "cache=magnitude": {"cache": "magnitude"},
    "cache=skip": {"cache": "skip"},
    "guidance_from=4": {"guidance_from": 4},
    "guidance_until=0.7": {"guidance_until": 0.7},
    "clamp_left=on": {"clamp_left": True},
    "null_panel=shared": {"null_panel": "shared"},
    "decode=right": {"decode": "right"},
}


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    """CP·PF of the packaged student in each setting compared with `exact`, on equal references, prompts and seeds.

    The subjects are held out, and the scoring judge did not curate (docs/evaluate.md). `pixels` is the mean absolute
    difference from the images of `exact`, 0 to 1.
    """
    from diptych import recipe as recipes
    from diptych.data.images import open_image
    from diptych.data.store import Dataset
    from diptych.evaluate import generation, harness, suites
    from diptych.evaluate.evaluation import Evaluation
    from diptych.evaluate.methods.common import Context
    from diptych.evaluate.methods.students import PackagedStudent
    from diptych.evaluate.scoring import judging, metrics, summary

    recipe = recipes.load(
        "pocket",
        [
            f"evaluate.samples={arguments.samples}",
            f"evaluate.prompts={arguments.prompts}",
            f"evaluate.seeds=[{', '.join(map(str, range(arguments.seeds)))}]",
            "evaluate.batch_size=8",
        ],
    )
    exact = replace(PRESETS["exact"], compile=False)
    settings = {name: preset for name, preset in PRESETS.items() if name != "exact"}
    settings |= {name: replace(exact, **change) for name, change in LOSSY_ALONE.items()}
    settings = {"exact": exact} | {n: s for n, s in settings.items() if not arguments.only or n in arguments.only}

    class Sped(PackagedStudent):
        """The packaged student in one setting."""

        def __init__(self, context: Any, label: str, setting: Speed) -> None:
            super().__init__(context)
            self.name, self.setting = label, setting  # pyright: ignore[reportAttributeAccessIssue]

        def fingerprint(self) -> str:
            return f"{super().fingerprint()} {json.dumps(asdict(self.setting))}"

        def open(self) -> Any:
            pipe = super().open()
            apply_speed(pipe, self.setting)
            return pipe

    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.run or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        suite = suites.load(recipe.evaluate.suite)
        context = Context(recipe, folder, suite)
        samples = suite.samples(recipe.evaluate.samples, recipe.evaluate.prompts)
        places = {re.sub(r"[^\w.]+", "_", name): name for name in settings}
        methods: Any = {place: Sped(context, place, settings[name]) for place, name in places.items()}
        prints = {place: generation.fingerprint(recipe, suite, samples, m) for place, m in methods.items()}
        plan = harness.EvaluationPlan(Evaluation.of_run(recipe, folder), context, samples, methods, prints)
        plan.generate(None, say)
        lines = harness.score_images(
            plan, [judging.pocket(plan.evaluation, suite, judging.VisionModels(recipe.device))]
        )
        outcomes, pictures = {}, {}
        for place, name in places.items():
            outcomes[name] = summary.outcome(lines, place, suites.MAIN)
            data = Dataset(folder / "samples" / place)
            rows = sorted((row for shard in data.shards() for row in data.read_shard(shard)), key=lambda row: row["id"])
            pictures[name] = np.stack([np.asarray(open_image(row["image"]), dtype=np.float32) / 255 for row in rows])
    base = outcomes["exact"].means()["cp_pf"]
    found: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        entry: dict[str, Any] = metrics.summary(outcome, arguments.bootstrap) | {"switches": settings[name].changed()}
        if name != "exact":
            compared = metrics.compare(outcome, outcomes["exact"], arguments.bootstrap)
            entry["change"] = round(compared["difference"] / base, 4) if base > 0 else None
            entry["change_ci95"] = [round(bound / base, 4) for bound in compared["ci95"]] if base > 0 else None
            entry["pixels"] = round(float(np.abs(pictures[name] - pictures["exact"]).mean()), 5)
        found[name] = entry
    return {"benchmark": "quality", "settings": found, "evaluate": recipe.evaluate.model_dump(mode="json")}


def say(done: int, total: int, note: str) -> None:
    print(f"\r{done}/{total} {note:<24}", end="" if done < total else "\n", file=sys.stderr, flush=True)


# publish -----------------------------------------------------------------------------------------------------------


MARKS = ("<!-- costs: written by benchmarks/inference.py publish -->", "<!-- end of costs -->")


def publish(arguments: argparse.Namespace) -> None:
    """Writes a quality result to `speed_costs.json`, which `diptych switches` reads, and to docs/speed.md."""
    result = json.loads(Path(arguments.result).read_text("utf8"))
    if result.get("benchmark") != "quality":
        sys.exit(f"{arguments.result} is not a quality result")
    measured = {name: entry for name, entry in result["settings"].items() if entry.get("change") is not None}
    costs = {
        "about": {key: result["about"][key] for key in ("date", "versions")},
        "settings": {
            name: {"change": entry["change"], "ci95": entry["change_ci95"], "n": entry["n"]}
            for name, entry in measured.items()
        },
    }
    speed.COSTS.write_text(json.dumps(costs, indent=1) + "\n", "utf8")
    page = ROOT / "docs" / "speed.md"
    text = page.read_text("utf8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{table(result)}\n{MARKS[1]}{after}", "utf8")
    print(page)


def table(result: dict[str, Any]) -> str:
    """The quality table, in Markdown."""
    exact = result["settings"]["exact"]
    lines = [
        f"Pocket model, {exact['n']} pictures of unseen subjects, {result['about']['date']}; `exact`: CP·PF "
        f"{exact['cp_pf']:.3f}, CP {exact['cp']:.3f}, PF {exact['pf']:.3f}.",
        "",
        "| setting | CP·PF | change against `exact` [95 %] | mean pixel difference |",
        "|---|---|---|---|",
    ]
    for name, entry in result["settings"].items():
        if entry.get("change") is not None:
            low, high = (100 * bound for bound in entry["change_ci95"])
            change = f"{100 * entry['change']:+.1f} % [{low:+.1f}, {high:+.1f}]"
            lines.append(f"| `{name}` | {entry['cp_pf']:.3f} | {change} | {entry['pixels']:.4f} |")
    return "\n".join(lines)


# the command -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (golden, pocket, midsize, full, tokens, quality):
        command = commands.add_parser(function.__name__, help=(function.__doc__ or "").splitlines()[0])
        command.add_argument("--out", type=Path, help="the result file [default: results/NAME-DEVICE-DATE.json]")
        command.add_argument("--threads", type=int, help="torch threads [default: torch's]")
        if function is tokens:
            command.add_argument("--side", type=int, default=512, help="pixels of an image's side")
            command.add_argument("--text", type=int, default=512, help="text tokens")
        if function in (pocket, midsize, full, tokens):
            command.add_argument("--rounds", type=int, default=5, help="measured rounds")
            command.add_argument("--steps", type=int, default=0, help="sampling steps [default: 28, or the model's]")
        if function in (midsize, full):
            command.add_argument("--cases", nargs="+", default=["unguided", "guided"], choices=["unguided", "guided"])
            command.add_argument("--switches", action="store_true", help="also each exact switch alone")
            command.add_argument("--only-exact", action="store_true", help="leave fast and fastest out")
        if function is quality:
            command.add_argument("--samples", type=int, default=40, help="identities")
            command.add_argument("--prompts", type=int, default=5)
            command.add_argument("--seeds", type=int, default=1)
            command.add_argument("--bootstrap", type=int, default=2000)
            command.add_argument("--only", nargs="+", help="these settings, beside exact")
            command.add_argument("--run", help="draw into this folder, so that a second call resumes")
        command.set_defaults(function=function)
    command = commands.add_parser("publish", help="a quality result into docs/speed.md and the help")
    command.add_argument("result")
    command.set_defaults(function=publish)
    arguments = parser.parse_args()
    if arguments.command == "publish":
        publish(arguments)
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = arguments.function(arguments)
    device = torch.device("cuda" if result["benchmark"] == "full" else "cpu")
    result = {"benchmark": result.pop("benchmark"), "about": measuring.about(device), **result}
    print(json.dumps(result, indent=1))
    print(measuring.write(result["benchmark"], result, arguments.out), file=sys.stderr)
    if result.get("passed") is False:
        sys.exit(1)


if __name__ == "__main__":
    main()
