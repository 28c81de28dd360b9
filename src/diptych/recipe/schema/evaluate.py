"""Section `evaluate` of a recipe: stage 5, the student beside its baselines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from diptych.recipe.schema.base import Section


class Tuning(Section):
    """The baseline `tuned`: a LoRA of the teacher for each subject, trained on its reference alone (DreamBooth style).

    Each combination of a learning rate and a number of steps is a separate method, `tuned-RATE-STEPS`."""

    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(default=[5e-4, 2e-3], min_length=1)
    """Learning rates of AdamW to try. Each is constant during training."""
    steps: list[Annotated[int, Field(ge=1)]] = Field(default=[50, 100, 200], min_length=1)
    """Training steps to try. The longest training passes through the others, so only the largest number costs time."""
    rank: int = Field(default=16, ge=1)
    """Rank of the LoRA."""
    lora_targets: list[str] | str = "attention"
    """Linear layers that get adapters: a named set, or endings of module names, as for `distill.lora_targets`."""
    batch_size: int = Field(default=8, ge=1)
    """Crops of the reference in one training step."""
    crops: int = Field(default=16, ge=1)
    """Views of the reference to train on: the image, its mirror image, then random crops of either."""
    prior: int = Field(default=0, ge=0)
    """Images of the subject's kind that the teacher generates first and that training also uses (prior preservation).
    0 turns it off."""


class Adapter(Section):
    """The baseline `adapter`: the teacher with image tokens in its attention, trained on the run's pairs (IP-Adapter
    style). Training keys that are not listed here are those of `distill`."""

    path: str | None = None
    """Folder with a trained `ip_adapter.safetensors`. null trains an adapter on the run's pairs."""
    encoder: str = Field(default="pocket", min_length=1)
    """Image encoder for the reference: the folder of a CLIP vision model or of any embedding model. `pocket` is the
    pocket judge that curates. The judge that scores is rejected."""
    steps: int | None = Field(default=None, ge=1)
    """Training steps. null is `distill.steps`."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the adapter's training. null is `distill.learning_rate`."""
    scale: float = Field(default=1.0, ge=0)
    """Strength of the image tokens when images are generated."""


class StockPipeline(Section):
    """The baseline `pipeline`: any diffusers pipeline with a reference input (Kontext, FLUX.2, Qwen-Image-Edit, …)."""

    model: str | None = Field(default=None, min_length=1)
    """The pipeline: a folder, or a hub name."""
    argument: str | None = Field(default=None, min_length=1)
    """Argument of the pipeline's call that takes the reference. null takes it from the call's signature."""
    prompt: str = Field(default="{prompt}", pattern=r"\{prompt\}")
    """Template of the prompt passed to the pipeline. A model that follows instructions may need more words around
    `{prompt}`."""
    size: int | None = Field(default=None, ge=16)
    """Side in pixels of the reference and of the images that the pipeline generates. They are then resized to the
    suite's size. null is the suite's size."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Sampling steps. null is the pipeline's default."""
    options: dict[str, Any] = Field(default={})
    """Further arguments of the pipeline's call, for instance {guidance_scale: 2.5}."""


Method = Literal["student", "student_shipped", "text_only", "copy", "inpaint", "tuned", "adapter", "pipeline"]


class Relighting(Section):
    """Guidance of the student when it relights. null takes the value of `evaluate`."""

    image_guidance: float | None = Field(default=None, ge=0)
    """Strength of the reference when relighting. Use less than for a subject, because the light must change."""
    text_guidance: float | None = Field(default=None, ge=0)
    """Strength of the prompt, which names the new light."""
    null_panel: Literal["shared", "own"] | None = None
    """Left panel that the null pass of image guidance sees when relighting: `shared` shows the reference, `own` is a
    separate panel that starts as noise."""


class Evaluate(Section):
    """Stage 5: compare the student with its baselines, on subjects that no model was trained on."""

    suite: Literal["pocket", "none"] = "pocket"
    """Suite of references and prompts. `none` scores no subjects."""
    relight: int = Field(default=0, ge=0)
    """Number of held-out scenes that the student relights, in three lights each, and that are compared with the true
    result. 0 turns it off."""
    samples: int = Field(default=40, ge=2)
    """Number of held-out identities."""
    prompts: int = Field(default=5, ge=1)
    """Number of prompts for each identity."""
    methods: list[Method] = Field(default=["student", "student_shipped", "text_only", "copy", "inpaint"], min_length=1)
    """Methods to compare. `student_shipped` is the student in the package. `docs/baselines.md` explains `tuned`,
    `adapter` and `pipeline`."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Sampling steps of the student. null is the default of the student's family; for FLUX.1 that is 28 steps with
    both guidance scales off, as in the release. A value that is set also becomes the default of the trained student,
    whatever `suite` is."""
    image_guidance: float | None = Field(default=None, ge=0)
    """Strength of the reference; 1 turns image guidance off. null is the default of the student's family. A value that
    is set also becomes the default of the trained student."""
    text_guidance: float | None = Field(default=None, ge=0)
    """Strength of the prompt; 1 turns text guidance off. null is the default of the student's family. A value that is
    set also becomes the default of the trained student."""
    null_panel: Literal["shared", "own"] | None = None
    """Left panel that the null pass of image guidance sees. `shared` shows the reference, as in the release; `own` is a
    separate panel that starts as noise (`docs/student.md`). null is the default of the student's family. Students
    without a left panel ignore it (`distill.conditioning`: `tokens`, `channel`)."""
    relighting: Relighting = Relighting()
    """Guidance that differs when the student relights."""
    true_guidance: float = Field(default=2.0, ge=1)
    """Classifier-free guidance scale of the teacher, for the baselines that generate images with it."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds. Each method generates one image for each identity, prompt and seed."""
    batch_size: int = Field(default=16, ge=1)
    """Images to generate at once."""
    bootstrap: int = Field(default=1000, ge=10)
    """Bootstrap resamples, over identities, for the 95 % intervals."""
    scorer: str = Field(default="pocket", min_length=1)
    """Judge that scores: `pocket`, a folder, or a hub name. The judge that curated the pairs is rejected."""
    reader: str = Field(default="pocket", min_length=1)
    """Model that reads what an image shows, for prompt following: `pocket`, a folder, or a hub name."""
    yardsticks: bool = True
    """Also score images of the renderer in place of a method, the errors of the judges, and the quality of curation.
    These are the same for all runs of one study, and take about as long as scoring one method."""
    tuning: Tuning = Tuning()
    """Settings of the baseline `tuned`."""
    adapter: Adapter = Adapter()
    """Settings of the baseline `adapter`."""
    pipeline: StockPipeline = StockPipeline()
    """Settings of the baseline `pipeline`."""
