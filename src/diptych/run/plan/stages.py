"""What each stage of a recipe will cost: plain values, None where nobody said what it takes to know."""

from __future__ import annotations

import json
import math
from typing import Any

from diptych.errors import UsageError, nearest
from diptych.recipe.schema.distill import LORA_TARGETS
from diptych.run.plan import arithmetic
from diptych.run.plan.job import Job
from diptych.run.plan.memory import Training
from diptych.run.plan.teacher import painting_memory

TEXT_IN_MEMORY = 2 * 2**30  # bytes: train/text.py encodes captions once if they fit, else in every step
LEVELS = 5  # noise levels of a validation, `train.validate.SIGMAS`


def write(job: Job) -> dict[str, Any]:
    """Prompts, and the language model's calls, tokens and money."""
    settings = job.recipe.write
    found: dict[str, Any] = {"writer": settings.writer, "prompts": settings.count, "calls": 0}
    found |= {"tokens": {"in": 0, "out": 0}, "money": 0.0, "model": None, "vllm_gpus": 0}
    if settings.writer == "llm":
        from diptych.llm import schema
        from diptych.stages.write import llm_writer

        if job.task.writer is None:
            raise UsageError(f"the task '{job.task.name}' has no `writer`, so no language model can write it")
        panels = job.layout.panels
        answer = llm_writer.answer_type(job.task, panels, settings.panel_words)
        brief = job.task.writer.brief.format(count=panels, layout=job.layout.name, words=settings.panel_words)
        parts = job.task.writer.answer
        words = sum(llm_writer.LIMITS.get(name, 0) for name in parts) + panels * settings.panel_words
        form = json.dumps({name: [""] * panels if name == "panels" else "" for name in parts})
        longest = math.ceil(words / job.book["words_per_token"]) + _tokens(job, form)
        asked = _quotation(job, bool(settings.captions)) + _tokens(job, brief + schema.in_words(answer))
        told = job.book.derived("writer_answer_tokens", longest)
        found["calls"], spent = settings.count, [asked, told]
        if settings.clear_subject:
            clear = llm_writer.FILTER + schema.in_words(llm_writer.Clear)
            found["calls"] *= 2
            spent[0] += _quotation(job, True) + _tokens(job, clear)
            spent[1] += math.ceil(llm_writer.LIMITS["subject"] / job.book["words_per_token"]) + 12  # its JSON
        found["tokens"] = {way: round(n * settings.count) for way, n in zip(("in", "out"), spent, strict=True)}
        found |= {"model": settings.model, "vllm_gpus": settings.vllm.tensor_parallel_size if settings.vllm else 0}
        # How fast a model on this machine writes is not known.
        found["money"] = None if settings.vllm or settings.local else job.money("writer", found["tokens"])
    found["disk"] = round(settings.count * job.book["row_bytes"] + _answers(job, found))
    return found


def paint(job: Job) -> dict[str, Any]:
    """Forward passes, operations, device hours, memory and disk of the grids."""
    settings, layout = job.recipe.paint, job.layout
    call, index = job.teacher.call, job.teacher.index
    prompts = call.branches(settings.true_guidance, index)
    forwards = _steps_run(settings.speed, settings.steps) * prompts
    one = arithmetic.forward(job.counts.shapes, job.canvas(layout.rows, layout.cols))
    per_grid = forwards * one + prompts * job.text_flops
    hours = job.hours("seconds_per_grid", job.grids, job.grids * per_grid, "paint_share")
    size = (layout.rows * job.size, layout.cols * job.size)
    bytes_ = job.number_bytes(settings.dtype)
    rows = settings.batch_size * call.rows(settings.true_guidance, index)
    gib = job.book.maybe("device_gib") if settings.memory == "auto" else None
    memory, preset, held = painting_memory(
        job.teacher, size, rows, job.on_cpu, bytes_, settings.memory, gib and gib * 2**30
    )
    return {
        "grids": job.grids,
        "forwards_per_grid": forwards,
        "flops_per_forward": one,
        "flops_per_grid": per_grid,
        "flops": job.grids * per_grid,
        "seconds_per_grid": hours * 3600 / job.grids,
        **_time(job, hours),
        "memory": memory,
        "memory_preset": preset,
        "held": held,
        "speed": settings.speed,
        "disk": round(job.grids * job.row_bytes("grid_bytes", layout.panels)),
    }


def _steps_run(name: str | None, steps: int) -> int:
    """How many of the sampling steps a speed computes."""
    from diptych.student.runtime import speed

    wanted = speed.parse(name)
    return sum(wanted.runs(step, steps) for step in range(steps))


def curate(job: Job, painting_hours: float) -> dict[str, Any]:
    """Judge calls, the vision-language model's calls, tokens and money, and the core hours of cutting and comparing."""
    vlm = job.recipe.curate.vlm
    core = job.grids * job.book["seam_ms"] + job.pairs * job.book["compare_ms"]
    found: dict[str, Any] = {"judge": job.recipe.curate.judge, "judge_calls": job.grids * job.layout.panels}
    found |= {"core_hours": core / 3.6e6, "vlm": None, "vllm_gpus": 0, "votes": 0, "captions": 0, "calls": 0}
    found |= {"tokens": {"in": 0, "out": 0}, "money": 0.0, **_time(job, 0.0)}
    if vlm is not None:
        asked = round(job.pairs * job.book["judge_share"])
        votes, captions = asked * vlm.votes, job.kept if vlm.captions else 0
        pictures = 2 * job.book.derived("image_tokens", math.ceil(job.size / 28) ** 2)
        judged, captioned = _questions(job)
        asked_tokens = job.book.derived("judge_input_tokens", judged + pictures)
        pictures = max(0.0, asked_tokens - judged)  # as measured, if it was
        spent = {"in": votes * asked_tokens + captions * (captioned + pictures)}
        spent["out"] = votes * job.book["judge_answer_tokens"]
        spent["out"] += captions * job.book["caption_answer_tokens"] if captions else 0
        found["vllm_gpus"] = vlm.vllm.tensor_parallel_size if vlm.vllm else 0
        found |= {"vlm": vlm.model, "votes": votes, "captions": captions, "calls": votes + captions}
        found["tokens"] = {way: round(n) for way, n in spent.items()}
        if vlm.endpoint is None:
            found |= _time(job, painting_hours * job.book["local_vlm_share"])
        else:
            found["money"] = job.money("vlm", found["tokens"])
    pair = job.row_bytes("candidate_bytes", 2)
    found["disk"] = {"candidates": round(job.candidates * pair + _answers(job, found)), "pairs": round(job.kept * pair)}
    return found


def distill(job: Job) -> dict[str, Any]:
    """Steps, samples, operations, device hours, memory and disk of the training."""
    settings = job.recipe.distill
    canvas = _student_canvas(job)
    shapes = arithmetic.widened(job.counts.shapes)
    one = arithmetic.forward(shapes, canvas)
    trained = _trained(job, shapes, canvas)
    samples = settings.steps * settings.batch_size
    captions = min(job.kept, job.grids * job.layout.panels) + (job.kept if settings.instructions else 0)
    wide = 4 if job.on_cpu else 2  # what the text encoders and the VAE compute in
    embedding = job.teacher.text_tokens * job.counts.shapes["context_embedder.weight"][1] * wide
    online = captions * embedding > TEXT_IN_MEMORY
    per_sample = arithmetic.training(one, trained, settings.gradient_checkpointing)
    wish, sides, negatives, pairs = settings.preference, 1, 0, job.kept
    if wish:  # each target beside its negative, both also without gradients through what training started from
        sides, pairs = 2, min(wish.pairs, job.kept)
        negatives = pairs
        per_sample = sides * (per_sample + one)
    texts = samples if online else captions
    checks = LEVELS * settings.validation_pairs * math.ceil(settings.steps / settings.validate_every)
    sheets = 1 + (settings.steps // settings.sample_every if settings.sample_every else 0)
    drawn = sheets * settings.sample_pairs * settings.sample_steps
    drawn += negatives * settings.sample_steps
    flops = samples * per_sample + texts * job.text_flops + (checks + drawn) * one
    hours = job.hours("seconds_per_step", settings.steps, flops, "train_share")
    memory = Training(job, shapes, canvas, _canvas_pixels(job), trained, online)
    phases = memory.phases()
    of = memory.held() | {"activations": phases["steps"] - sum(memory.held().values())}
    averages = arithmetic.TRAINED_BYTES * bool(settings.ema)
    state = arithmetic.TRAINED_BYTES + averages + arithmetic.OPTIMIZER_BYTES[settings.optimizer]
    channels = job.counts.shapes["x_embedder.weight"][1]
    whole = job.counts.transformer * 4 + (job.counts.text + job.counts.vae) * wide
    disk = {
        "latents": job.kept * 2 * canvas.image * channels * wide,
        "negatives": negatives * canvas.image * channels * 4,
        "checkpoints": trained.numbers * state * (settings.keep + 2),  # the best, and the one being written
        "student": whole if trained.whole else trained.numbers * 4,
    }
    return {
        "mode": settings.mode,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "samples": samples,
        "epochs": samples / pairs if pairs else None,
        "trained_parameters": trained.numbers,
        "flops_per_sample": per_sample + (job.text_flops if online else 0.0),
        "flops": flops,
        "seconds_per_step": hours * 3600 / settings.steps,
        **_time(job, hours),
        "memory": max(phases.values()),
        "memory_of": {name: round(size) for name, size in of.items()},
        "memory_phases": phases,
        "rows_at_once": memory.rows,
        "disk": disk,
    }


def evaluate(job: Job) -> dict[str, Any]:
    """Pictures to draw and to score: of every split, by every method and the anchors."""
    settings = job.recipe.evaluate
    if settings.suite == "none":
        return {"suite": "none", "pictures": 0}
    from diptych.evaluate import suites
    from diptych.evaluate.methods import drawn

    references = sum(suites.load(settings.suite).references(settings.samples).values())
    methods = len(drawn(settings))
    return {"suite": settings.suite, "pictures": references * settings.prompts * len(settings.seeds) * methods}


def _canvas_pixels(job: Job) -> tuple[int, int]:
    """Height and width of a training sample, at the largest of the recipe's sizes."""
    settings = job.recipe.distill
    panels = 2 if settings.conditioning == "diptych" else 1
    sizes = settings.buckets if settings.buckets != "auto" else []  # its ladder keeps the square's area
    height, width = max(sizes or [(job.size, job.size)], key=lambda size: size[0] * size[1])
    return height, panels * width


def _student_canvas(job: Job) -> arithmetic.Canvas:
    """What a training sample is, at the largest of the recipe's sizes."""
    height, width = _canvas_pixels(job)
    return arithmetic.Canvas(arithmetic.image_tokens(height, width, job.teacher.factor), job.teacher.text_tokens)


def _trained(job: Job, shapes: arithmetic.Shapes, canvas: arithmetic.Canvas) -> arithmetic.Trained:
    settings = job.recipe.distill
    out, channels = job.counts.shapes["x_embedder.weight"]
    if settings.mode == "full":
        return arithmetic.Trained(job.counts.transformer + out * channels, 0.0, whole=True)
    targets = settings.lora_targets
    if isinstance(targets, str):
        if targets not in LORA_TARGETS:
            hint = nearest(targets, LORA_TARGETS)
            raise UsageError(f"distill.lora_targets: no set '{targets}'; sets: {', '.join(LORA_TARGETS)}{hint}")
        targets = LORA_TARGETS[targets]
    names = list(arithmetic.linears(shapes))
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = {name.split(".", 2)[-1] for name in names}
            raise UsageError(f"distill.lora_targets: no linear layer is called '{target}'{nearest(target, known)}")
    return arithmetic.adapted(shapes, targets, settings.rank, canvas)


def _questions(job: Job) -> tuple[int, int]:
    """Tokens of the words of a judge's question and of a captioner's."""
    from diptych.judges import vlm
    from diptych.llm import schema
    from diptych.stages.curate import captioning

    count, words = len(job.task.curation.questions), "".join(job.task.curation.questions)
    briefs = job.task.captions.description + job.task.captions.instruction
    return (
        _tokens(job, vlm.BRIEF + words + schema.in_words(vlm.answer_type(count))),
        _tokens(job, captioning.BRIEF + briefs + schema.in_words(captioning.Words)),
    )


def _quotation(job: Job, caption: bool) -> int:
    from diptych.llm.question import quoted

    return _tokens(job, quoted("")) + round(job.book["seed_caption_tokens"]) if caption else 0


def _tokens(job: Job, text: str) -> int:
    return arithmetic.tokens(text, job.book["chars_per_token"])


def _answers(job: Job, found: dict[str, Any]) -> float:
    """Bytes of the file of answers: the replies, and a row's numbers."""
    return found["tokens"]["out"] * job.book["chars_per_token"] + found["calls"] * 200 if found["calls"] else 0.0


def _time(job: Job, device_hours: float) -> dict[str, float]:
    return {"device_hours": device_hours, "wall_hours": device_hours / job.book["devices"]}
