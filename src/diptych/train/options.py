"""What training can be told: a recipe's `distill` section and the run's seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels of the validation loss
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"]
TARGETS: dict[str, list[str]] = {
    "attention": _ATTENTION,  # what the release's file fits (facts.md 2)
    "attention+mlp": [*_ATTENTION, *_FEED_FORWARD],
}


def canvases_at_once(height: int, width: int) -> int:
    """How many canvases of this size in pixels are encoded, decoded or drawn together where nothing is learnt from
    them: as many as one of FLUX's is large, and at most 16. Fixed, so that the bytes depend on the size alone."""
    return max(1, min(16, 512 * 1024 // (height * width)))


def captions_at_once(tokens: int) -> int:
    """How many captions of N tokens are encoded together: four of FLUX's, and at most 64."""
    return max(1, min(64, 2048 // tokens))


@dataclass(frozen=True)
class Preference:
    """As `sections.Preference`, which documents it."""

    beta: float = 500.0
    weight: float = 1.0
    pairs: int = 5000
    shrink: float = 0.125
    drop_text: float = 0.5


@dataclass(frozen=True)
class Options:
    """Named as in the recipe: `sections.Distill` documents and bounds them."""

    mode: Literal["full", "lora"] = "full"
    quantize: Literal["none", "nf4", "int8"] = "none"
    conditioning: Literal["diptych", "channel"] = "diptych"
    condition_init: Literal["zeros", "teacher"] = "zeros"
    rank: int = 64
    lora_targets: list[str] | str = "attention"
    steps: int = 1000
    batch_size: int = 32
    micro_batch: int | None = None
    sharding: Literal["none", "full"] = "none"
    offload: Literal["none", "blocks"] = "none"
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    learning_rate: float = 3e-4
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    reference_dropout: float = 0.05
    text_dropout: float = 0.1
    both_dropout: float = 0.05
    instructions: float = 0.0
    left_weight: float = 1.0
    right_weight: float = 1.0
    timestep_density: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float | Literal["auto"] = 1.0
    ema: float = 0.998
    checkpoint_every: int = 200
    keep: int = 2
    validate_every: int = 200
    validation_pairs: int = 32
    sample_every: int = 1000
    init: str | None = None
    guidance: float = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    compile: bool = False
    gradient_checkpointing: bool = False
    sample_pairs: int = 4
    sample_steps: int = 20
    sample_guidance: float = 3.5
    preference: Preference | None = None
    trackers: tuple[str, ...] = ()
    seed: int = 0

    @classmethod
    def of(cls, section: Any, **extra: Any) -> Options:
        """Options from any object with (some of) these fields, a recipe section for one; the rest are defaults."""
        values: dict[str, Any] = {f.name: getattr(section, f.name) for f in fields(cls) if hasattr(section, f.name)}
        values |= extra
        for name in ("betas", "trackers"):
            if name in values:
                values[name] = tuple(values[name])
        if values.get("preference") is not None:
            values["preference"] = Preference(**values["preference"].model_dump())
        return cls(**values)


# Changing one of these between two sittings of a run changes no weight up to the step it was stopped at.
HARMLESS = frozenset(
    {"checkpoint_every", "keep", "validate_every", "sample_every", "sample_pairs", "sample_steps", "sample_guidance"}
    | {
        "allow_distilled_teacher",
        "trackers",
        "offload",
        "micro_batch",
        "sharding",
    }  # the last two no further than the order in which floats are added
)


def harmless(settings: Any) -> frozenset[str]:
    """Those of `HARMLESS` that are so under these settings, `Options` or a recipe's `distill`."""
    # Negatives are drawn as samples are.
    return HARMLESS if settings.preference is None else HARMLESS - {"sample_steps", "sample_guidance"}


def may_change(before: Any, after: Any) -> set[str]:
    """Keys of a recipe's `distill` with which a run may go on as `after` has them.

    `steps` may be raised while the learning rate does not depend on it.
    """
    longer = before.schedule == "constant" and after.steps > before.steps
    return {*harmless(before), "export", *(["steps"] if longer else [])}


def identity(options: Options) -> dict[str, Any]:
    """The options that a checkpoint must agree with to be continued exactly."""
    skip = harmless(options) | ({"steps"} if options.schedule == "constant" else set())
    values = {name: value for name, value in asdict(options).items() if name not in skip}
    if options.preference is None:
        del values["preference"]  # trainings of before there was any go on
    if options.condition_init == "zeros":
        del values["condition_init"]  # likewise
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
