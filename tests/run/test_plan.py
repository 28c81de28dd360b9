"""A plan counts what can be counted, names what it assumes, and believes a run's own measurements first."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from diptych import recipe as recipes
from diptych.cli import app
from diptych.data import places
from diptych.errors import UsageError
from diptych.recipe import load, tasks
from diptych.recipe.schema import Recipe
from diptych.run.plan import arithmetic, assumptions, format_plan, make, sizes
from diptych.student.runtime.presets import HEADROOM
from diptych.utils.paths import packaged
from raising import raises

LLM = {
    "write.writer": "llm",
    "write.count": 1000,
    "write.endpoint": "{base_url: 'http://localhost:8000/v1', model: writer, input_price: 0.5, output_price: 2.0}",
}
PARTS = {
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
}
VLM = "curate.vlm={endpoint: {base_url: 'http://localhost:8001/v1', model: judge, temperature: 0.7}, votes: 3}"


def plan(name: str, tmp_path: Path, *sets: str, **options: Any) -> dict[str, Any]:
    return make(load(name, sets), run_dir=tmp_path / "no run", **options)


# ---- what is counted


def test_a_flux_plan_agrees_with_what_is_known_of_flux(tmp_path: Path) -> None:
    found = plan("flux-subject", tmp_path)
    paint, distill = found["stages"]["paint"], found["stages"]["distill"]
    assert found["teacher"]["parameters"]["transformer"] == pytest.approx(11.9e9, rel=0.002)
    assert paint["flops_per_forward"] == pytest.approx(37.7e12, rel=0.005)
    assert 28 * paint["flops_per_forward"] == pytest.approx(1.055e15, rel=0.005)
    assert 120e12 < distill["flops_per_sample"] < 152e12
    latents_of_400k = 400_000 * 2048 * 64 * 2  # 105 GB for one canvas of each pair; condition canvases double it
    assert distill["disk"]["latents"] == pytest.approx(2 * latents_of_400k * found["counts"]["kept"] / 400_000)
    assert 40 < distill["memory"] / 2**30 < 80
    full = plan("flux-subject", tmp_path, "distill.mode=full")["stages"]["distill"]
    assert full["flops_per_sample"] == pytest.approx(152e12, rel=0.03)
    assert full["trained_parameters"] > 11.9e9 and full["memory"] > 12 * 11.9e9


def test_a_forward_is_what_torch_counts() -> None:
    import torch
    from diffusers import FluxTransformer2DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = json.loads((packaged("pocket/weights") / "teacher/transformer/config.json").read_text())
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel.from_config({**config, "guidance_embeds": True})
        image, text = 24, 10
        inputs = {
            "hidden_states": torch.zeros(1, image, config["in_channels"]),
            "encoder_hidden_states": torch.zeros(1, text, config["joint_attention_dim"]),
            "pooled_projections": torch.zeros(1, config["pooled_projection_dim"]),
            "timestep": torch.zeros(1),
            "guidance": torch.zeros(1),
            "img_ids": torch.zeros(image, 3),
            "txt_ids": torch.zeros(text, 3),
        }
    # The math kernel is made of plain products, which the counter knows on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert arithmetic.forward(shapes, arithmetic.TokenCounts(image, text)) == counter.get_total_flops()


def test_reference_tokens_are_what_torch_counts() -> None:
    import torch
    from diffusers import FluxTransformer2DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from diptych.student.attention import capture, install

    config = json.loads((packaged("pocket/weights") / "teacher/transformer/config.json").read_text())
    target, text, reference = 24, 10, 15
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel.from_config(config)
        install(model)
        inputs = {
            "hidden_states": torch.zeros(1, target, config["in_channels"]),
            "encoder_hidden_states": torch.zeros(1, text, config["joint_attention_dim"]),
            "pooled_projections": torch.zeros(1, config["pooled_projection_dim"]),
            "timestep": torch.zeros(1),
            "img_ids": torch.zeros(target, 3),
            "txt_ids": torch.zeros(text, 3),
        }
        tokens, ids = torch.zeros(1, reference, config["in_channels"]), torch.zeros(reference, 3)
    counted = []
    for passes in (1, 2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            keys = capture(model, tokens, ids)
            if passes == 2:
                model(**inputs, joint_attention_kwargs={"references": keys})
        counted.append(counter.get_total_flops())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    apart = arithmetic.TokenCounts(target + reference, text, apart=reference)
    assert arithmetic.forward(shapes, apart) == counted[1]
    step = arithmetic.TokenCounts(target, text, keys=reference)
    assert arithmetic.forward(shapes, step) == counted[1] - counted[0]


@pytest.mark.parametrize("targets", ["attention", "attention+mlp"])
def test_the_adapters_are_those_that_training_makes(tmp_path: Path, targets: str) -> None:
    import torch
    from diffusers import FluxTransformer2DModel

    from diptych.recipe.schema import Distill
    from diptych.train import parts

    config = json.loads((packaged("pocket/weights") / "teacher/transformer/config.json").read_text())
    channels = config["in_channels"]
    model = FluxTransformer2DModel.from_config({**config, "in_channels": 2 * channels, "out_channels": channels})
    options = Distill(mode="lora", rank=8, lora_targets=targets)
    real = parts.select(model, options, "float32", torch.device("cpu")).count
    found = plan("pocket", tmp_path, "distill.rank=8", f"distill.lora_targets={targets}")
    assert found["stages"]["distill"]["trained_parameters"] == real


def test_reference_tokens_widen_nothing_and_are_planned(tmp_path: Path) -> None:
    def distill(*sets: str) -> dict[str, Any]:
        return plan("flux-subject", tmp_path, *sets)["stages"]["distill"]

    base = ("distill.conditioning=tokens", "distill.condition_init=zeros")
    diptych, tokens = distill(), distill(*base)
    alone = distill(*base, "distill.reference_attention=self")
    assert diptych["trained_parameters"] - tokens["trained_parameters"] == 3072 * 128 + 3072  # the input layer
    assert tokens["flops_per_sample"] == pytest.approx(diptych["flops_per_sample"], rel=1e-3)  # as many tokens
    assert alone["flops_per_sample"] < tokens["flops_per_sample"]  # fewer pairs of tokens in attention
    assert tokens["disk"]["latents"] == diptych["disk"]["latents"] / 2
    # 57 blocks keep keys and values of 1,024 tokens for the other pass, in bfloat16
    rows = tokens["rows_at_once"]
    more = alone["memory_of"]["activations"] - tokens["memory_of"]["activations"]
    assert more == pytest.approx(57 * 2 * 1024 * 3072 * 2 * rows, rel=1e-3)
    whole = distill(*base, "distill.mode=full")
    assert whole["trained_parameters"] == plan("flux-subject", tmp_path)["teacher"]["parameters"]["transformer"]


def test_rows_follow_from_the_layout(tmp_path: Path) -> None:
    found = plan("flux-subject", tmp_path, "write.layout=2x2", "write.count=100", assume=["keep_rate=0.25"])
    assert found["counts"] == {
        **{"prompts": 100, "grids": 100, "panels": 400, "candidates": 1200, "kept": 300},
        **{"kept_low": None, "kept_high": None},
    }
    assert found["stages"]["curate"]["judge_calls"] == 400
    bounds = plan("flux-subject", tmp_path)["counts"]
    assert bounds["kept_low"] < bounds["kept"] < bounds["kept_high"] < bounds["candidates"]


def test_several_images_of_a_prompt_are_grids_of_their_own(tmp_path: Path) -> None:
    one, three = (plan("flux-subject", tmp_path, "write.count=100", f"paint.images={n}") for n in (1, 3))
    assert one["counts"]["grids"] == three["counts"]["prompts"] == 100 and three["counts"]["grids"] == 300
    assert three["stages"]["paint"]["flops"] == 3 * one["stages"]["paint"]["flops"]
    assert three["counts"]["candidates"] == 3 * one["counts"]["candidates"]


def test_guidance_doubles_the_forwards_and_devices_share_the_hours(tmp_path: Path) -> None:
    one = plan("flux-subject", tmp_path)["stages"]["paint"]
    guided = plan("flux-subject", tmp_path, "paint.true_guidance=2", assume=["devices=8"])["stages"]["paint"]
    assert (one["forwards_per_grid"], guided["forwards_per_grid"]) == (28, 56)
    assert guided["device_hours"] == pytest.approx(2 * one["device_hours"])
    assert guided["wall_hours"] == pytest.approx(guided["device_hours"] / 8)


def test_less_memory_is_planned_for_what_takes_less(tmp_path: Path) -> None:
    def memory(*sets: str, **options: Any) -> dict[str, Any]:
        return plan("flux-subject", tmp_path, *sets, **options)["stages"]["distill"]["memory_of"]

    usual = memory()
    assert memory("distill.micro_batch=8")["activations"] > 1.6 * usual["activations"]
    assert memory("distill.gradient_checkpointing=false")["activations"] > 8 * usual["activations"]
    assert memory("distill.optimizer=adamw8bit")["trained"] == pytest.approx(usual["trained"] * 10 / 16)
    assert memory("distill.quantize=nf4")["weights"] < usual["weights"] - 8e9
    assert memory("distill.offload=blocks")["weights"] < usual["weights"] - 21e9
    assert memory("distill.conditioning=channel")["activations"] < 0.75 * usual["activations"]
    spread = memory("distill.sharding=full", assume=["devices=8"])
    assert spread["trained"] == pytest.approx(usual["trained"] / 8) and spread["weights"] < usual["weights"]


@pytest.mark.parametrize(
    ("card", "sets"), [(24, ("rank=16", "quantize=nf4")), (16, ("rank=32", "offload=blocks"))], ids=["nf4", "offload"]
)
def test_the_documented_settings_fit_their_card_in_every_phase(
    tmp_path: Path, card: int, sets: tuple[str, ...]
) -> None:
    settings = [f"distill.{key}" for key in (*sets, "micro_batch=1")]
    found = plan("flux-subject", tmp_path, *settings, gpu="rtx4090")["stages"]["distill"]
    assert found["memory"] == max(found["memory_phases"].values()) < HEADROOM * card * 2**30
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf8")
    assert f"{found['memory'] / 2**30:.1f} GiB" in text and all(key.replace("=", ": ") in text for key in sets)


def test_the_largest_phase_is_what_a_training_needs(tmp_path: Path) -> None:
    def phases(*sets: str, **options: Any) -> tuple[str, dict[str, int]]:
        found = plan("flux-subject", tmp_path, *sets, **options)
        distill = found["stages"]["distill"]
        assert distill["memory"] == max(distill["memory_phases"].values()) <= found["totals"]["memory"]
        return max(distill["memory_phases"], key=distill["memory_phases"].__getitem__), distill["memory_phases"]

    largest, usual = phases()
    assert largest == "steps" and usual["validation"] < usual["steps"] < 80e9
    large, all_at_once = phases("distill.micro_batch=null", "distill.gradient_checkpointing=true")
    assert large == "steps" and all_at_once["validation"] - usual["validation"] > 40 * 2**30
    small = ("distill.rank=1", "distill.micro_batch=1", "write.count=200")  # few captions: the encoders leave
    assert phases(*small)[0] in ("captions", "latents")
    eight = phases("distill.mode=full", "distill.sharding=full", assume=["devices=8"])
    assert eight[0] == "splitting" and eight[1]["splitting"] > 4 * 11.9e9
    text = "\n".join(format_plan(plan("flux-subject", tmp_path, *small)))
    assert "; the maximum is" in text


def test_planning_a_flux_training_imports_neither_torch_nor_diffusers(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from diptych.cli import app\n"
        "code = app.call(['plan', 'flux-subject', '--set', 'paint.speed=fast'])\n"
        "sys.exit(code or ' '.join({'torch', 'diffusers', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell", "pocket"])
def test_the_rules_for_a_model_s_tensors_give_the_model_s_own(name: str) -> None:
    import torch

    from diptych.student.families import shapes

    configs = sizes.find(load("flux-subject", [f"teacher={name}"])).configs
    for part, (library, cls) in PARTS.items():
        config = {key: value for key, value in configs[part].items() if not key.startswith("_")}
        model, found = shapes.meta(library, cls, config), shapes.tensors(library, cls, config)
        assert found.shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}, part
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert found.linears == linears and found.count == sum(p.numel() for p in model.parameters()), part


def test_preference_draws_negatives_and_computes_both_sides_through_two_models(tmp_path: Path) -> None:
    usual = plan("flux-subject", tmp_path)["stages"]["distill"]
    sets = ("distill.init=some/student", "distill.preference={pairs: 5000}")
    found = plan("flux-subject", tmp_path, *sets)["stages"]["distill"]
    forward = plan("flux-subject", tmp_path)["stages"]["paint"]["flops_per_forward"]
    assert found["flops_per_sample"] == pytest.approx(2 * (usual["flops_per_sample"] + forward), rel=0.05)
    assert found["memory_of"]["activations"] > 1.6 * usual["memory_of"]["activations"]
    assert found["memory_phases"]["negatives"] < found["memory"] and "negatives" not in usual["memory_phases"]
    assert found["memory_of"]["trained"] == pytest.approx(usual["memory_of"]["trained"] * 20 / 16)
    assert found["disk"]["negatives"] == 5000 * 2048 * 64 * 4 and usual["disk"]["negatives"] == 0
    assert found["epochs"] == found["samples"] / 5000


def test_what_does_not_fit_the_device_is_said_with_its_cures(tmp_path: Path) -> None:
    assert not any("a device has" in note for note in plan("flux-subject", tmp_path)["notes"])
    sets = ("distill.gradient_checkpointing=false", "distill.micro_batch=null")
    (note,) = (n for n in plan("flux-subject", tmp_path, *sets)["notes"] if "a device has" in n)
    assert (
        note.startswith("distill needs") and "set distill.gradient_checkpointing=true, set distill.micro_batch" in note
    )
    sets = ("distill.quantize=nf4", "distill.micro_batch=1", "distill.rank=1", "paint.memory=24")
    assert not any("a device has" in n for n in plan("flux-subject", tmp_path, *sets, gpu="rtx4090")["notes"])
    sets = (*sets[1:], "write.count=200")  # captions and latents are what needs most
    (note,) = (n for n in plan("flux-subject", tmp_path, *sets, gpu="rtx4090")["notes"] if n.startswith("distill"))
    assert "distill.offload=blocks" in note and "micro_batch" not in note
    small = plan("flux-subject", tmp_path, "paint.memory=null", gpu="rtx4090")["notes"]
    assert any(note.startswith("paint needs") and note.endswith("set paint.memory=auto") for note in small)
    few = plan("pocket", tmp_path, "write.count=10")["notes"]
    assert any("fewer than one batch of 32" in note for note in few)


def test_painting_is_planned_as_its_memory_preset_holds_the_teacher(tmp_path: Path) -> None:
    def paint(*sets: str, **options: Any) -> dict[str, Any]:
        return plan("flux-subject", tmp_path, *sets, **options)["stages"]["paint"]

    whole, staged, packed = (paint(f"paint.memory={name}")["memory"] for name in ("null", "24", "12"))
    assert whole > 33 * 2**30 > 24 * 2**30 > staged > packed and packed < 12 * 2**30
    chosen = paint("paint.memory=auto", gpu="rtx4090")
    assert chosen["memory_preset"] == "auto → 24" and chosen["memory"] == staged
    assert paint("paint.memory=auto")["memory"] == whole
    notes = {name: plan("flux-subject", tmp_path, f"paint.memory={name}")["notes"] for name in ("12", "24")}
    assert [any("longer than planned" in note for note in found) for found in notes.values()] == [True, False]


def test_a_speed_skips_forwards_and_compiles_where_there_is_a_gpu(tmp_path: Path) -> None:
    def paint(*sets: str) -> tuple[int, float]:
        found = plan("flux-subject", tmp_path, *sets)["stages"]["paint"]
        return found["forwards_per_grid"], found["seconds_per_grid"]

    (steps, plain), (same, exact), (fewer, fast) = (paint(f"paint.speed={name}") for name in ("null", "exact", "fast"))
    assert steps == same == 28 and fewer == 16
    assert exact == pytest.approx(plain * 0.42 / 0.6) and fast < 0.6 * exact
    pocket = plan("pocket", tmp_path, "paint.speed=exact")
    assert pocket["stages"]["paint"]["flops"] == plan("pocket", tmp_path)["stages"]["paint"]["flops"]
    assert pocket["assumed"].get("paint_share", {"value": 1})["value"] == 1  # nothing compiles there


# ---- calls, tokens, money


def test_a_language_model_is_counted_and_priced(tmp_path: Path) -> None:
    sets = [f"{key}={value}" for key, value in LLM.items()]
    found = plan("flux-subject", tmp_path, *sets, assume=["writer_answer_tokens=100"])
    write = found["stages"]["write"]
    assert (write["calls"], write["tokens"]["out"], write["model"]) == (1000, 100_000, "writer")
    told = tasks.load("subject").writer
    assert told is not None
    brief = len(told.brief) / 4
    assert brief * 1000 < write["tokens"]["in"] < 4 * brief * 1000
    assert write["money"] == pytest.approx(write["tokens"]["in"] * 0.5e-6 + 0.2)
    longer = plan("flux-subject", tmp_path, *sets, "write.panel_words=50")["stages"]["write"]
    usual = plan("flux-subject", tmp_path, *sets)["stages"]["write"]
    assert longer["tokens"]["out"] - usual["tokens"]["out"] == pytest.approx(1000 * 2 * 25 / 0.75, rel=0.02)
    asked = plan("flux-subject", tmp_path, *sets, "write.captions=a.txt", "write.clear_subject=true")["stages"]["write"]
    assert asked["calls"] == 2000 and asked["tokens"]["in"] > usual["tokens"]["in"]


def test_a_vision_model_is_asked_once_for_two_panels_and_each_vote(tmp_path: Path) -> None:
    found = plan("flux-subject", tmp_path, "write.count=100", VLM, assume=["keep_rate=0.5", "judge_share=0.5"])
    curate = found["stages"]["curate"]
    assert (curate["votes"], curate["captions"], curate["calls"]) == (150, 0, 150)
    assert curate["money"] is None and found["totals"]["money"] is None
    assert "money unknown" in "\n".join(format_plan(found))
    assert {"gpu_hour", "vlm_input_price", "vlm_output_price"} <= set(found["missing"])
    prices = ["vlm_input_price=1", "vlm_output_price=4", "gpu_hour=2", "keep_rate=0.5"]
    found = plan("flux-subject", tmp_path, "write.count=100", VLM[:-1] + ", captions: true}", assume=prices)
    curate = found["stages"]["curate"]
    assert (curate["votes"], curate["captions"]) == (300, 100)
    assert curate["money"] == pytest.approx((curate["tokens"]["in"] + 4 * curate["tokens"]["out"]) / 1e6)
    assert found["totals"]["money"] == pytest.approx(curate["money"] + 2 * found["totals"]["device_hours"])
    assert found["missing"] == []


def test_a_local_vision_model_costs_hours_and_no_tokens_money(tmp_path: Path) -> None:
    found = plan("flux-subject", tmp_path, "curate.vlm={local: Qwen/Qwen3-VL-8B-Instruct}")["stages"]
    assert found["curate"]["money"] == 0
    assert found["curate"]["device_hours"] == pytest.approx(found["paint"]["device_hours"] * 0.04)


def test_models_on_vllm_cost_hours_where_they_are_known_and_name_what_they_need(tmp_path: Path) -> None:
    judge = "curate.vlm.vllm={model: Qwen/Qwen3-VL-32B-Instruct, tensor_parallel_size: 2}"
    found = plan("flux-subject", tmp_path, judge, assume=["gpu_hour=2"])
    curate = found["stages"]["curate"]
    assert (curate["money"], curate["vllm_gpus"]) == (0, 2) and found["missing"] == []
    assert curate["device_hours"] == pytest.approx(found["stages"]["paint"]["device_hours"] * 0.04)
    text = "\n".join(format_plan(found))
    assert "Qwen/Qwen3-VL-32B-Instruct (vLLM, 2 GPUs a worker): " in text
    assert "note: curate.vlm.vllm: pip install 'diptych[vllm]' and GPUs where the stage runs" in text
    writer = ["write.writer=llm", "write.vllm.model=Qwen/Qwen3-8B"]
    found = plan("flux-subject", tmp_path, *writer, assume=["gpu_hour=2"])
    assert found["stages"]["write"]["money"] is None and found["totals"]["money"] is None
    text = "\n".join(format_plan(found))
    assert "Qwen/Qwen3-8B (vLLM, 1 GPU a worker): " in text and "the hours of its GPUs are not counted" in text
    assert not [note for note in plan("flux-subject", tmp_path)["notes"] if "vllm" in note]


# ---- assumptions


def test_every_assumption_has_a_unit_and_a_source_and_can_be_set() -> None:
    recipe = load("flux-subject")
    for name, one in assumptions.defaults(recipe).items():
        assert one.unit and one.source
        assert assumptions.collect(recipe, [f"{name}=1"])[name].value == 1


@pytest.mark.parametrize(
    ("text", "code", "fact"),
    [
        ("keep_rat=0.4", "name_unknown", "'keep_rate'"),
        ("zzz=1", "name_unknown", "keep_rate, devices"),
        ("keep_rate", "option_invalid", "name=number"),
        ("keep_rate=many", "option_invalid", "above 0"),
        ("keep_rate=nan", "option_invalid", "above 0"),
        ("keep_rate=1.5", "option_invalid", "at most 1"),
        ("devices=0", "option_invalid", "above 0"),
        ("devices=1.5", "option_invalid", "whole number"),
        ("paint_share=0", "option_invalid", "above 0"),
    ],
)
def test_an_invalid_assumption_is_an_error(text: str, code: str, fact: str) -> None:
    with raises(code, text, fact, kind=UsageError) as caught:
        assumptions.collect(load("pocket"), [text])
    assert "\n" not in str(caught.value)


def test_a_recipe_s_own_prices_count_and_an_option_beats_them() -> None:
    recipe = load("flux-subject", [f"{key}={value}" for key, value in LLM.items()])
    found = assumptions.collect(recipe, ["writer_output_price=9"])
    assert (found["writer_input_price"].value, found["writer_output_price"].value) == (0.5, 9)
    assert assumptions.collect(load("pocket"))["writer_input_price"].value is None


def test_a_device_or_teacher_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with raises("hardware_unknown", "--gpu H20", "'H200'", kind=UsageError):
        plan("pocket", tmp_path, gpu="H20")
    with raises("model_not_found", "'black-forest-labs/FLUX.1-def'", "'black-forest-labs/FLUX.1-dev'"):
        plan("flux-subject", tmp_path, "teacher=black-forest-labs/FLUX.1-def")
    folder = tmp_path / "other" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    with raises("model_unsupported", folder.parent, "SD3Transformer2DModel"):
        plan("flux-subject", tmp_path, f"teacher={folder.parent}")
    with raises("size_invalid", "500", "16", kind=UsageError):
        plan("flux-subject", tmp_path, "paint.panel_size=500")
    with raises("name_unknown", "'atention'", "'attention'", kind=UsageError):
        plan("pocket", tmp_path, "distill.lora_targets=atention")
    with raises("layer_unknown", "'to_quu'", kind=UsageError):
        plan("pocket", tmp_path, "distill.lora_targets=[to_quu]")
    with pytest.raises(UsageError, match="3x3"):
        plan("flux-subject", tmp_path, "write.layout=3x3")


def test_a_local_folder_is_counted_from_its_own_files(tmp_path: Path) -> None:
    pocket = str(packaged("pocket/weights") / "teacher")
    recipe = load("pocket", [f"teacher={pocket}"])
    assert sizes.find(recipe).configs == sizes.find(load("pocket")).configs
    assert sizes.find(recipe).text_tokens == 32


def test_a_downloaded_teacher_is_counted_from_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--flux-mini"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    pocket = packaged("pocket/weights") / "teacher"
    recipe = load("pocket", ["teacher=someone/flux-mini"])
    for part in ("transformer", "vae"):
        with raises("model_not_found", "someone/flux-mini"):
            sizes.find(recipe)
        (repo / "snapshots" / "abc" / part).mkdir(parents=True)
        (repo / "snapshots" / "abc" / part / "config.json").write_bytes((pocket / part / "config.json").read_bytes())
    found = sizes.find(recipe)
    assert found.configs["transformer"] == sizes.find(load("pocket")).configs["transformer"]
    assert "cache" in found.source


# ---- what was measured


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A pocket run: painted at 0.1 s a grid, a fifth kept, trained at 0.5 s a step."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = Recipe.model_validate({**load("pocket").values(), "device": "cpu", "threads": 2})
    recipe = recipe.model_copy(update={"write": recipe.write.model_copy(update={"count": 50})})
    (folder / "recipe.yaml").write_text(recipe.dump())
    places.append(folder, "start", machine={"processor": "Test CPU", "cores": 2})
    places.append(folder, "stage", stage="paint", seconds=4.0, result={"rows": 40, "processed": 40})
    places.append(folder, "stage", stage="paint", seconds=1.0, result={"rows": 50, "processed": 10})
    places.append(folder, "stage", stage="curate", seconds=2.0, result={"rows": 100, "processed": 50, "pairs": 20})
    places.append(folder, "stage", stage="distill", seconds=60, result={"training": {"seconds": 50.0, "steps": 100}})
    (folder / "grids").mkdir()
    (folder / "grids" / "part-00000.parquet").write_bytes(b"x" * 5000)
    return folder


def test_a_run_s_own_rates_take_the_place_of_assumptions(run: Path) -> None:
    found = make(load("pocket"), run_dir=run)
    paint, distill = found["stages"]["paint"], found["stages"]["distill"]
    assert paint["seconds_per_grid"] == pytest.approx(0.1)
    assert paint["disk"] == load("pocket").write.count * 100
    assert distill["seconds_per_step"] == pytest.approx(0.5)
    assert found["counts"]["kept"] == 2 * load("pocket").write.count // 5
    assert found["assumed"]["keep_rate"]["of"] == "measured" and "Test CPU" in found["assumed"]["keep_rate"]["source"]
    assert any("measured" in note for note in found["notes"])
    assert "measured: " in "\n".join(format_plan(found))


def test_what_somebody_sets_beats_what_was_measured(run: Path, tmp_path: Path) -> None:
    found = make(load("pocket"), ["keep_rate=0.5", "tflops=1"], run_dir=run)
    assert found["counts"]["kept"] == load("pocket").write.count  # half of two pairs a grid
    bare = plan("pocket", tmp_path, assume=["tflops=1"])["stages"]["paint"]["seconds_per_grid"]
    assert found["stages"]["paint"]["seconds_per_grid"] == pytest.approx(bare)
    fast = make(load("pocket"), gpu="H200", run_dir=run)["stages"]["paint"]["seconds_per_grid"]
    assert fast < bare
    assert make(load("pocket"), ["seconds_per_grid=7"], run_dir=run)["stages"]["paint"]["seconds_per_grid"] == 7


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ("write.count=9", set()),
        ("distill.steps=9", set()),
        ("seed=5", set()),
        ("paint.steps=9", {"seconds_per_grid", "grid_bytes", "keep_rate"}),
        ("curate.thresholds.same=0.9", {"keep_rate"}),
        ("curate.screens.dark=0.1", {"keep_rate"}),
        ("curate.copies={}", {"keep_rate"}),
        ("curate.duplicates={}", {"keep_rate"}),
        ("distill.rank=9", {"seconds_per_step"}),
        ("threads=7", {"seconds_per_grid", "seconds_per_step"}),
    ],
)
def test_a_rate_of_another_recipe_is_not_believed(run: Path, change: str, lost: set[str]) -> None:
    every = {"seconds_per_grid", "seconds_per_step", "keep_rate", "grid_bytes"}
    assert set(assumptions.rates(load("pocket", [change]), run)) == every - lost


def test_a_folder_without_a_run_measures_nothing(tmp_path: Path) -> None:
    assert assumptions.rates(load("pocket"), tmp_path / "nothing") == {}


def test_tokens_of_a_run_s_answers_are_read_from_its_evidence(tmp_path: Path) -> None:
    import judged_run
    from diptych.data import records

    row = judged_run.candidate(0, 0, 1, 0.9, 0.3, 1.0)
    votes = [{"status": "answered", "tokens": [900, 200]}, {"status": "answered", "tokens": [1100, 300]}]
    votes += [{"status": "failed", "tokens": [0, 0]}]
    folder = tmp_path / "run"
    judged_run.save(folder / "candidates", records.PAIR, [{**row, "evidence": json.dumps({"vlm": {"votes": votes}})}])
    recipe = load("pocket", [VLM])
    (folder / "recipe.yaml").write_text(recipe.dump())
    found = assumptions.rates(recipe, folder)
    assert (found["judge_input_tokens"][0], found["judge_answer_tokens"][0]) == (1000, 250)
    planned = make(load("pocket", ["write.count=10"]).model_copy(update={"curate": recipe.curate}), run_dir=folder)
    assert planned["stages"]["curate"]["tokens"] == {"in": 3 * 10 * 1000, "out": 3 * 10 * 250}
    assert assumptions.rates(load("pocket", [VLM, "curate.vlm.votes=1"]), folder) == {}


# ---- the command


def test_the_command_prints_a_plan_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.call(["plan", "pocket", "--assume", "gpu_hour=3", "--set", "write.count=100"]) == 0
    out, err = capsys.readouterr()
    assert "100 prompts → 100 grids → 200 candidate pairs" in out and err == ""
    assert all(f"\n{stage} " in out for stage in ("write", "paint", "curate", "distill", "evaluate", "total"))
    assert app.call(["plan", "pocket", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["grids"] == load("pocket").write.count
    assert found["totals"]["money"] is None and found["missing"] == ["gpu_hour"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("plan pocket --assume keep_rat=1", "'keep_rate'"),
        ("plan pockt", "'pocket'"),
        ("plan pocket --set paint.stesp=1", "'steps'"),
        ("plan pocket --gpu H20", "'H200'"),
    ],
)
def test_a_wrong_plan_is_one_line_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], args: str, message: str
) -> None:
    assert app.call(args.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1


def test_planning_loads_nothing_heavy_before_it_counts() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'pyarrow'}"
    code = f"import sys, diptych.run.plan; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- the recipe that a plan is for


def commented_blocks(name: str) -> dict[str, dict[str, Any]]:
    """The sections that a recipe's comments offer, by key."""
    text = (packaged("recipes") / f"{name}.yaml").read_text("utf8")
    found = re.findall(r"^# (?:write|curate):\n(?:#   .*\n)+", text, re.MULTILINE)
    blocks: dict[str, dict[str, Any]] = {}
    for block in found:
        blocks |= yaml.safe_load("".join(line[2:] for line in block.splitlines(keepends=True)))
    return blocks


def test_the_commented_settings_of_flux_subject_are_a_recipe(tmp_path: Path) -> None:
    blocks = commented_blocks("flux-subject")
    assert set(blocks) == {"write", "curate"}
    plain = yaml.safe_load((packaged("recipes") / "flux-subject.yaml").read_text("utf8"))
    recipe = recipes.check({**plain, **blocks}, "flux-subject.yaml")
    assert recipe.write.writer == "llm" and recipe.write.endpoint is not None
    assert recipe.curate.vlm is not None and recipe.curate.vlm.endpoint is not None
    for key in ("count", "shard_size"):
        assert getattr(recipe.write, key) == plain["write"][key]
    found = make(recipe, run_dir=tmp_path)
    assert found["stages"]["write"]["calls"] == 500_000
    assert found["stages"]["curate"]["votes"] == 3 * 500_000


def test_a_recipe_on_other_peoples_pairs_is_refused() -> None:
    with raises("recipe_conflict", "distill.data", kind=UsageError):
        make(load("demo", ["distill.data=[{path: runs/other}]"]))
