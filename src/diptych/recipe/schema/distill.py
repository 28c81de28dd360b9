"""Section `distill` of a recipe: stage 4, the teacher becomes a student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diptych.recipe.schema.base import Section

OWN = "own"
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"]
# Named sets of linear layers for `lora_targets`. The paper's release adapts those of the attention.
LORA_TARGETS = {"attention": _ATTENTION, "attention+mlp": [*_ATTENTION, *_FEED_FORWARD]}


class Data(Section):
    """A data set of pairs to train on."""

    path: str = Field(min_length=1)
    """Where the pairs are: `own` for the pairs of this run, the folder of another run, a folder of parquet files, or an
    fsspec address such as hf://datasets/OWNER/NAME, which is streamed."""
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch has each pair of this data set. 2 is twice; 0.5 is one half of the pairs in one epoch and the
    other half in the next."""
    columns: dict[Literal["conditioning", "image", "caption", "instruction"], str] = Field(default={})
    """Column names of this data set for the reference (`conditioning`), the target (`image`), the target's caption and
    the edit instruction. Common names are recognized and can be left out."""
    split: str | None = Field(default=None, min_length=1)
    """Split to read, as the file names have it, or `all`. null reads the training files and leaves out test and
    validation files."""


class Preference(Section):
    """Preference training: prefer the true target to what a degraded reference gives (subject fidelity optimization,
    arXiv 2506.03621). It needs a student that is already trained (`distill.init`)."""

    beta: float = Field(default=500.0, gt=0)
    """Scale of the margin of squared errors in the preference loss, before its sigmoid. Higher values count a sample as
    preferred at a smaller margin."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of the preference loss, relative to the loss on the two panels."""
    pairs: int = Field(default=5000, ge=1)
    """Maximum number of pairs to train on. Each needs a negative image, which is generated before the first step."""
    shrink: float = Field(default=0.125, gt=0, lt=1)
    """Degradation of the reference for a negative image: its side is scaled by this factor and then enlarged again."""
    drop_text: float = Field(default=0.5, ge=0, le=1)
    """Share of negative images that are generated without text."""


class Distill(Section):
    """Stage 4: train the teacher on the pairs, so that it becomes a student."""

    data: list[Data] = Field(default=[])
    """Data sets to train on. An empty list means the pairs of this run. If the list has no `own`, the run writes,
    paints and curates nothing."""

    conditioning: Literal["diptych", "tokens", "channel"] = "diptych"
    """How the reference enters the model. `diptych` makes it the left panel of the canvas, as in the paper. `tokens`
    appends its clean tokens to the target's and widens nothing, as in FLUX.1 Kontext. `channel` puts it in condition
    channels of the target panel, without a left panel (stock FLUX-Control, the paper's baseline). Stable Diffusion 3.5
    has no `tokens`, and Z-Image has only `tokens`."""
    positions: Literal["frame", "left"] = "frame"
    """Positions of the reference tokens with `conditioning: tokens`. `frame` gives each reference a separate frame
    index, as in FLUX.1 Kontext. `left` puts it where the left panel of a grid is, so that the teacher's ability to
    generate grids transfers."""
    reference_attention: Literal["joint", "self"] = "joint"
    """What reference tokens attend to with `conditioning: tokens`. With `joint`, to all tokens, as in FLUX.1 Kontext.
    With `self`, to themselves only, so that their keys and values are computed once per image and not in every
    step."""
    condition_init: Literal["zeros", "teacher"] = "zeros"
    """Initial values of the input layer's new columns, which read the condition. With `zeros`, as in FLUX-Control, the
    first step equals the teacher's. `teacher` copies the teacher's columns for an image and corrects for the empty
    half, so that the model sees the reference from the first step. A student in `init` keeps its columns."""
    buckets: list[tuple[int, int]] | Literal["auto"] = Field(default=[])
    """Panel sizes to train at, [height, width] in pixels. Each pair uses the size nearest to its target's shape. `auto`
    is diffusers' ladder of aspect ratios with the area of the square panel; an empty list is the square alone."""
    mode: Literal["full", "lora"] = "full"
    """What to train: `full` is every weight, `lora` is low-rank adapters and the widened input layer."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Precision of the frozen weights under `mode: lora` (QLoRA). FLUX.1 at 512 px is planned to fit a 24 GB GPU with
    `nf4`, rank 16, `micro_batch: 1` and `gradient_checkpointing`."""
    rank: int = Field(default=64, ge=1)
    """LoRA rank under `mode: lora`. Higher ranks learn more and take more memory."""
    lora_targets: list[str] | str = "attention"
    """Linear layers that get adapters under `mode: lora`: a named set (`attention`, `attention+mlp`), or a list of
    endings of module names."""
    steps: int = Field(default=4000, ge=1)
    """Optimizer steps of the training."""
    batch_size: int = Field(default=32, ge=1)
    """Pairs in one optimizer step, over all devices."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of training alone, so that several trainings can share the same pairs. null is the recipe's `seed`."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Pairs in one forward pass of one process, in training and validation. Lower it until a step fits in memory; the
    result stays the same, through gradient accumulation. null is the process's whole share of the batch."""
    sharding: Literal["none", "full"] = "none"
    """How several processes hold the weights: `none` keeps a copy in each (DDP), `full` splits them (FSDP2)."""
    offload: Literal["none", "blocks"] = "none"
    """`blocks` keeps frozen blocks in main memory and moves them to the device one at a time, under `mode: lora`. It
    needs `gradient_checkpointing` and does not change the result. FLUX.1 at 512 px is planned to fit a 16 GB GPU with
    rank 32 and `micro_batch: 1`."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    """Optimizer. `adamw8bit` is that of bitsandbytes. `prodigy` adapts its rate and needs `learning_rate: 1`."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Learning rate after warm-up."""
    warmup: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of the optimizer. Under `mode: lora` it applies to the adapters but not to the input layer, which is
    the teacher's."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the optimizer's first and second moments."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Maximum norm of the whole gradient. A larger gradient is scaled down to it."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass; trained weights are always float32. `auto` is bfloat16 where that is faster; it is
    resolved when a run is frozen."""
    reference_dropout: float = Field(default=0.05, ge=0, le=1)
    """Share of samples whose reference is replaced by the null reference. Image guidance needs them."""
    text_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of samples whose text is empty. Text guidance needs them."""
    both_dropout: float = Field(default=0.05, ge=0, le=1)
    """Share of samples that have neither reference nor text."""
    instructions: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    """Share of samples trained with the pair's instruction ("the same cat, in the snow") in place of the target's
    caption. `auto` is the task's share: 1 for `instruction`, 0 for the other tasks that ship. It is resolved when a
    run is frozen."""
    left_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss on the left panel, which learns to reproduce the reference."""
    right_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss on the right panel, which learns the target."""
    timestep_density: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution from which timesteps (noise levels) are sampled."""
    logit_mean: float = 0.0
    """Mean of the logit-normal timestep distribution. Values above 0 favor noisier timesteps."""
    logit_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the logit-normal timestep distribution. Higher values spread the timesteps more."""
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Shift s of the timesteps, t' = s·t / (1 + (s − 1)·t). Values above 1 favor noisier timesteps; 1 is off.
    `auto` is the shift with which the base model samples at this resolution."""
    ema: float = Field(default=0.998, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, which is what is saved. 0 turns it off."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints, and thus the most that an interruption costs. A checkpoint is also saved before each
    validation and each sample sheet."""
    keep: int = Field(default=2, ge=1)
    """Number of checkpoints to keep."""
    validate_every: int = Field(default=200, ge=1)
    """Steps between validations. They use fixed noise levels."""
    validation_pairs: int = Field(default=32, ge=0)
    """Pairs that are held out of training for validation."""
    export: Literal["last", "best"] = "last"
    """Weights that become the student: those of the last step, or those with the lowest validation loss. You can change
    this after training has finished."""
    sample_every: int = Field(default=1000, ge=0)
    """Steps between sample sheets. 0 writes only the last one."""
    init: str | None = None
    """Student to start from: any student under `mode: full`, a control-LoRA of the same rank and targets under
    `mode: lora`. null widens the teacher."""
    guidance: float = Field(default=1.0, ge=0)
    """Guidance scale passed to guidance-distilled transformers (FLUX.1-dev) during training."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Schedule of the learning rate after warm-up. With `constant`, `steps` can be raised later."""
    compile: bool = False
    """Compile the transformer with torch.compile. It pays off on a GPU over thousands of steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. It takes much less memory and about a third more time."""
    sample_pairs: int = Field(default=4, ge=1)
    """Number of pairs, one per row, on a sample sheet."""
    sample_steps: int = Field(default=20, ge=1, le=1000)
    """Sampling steps for sample sheets."""
    sample_guidance: float = Field(default=3.5, ge=0)
    """Distilled guidance scale for sample sheets, where the transformer takes one."""
    allow_distilled_teacher: bool = False
    """Train even though the teacher is step-distilled (FLUX.1-schnell, a Turbo model). Students trained from such a
    teacher generate gray or blocky images, so it is otherwise an error. Use the model that it was distilled from."""
    allow_restricted_pairs: bool = False
    """Train on pairs although the license of the model that generated them forbids it for this teacher, for example
    pairs from FLUX.1-dev for a student of Qwen-Image. Set it only if an agreement with the licensor permits it."""
    preference: Preference | None = None
    """Preference training of the student in `init`, as a last stage. null trains on the pairs alone."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Experiment trackers that receive the metrics, in addition to `metrics.jsonl`."""

    @model_validator(mode="after")
    def _keys_agree(self) -> Distill:
        if self.reference_dropout + self.text_dropout + self.both_dropout > 1:
            raise ValueError("reference_dropout + text_dropout + both_dropout is above 1; lower one of them")
        if self.left_weight + self.right_weight == 0:
            raise ValueError("left_weight and right_weight are both 0, so nothing would be learned; set one above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and below 1")
        if self.preference and not self.init:
            raise ValueError("preference starts from a trained student; set init to it")
        if self.conditioning != "diptych" and not self.right_weight:
            raise ValueError(f"conditioning: {self.conditioning} has no left panel; set right_weight above 0")
        if self.conditioning == "tokens" and self.left_weight != 1:
            raise ValueError("left_weight has no effect with conditioning: tokens, which has no left panel; remove it")
        if self.conditioning == "tokens" and self.condition_init != "zeros":
            raise ValueError(
                "condition_init has no effect with conditioning: tokens, which adds no input columns; remove it"
            )
        for key, default in (("positions", "frame"), ("reference_attention", "joint")):
            if self.conditioning != "tokens" and (value := getattr(self, key)) != default:
                raise ValueError(
                    f"{key}: {value} needs conditioning: tokens, not {self.conditioning}; set or remove it"
                )
        if self.offload != "none" and (self.mode == "full" or self.quantize != "none" or self.sharding == "full"):
            raise ValueError("offload: blocks moves frozen weights; set mode: lora, quantize: none, sharding: none")
        if self.offload != "none" and self.preference:
            raise ValueError(
                "offload: blocks cannot be used with preference, which swaps the trained weights; remove one"
            )
        if self.offload != "none" and not self.gradient_checkpointing:
            raise ValueError(
                "offload: blocks needs gradient_checkpointing: true; without it every block stays on the device"
            )
        if self.mode == "full" and self.quantize != "none":
            raise ValueError(f"quantize: {self.quantize} freezes the weights that mode: full trains; set mode: lora")
        if self.sharding == "full" and self.optimizer != "adamw":
            raise ValueError(f"sharding: full works with optimizer: adamw only, not {self.optimizer}")
        if self.sharding == "full" and self.quantize != "none":
            raise ValueError("sharding: full cannot split quantized weights; set quantize: none")
        if self.sharding == "full" and self.reference_attention == "self":
            raise ValueError("sharding: full cannot be used with reference_attention: self; set sharding: none")
        return self
