"""The recipe's section `distill`: stage 4, the teacher becomes a student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diptych.recipe.schema.base import Section

OWN = "own"
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"]
# Named sets of linears for `lora_targets`. The paper's release adapts the attention's.
LORA_TARGETS = {"attention": _ATTENTION, "attention+mlp": [*_ATTENTION, *_FEED_FORWARD]}


class Data(Section):
    """A data set of pairs to train on."""

    path: str = Field(min_length=1)
    """`own` for the run's own pairs; else a run's folder, a folder of parquet files, or an fsspec address such as
    hf://datasets/OWNER/NAME, which is streamed."""
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch has each of its pairs: 2 is twice, 0.5 is half of them and the other half in the next."""
    columns: dict[Literal["conditioning", "image", "caption", "instruction"], str] = Field(default={})
    """What it calls its reference, target, target's caption and edit instruction; the usual names are known."""
    split: str | None = Field(default=None, min_length=1)
    """Name of the split to read, as the names of the files have it, or `all`. By default the files to train on are
    read, and test and validation files are left out."""


class Preference(Section):
    """The target, rather than what a degraded reference gives: subject fidelity optimization (arXiv 2506.03621), for a
    student that is trained already (`distill.init`)."""

    beta: float = Field(default=500.0, gt=0)
    """How soon a sample counts as preferred: its margin of squared errors, times this, goes through a sigmoid."""
    weight: float = Field(default=1.0, gt=0)
    """Of the preference loss beside that of the two panels."""
    pairs: int = Field(default=5000, ge=1)
    """Train on this many pairs at most: each needs a negative, drawn before the first step."""
    shrink: float = Field(default=0.125, gt=0, lt=1)
    """A negative's reference is shrunk to this share of its side and enlarged again."""
    drop_text: float = Field(default=0.5, ge=0, le=1)
    """Share of negatives drawn without text."""


class Distill(Section):
    """Stage 4: the teacher becomes a student, trained on the pairs."""

    data: list[Data] = Field(default=[])
    """What to train on; an empty list is the run's own pairs. Without `own` in it nothing is written, painted or
    curated."""

    conditioning: Literal["diptych", "channel"] = "diptych"
    """Where the reference is: the left panel of the canvas (the paper's), or the condition channels of the target panel
    itself, with no left panel (stock FLUX-Control's, which the paper compares with)."""
    condition_init: Literal["zeros", "teacher"] = "zeros"
    """Where the input layer's columns for the condition begin. `zeros`: the first step is the teacher's, as with
    FLUX-Control. `teacher`: they are the teacher's own columns for a picture, less what those make of the empty half,
    so that the reference is seen from the first step. A student that `init` names keeps its own."""
    buckets: list[tuple[int, int]] | Literal["auto"] = Field(default=[])
    """Panel sizes, [height, width] in pixels: each pair is trained at the one nearest to its target's shape. `auto` is
    diffusers' ladder of aspect ratios with the area of the square panel; an empty list is that square alone."""
    mode: Literal["full", "lora"] = "full"
    """Train every weight, or low-rank adapters and the widened input layer."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Precision of the frozen weights under `lora` (QLoRA). With `nf4`, rank 16, `micro_batch: 1` and checkpointing,
    FLUX.1 at 512 px is planned to fit a 24 GB card."""
    rank: int = Field(default=64, ge=1)
    """Of the adapters."""
    lora_targets: list[str] | str = "attention"
    """Which linears get adapters: a named set, or module name endings."""
    steps: int = Field(default=4000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs in a step, over all devices."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Of training alone, so that runs on the same pairs can differ in nothing else; null is the recipe's."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Pairs in one forward pass of one process, in training and in validation; null is its whole share of the batch.
    Lower it until a step fits into memory: the step stays the same (gradient accumulation)."""
    sharding: Literal["none", "full"] = "none"
    """With several processes: the weights whole in each (DDP), or each with a part of them (FSDP2)."""
    offload: Literal["none", "blocks"] = "none"
    """Under `lora`: frozen blocks wait in main memory and come to the device one at a time. With rank 32 and
    `micro_batch: 1`, FLUX.1 at 512 px is planned to fit a 16 GB card. Needs `gradient_checkpointing`; the numbers stay
    the same."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    """`adamw8bit` is bitsandbytes'; `prodigy` finds its own rate: give it `learning_rate: 1`."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """The optimizer's, after warm-up."""
    warmup: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """The optimizer's. Under `lora` it applies to the adapters, and not to the input layer, which is the teacher's."""
    betas: tuple[float, float] = (0.9, 0.99)
    """The optimizer's."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the forward pass computes in; weights being trained are float32. `auto` takes bfloat16 where it is faster,
    and is settled, like `device`, when a run is frozen."""
    reference_dropout: float = Field(default=0.05, ge=0, le=1)
    """Share of samples whose reference is replaced by the null reference (for image guidance)."""
    text_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose text is empty (for text guidance)."""
    both_dropout: float = Field(default=0.05, ge=0, le=1)
    """Share of samples without either."""
    instructions: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """Share of samples trained with the pair's instruction ("the same cat, in the snow") in place of the target's
    caption. `auto` is the task's own share: 1 for `instruction`, 0 for the other tasks that ship. It is resolved when a
    run is frozen."""
    left_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss on the left panel, which learns the identity mapping."""
    right_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss on the right panel, which learns the edit."""
    timestep_density: Literal["logit_normal", "uniform"] = "logit_normal"
    """How noise levels are drawn."""
    logit_mean: float = 0.0
    """Of the logit-normal density; above 0 is noisier."""
    logit_std: float = Field(default=1.0, gt=0)
    """Of the logit-normal density."""
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Timestep shift s·t / (1 + (s − 1)·t); 1 is none, `auto` is the one the base samples with at this resolution."""
    ema: float = Field(default=0.998, ge=0, lt=1)
    """Decay of the weights' moving average, which is what is saved; 0 is off."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints: at most what a kill costs. A checkpoint is also saved before each validation and each
    sample sheet."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    validate_every: int = Field(default=200, ge=1)
    """Steps between validations, at fixed noise levels."""
    validation_pairs: int = Field(default=32, ge=0)
    """Pairs held out of training for it."""
    export: Literal["last", "best"] = "last"
    """Whose weights become the student: the last step's, or those with the best validation loss. It may be changed when
    the training is finished."""
    sample_every: int = Field(default=1000, ge=0)
    """Steps between sample sheets; 0 is only the last."""
    init: str | None = None
    """A student to start from: under `full` any one, under `lora` a control-LoRA of the same rank and targets; null
    widens the teacher."""
    guidance: float = Field(default=1.0, ge=0)
    """Guidance scale passed to guidance-distilled transformers (FLUX.1-dev) during training."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate after warm-up; with `constant`, `steps` can be raised later."""
    compile: bool = False
    """torch.compile the transformer: worth it on a GPU over thousands of steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, a third slower."""
    sample_pairs: int = Field(default=4, ge=1)
    """Rows of a sample sheet."""
    sample_steps: int = Field(default=20, ge=1, le=1000)
    """Sampling steps of a sample sheet."""
    sample_guidance: float = Field(default=3.5, ge=0)
    """Distilled guidance of a sample sheet, where the transformer takes one."""
    allow_distilled_teacher: bool = False
    """Train although the teacher is step-distilled (FLUX.1-schnell, a Turbo model). Otherwise it is refused:
    students that are trained from one draw gray or blocky images. Use the model that it was distilled from."""
    preference: Preference | None = None
    """A last stage, for a student named by `init`; null trains on the pairs alone."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Where metrics go besides `metrics.jsonl`."""

    @model_validator(mode="after")
    def _shares(self) -> Distill:
        if self.reference_dropout + self.text_dropout + self.both_dropout > 1:
            raise ValueError("reference_dropout + text_dropout + both_dropout is over 1")
        if self.left_weight + self.right_weight == 0:
            raise ValueError("left_weight and right_weight are both 0: nothing would be learnt")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and below 1")
        if self.preference and not self.init:
            raise ValueError("preference: starts from a trained student; name it with init")
        if self.conditioning == "channel" and not self.right_weight:
            raise ValueError("conditioning: channel has no left panel, so right_weight must be above 0")
        if self.offload != "none" and (self.mode == "full" or self.quantize != "none" or self.sharding == "full"):
            raise ValueError("offload: blocks moves frozen weights: use mode: lora, quantize: none, sharding: none")
        if self.offload != "none" and self.preference:
            raise ValueError("offload: blocks does not go with preference, which swaps the weights that are trained")
        if self.offload != "none" and not self.gradient_checkpointing:
            raise ValueError(
                "offload: blocks needs gradient_checkpointing: true, else every block stays for its gradient"
            )
        if self.mode == "full" and self.quantize != "none":
            raise ValueError(f"quantize: {self.quantize} freezes the base, and mode: full trains it; use mode: lora")
        if self.sharding == "full" and self.optimizer != "adamw":
            raise ValueError(f"sharding: full takes optimizer: adamw, not {self.optimizer}")
        if self.sharding == "full" and self.quantize != "none":
            raise ValueError("sharding: full cannot split quantized weights; use quantize: none")
        return self
