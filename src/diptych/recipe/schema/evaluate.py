"""The recipe's section `evaluate`: stage 5, the student beside its baselines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from diptych.recipe.schema.base import Section


class Tuning(Section):
    """The baseline `tuned`: for each subject a LoRA of the teacher, trained on its reference alone (DreamBooth style).

    Every learning rate with every number of steps is a method of its own, `tuned-RATE-STEPS`."""

    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(default=[5e-4, 2e-3], min_length=1)
    """Constant ones, of AdamW."""
    steps: list[Annotated[int, Field(ge=1)]] = Field(default=[50, 100, 200], min_length=1)
    """A training of the most steps passes the others on its way, so only the last costs time."""
    rank: int = Field(default=16, ge=1)
    """Of the LoRA."""
    lora_targets: list[str] | str = "attention"
    """As `distill.lora_targets`."""
    batch_size: int = Field(default=8, ge=1)
    """Crops in a step."""
    crops: int = Field(default=16, ge=1)
    """Views of the reference: itself, its mirror image, then random crops of either."""
    prior: int = Field(default=0, ge=0)
    """Pictures of the kind that the teacher draws first and goes on learning from (prior preservation); 0 is off."""


class Adapter(Section):
    """The baseline `adapter`: the teacher with image tokens in its attention, trained on the run's pairs (IP-Adapter
    style). What is not said here is as in `distill`."""

    path: str | None = None
    """A folder with a trained `ip_adapter.safetensors`; null trains one on this run's pairs."""
    encoder: str = Field(default="pocket", min_length=1)
    """What sees the reference: a CLIP vision model's folder, or any embedding model's; `pocket` is the judge that
    curates. Never the one that scores."""
    steps: int | None = Field(default=None, ge=1)
    """Of training; null is `distill.steps`."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Of training; null is `distill.learning_rate`."""
    scale: float = Field(default=1.0, ge=0)
    """Of the image tokens, in drawing."""


class StockPipeline(Section):
    """The baseline `pipeline`: any diffusers pipeline with a reference input (Kontext, FLUX.2, Qwen-Image-Edit, …)."""

    model: str | None = Field(default=None, min_length=1)
    """Its folder or hub name."""
    argument: str | None = Field(default=None, min_length=1)
    """What its call names the reference; null: found in its signature."""
    prompt: str = Field(default="{prompt}", pattern=r"\{prompt\}")
    """Template of the prompt passed to the model. A model that follows instructions may need more words around it."""
    size: int | None = Field(default=None, ge=16)
    """Side in pixels of what it is given and asked for, before its pictures are brought to the suite's size; null is
    the suite's."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Sampling steps; null is the pipeline's own number."""
    options: dict[str, Any] = Field(default={})
    """Further arguments of its call, for instance {guidance_scale: 2.5}."""


Method = Literal["student", "student_shipped", "text_only", "copy", "inpaint", "tuned", "adapter", "pipeline"]


class Relighting(Section):
    """How a student is guided when it relights; what is not said is as for everything else."""

    image_guidance: float | None = Field(default=None, ge=0)
    """Strength of the reference: less of it than for a subject, since the light is to go."""
    text_guidance: float | None = Field(default=None, ge=0)
    """Strength of the light that is asked for."""
    null_panel: Literal["shared", "own"] | None = None
    """The left panel that the null pass sees."""


class Evaluate(Section):
    """Stage 5: the student next to its baselines, on subjects nobody trained on."""

    suite: Literal["pocket", "none"] = "pocket"
    """References and prompts; `none` scores no subjects."""
    relight: int = Field(default=0, ge=0)
    """Held-out scenes that the student is asked to relight, three lights each, against the true answer; 0: none."""
    samples: int = Field(default=40, ge=2)
    """Held-out identities."""
    prompts: int = Field(default=5, ge=1)
    """Prompts for each of them."""
    methods: list[Method] = Field(default=["student", "student_shipped", "text_only", "copy", "inpaint"], min_length=1)
    """What is compared; `student_shipped` is the one in the package. See docs/baselines.md for the last three."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Sampling steps. null, here and for the next three keys: the setting of the student's family; FLUX.1 students take
    28 steps with both guidance scales off, one forward a step, as the release. What is set is also what the trained
    student registers as its default, whatever `suite` is."""
    image_guidance: float | None = Field(default=None, ge=0)
    """Strength of the reference; 1 is off."""
    text_guidance: float | None = Field(default=None, ge=0)
    """Strength of the prompt; 1 is off."""
    null_panel: Literal["shared", "own"] | None = None
    """The left panel that the null pass of image guidance sees: `shared`, which shows the reference, as in the release,
    or `own`, a separate one (docs/student.md)."""
    relighting: Relighting = Relighting()
    """Where guidance differs for relighting."""
    true_guidance: float = Field(default=2.0, ge=1)
    """The teacher's classifier-free guidance, for the baselines that draw with it."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """One picture of each identity, prompt and seed."""
    batch_size: int = Field(default=16, ge=1)
    """Pictures drawn at once."""
    bootstrap: int = Field(default=1000, ge=10)
    """Resamplings for the 95 % intervals, over identities."""
    scorer: str = Field(default="pocket", min_length=1)
    """The judge that scores; never the one that curated."""
    reader: str = Field(default="pocket", min_length=1)
    """The model that reads what a picture shows."""
    yardsticks: bool = True
    """Also what the renderer draws in the methods' place, the judges' own errors, and how good curation was. They are
    the same for all runs of one study, and take about as long as scoring a method."""
    tuning: Tuning = Tuning()
    adapter: Adapter = Adapter()
    pipeline: StockPipeline = StockPipeline()
