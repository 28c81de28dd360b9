"""The cost of each stage of a recipe, as plain values; None where a price is unknown."""

from __future__ import annotations

import json
import math
from typing import Any

from diptych.errors import UsageError, nearest
from diptych.recipe.schema.distill import LORA_TARGETS
from diptych.run.plan import arithmetic
from diptych.run.plan.sizes import painting_memory
from diptych.run.plan.workload import TrainingMemory, Workload

TEXT_IN_MEMORY = 2 * 2**30  # bytes: training encodes captions once if they fit, else in every step
LEVELS = 5  # noise levels of a validation (`train.validate.SIGMAS`)


def write(work: Workload) -> dict[str, Any]:
    """Return the prompts, and the language model's calls, tokens and money."""
    settings = work.recipe.write
    cost: dict[str, Any] = {"writer": settings.writer, "prompts": settings.count, "calls": 0}
    cost |= {"tokens": {"in": 0, "out": 0}, "money": 0.0, "model": None, "vllm_gpus": 0}
    if settings.writer == "llm":
        from diptych.llm import schema
        from diptych.stages.write import llm_writer

        llm_writer.check_task(work.task)
        assert work.task.writer is not None
        panels = work.layout.panels
        answer = llm_writer.answer_type(work.task, panels, settings.panel_words)
        brief = llm_writer.brief(work.task, work.layout, settings.panel_words)
        parts = work.task.writer.answer
        words = sum(llm_writer.LIMITS.get(name, 0) for name in parts) + panels * settings.panel_words
        form = json.dumps({name: [""] * panels if name == "panels" else "" for name in parts})
        longest = math.ceil(words / work.book["words_per_token"]) + _tokens(work, form)
        question = _quotation(work, bool(settings.captions)) + _tokens(work, brief + schema.in_words(answer))
        cost["calls"], spent = settings.count, [question, work.book.derived("writer_answer_tokens", longest)]
        if settings.clear_subject:
            clear = llm_writer.FILTER + schema.in_words(llm_writer.Clear)
            cost["calls"] *= 2
            spent[0] += _quotation(work, True) + _tokens(work, clear)
            spent[1] += math.ceil(llm_writer.LIMITS["subject"] / work.book["words_per_token"]) + 12  # its JSON
        cost["tokens"] = {way: round(n * settings.count) for way, n in zip(("in", "out"), spent, strict=True)}
        cost |= {"model": settings.model, "vllm_gpus": settings.vllm.tensor_parallel_size if settings.vllm else 0}
        # The speed of a model on this machine is unknown.
        cost["money"] = None if settings.vllm or settings.local else work.money("writer", cost["tokens"])
    cost["disk"] = round(settings.count * work.book["row_bytes"] + _answers(work, cost))
    return cost


def paint(work: Workload) -> dict[str, Any]:
    """Return the forward passes, operations, device hours, memory and disk of the grids."""
    settings, layout = work.recipe.paint, work.layout
    call, index = work.teacher.call, work.teacher.index
    prompts = call.branches(settings.true_guidance, index)
    forwards = _steps_run(settings.speed, settings.steps) * prompts
    one = arithmetic.forward(work.counts.shapes, work.canvas(layout.rows, layout.cols))
    per_grid = forwards * one + prompts * work.text_flops
    hours = work.hours("seconds_per_grid", work.grids, work.grids * per_grid, "paint_share")
    size = (layout.rows * work.size, layout.cols * work.size)
    bytes_ = work.number_bytes(settings.dtype)
    rows = settings.batch_size * call.rows(settings.true_guidance, index)
    gib = work.book.maybe("device_gib") if settings.memory == "auto" else None
    memory, preset, held = painting_memory(
        work.teacher, size, rows, work.on_cpu, bytes_, settings.memory, gib and gib * 2**30
    )
    return {
        "grids": work.grids,
        "forwards_per_grid": forwards,
        "flops_per_forward": one,
        "flops_per_grid": per_grid,
        "flops": work.grids * per_grid,
        "seconds_per_grid": hours * 3600 / work.grids,
        **_time(work, hours),
        "memory": memory,
        "memory_preset": preset,
        "held": held,
        "speed": settings.speed,
        "disk": round(work.grids * work.row_bytes("grid_bytes", layout.panels)),
    }


def _steps_run(name: str | None, steps: int) -> int:
    """Return how many of the sampling steps a speed preset computes."""
    from diptych.student.runtime import speed

    preset = speed.parse(name)
    return sum(preset.runs(step, steps) for step in range(steps))


def curate(work: Workload, painting_hours: float) -> dict[str, Any]:
    """Return the calls, tokens and money of the judges, and the core hours of cutting and comparing."""
    vlm = work.recipe.curate.vlm
    core = work.grids * work.book["seam_ms"] + work.pairs * work.book["compare_ms"]
    cost: dict[str, Any] = {"judge": work.recipe.curate.judge, "judge_calls": work.grids * work.layout.panels}
    cost |= {"core_hours": core / 3.6e6, "vlm": None, "vllm_gpus": 0, "votes": 0, "captions": 0, "calls": 0}
    cost |= {"tokens": {"in": 0, "out": 0}, "money": 0.0, **_time(work, 0.0)}
    if vlm is not None:
        judged = round(work.pairs * work.book["judge_share"])
        votes, captions = judged * vlm.votes, work.kept if vlm.captions else 0
        images = 2 * work.book.derived("image_tokens", math.ceil(work.size / 28) ** 2)
        judging, captioning = _questions(work)
        vote_tokens = work.book.derived("judge_input_tokens", judging + images)
        images = max(0.0, vote_tokens - judging)  # as measured, if a run measured it
        spent = {"in": votes * vote_tokens + captions * (captioning + images)}
        spent["out"] = votes * work.book["judge_answer_tokens"]
        spent["out"] += captions * work.book["caption_answer_tokens"] if captions else 0
        cost["vllm_gpus"] = vlm.vllm.tensor_parallel_size if vlm.vllm else 0
        cost |= {"vlm": vlm.model, "votes": votes, "captions": captions, "calls": votes + captions}
        cost["tokens"] = {way: round(n) for way, n in spent.items()}
        if vlm.endpoint is None:
            cost |= _time(work, painting_hours * work.book["local_vlm_share"])
        else:
            cost["money"] = work.money("vlm", cost["tokens"])
    pair = work.row_bytes("candidate_bytes", 2)
    cost["disk"] = {
        "candidates": round(work.candidates * pair + _answers(work, cost)),
        "pairs": round(work.kept * pair),
    }
    return cost


def distill(work: Workload) -> dict[str, Any]:
    """Return the steps, samples, operations, device hours, memory and disk of the training."""
    settings = work.recipe.distill
    canvas, tokens = _student_canvas(work), settings.conditioning == "tokens"
    shapes = work.counts.shapes if tokens else arithmetic.widened(work.counts.shapes)
    one = arithmetic.forward(shapes, canvas)
    step = one
    if canvas.apart:  # an image's reference is processed once, and its keys and values are used in every step
        apart = canvas.apart
        step = arithmetic.forward(shapes, arithmetic.TokenCounts(canvas.image - apart, canvas.text, keys=apart))
    trained = _trained(work, shapes, canvas)
    samples = settings.steps * settings.batch_size
    captions = min(work.kept, work.grids * work.layout.panels) + (work.kept if settings.instructions else 0)
    wide = 4 if work.on_cpu else 2  # bytes of a number in the text encoders and the VAE
    embedding = work.teacher.text_tokens * work.counts.shapes["context_embedder.weight"][1] * wide
    online = captions * embedding > TEXT_IN_MEMORY
    per_sample = arithmetic.training(one, trained, settings.gradient_checkpointing)
    preference, sides, negatives, pairs = settings.preference, 1, 0, work.kept
    if preference:  # each target and its negative, both also without gradients through the reference model
        sides, pairs = 2, min(preference.pairs, work.kept)
        negatives = pairs
        per_sample = sides * (per_sample + one)
    texts = samples if online else captions
    swaps = 2 if settings.conditioning == "diptych" else 1  # passes with another pair's reference
    checks = (1 + swaps) * LEVELS * settings.validation_pairs * math.ceil(settings.steps / settings.validate_every)
    sheets = 1 + (settings.steps // settings.sample_every if settings.sample_every else 0)
    sampled = (sheets * settings.sample_pairs + negatives) * settings.sample_steps
    flops = samples * per_sample + texts * work.text_flops + checks * one + sampled * step
    hours = work.hours("seconds_per_step", settings.steps, flops, "train_share")
    memory = TrainingMemory(work, shapes, canvas, _canvas_pixels(work), trained, online)
    phases = memory.phases()
    of = memory.held() | {"activations": phases["steps"] - sum(memory.held().values())}
    averages = arithmetic.TRAINED_BYTES * bool(settings.ema)
    state = arithmetic.TRAINED_BYTES + averages + arithmetic.OPTIMIZER_BYTES[settings.optimizer]
    channels = work.counts.shapes["x_embedder.weight"][1]
    whole = work.counts.transformer * 4 + (work.counts.text + work.counts.vae) * wide
    disk = {
        "latents": work.kept * 2 * memory.tokens * channels * wide,
        "negatives": negatives * memory.tokens * channels * 4,
        "checkpoints": trained.numbers * state * (settings.keep + 2),  # the best one, and the one being written
        "student": whole if trained.whole else trained.numbers * 4,
    }
    return {
        "mode": settings.mode,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "samples": samples,
        "epochs": samples / pairs if pairs else None,
        "trained_parameters": trained.numbers,
        "flops_per_sample": per_sample + (work.text_flops if online else 0.0),
        "flops": flops,
        "seconds_per_step": hours * 3600 / settings.steps,
        **_time(work, hours),
        "memory": max(phases.values()),
        "memory_of": {name: round(size) for name, size in of.items()},
        "memory_phases": phases,
        "rows_at_once": memory.rows,
        "disk": disk,
    }


def evaluate(work: Workload) -> dict[str, Any]:
    """Return the images to generate and score: of every split, by every method and the anchors."""
    settings = work.recipe.evaluate
    if settings.suite == "none":
        return {"suite": "none", "pictures": 0}
    from diptych.evaluate import suites
    from diptych.evaluate.methods import method_names

    references = sum(suites.load(settings.suite).references(settings.samples).values())
    methods = len(method_names(settings))
    return {"suite": settings.suite, "pictures": references * settings.prompts * len(settings.seeds) * methods}


def _canvas_pixels(work: Workload) -> tuple[int, int]:
    """Return height and width of a training sample at the largest of the recipe's sizes."""
    settings = work.recipe.distill
    panels = 2 if settings.conditioning == "diptych" else 1
    sizes = settings.buckets if settings.buckets != "auto" else []  # its sizes have the area of the square
    height, width = max(sizes or [(work.size, work.size)], key=lambda size: size[0] * size[1])
    return height, panels * width


def _student_canvas(work: Workload) -> arithmetic.TokenCounts:
    """Return the tokens of a training sample at the largest of the recipe's sizes.

    With reference tokens, they include a reference of the target's size.
    """
    settings, (height, width) = work.recipe.distill, _canvas_pixels(work)
    tokens, text = arithmetic.image_tokens(height, width, work.teacher.factor), work.teacher.text_tokens
    if settings.conditioning != "tokens":
        return arithmetic.TokenCounts(tokens, text)
    return arithmetic.TokenCounts(2 * tokens, text, apart=tokens if settings.reference_attention == "self" else 0)


def _trained(work: Workload, shapes: arithmetic.Shapes, canvas: arithmetic.TokenCounts) -> arithmetic.TrainedSize:
    settings = work.recipe.distill
    out, channels = work.counts.shapes["x_embedder.weight"]
    widens = settings.conditioning != "tokens"
    if settings.mode == "full":
        return arithmetic.TrainedSize(work.counts.transformer + (out * channels if widens else 0), 0.0, whole=True)
    targets = settings.lora_targets
    if isinstance(targets, str):
        if targets not in LORA_TARGETS:
            known = f"Sets: {', '.join(LORA_TARGETS)}{nearest(targets, LORA_TARGETS)}"
            raise UsageError("name_unknown", f"distill.lora_targets: no set of layers is named '{targets}'. {known}")
        targets = LORA_TARGETS[targets]
    names = list(arithmetic.linears(shapes))
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = {name.split(".", 2)[-1] for name in names}
            message = f"distill.lora_targets: no linear layer is named '{target}'{nearest(target, known)}"
            raise UsageError("layer_unknown", message)
    return arithmetic.adapted(shapes, targets, settings.rank, canvas, input_layer=widens)


def _questions(work: Workload) -> tuple[int, int]:
    """Return the text tokens of a judge's question and of a captioner's."""
    from diptych.judges import vlm
    from diptych.llm import schema
    from diptych.stages.curate import captioning

    count, words = len(work.task.curation.questions), "".join(work.task.curation.questions)
    briefs = work.task.captions.description + work.task.captions.instruction
    return (
        _tokens(work, vlm.BRIEF + words + schema.in_words(vlm.answer_type(count))),
        _tokens(work, captioning.BRIEF + briefs + schema.in_words(captioning.Words)),
    )


def _quotation(work: Workload, caption: bool) -> int:
    from diptych.llm.question import quoted

    return _tokens(work, quoted("")) + round(work.book["seed_caption_tokens"]) if caption else 0


def _tokens(work: Workload, text: str) -> int:
    return arithmetic.tokens(text, work.book["chars_per_token"])


def _answers(work: Workload, cost: dict[str, Any]) -> float:
    """Return the bytes of the file of answers: the replies, and the numbers of each row."""
    return cost["tokens"]["out"] * work.book["chars_per_token"] + cost["calls"] * 200 if cost["calls"] else 0.0


def _time(work: Workload, device_hours: float) -> dict[str, float]:
    return {"device_hours": device_hours, "wall_hours": device_hours / work.book["devices"]}
